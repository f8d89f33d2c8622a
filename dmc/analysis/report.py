"""The report of `dmc inspect --out`: one page that needs neither network nor script, PNGs of its pictures, the numbers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from html import escape
from pathlib import Path

import torch
from torch import Tensor

from dmc.analysis.attention import FIRST, NEWEST
from dmc.analysis.figures import Curves, Panel, draw, heat_maps
from dmc.analysis.inspection import KIND_NAMES, Inspection, findings, listed, numbers
from dmc.analysis.markup import folded, heat_table, number_table, segments
from dmc.analysis.output import REPORT
from dmc.analysis.style import PAGE
from dmc.analysis.suggested import divided

_QUERY = "query head"
_SPANS = 40_000  # tokens of coloured text in the page, all heads together
_SPECTRUM_POINTS = 64  # of a table


def write(found: Inspection, directory: Path) -> None:
    """Fills a directory: report.html, inspect.json, PNGs, and layers.json if settings of layers were asked for."""
    parts = [_summary(found), _compression(found, directory), _ranks(found, directory), _attention(found, directory)]
    if found.recommendation is not None:
        parts.append(divided(found.recommendation, directory))
    if found.merging:
        parts.append(_segments(found))
    title = f"dmc inspect: {found.about['model']}"
    page = PAGE.replace("@TITLE@", escape(title)).replace("@BODY@", "\n".join(parts))
    (directory / "report.html").write_text(page, encoding="utf-8")
    (directory / REPORT).write_text(json.dumps(numbers(found)) + "\n", encoding="utf-8")


def _summary(found: Inspection) -> str:
    cache = found.cache
    rows = [(name.replace("_", " "), [_fact(value)]) for name, value in found.about.items()]
    rows += [
        ("windows", [f"{found.measures.windows} of {found.measures.tokens:,} tokens"]),
        ("cache", [f"{cache['policy']} x {cache['codec']}, pages of {cache['page_size']} entries, {cache['sink_tokens']} sinks, "
                   f"window {cache['window']}"]),
        ("entries", [f"{cache['entries']:,} for {cache['tokens']:,} tokens in all layers and heads: CR {cache['cr']:.2f}"]),
        ("bytes held", [f"{cache['held_bytes']:,} ({', '.join(f'{kind} {size:,}' for kind, size in cache['held'].items())})"]),
        ("dense bf16", [f"{cache['dense_bytes']:,} bytes: {cache['byte_ratio']:.2f} times what is held"]),
        ("pages", [f"{cache['pages']:,} of {cache['page_bytes']:,} bytes"]),
        ("codec error", [f"keys {cache['codec_error']['keys']:.4f}, values {cache['codec_error']['values']:.4f} (relative)"]),
    ]
    said = "".join(f"<li>{escape(sentence)}</li>" for sentence in findings(found))
    facts = number_table("What was measured", ["what", "value"], rows)
    return f"{_head('Summary', '')}<ul>{said}</ul>\n<div class=wide>{facts}</div>"


def _compression(found: Inspection, directory: Path) -> str:
    cr = found.cache["cr_per_head"]
    panel = Panel("tokens / entries", cr)
    heat_maps([panel], directory / "cr.png", label="tokens / entries", log=True)
    text = (
        "Compression ratio of every key/value head: tokens that went through the cache / entries that it held after each "
        "window, the open entry counted, as the engine counts them."
    )
    parts = [_head("Compression per head", text), heat_table(panel, log=True)]
    if found.merging:
        measured = found.measures
        lines = measured.bins * measured.entries.shape[1] / measured.entries.sum(1)
        curve = _by_position("compression along the position", found, lines, "tokens / entries", log=True)
        parts += [
            "<p>Along the window: tokens of a stretch / entries opened in it, all heads of a layer together. There is a gap "
            "where a stretch opened none.</p>",
            _figure(draw([curve], "cr-positions", directory / "cr_positions.png"), "Compression ratio along the position"),
            _table_of(curve, "Compression along the position"),
        ]
    return "\n".join(parts)


def _ranks(found: Inspection, directory: Path) -> str:
    measured = found.measures
    parts = [_head("Ranks", (
        "Of what the cache of one head holds after a window (entries x channels), and of attention (queries x entries) over the "
        f"first {measured.spectrum['attention'].shape[-1]} tokens. Effective rank: how many singular values hold 99 % of the "
        "energy. Stable rank: energy / the largest singular value squared."
    ))]
    kinds = ("Effective rank", "ranks.png", measured.rank), ("Stable rank", "stable_ranks.png", measured.stable)
    for name, file, ranks in kinds:
        panels = [Panel(KIND_NAMES[kind], listed(rank), _heads(kind)) for kind, rank in ranks.items()]
        heat_maps(panels, directory / file, label=name.lower())
        parts += [f"<h3>{name}</h3>", _row(heat_table(panel) for panel in panels)]
    curves = []
    for kind, values in measured.spectrum.items():
        share = (values / values[..., :1]).nanmean(1)
        curves.append(Curves(
            KIND_NAMES[kind], range(1, share.shape[-1] + 1), listed(share), "singular value", "share of the largest", log=True,
        ))
    parts += ["<h3>Spectra</h3><p>Singular values over the largest, averaged over the heads of a layer.</p>",
              _figure(draw(curves, "spectra", directory / "spectra.png"), "Singular values of keys, values and attention")]
    parts += [_table_of(curve, f"Spectrum of {curve.title}") for curve in curves]
    return "\n".join(parts)


def _attention(found: Inspection, directory: Path) -> str:
    measured = found.measures
    panels = [
        Panel("entropy, bits", listed(measured.entropy), _QUERY),
        Panel("entropy / even spread", listed(measured.entropy_overall), _QUERY),
        Panel(f"on the first {FIRST} positions", listed(measured.first), _QUERY),
        Panel(f"on the newest {NEWEST} positions", listed(measured.newest), _QUERY),
    ]
    heat_maps(panels, directory / "attention.png", label="share")
    curve = _by_position("entropy along the position", found, measured.entropy_share.nanmean(1), "entropy / even spread")
    text = (
        "Entropy of every query head's weights, averaged over queries; also divided by the log of how many entries the query "
        "sees, so that 0 is one entry only and 1 an even spread over all. And the share of the weights on the first positions of "
        "the window and on the newest ones; where an entry was merged from several tokens, its position is that of the newest."
    )
    return "\n".join([
        _head("Attention", text), _row(heat_table(panel) for panel in panels),
        _figure(draw([curve], "entropy-positions", directory / "entropy_positions.png"), "Entropy along the position"),
        _table_of(curve, "Entropy along the position"),
    ])


def _segments(found: Inspection) -> str:
    layers, heads, tokens = found.merges.shape
    shown = min(tokens, max(32, _SPANS // (layers * heads)))
    text = (
        f"The first {shown} tokens of the first window. One coloured span is one entry: its tokens were merged into it. Spaces, "
        "tabs and line ends are marked."
    )
    parts = [_head("Which tokens share an entry", text)]
    for layer in range(layers):
        body = []
        for head in range(heads):
            merges = found.merges[layer, head, :shown]
            entries = shown - int(merges[1:].sum())
            body.append(f"<h4>layer {layer}, head {head}: {shown} tokens in {entries} entries</h4>")
            body.append(segments(found.pieces[:shown], merges))
        parts.append(folded(f"Layer {layer}", "\n".join(body)))
    return "\n".join(parts)


def _heads(kind: str) -> str:
    return _QUERY if kind == "attention" else "key/value head"


def _by_position(title: str, found: Inspection, lines: Tensor, y_label: str, *, log: bool = False) -> Curves:
    """Lines ``[L, B]`` over the middle of each bin of positions."""
    bins = found.measures.bins
    middle = (bins.cumsum(0) - (bins + 1) / 2).tolist()
    return Curves(title, middle, listed(lines), "position in the window, tokens", y_label, log)


def _head(title: str, text: str) -> str:
    return f"<h2>{escape(title)}</h2>" + (f"\n<p>{escape(text)}</p>" if text else "")


def _row(tables: Iterable[str]) -> str:
    return "<div class=row>" + "\n".join(tables) + "</div>"


def _figure(svg: str, label: str) -> str:
    return f'<figure role=img aria-label="{escape(label)}, a line a layer; the numbers are in the table below">{svg}</figure>'


def _table_of(curve: Curves, caption: str) -> str:
    """The numbers of a diagram, folded; of many points some."""
    points = len(curve.x)
    some = range(points)
    if points > _SPECTRUM_POINTS:  # closer together where a spectrum falls
        some = sorted({int(place) for place in torch.logspace(0, torch.tensor(points).log10(), _SPECTRUM_POINTS) - 1})
    columns = [curve.x_label, *(f"layer {layer}" for layer in range(len(curve.lines)))]
    rows = [(f"{curve.x[place]:g}", [_dash(line[place]) for line in curve.lines]) for place in some]
    return folded(f"{caption}: numbers", f"<div class=wide>{number_table(f'{caption}: {curve.y_label}', columns, rows)}</div>")


def _dash(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _fact(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_fact(part)}" for name, part in value.items())
    if isinstance(value, list):
        return "; ".join(map(_fact, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
