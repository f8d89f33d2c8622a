"""Means with their standard errors, and those of differences over pairs: what two caches made of the same samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev


def mean(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and its standard error; None for one value."""
    return fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def difference(values: Sequence[float], others: Sequence[float]) -> tuple[float, float | None]:
    """Mean of ``value - other`` over pairs, and its standard error; None for one pair.

    Samples that are hard for one cache are hard for the other, so this error is mostly smaller than that of two separate means.

    Raises:
        ValueError: if the numbers of values are not equal.
    """
    return mean([value - other for value, other in zip(values, others, strict=True)])


def settled(by: float, error: float | None) -> bool:
    """True if a difference is more than twice its standard error; False if it has none."""
    return error is not None and abs(by) > 2 * error


def segment_mean(values: Sequence[float], segments: Sequence[Sequence[int]]) -> float:
    """Mean over a text, from the means of its segments ``(first, end)``."""
    sizes = [end - first for first, end in segments]
    return sum(size * value for size, value in zip(sizes, values, strict=True)) / sum(sizes)
