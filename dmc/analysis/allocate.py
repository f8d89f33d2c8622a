"""Which of several choices each of many items gets, when costs have to stay within a budget."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

_ROUNDING = 1e-9  # relative
Choice = tuple[float, float]
"""(cost, loss)."""


def allocate(items: Sequence[Sequence[Choice]], budget: float) -> list[int]:
    """Choices that make the sum of losses small: greedy on the lower convex hull of each item.

    Starting from the cheapest, the upgrade that saves most loss for its cost is taken as long as one fits. With convex
    items no choice of the same or less total cost has less loss; the budget that stays unused is less than the cost of
    one upgrade.

    Args:
        items: choices of each, at least one, in any order.
        budget: for the sum of costs.

    Returns:
        The index of each item's choice.

    Raises:
        ValueError: if even the cheapest choices are over the budget.
    """
    hulls = [_hull(choices) for choices in items]
    spent = sum(items[number][hull[0]][0] for number, hull in enumerate(hulls))
    if spent > budget * (1 + _ROUNDING):
        raise ValueError(f"the cheapest choices cost {spent:g}, which is over the budget of {budget:g}")
    place = [0] * len(items)
    heap = [(-slope, number) for number in range(len(items)) if (slope := _slope(items[number], hulls[number], 0)) > 0]
    heapq.heapify(heap)
    while heap:
        _, number = heapq.heappop(heap)
        hull, choices = hulls[number], items[number]
        step = choices[hull[place[number] + 1]][0] - choices[hull[place[number]]][0]
        if spent + step > budget * (1 + _ROUNDING):
            continue
        spent += step
        place[number] += 1
        slope = _slope(choices, hull, place[number])
        if slope > 0:
            heapq.heappush(heap, (-slope, number))
    return [hull[at] for hull, at in zip(hulls, place, strict=True)]


def _hull(choices: Sequence[Choice]) -> list[int]:
    """Indices from the cheapest choice to the one of least loss, along which each step saves less for its cost."""
    hull: list[int] = []
    for index in sorted(range(len(choices)), key=lambda i: choices[i]):
        cost, loss = choices[index]
        if hull and loss >= choices[hull[-1]][1]:
            continue
        # Points on a line stay, or a small rest of the budget would find no step that fits.
        while len(hull) > 1 and _rate(choices, hull[-2], hull[-1]) < (1 - _ROUNDING) * _rate(choices, hull[-2], index):
            hull.pop()
        hull.append(index)
    return hull


def _rate(choices: Sequence[Choice], first: int, second: int) -> float:
    return (choices[first][1] - choices[second][1]) / (choices[second][0] - choices[first][0])


def _slope(choices: Sequence[Choice], hull: Sequence[int], place: int) -> float:
    return _rate(choices, hull[place], hull[place + 1]) if place + 1 < len(hull) else 0.0
