"""The order of the sequences of an epoch: a pseudo-random permutation as a function of (seed, epoch, index).

Corpora of up to `LISTED` sequences take a permutation that torch draws and the process keeps (8 bytes a sequence).
Larger ones take a keyed permutation that is computed index by index and keeps nothing: a balanced Feistel network
over the next even number of bits, walked along its cycle until it lands inside (format-preserving encryption as in
Black and Rogaway, CT-RSA 2002). Both depend on nothing but their arguments, so any place of any epoch is known at once.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

# 2^24 sequences: 128 MiB of indices, 69 thousand million tokens at 4096 a sequence.
LISTED = 2**24
ROUNDS = 8  # four are the least that resists statistics; a walk costs 8 small multiplications
_MASK = 2**64 - 1


class Shuffle:
    """The orders of all epochs over ``count`` sequences."""

    def __init__(self, count: int, seed: int, *, listed: int = LISTED) -> None:
        self.count, self._seed, self._listed = count, seed, listed
        self._epoch = -1
        self._order: Tensor | FeistelPermutation | None = None

    def place(self, sample: int) -> int:
        """The sequence at place ``sample`` of the endless order: every sequence once in each run of ``count``."""
        epoch, within = divmod(sample, self.count)
        if self._order is None or epoch != self._epoch:
            self._epoch, self._order = epoch, self._draw(epoch)
        return int(self._order[within])

    def _draw(self, epoch: int) -> Tensor | FeistelPermutation:
        if self.count > self._listed:
            return FeistelPermutation(self.count, f"{self._seed} {epoch}")
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + epoch) % 2**63)
        return torch.randperm(self.count, generator=generator)


class FeistelPermutation:
    """A bijection of ``range(count)``, chosen by ``key``; ``permutation[i]`` takes constant time and memory."""

    def __init__(self, count: int, key: str) -> None:
        if count < 1:
            raise ValueError(f"a permutation of {count} things: there must be at least one")
        self._count = count
        self._half = max(1, (((count - 1).bit_length()) + 1) // 2)  # bits of each of the two halves
        digest = hashlib.shake_256(key.encode()).digest(8 * ROUNDS)
        self._keys = [int.from_bytes(digest[8 * r : 8 * r + 8], "little") for r in range(ROUNDS)]

    def __len__(self) -> int:
        """Things permuted."""
        return self._count

    def __getitem__(self, index: int) -> int:
        """Where ``index`` goes.

        Raises:
            IndexError: if it lies outside ``range(count)``.
        """
        if not 0 <= index < self._count:
            raise IndexError(f"index {index} of a permutation of {self._count}")
        value = self._encrypt(index)
        while value >= self._count:  # at most four times on average: the domain is below 4 x count
            value = self._encrypt(value)
        return value

    def _encrypt(self, value: int) -> int:
        mask = (1 << self._half) - 1
        left, right = value >> self._half, value & mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return left << self._half | right


def _mix(value: int) -> int:
    """The finaliser of splitmix64 (Steele et al., OOPSLA 2014): every bit of 64 depends on every other."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK
    return value ^ value >> 31
