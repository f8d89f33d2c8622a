"""Pictures of a report: heat maps of layers and heads, and curves of layers; as PNG, or as SVG to stand in a page."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dmc.analysis.plots import pyplot
from dmc.extras import needed_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.colors import Normalize

_INK = "#010203"  # of text and axes; in an SVG it becomes the colour of the page's text
_SHOWN_HEADS = 16  # panels of more heads have no numbers in their cells
_LEAST = 1e-4  # of the largest value, on a logarithmic axis
_DEPTH = ("#2f74d0", "#a04fb0", "#d9722e")  # first to last layer; each readable on white and on black


@dataclass(frozen=True)
class Panel:
    """One heat map.

    Attributes:
        title: above it.
        cells: ``[L][heads]``; None or NaN is left empty.
        heads: "key/value head" or "query head".
    """

    title: str
    cells: Sequence[Sequence[float | None]]
    heads: str = "key/value head"


@dataclass(frozen=True)
class Curves:
    """One diagram with a line for each layer.

    Attributes:
        title: above it.
        x: of all lines.
        lines: ``[L][points]``, None or NaN is a gap.
        x_label, y_label: with units.
        log: whether y is logarithmic.
    """

    title: str
    x: Sequence[float]
    lines: Sequence[Sequence[float | None]]
    x_label: str
    y_label: str
    log: bool = False


def number(value: float | None) -> str:
    """A number as cells show it: three figures at most; a dash for what is missing."""
    if value is None or value != value:
        return "–"
    return f"{value:.2f}" if abs(value) < 9.995 else f"{value:.1f}" if abs(value) < 99.95 else f"{value:.0f}"


def colours(cells: Sequence[Sequence[float | None]], *, log: bool = False) -> list[list[tuple[str, str]]]:
    """(background, text) of each cell, as ``#rrggbb``; missing cells are grey."""
    with needed_for("the report"):
        from matplotlib import colormaps
        from matplotlib.colors import to_hex

    scale, chosen = _scale(cells, log), colormaps["viridis"]

    def pair(value: float | None) -> tuple[str, str]:
        if value is None or value != value:
            return "#808080", "#ffffff"
        place = float(scale(value))
        return to_hex(chosen(place)), "#ffffff" if place < 0.55 else "#000000"

    return [[pair(value) for value in row] for row in cells]


