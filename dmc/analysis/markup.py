"""The templates of `dmc inspect`'s pages, and what they are filled with: heat maps, tables of numbers, texts cut into entries."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor

from dmc.analysis.figures import Curves, Panel, colours, number

_MARKS = str.maketrans({" ": "\u00b7", "\t": "\u2192\t", "\n": "\u21b5\n", "\r": "\u240d"})
_SPECTRUM_POINTS = 64  # of a table


def render(name: str, **data: object) -> str:
    """A template of this package, filled; texts are escaped."""
    return _templates().get_template(name).render(data)


def heat_table(panel: Panel, *, log: bool = False) -> dict:
    """A heat map as a table: for every layer and head (number, background, colour of the text)."""
    shades = colours(panel.cells, log=log)
    rows = [
        [(number(value), *pair) for value, pair in zip(cells, pairs, strict=True)]
        for cells, pairs in zip(panel.cells, shades, strict=True)
    ]
    kind = "head" if panel.heads.startswith("key") else "query head"
    return {"title": panel.title, "heads": panel.heads, "kind": kind, "rows": rows}


def figure(svg: str, label: str, *tables: dict) -> dict:
    """A figure, with the tables of its numbers folded below."""
    return {"svg": svg, "label": label, "tables": tables}


def table(summary: str, caption: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[object]]]) -> dict:
    """A table that opens on demand; the first of its columns has the names of the rows."""
    return {"summary": summary, "caption": caption, "columns": columns, "rows": rows}


def table_of(curve: Curves, caption: str) -> dict:
    """The numbers of a figure with one line per layer; of many points some."""
    points = len(curve.x)
    some: Sequence[int] = range(points)
    if points > _SPECTRUM_POINTS:  # closer together where a spectrum falls
        some = sorted({int(place) for place in torch.logspace(0, torch.tensor(points).log10(), _SPECTRUM_POINTS) - 1})
    columns = [curve.x_label, *(f"layer {layer}" for layer in range(len(curve.lines)))]
    rows = [(f"{curve.x[place]:g}", [_dash(line[place]) for line in curve.lines]) for place in some]
    return table(f"{caption}: numbers", f"{caption}: {curve.y_label}", columns, rows)


def entries_of(tokens: Sequence[str], merges: Tensor) -> list[list[str]]:
    """The tokens of a text, grouped into the entries of one head; merges bool ``[T]``."""
    entries: list[list[str]] = []
    for token, merged in zip(tokens, merges.tolist(), strict=True):
        if not (entries and merged):
            entries.append([])
        entries[-1].append(token)
    return entries


@cache
def _templates() -> Environment:
    made = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"shown": _shown, "marked": lambda text: str(text).translate(_MARKS)}
    return made


def _shown(value: object) -> str:
    return number(value) if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _dash(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
