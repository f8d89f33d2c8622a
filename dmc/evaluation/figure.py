"""Figures of frontiers: what a cache loses against its bytes, a line for each method, from rows of `dmc frontier`."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from dmc.evaluation.labels import place
from dmc.evaluation.report import measured
from dmc.evaluation.styles import STYLES, label_decades, method, style
from dmc.extras import needed_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.container import Container
    from matplotlib.lines import Line2D

FORMATS = (".pdf", ".svg", ".png")
MEASURES = {
    "kl": ("KL to the uncompressed model, nats/token", "kl_stderr"),
    "perplexity": ("perplexity", None),
    "disagreement": ("tokens whose most likely successor differs", None),
}
_DASHES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 2)), (0, (8, 3)))  # of curves, by codec
_NEEDED = {
    "share",
    "kl",
    "perplexity",
    "agreement",
    "base",
    "model",
    "settings",
    "text",
    "windows",
    "prompt_tokens",
    "scored_tokens",
}
_LEAST = 1e-5  # a loss below this is rounding; drawn here


@dataclass(frozen=True)
class Look:
    """What a figure shows.

    Attributes:
        measure: of `MEASURES`.
        curves: True: a line for each evicting policy and codec through all shares of the tokens; False: for each method through
            its rows that no other row of the method beats in bytes and loss.
        labels: whether the points that no other point of their panel beats carry a number, with method, budget and codec in the
            legend.
        most: lines at most; the ones with the lowest loss stay.
        width: inches; None: 5.6 for each file.
    """

    measure: str = "kl"
    curves: bool = False
    labels: bool = False
    most: int = 12
    width: float | None = None


@dataclass(frozen=True)
class Point:
    """One row: share of the bytes of a dense bf16 cache, loss, its standard error (0 where there is none), and its label."""

    share: float
    loss: float
    error: float
    label: str


def read_rows(path: str | Path) -> list[dict]:
    """Rows with a result, of a results.jsonl of `dmc frontier` or its folder.

    Raises:
        ValueError: if there is no such file, or a line or row is not one of `dmc frontier`; the sentence names it.
    """
    path = Path(path) / "results.jsonl" if Path(path).is_dir() else Path(path)
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        done = measured(rows)
        for row in done:
            if not _NEEDED <= set(row["result"]) or not {"model", "policy", "codec"} <= set(row):
                raise KeyError("share")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not hold rows of dmc frontier (results.jsonl)") from error
    if not done:
        raise ValueError(f"{path} has no row with a result: nothing to draw")
    return done


def lines(rows: Sequence[dict], look: Look) -> dict[str, list[Point]]:
    """Points of each line, by falling share; methods of `STYLES` first, in its order."""
    found: dict[str, list[Point]] = {}
    for row in rows:
        if (name := method(row)) is None or (look.curves and "share=" not in row["policy"]):
            continue
        loss, error = _loss(row["result"], look.measure)
        budget = re.sub(r"[^=,]*/([^/,]*?)(\.safetensors)?(?=,|$)", r"\1", row["policy"].partition(":")[2])  # files by their name
        model = "" if row["result"]["model"] == row["result"]["base"] else row["model"]
        label = " ".join(part for part in (model, budget, row["codec"].replace("page_size=", "page ")) if part)
        point = Point(row["result"]["share"], max(loss, _LEAST), error, label)
        found.setdefault(f"{name}, {row['codec']}" if look.curves else name, []).append(point)
    if not look.curves:
        found = {name: best(points) for name, points in found.items()}
    kept = sorted(found, key=lambda name: min(point.loss for point in found[name]))[: look.most]
    order = [*STYLES, *sorted(found)]
    kept.sort(key=lambda name: next(i for i, known in enumerate(order) if name == known or name.startswith(f"{known}, ")))
    return {name: sorted(found[name], key=lambda point: -point.share) for name in kept}


def best(points: Sequence[Point]) -> list[Point]:
    """Those that no other point beats in bytes and loss, by falling share."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: (point.share, point.loss)):
        if not kept or point.loss < kept[-1].loss:
            kept.append(point)
    return kept[::-1]


