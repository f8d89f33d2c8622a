"""The report of `dmc inspect --out`: one page that needs neither network nor script, PNGs of its figures, the numbers."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from dmc.analysis.attention import FIRST, NEWEST
from dmc.analysis.figures import Curves, Panel, draw, heat_maps
from dmc.analysis.inspection import KIND_NAMES, Inspection, findings, listed, numbers
from dmc.analysis.markup import entries_of, figure, heat_table, render, table_of
from dmc.analysis.output import REPORT
from dmc.analysis.suggested import divided

_QUERY = "query head"
_SPANS = 40_000  # tokens of coloured text in the page, all heads together


def write(found: Inspection, directory: Path) -> None:
    """Fills a directory: report.html, inspect.json, PNGs, and layers.json if settings of layers were asked for."""
    page = render(
        "report.html",
        title=f"dmc inspect: {found.about['model']}",
        findings=findings(found),
        facts=_facts(found),
        compression=_compression(found, directory),
        ranks=_ranks(found, directory),
        attention=_attention(found, directory),
        settings=None if found.recommendation is None else divided(found.recommendation, directory),
        segments=_segments(found) if found.merging else None,
    )
    (directory / "report.html").write_text(page, encoding="utf-8")
    (directory / REPORT).write_text(json.dumps(numbers(found)) + "\n", encoding="utf-8")


def _facts(found: Inspection) -> list[tuple[str, list[str]]]:
    """What was measured: rows of a table."""
    cache = found.cache
    rows = [(name.replace("_", " "), [_fact(value)]) for name, value in found.about.items()]
    return rows + [
        ("windows", [f"{found.measures.windows} of {found.measures.tokens:,} tokens"]),
        (
            "cache",
            [
                f"{cache['policy']} x {cache['codec']}, pages of {cache['page_size']} entries, {cache['sink_tokens']} sinks, "
                f"window {cache['window']}"
            ],
        ),
        ("entries", [f"{cache['entries']:,} for {cache['tokens']:,} tokens in all layers and heads: CR {cache['cr']:.2f}"]),
        ("bytes held", [f"{cache['held_bytes']:,} ({', '.join(f'{kind} {size:,}' for kind, size in cache['held'].items())})"]),
        ("dense bf16", [f"{cache['dense_bytes']:,} bytes: {cache['byte_ratio']:.2f} times what is held"]),
        ("pages", [f"{cache['pages']:,} of {cache['page_bytes']:,} bytes"]),
        ("codec error", [f"keys {cache['codec_error']['keys']:.4f}, values {cache['codec_error']['values']:.4f} (relative)"]),
    ]


def _compression(found: Inspection, directory: Path) -> dict:
    panel = Panel("tokens / entries", found.cache["cr_per_head"])
    heat_maps([panel], directory / "cr.png", label="tokens / entries", log=True)
    drawn = None
    if found.merging:
        measured = found.measures
        lines = measured.bins * measured.entries.shape[1] / measured.entries.sum(1)
        curve = _by_position("compression along the position", found, lines, "tokens / entries", log=True)
        svg = draw([curve], "cr-positions", directory / "cr_positions.png")
        drawn = figure(svg, "Compression ratio along the position", table_of(curve, "Compression along the position"))
    return {"panel": heat_table(panel, log=True), "figure": drawn}


def _ranks(found: Inspection, directory: Path) -> dict:
    measured, kinds, curves = found.measures, [], []
    for name, file, ranks in (
        ("Effective rank", "ranks.png", measured.rank),
        ("Stable rank", "stable_ranks.png", measured.stable),
    ):
        panels = [Panel(KIND_NAMES[kind], listed(rank), _heads(kind)) for kind, rank in ranks.items()]
        heat_maps(panels, directory / file, label=name.lower())
        kinds.append((name, [heat_table(panel) for panel in panels]))
    for kind, values in measured.spectrum.items():
        share = (values / values[..., :1]).nanmean(1)
        curves.append(
            Curves(
                KIND_NAMES[kind], range(1, share.shape[-1] + 1), listed(share), "singular value", "share of the largest", log=True
            )
        )
    svg = draw(curves, "spectra", directory / "spectra.png")
    tables = [table_of(curve, f"Spectrum of {curve.title}") for curve in curves]
    return {
        "tokens": measured.spectrum["attention"].shape[-1],
        "kinds": kinds,
        "figure": figure(svg, "Singular values of keys, values and attention", *tables),
    }


def _attention(found: Inspection, directory: Path) -> dict:
    measured = found.measures
    panels = [
        Panel("entropy, bits", listed(measured.entropy), _QUERY),
        Panel("entropy / even spread", listed(measured.entropy_overall), _QUERY),
        Panel(f"on the first {FIRST} positions", listed(measured.first), _QUERY),
        Panel(f"on the newest {NEWEST} positions", listed(measured.newest), _QUERY),
    ]
    heat_maps(panels, directory / "attention.png", label="share")
    curve = _by_position("entropy along the position", found, measured.entropy_share.nanmean(1), "entropy / even spread")
    svg, name = draw([curve], "entropy-positions", directory / "entropy_positions.png"), "Entropy along the position"
    return {"panels": [heat_table(panel) for panel in panels], "figure": figure(svg, name, table_of(curve, name))}


def _segments(found: Inspection) -> dict:
    layers, heads, tokens = found.merges.shape
    shown = min(tokens, max(32, _SPANS // (layers * heads)))
    pieces = found.pieces[:shown]
    return {"shown": shown, "layers": [[entries_of(pieces, head[:shown]) for head in layer] for layer in found.merges]}


def _heads(kind: str) -> str:
    return _QUERY if kind == "attention" else "key/value head"


def _by_position(title: str, found: Inspection, lines: Tensor, y_label: str, *, log: bool = False) -> Curves:
    """Lines ``[L, B]`` over the middle of each bin of positions."""
    bins = found.measures.bins
    middle = (bins.cumsum(0) - (bins + 1) / 2).tolist()
    return Curves(title, middle, listed(lines), "position in the window, tokens", y_label, log)


def _fact(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_fact(part)}" for name, part in value.items())
    if isinstance(value, list):
        return "; ".join(map(_fact, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
