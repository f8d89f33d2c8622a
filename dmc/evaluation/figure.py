"""Figures of frontiers: what a cache loses against its bytes, a line for each method, from rows of `dmc frontier`."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from dmc.evaluation.report import measured
from dmc.evaluation.styles import STYLES, method, style
from dmc.extras import needed_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.container import Container

FORMATS = (".pdf", ".svg", ".png")
MEASURES = {
    "kl": ("KL to the uncompressed model, nats/token", "kl_stderr"),
    "perplexity": ("perplexity", None),
    "disagreement": ("tokens whose most likely successor differs", None),
}
_DASHES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 2)), (0, (8, 3)))  # of curves, by codec
_NEEDED = {"share", "kl", "perplexity", "agreement", "base", "model", "settings", "text", "windows", "prompt_tokens",
           "scored_tokens"}
_LEAST = 1e-5  # a loss below this is rounding; drawn here


@dataclass(frozen=True)
class Look:
    """What a figure shows.

    Attributes:
        measure: of `MEASURES`.
        curves: True: a line for each evicting policy and codec through all shares of the tokens; False: for each method through
            its rows that no other row of the method beats in bytes and loss.
        labels: whether points carry their budget and codec.
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
        budget = row["policy"].partition(":")[2]
        point = Point(row["result"]["share"], max(loss, _LEAST), error, f"{budget} {row['codec']}".strip())
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
    names = dict.fromkeys(name for mine in drawn for name in mine)
    columns = max(1, int(width // (0.6 + 0.055 * max(map(len, names)))))  # inches of a line's sample and its name
    height = 0.72 * width / len(files) + 0.8 + 0.17 * -(-len(names) // columns)  # the panel, its titles, the legend's lines
    figure, axes = plt.subplots(1, len(files), figsize=(width, height), sharey=True, squeeze=False, layout="constrained")
    shown = {}
    for axis, some, mine in zip(axes[0], rows, drawn, strict=True):
        for name, points in mine.items():
            shown[name] = _line(axis, name, points, look)
        _axes(axis, some)
    axes[0, 0].set_ylabel(MEASURES[look.measure][0], fontsize=7)
    figure.legend(handles=list(shown.values()), loc="outside lower center", ncols=columns, frameon=False, fontsize=7)
    figure.savefig(out, dpi=200)
    plt.close(figure)
    return left


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
    for point in points if look.labels else ():
        axis.annotate(point.label, (point.share, point.loss), fontsize=5, xytext=(3, 3), textcoords="offset points")
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
