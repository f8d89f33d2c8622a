"""What the model attends through in one step: new tokens of running sequences, and chunks of prompts, together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dmc.cache.attention import row_attention
from dmc.cache.evict import entries, evict
from dmc.cache.policies import Policy
from dmc.cache.prompt import Prompt
from dmc.cache.rows import Rows
from dmc.functional import rotate

Rope = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Positions, int64 of any shape → (cos, sin), each ``[..., D]`` fp32 or fp64, in the half-split layout."""


class Step:
    """Called once a layer by the model, with the tokens of all parts one after the other.

    Args:
        rows, policy: of the cache.
        slots: int64 ``[S]``, running sequences: one token each, first.
        positions: int64 ``[S]`` of these tokens, at least 1: a prompt went before.
        chunks: prompts and how many of their tokens follow, at least 1 each. The last layer adds it to `Prompt.done`.
        rope: see `Rope`.
        trace: whether to keep the decisions.

    Attributes:
        merges: bool ``[N, H]`` of each layer so far, True where a token was merged; None without ``trace``.
    """

    def __init__(
        self, rows: Rows, policy: Policy, slots: Tensor, positions: Tensor, chunks: Sequence[tuple[Prompt, int]], rope: Rope,
        *, trace: bool = False,
    ) -> None:
        self.merges: list[Tensor] | None = [] if trace else None
        self.rows, self.policy, self.slots, self.positions = rows, policy, slots, positions
        heads = rows.shape.heads
        if len(slots):
            # Repeated per row: [S * H, 1, D] for queries, [S * H, D] for the entry that closes.
            self.now = tuple(table.repeat_interleave(heads, 0)[:, None] for table in rope(positions))
            self.before = tuple(table.repeat_interleave(heads, 0) for table in rope(positions - 1))
            self.following = (positions + 1).repeat_interleave(heads)
        self.chunks = []
        for prompt, tokens in chunks:
            places = prompt.positions(tokens, slots.device)
            self.chunks.append((prompt, tokens, places, rope(places)))

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, alpha: Tensor, omega: Tensor,
    ) -> Tensor:
        """Query ``[N, Hq, D]``, key, value ``[N, H, D]``, not rotated; alpha, omega ``[N, H]`` → as query."""
        mark = self.policy.mark(alpha, omega) if self.policy.marks else None
        parts = [query, key, value, *self.policy.decide(alpha, omega), mark]
        if self.merges is not None:
            self.merges.append(parts[3] != 0)
        sizes = [len(self.slots), *(tokens for _, tokens, _, _ in self.chunks)]
        split = [_cut(part, sizes) for part in parts]
        outs = [self._decode(layer, *(part[0] for part in split))] if sizes[0] else []
        for number, (prompt, tokens, places, table) in enumerate(self.chunks, 1):
            outs.append(prompt.attend(layer, *(part[number] for part in split), places, table))
            if layer == self.rows.shape.layers - 1:
                prompt.done += tokens
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _decode(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, alpha: Tensor, omega: Tensor, mark: Tensor | None,
    ) -> Tensor:
        rows, index = self.rows, self.rows.index(layer, self.slots)
        alpha, omega = alpha.flatten().to(rows.z.dtype), omega.flatten().to(rows.z.dtype)
        size = key.shape[-1]
        numerators, z = rows.numerators[index], rows.z[index]

        closing = alpha == 0
        if closing.any():
            self._close(index, closing, numerators, z)
        token = torch.cat([key, value], dim=-1).view(-1, 2 * size).to(numerators.dtype)
        numerators = alpha[:, None] * numerators + omega[:, None] * token
        z = alpha * z + omega
        rows.numerators[index], rows.z[index] = numerators, z

        own = numerators / z[:, None]
        own_key = rotate(own[:, None, :size], self.now)[:, 0]
        queries = rotate(query.reshape(len(index), -1, size).to(own.dtype), self.now)  # [S * H, G, D]
        out, weight = row_attention(rows, index, queries, own_key, own[:, size:], watch=self.policy.watches)
        if rows.storage.scored:
            self._score(index, alpha, mark, weight)
        if self.policy.evicts:
            there = entries(rows, index, self.following)
            evict(rows, index, there, self.policy.keep(there))
        return out.view(query.shape).to(query.dtype)

    def _close(self, index: Tensor, closing: Tensor, numerators: Tensor, z: Tensor) -> None:
        """The open entries of some rows become final ones."""
        every = bool(closing.all())
        some = slice(None) if every else closing
        done = numerators[some] / z[some, None]
        keys, values = done.chunk(2, dim=-1)
        marks = {}
        if self.rows.storage.placed:
            marks["place"] = (self.following[some] - 2).int()
        if self.rows.storage.scored:
            marks["score"] = self.rows.tail_score[index[some]]
        self.rows.append(index[some], rotate(keys, tuple(table[some] for table in self.before)), values, marks)

    def _score(self, index: Tensor, alpha: Tensor, mark: Tensor | None, weight: Tensor | None) -> None:
        score = torch.zeros(len(index), device=index.device) if mark is None else mark.flatten().float()
        if self.policy.watches != "last":
            score = score + alpha.float() * self.rows.tail_score[index]
        self.rows.tail_score[index] = score if weight is None else score + weight


def _cut(part: Tensor | None, sizes: list[int]) -> Sequence[Tensor | None]:
    """Cuts a tensor along its first dimension; None gives None for each piece."""
    return [None] * len(sizes) if part is None else part.split(sizes)
