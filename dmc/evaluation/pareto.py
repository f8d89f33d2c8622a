"""Which rows no other row beats in bytes and in loss at once, and which leads at a given number of bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

Point = tuple[float, float]
Row = TypeVar("Row")


def front(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other point dominates, by rising first coordinate.

    Lower is better in both coordinates. A point dominates another if it is not worse in both and better in one; of equal
    points the first counts.

    Raises:
        ValueError: if a coordinate is NaN.
    """
    if any(math.isnan(value) for point in points for value in point):
        raise ValueError("points of a Pareto front must be numbers, not NaN")
    kept, least = [], math.inf
    for index in sorted(range(len(points)), key=lambda i: (points[i], i)):
        if points[index][1] < least or not kept:
            kept.append(index)
            least = points[index][1]
    return kept


def leader(rows: Sequence[Row], points: Sequence[Point], most: float) -> Row | None:
    """The row with the least second coordinate among those whose first is at most ``most``; None if there is none.

    Of equal ones the one with the smaller first coordinate leads, then the earlier one.
    """
    able = [i for i, point in enumerate(points) if point[0] <= most]
    return rows[min(able, key=lambda i: (points[i][1], points[i][0], i))] if able else None


def between(points: Sequence[Point], size: float, *, least: float = 1e-6) -> float | None:
    """The second coordinate of a front at a given first one, on straight lines in logarithms of both.

    Args:
        points: any; their front is taken.
        size: first coordinate. Above the largest of the front, the front's least second coordinate is the answer: holding
            fewer bytes is allowed.
        least: second coordinates below this count as this.

    Returns:
        None if every point is larger than ``size``.
    """
    best = [(point[0], max(point[1], least)) for point in (points[index] for index in front(points))]
    below = [point for point in best if point[0] <= size]
    if len(below) in (0, len(best)):
        return below[-1][1] if below else None
    (x0, y0), (x1, y1) = below[-1], best[len(below)]
    part = math.log(size / x0) / math.log(x1 / x0)
    return y0 * (y1 / y0) ** part
