"""Which rows no other row beats in bytes and in loss at once, and which leads at a given number of bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

Point = tuple[float, float]
Row = TypeVar("Row")


def front(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other point dominates, by rising first coordinate.

    Lower is better in both coordinates. A point dominates another if it is no worse in both and better in one; of equal
    points the first counts.

    Raises:
        ValueError: if a coordinate is no number.
    """
    if any(math.isnan(value) for point in points for value in point):
        raise ValueError("points of a Pareto front must be numbers")
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
