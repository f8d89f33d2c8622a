"""Pieces of the HTML report: tables that are heat maps, tables of numbers, a text cut into its entries."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from torch import Tensor

from dmc.analysis.figures import Panel, colours, number

_MARKS = str.maketrans({" ": "\u00b7", "\t": "\u2192\t", "\n": "\u21b5\n", "\r": "\u240d"})
_SHADES = 6  # of entries, in turn: classes e0 to e5 of the page


def heat_table(panel: Panel, *, log: bool = False) -> str:
    """A heat map that is a table: every cell has its number, and its layer and head as tooltip."""
    kind = "head" if panel.heads.startswith("key") else "query head"
    heads = range(len(panel.cells[0]))
    lines = [
        f"<table class=heat><caption>{escape(panel.title)}<br><small>{escape(panel.heads)} / layer</small></caption>",
        "<thead><tr><td></td>" + "".join(f"<th scope=col>{head}</th>" for head in heads) + "</tr></thead><tbody>",
    ]
    for layer, (row, shades) in enumerate(zip(panel.cells, colours(panel.cells, log=log), strict=True)):
        cells = "".join(
            f'<td title="layer {layer}, {kind} {head}: {number(value)}" style="background:{back};color:{text}">'
            f"{number(value)}</td>"
            for head, (value, (back, text)) in enumerate(zip(row, shades, strict=True))
        )
        lines.append(f"<tr><th scope=row>{layer}</th>{cells}</tr>")
    return "\n".join([*lines, "</tbody></table>"])


def number_table(caption: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[object]]]) -> str:
    """A plain table: what the columns are (the first names the rows), and the rows with their names."""
    head = "".join(f"<th scope=col>{escape(column)}</th>" for column in columns)
    lines = [f"<table class=numbers><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>"]
    for name, values in rows:
        cells = "".join(f"<td>{escape(_shown(value))}</td>" for value in values)
        lines.append(f"<tr><th scope=row>{escape(name)}</th>{cells}</tr>")
    return "\n".join([*lines, "</tbody></table>"])


def folded(summary: str, body: str) -> str:
    """A part that opens on demand, without a script."""
    return f"<details><summary>{escape(summary)}</summary>\n{body}\n</details>"


def segments(tokens: Sequence[str], merges: Tensor) -> str:
    """A text whose tokens are grouped into the entries of one head; merges bool ``[T]``."""
    entries: list[list[str]] = []
    for token, merged in zip(tokens, merges.tolist(), strict=True):
        if not (entries and merged):
            entries.append([])
        entries[-1].append(token)
    spans = (
        f'<span class=e{place % _SHADES} title="entry {place}: {len(entry)} token{"s"[: len(entry) > 1]}">'
        f"{escape(''.join(entry).translate(_MARKS))}</span>"
        for place, entry in enumerate(entries)
    )
    return f"<p class=text>{''.join(spans)}</p>"


def _shown(value: object) -> str:
    return number(value) if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
