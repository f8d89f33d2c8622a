"""Budgets of evicting policies: the number of entries that a query may see, and which have the highest scores."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

LEAST = 16
"""Lower bound of a budget that is a share of the tokens: shorter texts are kept completely."""

Count = TypeVar("Count", int, Tensor)


def check_count(policy: str, setting: str, value: object, least: int) -> int:
    """Returns the value if it is a whole number that is large enough.

    Raises:
        ValueError: if not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{policy} policy: {setting}={value} must be a whole number, at least {least}")
    return value


def check_entries(policy: str, value: object, sinks: int = 0) -> int | None:
    """Returns ``max_entries`` if it is None or leaves room for an entry behind the sinks.

    Raises:
        ValueError: if not.
    """
    if value is None:
        return None
    try:
        return check_count(policy, "max_entries", value, sinks + 1)
    except ValueError as error:
        raise ValueError(f"{error}: more than the sinks ({sinks})" if sinks else str(error)) from None


def check_share(policy: str, value: object) -> float | None:
    """Returns the value if it is None or a share.

    Raises:
        ValueError: if not.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError(f"{policy} policy: share={value} must be above 0 and at most 1, a part of the tokens so far")
    return float(value)


def of_tokens(share: float, tokens: Count) -> Count:
    """Number of entries that a query may see, itself included, after so many tokens, itself included.

    Args:
        share: of the tokens.
        tokens: a count, or int64 of any shape.
    """
    if isinstance(tokens, Tensor):
        return (tokens.double() * share).ceil().long().clamp(min=LEAST)
    return max(LEAST, math.ceil(tokens * share))


def top(scores: Tensor, among: Tensor, count: int | Tensor) -> Tensor:
    """The entries with the highest scores; of equal scores, those further right.

    Args:
        scores: fp32 ``[R, N]``.
        among: bool ``[R, N]``, entries that take part.
        count: number per row; an int, or int64 ``[R, 1]``.

    Returns:
        bool ``[R, N]``; all that take part if there are at most ``count`` of them.
    """
    if not (among.sum(-1, keepdim=True) > count).any():
        return among
    order = scores.masked_fill(~among, -torch.inf).argsort(dim=-1, stable=True)
    numbers = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, numbers)
    return among & (rank >= scores.shape[-1] - count)
