"""Pictures: training over steps, compression per head."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dmc.extras import needed_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar

_RUN, _CONTROL, _TARGET = "#1f77b4", "#ff7f0e", "#444444"


def plot_training(metrics_jsonl: str | Path, out_png: str | Path, *, control_jsonl: str | Path | None = None) -> None:
    """Loss, and target and measured compression ratio, over the steps of a run.

    Args:
        metrics_jsonl: the run's metrics, one JSON object a line. The language-model loss (`lm_loss`) is drawn, or
            `loss` where no line has it; then `target_cr`, `measured_cr` and the boundaries between values of `phase`.
            Lines without a `step` and values that a line lacks are skipped.
        out_png: file to write.
        control_jsonl: the metrics of a control run, whose loss is drawn too.

    Raises:
        ValueError: if a line is not a JSON object, or a file has no loss at all.
    """
    plt = pyplot()
    run = _read(metrics_jsonl)
    loss = "lm_loss" if any("lm_loss" in line for line in run) else "loss"
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=(3, 2), layout="constrained")
    _draw_loss(top, run, loss, metrics_jsonl, label="DMC", color=_RUN)
    if control_jsonl is not None:
        _draw_loss(top, _read(control_jsonl), loss, control_jsonl, label="control", color=_CONTROL)
        top.legend()
    top.set_ylabel("language-model loss, nats per token" if loss == "lm_loss" else "loss")
    for key, style in (("target_cr", dict(color=_TARGET, linestyle="--")), ("measured_cr", dict(color=_RUN))):
        points = _points(run, key)
        if points:
            bottom.plot(*zip(*points, strict=True), label=key.removesuffix("_cr"), **style)
    if bottom.lines:
        bottom.legend()
    bottom.set_ylabel("compression ratio,\ntokens per entry")
    bottom.set_xlabel("step")
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    _mark_phases(top, bottom, run)
    figure.savefig(out_png, dpi=150)
    plt.close(figure)


def plot_heads(cr: Sequence[Sequence[float]], out_png: str | Path) -> None:
    """Heat map of the compression ratio, layers down and key/value heads across, the numbers in the cells.

    Args:
        cr: `[L][H]`, tokens per entry, at least 1. The colour is logarithmic.
        out_png: file to write.

    Raises:
        ValueError: if there is no layer or head, the layers differ in heads, or a ratio is below 1.
    """
    rows = [[float(value) for value in row] for row in cr]
    if not rows or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
        raise ValueError("cr must be a list of layers with the same number of heads, at least one of each")
    if not all(1 <= value < float("inf") for row in rows for value in row):
        raise ValueError("a compression ratio must be a finite number of at least 1")
    plt = pyplot()
    from matplotlib.colors import LogNorm

    layers, heads = len(rows), len(rows[0])
    figure, axes = plt.subplots(figsize=(2.2 + 0.6 * heads, 1.4 + 0.4 * layers), layout="constrained")
    norm = LogNorm(1, max(2.0, *(value for row in rows for value in row)))
    image = axes.imshow(rows, norm=norm, cmap="viridis", aspect="auto")
    for layer, row in enumerate(rows):
        for head, value in enumerate(row):
            color = "white" if norm(value) < 0.6 else "black"
            text = f"{value:.1f}" if value < 100 else f"{value:.0f}"
            axes.text(head, layer, text, ha="center", va="center", color=color, fontsize=9)
    axes.set_xticks(range(heads))
    axes.set_yticks(range(layers))
    axes.set_xlabel("key/value head")
    axes.set_ylabel("layer")
    _mark_ratios(figure.colorbar(image, label="tokens per entry", aspect=max(20, 2 * layers)), norm.vmax)
    figure.savefig(out_png, dpi=150)
    plt.close(figure)


def _mark_ratios(bar: Colorbar, largest: float) -> None:
    ticks = [tick for tick in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if tick <= largest]
    bar.set_ticks(ticks, labels=[str(tick) for tick in ticks])
    bar.minorticks_off()


def pyplot():  # noqa: ANN201 - matplotlib is imported only where something is drawn
    """matplotlib.pyplot, for drawing into files.

    Raises:
        ValueError: if there is no matplotlib.
    """
    with needed_for("the plot"):
        import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _read(path: str | Path) -> list[dict]:
    lines = []
    for number, text in enumerate(Path(path).read_text().splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}, is not JSON: {error}") from None
        if not isinstance(line, dict):
            raise ValueError(f"{path}, line {number}, is not a JSON object")
        if "step" in line:
            lines.append(line)
    return lines


def _points(lines: list[dict], key: str) -> list[tuple[float, float]]:
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None]


def _draw_loss(axes: Axes, lines: list[dict], key: str, path: str | Path, *, label: str, color: str) -> None:
    points = _points(lines, key) or _points(lines, "loss")
    if not points:
        raise ValueError(f"{path} has no line with a step and a loss: nothing to draw")
    steps, values = zip(*points, strict=True)
    axes.plot(steps, values, color=color, alpha=0.3, linewidth=0.8)
    axes.plot(steps, _smooth(values), color=color, label=label)


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean over the last fiftieth of the run, so that the level shows through the noise of single batches."""
    width = max(1, len(values) // 50)
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(values))]


def _mark_phases(top: Axes, bottom: Axes, lines: list[dict]) -> None:
    previous = None
    for line in lines:
        phase = line.get("phase", previous)
        if phase != previous:
            for axes in (top, bottom):
                axes.axvline(line["step"], color="#bbbbbb", linewidth=0.8, zorder=0)
            top.annotate(
                phase,
                (line["step"], 1),
                xycoords=("data", "axes fraction"),
                fontsize=8,
                color="#666666",
                xytext=(3, -3),
                textcoords="offset points",
                va="top",
            )
        previous = phase
