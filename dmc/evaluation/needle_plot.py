"""Picture of needle retrieval: depth down, length across, a panel for each kind of needle and metric."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dmc.extras import needed_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

_PANELS = (("exact", "exact retrieval"), ("choice", "answer most likely"), ("margin", "margin, nats"))


def plot_needle(figures: dict, out_png: str | Path, *, title: str = "") -> None:
    """Draws a `dmc.evaluation.needle.report`.

    Args:
        figures: the report.
        out_png: file to write.
        title: over all panels, such as model, policy and codec.

    Raises:
        OSError: if the file cannot be written.
        ValueError: if there is no matplotlib.
    """
    with needed_for("the plot"):
        import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings = figures["settings"]
    kinds, lengths, depths = list(settings["kinds"]), list(settings["lengths"]), list(settings["depths"])
    width, height = 1.6 + 0.75 * len(lengths), 1.3 + 0.42 * len(depths)
    figure, rows = pyplot.subplots(
        len(kinds), len(_PANELS), figsize=(len(_PANELS) * width, len(kinds) * height + 0.5), layout="constrained", squeeze=False
    )
    cells = {(cell["kind"], cell["length"], cell["depth"]): cell for cell in figures["cells"]}
    widest = max(1.0, *(abs(cell["margin"]) for cell in cells.values()))
    for kind, row in zip(kinds, rows, strict=True):
        for (metric, name), axes in zip(_PANELS, row, strict=True):
            values = [[cells[kind, length, depth][metric] for length in lengths] for depth in depths]
            scale = dict(vmin=-widest, vmax=widest, cmap="RdBu") if metric == "margin" else dict(vmin=0, vmax=1, cmap="viridis")
            image = axes.imshow(values, aspect="auto", **scale)
            _write(axes, values, metric, image)
            axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
            axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
            axes.set_title(f"{kind}: {name}", fontsize=9)
            axes.set_xlabel("tokens of the prompt", fontsize=8)
            axes.set_ylabel("depth of the needle", fontsize=8)
            axes.tick_params(labelsize=8)
            figure.colorbar(image, ax=axes).ax.tick_params(labelsize=7)
    if title:
        figure.suptitle(title, fontsize=10)
    figure.savefig(out_png, dpi=130)
    pyplot.close(figure)


def _write(axes: Axes, values: list[list[float]], metric: str, image: AxesImage) -> None:
    """The numbers, in a colour that can be read on the cell's."""
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            text = f"{value:+.1f}" if metric == "margin" else f"{value:.2f}"
            axes.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
