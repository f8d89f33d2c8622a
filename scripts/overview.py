"""The README's figure and table: KL against bytes, the best of each method, from the rows of docs/results/frontier.

    python scripts/overview.py docs/results/frontier/{base,smollm2-135m}.jsonl --out docs/results/overview.png

A line joins the rows of a method that no other row of that method beats in both numbers. A method's colour and marker
belong to its name. The table is printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dmc.evaluation.pareto import front  # noqa: E402
from dmc.evaluation.styles import STYLES, method  # noqa: E402

BUDGETS = (1 / 4, 1 / 8, 1 / 16)
TITLES = {"base": "small base model (3.05 M parameters)", "smollm2-135m": "SmolLM2-135M-Instruct (4-bit GGUF, dequantised)"}


def fronts(rows: list[dict]) -> dict[str, list[tuple[float, float, float]]]:
    """(share of dense bf16, KL, its standard error) of each method's best rows, by falling share."""
    points: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        name, result = method(row), row["result"]
        if name is not None:
            points.setdefault(name, []).append((result["share"], result["kl"], result["kl_stderr"]))
    best = {name: [of[i] for i in front([point[:2] for point in of])][::-1] for name, of in points.items()}
    return {name: best[name] for name in STYLES if name in best}


def table(files: list[Path]) -> str:
    """Markdown: the lowest KL of each method within each of `BUDGETS`, the lowest of all in bold; – where nothing is as small."""
    best = {path: fronts(_read(path)) for path in files}
    names = [name for name in STYLES if any(name in one for one in best.values())]
    lines = [f"| model | bytes, at most | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for path, methods in best.items():
        for budget in BUDGETS:
            lowest = [min((kl for share, kl, _ in methods.get(name, ()) if share <= budget), default=None) for name in names]
            if all(kl is None for kl in lowest):
                continue
            least = min(kl for kl in lowest if kl is not None)
            cells = ["–" if kl is None else f"**{kl:.3f}**" if kl == least else f"{kl:.3f}" for kl in lowest]
            lines.append(f"| {TITLES.get(path.stem, path.stem)} | 1/{1 / budget:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def draw(files: list[Path], out: Path) -> None:
    """One panel per file of rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(files), figsize=(5.6 * len(files), 4.4), sharey=True, squeeze=False)
    shown: dict[str, object] = {}
    for axis, path in zip(axes[0], files, strict=True):
        for name, points in fronts(_read(path)).items():
            colour, marker = STYLES[name]
            share, kl, error = zip(*points, strict=True)
            look = {"color": colour, "marker": marker, "ms": 11 if marker == "*" else 6}
            shown[name] = axis.errorbar(share, kl, error, lw=1.4, elinewidth=0.8, label=name, **look)
        axis.set(xscale="log", yscale="log", xlim=(1 / 24, 1.1), ylim=(1e-4, 1), title=TITLES.get(path.stem, path.stem))
        ticks = [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]
        axis.set_xticks(ticks, ["1/16", "1/8", "1/4", "1/2", "1"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.set_xlabel("bytes held / bytes of a dense bf16 cache")
    axes[0, 0].set_ylabel("KL to the uncompressed model, nats/token")
    handles = [shown[name] for name in STYLES if name in shown]
    figure.legend(handles=handles, loc="lower center", ncols=5, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.11, 1, 1))
    figure.savefig(out, dpi=150)


def main() -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+", help="results.jsonl of dmc frontier")
    parser.add_argument("--out", type=Path, required=True, help="file of the figure: .png, .svg or .pdf")
    args = parser.parse_args()
    try:
        draw(args.rows, args.out)
        print(table(args.rows))
    except (OSError, ValueError, KeyError) as error:
        print(f"overview: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
