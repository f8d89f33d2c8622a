"""From a policy of your own to a figure: `strided.py` next to policies of the package, on the small base model.

    python examples/own_policy.py --out runs/own-policy         # a minute with one CPU core; the notebook does the same

It writes results.jsonl, report.md and curves.png into the folder, and prints paired differences to H2O.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dmc.cli import main

BASE = Path(__file__).resolve().parents[1] / "checkpoints" / "base"
OWN = [f"strided:Strided:recent=64,stride={stride}" for stride in (2, 4, 16)]  # module:Class:settings
KNOWN = ["h2o", "streaming"]  # at each budget


def run(out: Path, windows: int, scored: int) -> int:
    """Measures the policies, compares them and draws the figure; returns the exit code of the first step that fails, else 0."""
    grid = ["--policies", *OWN, *KNOWN, "--codecs", "dense:dtype=bf16", "--budgets", "1/2", "1/4", "1/8"]
    sizes = ["--prompt", "448", "--scored", str(scored), "--windows", str(windows)]
    to = "h2o:share=0.25 x dense:dtype=bf16"
    for command in (
        ["frontier", "--base", str(BASE), "--out", str(out), *grid, *sizes],
        ["compare", str(out), "--to", to, "--json", str(out / "differences.json")],
        ["plot", str(out), "--out", str(out / "curves.png")],
    ):
        if code := main(command):
            return code
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/own-policy"), help="folder for results and figure")
    parser.add_argument("--windows", type=int, default=4, help="windows of the text (4); more give smaller standard errors")
    parser.add_argument("--scored", type=int, default=64, help="scored tokens of each window (64)")
    options = parser.parse_args()
    raise SystemExit(run(options.out, options.windows, options.scored))