def draw(files: Sequence[str | Path], out: str | Path, look: Look) -> int:
    """Draws one panel for each file of rows → the number of lines that were left out.

    Axes are logarithmic. Below is the share of a dense bf16 cache, above the bytes of a token.

    Raises:
        ValueError: if a file cannot be read, the format of ``out`` is unknown, or there is no matplotlib.
    """
    if Path(out).suffix not in FORMATS:
        raise ValueError(f"{out}: figures are {', '.join(FORMATS)}")
    rows = [read_rows(file) for file in files]
    with needed_for("the figure"):
        import matplotlib
    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    drawn = [lines(some, look) for some in rows]
    if not any(drawn):
        raise ValueError("no row has a policy with a share of the tokens, which curves are drawn over")
    left = sum(len(lines(some, replace(look, most=10**9))) - len(mine) for some, mine in zip(rows, drawn, strict=True))
    width = look.width or 5.6 * len(files)
    keys, numbers = numbered(drawn) if look.labels else ({}, [])
    size = 5.5 if keys else 7  # of the legend's letters, points
    names = [*dict.fromkeys(name for mine in drawn for name in mine), *keys]
    columns = max(1, int(width // (0.6 + 0.0075 * size * max(map(len, names)))))  # inches of a line's sample and its name
    height = 0.72 * width / len(files) + 1.3 + 0.0208 * size * -(-len(names) // columns)  # panel, titles, lines of the legend
    figure, axes = plt.subplots(1, len(files), figsize=(width, height), sharey=True, squeeze=False, layout="constrained")
    shown = {}
    for axis, some, mine in zip(axes[0], rows, drawn, strict=True):
        for name, points in mine.items():
            shown[name] = _line(axis, name, points, look)
        _axes(axis, some)
    label_decades(axes[0, 0].yaxis)  # which the panels share
    axes[0, 0].set_ylabel(MEASURES[look.measure][0].replace(", ", "\n"), fontsize=7)
    handles = [*shown.values(), *(_key(number, said) for said, number in keys.items())]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=size)
    if numbers:
        figure.draw_without_rendering()  # the layout: numbers are placed by what they would cover
        figure.set_layout_engine("none")
        for axis, mine, said in zip(axes[0], drawn, numbers, strict=True):
            place(
                axis,
                [(point.share, point.loss, str(number)) for number, point in said.items()],
                [(point.share, point.loss) for points in mine.values() for point in points],
            )
    figure.savefig(out, dpi=200)
    plt.close(figure)
    return left


def numbered(drawn: Sequence[dict[str, list[Point]]]) -> tuple[dict[str, int], list[dict[int, Point]]]:
    """Numbers of the points that no other point of their panel beats, by rising share: equal texts have equal numbers.

    Returns:
        text of the line and the point → number, and of each panel number → point.
    """
    keys: dict[str, int] = {}
    panels = []
    for mine in drawn:
        names = {id(point): name for name, points in mine.items() for point in points}
        shown = best([point for points in mine.values() for point in points])[::-1]
        panels.append({keys.setdefault(f"{names[id(point)]}, {point.label}", len(keys) + 1): point for point in shown})
    return keys, panels


def _key(number: int, text: str) -> Line2D:
    """The legend's line for a numbered point."""
    from matplotlib.lines import Line2D

    size = 2 + 2 * len(str(number))  # a marker of two digits is as wide as it is said to be high
    return Line2D([], [], linestyle="", marker=f"${number}$", color="black", markersize=size, markeredgewidth=0, label=text)


def _loss(result: dict, measure: str) -> tuple[float, float]:
    if measure == "disagreement":
        return 1 - result["agreement"], 0.0
    error = MEASURES[measure][1]
    return result[measure], (result.get(error) or 0.0) if error else 0.0


def _line(axis: Axes, name: str, points: Sequence[Point], look: Look) -> Container:
    whole = next((known for known in STYLES if name == known or name.startswith(f"{known}, ")), name)
    colour, marker = style(name if name in STYLES else whole)
    share, loss = [point.share for point in points], [point.loss for point in points]
    errors = [min(point.error, 0.9 * point.loss) for point in points], [point.error for point in points]  # a log axis has no 0
    error = errors if any(point.error for point in points) else None
    size = 9 if marker == "*" else 4
    codec = "" if name in STYLES else name.removeprefix(f"{whole}, ")
    dashes = _DASHES[zlib.crc32(codec.encode()) % len(_DASHES)] if look.curves else "-"
    made = axis.errorbar(share, loss, error, color=colour, marker=marker, ls=dashes, ms=size, lw=1.2, elinewidth=0.7, label=name)
    return made


def _axes(axis: Axes, rows: Sequence[dict]) -> None:
    first, shares = rows[0]["result"], [row["result"]["share"] for row in rows]
    axis.set(xscale="log", yscale="log")
    axis.set_xlabel("KV bytes / bytes of a dense bf16 cache", fontsize=8)
    axis.tick_params(labelsize=7)
    ticks = [2.0**-power for power in range(12) if 2.0**-power >= min(shares) / 1.5 and 2.0**-power <= max(shares) * 1.5]
    axis.set_xticks(ticks, [str(Fraction(tick)) for tick in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    tokens = first["prompt_tokens"] + first["scored_tokens"]
    windows = f"{first['windows']} x {first['prompt_tokens']} + {first['scored_tokens']} tokens"
    axis.set_title(f"{first['base']}\n{first['text']}\n{windows}", fontsize=7)
    whole = first.get("dense_bytes_end")
    if whole:
        above = axis.secondary_xaxis("top")
        above.set_xticks(ticks, [f"{tick * whole / tokens:,.0f}" for tick in ticks])
        above.minorticks_off()
        above.set_xlabel("KV bytes per token", fontsize=8)
        above.tick_params(labelsize=6)
