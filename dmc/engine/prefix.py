"""Prompts that several sequences have in common."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from dmc.engine.sequence import Sequence


@dataclass(frozen=True)
class Read:
    """A prompt that was read once and is kept for others that wait with the same one.

    Attributes:
        prompt: its tokens.
        slot: of the cache, where it ends with the prompt.
        logits: ``[V]`` after it.
    """

    prompt: list[int]
    slot: int
    logits: Tensor


def donor(prompt: list[int], running: Iterable[Sequence], kept: Iterable[Read]) -> tuple[int | None, int]:
    """The slot whose prompt begins with the most tokens of ``prompt``, and how many; (None, 0) if none has any.

    Only prompts count: entries of generated tokens come from attention over encoded pages, those of a prompt do not.
    """
    best: tuple[int | None, int] = (None, 0)
    holders: list[Sequence | Read] = [*running, *kept]
    for other, slot in [(holder.prompt, holder.slot) for holder in holders]:
        common = _common(prompt, other)
        if common > best[1]:
            best = (slot, common)
    return best


def _common(one: list[int], two: list[int]) -> int:
    """Length of the common beginning, by bisection: comparing slices is fast."""
    low, high = 0, min(len(one), len(two))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == two[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
