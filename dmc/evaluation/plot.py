"""The plot of a frontier: KL against bytes held."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from dmc.evaluation.report import family, frontier, measured, point
from dmc.evaluation.styles import label_decades
from dmc.extras import needed_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKERS = "osD^vPXp*h<>d"
_LEAST = 1e-5  # KL below this is rounding; drawn here


def plot_frontier(rows: Sequence[dict], out_png: str | Path) -> None:
    """One marker a row: its shape says the policy, its colour the codec; the line joins the rows that none beats.

    Args:
        rows: of `dmc.evaluation.frontier.run`, at least one with a result.
        out_png: file to write.

    Raises:
        ValueError: if no row has a result, or there is no matplotlib.
    """
    done = measured(rows)
    if not done:
        raise ValueError("no row has a result: nothing to draw")
    with needed_for("the plot"):
        import matplotlib
    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    base = done[0]["result"]["base_hash"]
    families = dict.fromkeys(family(row, base) for row in done)
    shapes = {name: _MARKERS[i % len(_MARKERS)] for i, name in enumerate(families)}
    names = list(dict.fromkeys(row["result"]["codec"] for row in done))
    colors = {name: plt.get_cmap("tab20" if len(names) > 10 else "tab10")(i % 20) for i, name in enumerate(names)}
    figure, axes = plt.subplots(figsize=(10, 6.5), layout="constrained")
    for row in done:
        share, kl = point(row)
        axes.plot(
            share,
            max(kl, _LEAST),
            shapes[family(row, base)],
            color=colors[row["result"]["codec"]],
            markersize=8,
            markeredgecolor="white",
            markeredgewidth=0.6,
        )
    best = [(share, max(kl, _LEAST)) for share, kl in map(point, frontier(done))]
    axes.step(*zip(*best, strict=True), where="post", color="#444444", linewidth=1, zorder=0)
    _axes(axes, [point(row)[0] for row in done], done[0]["result"])
    from matplotlib.lines import Line2D

    shape_keys = [Line2D([], [], marker=shape, color="#666666", linestyle="", label=name) for name, shape in shapes.items()]
    color_keys = [Line2D([], [], marker="o", color=color, linestyle="", label=name) for name, color in colors.items()]
    line = Line2D([], [], color="#444444", linewidth=1, label="frontier")
    figure.legend(handles=[*shape_keys, line], title="policy", loc="outside right upper")
    figure.legend(handles=color_keys, title="codec", loc="outside right lower")
    figure.savefig(out_png, dpi=150)
    plt.close(figure)


def _axes(axes: Axes, shares: Sequence[float], first: dict) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = [2.0**-power for power in range(12) if 2.0**-power >= min(shares) / 1.5 and 2.0**-power <= max(shares) * 1.5]
    axes.set_xticks(ticks, [str(Fraction(tick)) for tick in ticks])
    axes.minorticks_off()
    label_decades(axes.yaxis)
    axes.set_xlabel("bytes held / dense bf16 bytes (log)")
    axes.set_ylabel(f"KL to the uncompressed {first['base']}, nats/token (log)")
    axes.set_title(
        f"{first['base']} on {first['text']}: {first['windows']} windows of {first['prompt_tokens']} + "
        f"{first['scored_tokens']} tokens",
        fontsize=11,
    )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