def heat_maps(panels: Sequence[Panel], out_png: str | Path, *, label: str, log: bool = False) -> None:
    """Panels side by side, each with its own scale of colours, the numbers in the cells.

    Args:
        panels: at least one, all of L layers.
        out_png: file to write.
        label: of the colours.
        log: whether they are logarithmic.
    """
    plt = pyplot()
    layers, widths = len(panels[0].cells), [max(3.2, 0.42 * len(panel.cells[0])) for panel in panels]
    size = (min(40, 0.9 * len(panels) + sum(widths) + 0.4), max(2.6, 1.5 + 0.21 * layers))
    figure, row = plt.subplots(1, len(panels), figsize=size, width_ratios=widths, squeeze=False, layout="constrained")
    for axes, panel in zip(row[0], panels, strict=True):
        cells = [[float("nan") if value is None else value for value in row] for row in panel.cells]
        image = axes.imshow(cells, norm=_scale(cells, log), cmap="viridis", aspect="auto", interpolation="nearest")
        axes.set_facecolor("#808080")
        if len(cells[0]) <= _SHOWN_HEADS:
            for layer, (values, shades) in enumerate(zip(cells, colours(cells, log=log), strict=True)):
                for head, (value, (_, text)) in enumerate(zip(values, shades, strict=True)):
                    axes.text(head, layer, number(value), ha="center", va="center", color=text, fontsize=6.5)
        axes.set_title(panel.title, fontsize=9)
        axes.set_xlabel(panel.heads, fontsize=8)
        axes.set_xticks(range(0, len(cells[0]), 1 + len(cells[0]) // 17))
        axes.set_yticks(range(0, layers, 1 + layers // 41))
        axes.tick_params(labelsize=7, length=2)
        bar = figure.colorbar(image, ax=axes, aspect=30, pad=0.02)
        bar.ax.tick_params(labelsize=7)
        if log:
            _plain_ticks(bar)
    row[0][0].set_ylabel("layer", fontsize=8)
    bar.set_label(label, fontsize=8)
    figure.savefig(out_png, dpi=150)
    plt.close(figure)


def draw(diagrams: Sequence[Curves], name: str, out_png: str | Path) -> str:
    """Diagrams in rows of two, one line per layer, coloured by depth: writes a PNG → the same as SVG, to stand in a page.

    Args:
        diagrams: at least one.
        name: begins the ids of the SVG, so that several can be in one page.
        out_png: file to write.
    """
    plt = pyplot()
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    rows, columns = -(-len(diagrams) // 2), min(2, len(diagrams))
    depth, scale = LinearSegmentedColormap.from_list("depth", _DEPTH), Normalize(0, max(1, len(diagrams[0].lines) - 1))
    inks = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    with plt.rc_context({ink: _INK for ink in inks} | {"svg.fonttype": "none", "svg.hashsalt": name}):
        figure, grid = plt.subplots(
            rows, columns, figsize=(1.2 + 4.4 * columns, 0.3 + 2.9 * rows), squeeze=False, layout="constrained"
        )
        for place, axes in enumerate(grid.flat):
            if place >= len(diagrams):
                axes.remove()
                continue
            _draw(axes, diagrams[place], [depth(scale(layer)) for layer in range(len(diagrams[0].lines))])
        bar = figure.colorbar(ScalarMappable(scale, depth), ax=grid, aspect=30 * rows, pad=0.02)
        bar.set_label("layer")
        bar.ax.yaxis.get_major_locator().set_params(integer=True)
        figure.savefig(out_png, dpi=130, facecolor="white")
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    return _inline(text.getvalue(), name).replace("<svg", f"<svg class=columns{columns}", 1)


def _draw(axes: Axes, diagram: Curves, shades: Sequence[str]) -> None:
    for line, shade in zip(diagram.lines, shades, strict=True):
        values = [float("nan") if value is None or (diagram.log and value <= 0) else value for value in line]
        alone = len(values) == 1
        axes.plot(diagram.x, values, color=shade, linewidth=1.1, alpha=0.9, marker="o" if alone else None, markersize=3)
    if diagram.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        most = max((value for line in diagram.lines for value in line if value is not None), default=1.0)
        if axes.get_ylim()[0] < _LEAST * most:
            axes.set_ylim(bottom=_LEAST * most)
    else:
        axes.set_ylim(bottom=0)
    axes.set_title(diagram.title, fontsize=10)
    axes.set_xlabel(diagram.x_label, fontsize=9)
    axes.set_ylabel(diagram.y_label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)


def _inline(svg: str, name: str) -> str:
    """Without prolog, fixed size and ids that another figure may have; ink in the page's colour."""
    svg = svg[svg.index("<svg") :]
    head, rest = svg.split(">", 1)
    svg = re.sub(r' (?:width|height)="[^"]*"', "", head) + ">" + rest
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    return svg.replace("url(#", f"url(#{name}-").replace(_INK, "currentColor")


def _scale(cells: Sequence[Sequence[float | None]], log: bool) -> Normalize:
    from matplotlib.colors import LogNorm, Normalize

    known = [value for row in cells for value in row if value is not None and value == value]
    least, most = (min(known), max(known)) if known else (0.0, 1.0)
    if log:
        return LogNorm(least, max(most, 2 * least))
    return Normalize(least, most if most > least else least + 1)


def _plain_ticks(bar: Colorbar) -> None:
    ticks = [2**power for power in range(-20, 21) if bar.norm.vmin <= 2**power <= bar.norm.vmax]
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    bar.minorticks_off()
