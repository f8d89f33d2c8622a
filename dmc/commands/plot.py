"""`dmc plot`: figures of what `dmc frontier` measured."""

from __future__ import annotations

import argparse
from pathlib import Path

WIDTHS = {"column": 3.3, "paper": 5.5, "wide": 11.0}
"""Inches: one of two columns, the text of a paper, a slide."""


def add(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    parser.add_argument("rows", nargs="+", metavar="FRONTIER", help="folders of dmc frontier, or results.jsonl: one panel each")
    parser.add_argument("--out", required=True, metavar="FILE", help="the figure: .pdf, .svg or .png")
    parser.add_argument("--measure", default="kl", help="kl (default), perplexity or disagreement")
    parser.add_argument(
        "--curves",
        action="store_true",
        help="a line for each evicting policy and codec over its shares, not the best rows of each method",
    )
    parser.add_argument(
        "--labels", action="store_true", help="number the points that no other point beats; the legend has their budget and codec"
    )
    parser.add_argument("--most", type=int, default=12, help="lines of a panel at most, those of the lowest loss (12)")
    parser.add_argument("--width", metavar="WIDTH", help="inches, or column, paper, wide (5.6 inches for each panel)")


def run(options: argparse.Namespace) -> None:
    """Draws the figure and says what it left out.

    Raises:
        ValueError: if a flag is out of range or rows cannot be read; one sentence.
    """
    from dmc.evaluation.figure import MEASURES, Look, draw

    if options.measure not in MEASURES:
        raise ValueError(f"--measure {options.measure}: known are {', '.join(MEASURES)}")
    if options.most < 1:
        raise ValueError(f"--most must be at least 1, got {options.most}")
    if not Path(options.out).absolute().parent.is_dir():
        raise ValueError(f"--out {options.out}: there is no folder {Path(options.out).absolute().parent}")
    look = Look(options.measure, options.curves, options.labels, options.most, _width(options.width))
    left = draw(options.rows, options.out, look)
    print(f"wrote {options.out}" + (f"; {left} lines with a higher loss were left out (--most {options.most})" if left else ""))


def _width(given: str | None) -> float | None:
    if given is None or given in WIDTHS:
        return WIDTHS.get(given)
    try:
        inches = float(given)
    except ValueError:
        inches = 0.0
    if not 1 <= inches <= 50:
        raise ValueError(f"--width {given}: give inches from 1 to 50, or one of {', '.join(WIDTHS)}")
    return inches
