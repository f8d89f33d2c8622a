"""The cache's part of one step: attention of new tokens of running sequences and of chunks of prompts, together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dmc.cache.policies import Policy
from dmc.cache.reading import asking, growing, late
from dmc.cache.reading.late_prompt import LatePrompt
from dmc.cache.reading.plan import Plan, plans
from dmc.cache.reading.prompt import Prompt
from dmc.cache.reading.reader import Reader
from dmc.cache.storage.evict import entries, evict
from dmc.cache.storage.rows import Rows

Rope = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Positions, int64 of any shape → (cos, sin), each ``[..., D]`` fp32 or fp64, in the half-split layout."""


class Step:
    """Called by the model once per layer, layer after layer, with the tokens of all parts one after the other.

    If kernels write the rows (`dmc.cache.reading.onpages`), each layer appends its tokens, encodes the pages that they fill and
    attends, without waiting for the device. Else PyTorch writes the rows. If in addition nothing merges, the accumulating
    entries of all layers become final when the step is made, and the new ones are written after the last layer, so each layer
    only computes attention. With a window, tokens leave their rings after the last layer, in all layers at once.

    Args:
        rows, policy: of the cache.
        readers: of each layer.
        slots: int64 ``[S]``, running sequences: one token each, first.
        positions: int64 ``[S]`` of these tokens, at least 1, since a prompt precedes them.
        chunks: prompts and the number of their tokens in this step, at least 1 each. The last layer adds it to `Prompt.done`.
        rope: see `Rope`.
        merges: whether the model can decide to merge.
        trace: whether to keep the decisions.
        closed: bool ``[L, S * H]``, rows of running sequences that get no further final entry: a token is merged, or dropped by
            a policy that drops, whatever was decided; None: none.

    Attributes:
        merges: bool ``[N, H]`` of each layer so far, True where a token was merged; None without ``trace``. With a window,
            of the token that left it as each came.
        reads_hidden: whether calls need hidden states (`Policy.arrival_hidden`).
    """

    def __init__(
        self,
        rows: Rows,
        policy: Policy,
        readers: Sequence[Reader],
        slots: Tensor,
        positions: Tensor,
        chunks: Sequence[tuple[Prompt | LatePrompt, int]],
        rope: Rope,
        *,
        merges: bool = True,
        trace: bool = False,
        closed: Tensor | None = None,
    ) -> None:
        self.closed = closed
        self.merges: list[Tensor] | None = [] if trace else None
        self.entering: list[tuple] = []  # with a window: the new tokens of each layer so far
        self.left: list[list[Tensor]] = []  # with a window: decisions about the prompts' tokens that left it, by layer
        self.rows, self.policy, self.readers, self.slots = rows, policy, readers, slots
        self.reads_hidden = policy.reads_hidden
        self.grows = all(reader.writes for reader in readers)
        self.chunks = []
        for prompt, tokens in chunks:
            prompt.rope = rope
            at = prompt.positions(tokens, slots.device)
            self.chunks.append((prompt, tokens, at, rope(at)))
        self.settled = not (merges and policy.merges)
        assert closed is None or policy.ring is not None or not self.settled, "these rows can neither merge nor drop a token"
        if len(slots) and policy.ring is not None:
            self._prepare_late(slots, positions, rope)
        elif len(slots):
            self.index = rows.indices(slots)  # [L, S * H]
            if self.grows:
                growing.make_room(rows, self.index, closed)
                self.table_index = torch.arange(1, 2 * len(slots), 2, device=slots.device)  # rows of the table: the odd ones
                self.table = rope(torch.stack([positions - 1, positions], dim=1).flatten())  # [2 S, D]
                self.now = _signed(tuple(x[1::2] for x in self.table))
                ending = rows.z.new_zeros(self.index.shape[1])
                self.settle = (ending, ending + 1) if self.settled else None  # alpha and omega if nothing merges
                return
            self.now, self.before = (_signed(rope(each)) for each in (positions, positions - 1))  # [S, 1, D]
            self.following = (positions + 1).repeat_interleave(rows.shape.heads)
            self.plans: list[Plan | None] = [None] * rows.shape.layers
            self.tokens: list[Tensor] = []  # if nothing merges: the next accumulating entries of each layer so far
            for numbers in rows.layers_alike() if self.settled else ():
                self._finish_all(numbers)

    def __call__(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        alpha: Tensor,
        omega: Tensor,
        late: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Query ``[N, Hq, D]``, key, value ``[N, H, D]``, not rotated; alpha, omega, late ``[N, H]`` → as query.

        If the model decides when tokens leave a window, alpha is the logit at arrival, and late is added to the logit of the
        token that leaves when this one arrives (`dmc.cache.reading.late`). Hidden ``[N, hidden]``, if it `reads_hidden`.
        """
        if self.policy.ring is None:  # nothing is decided late, so scores at arrival can go the same way
            shape = key.shape[:2]
            late = asking.numbers(self.policy, "arrival_hidden", layer, hidden, shape=shape) if self.reads_hidden else None
        parts = [query, key, value, *asking.decisions(self.policy, alpha, omega), late]
        if self.closed is not None and self.policy.ring is None:
            forced = self.closed[layer].view(len(self.slots), -1)
            parts[3] = torch.cat([parts[3][: len(forced)].masked_fill(forced, 1.0), parts[3][len(forced) :]])
        if self.merges is not None and self.policy.ring is None:
            self.merges.append(parts[3] != 0)
        decode: Callable[..., Tensor] = self._settled if self.settled else self._merging
        if self.policy.ring is not None:
            decode = self._late
        elif len(self.slots) and self.grows:
            decode = self._grown
        if not self.chunks:
            out = decode(layer, *parts)
            self._note(layer, [])
            return out
        sizes = [len(self.slots), *(tokens for _, tokens, _, _ in self.chunks)]
        split = [_cut(part, sizes) for part in parts]
        outs, left = [decode(layer, *(part[0] for part in split))] if sizes[0] else [], []
        for number, (prompt, tokens, at, table) in enumerate(self.chunks, 1):
            outs.append(prompt.attend(layer, *(part[number] for part in split), at, table))
            left.append(getattr(prompt, "merged", None))
            if layer == self.rows.shape.layers - 1:
                prompt.done += tokens
        self._note(layer, left)
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _note(self, layer: int, left: list[Tensor]) -> None:
        """With a window, keeps the decisions about the tokens that left it: of running sequences, then of prompts."""
        if self.merges is None or self.policy.ring is None:
            return
        self.left.append(left)
        if layer == self.rows.shape.layers - 1:
            running = [[merged] for merged in self.gone_merged] if len(self.slots) else [[] for _ in self.left]
            self.merges += [torch.cat([*some, *prompts]) for some, prompts in zip(running, self.left, strict=True)]

    # ------------------------------------------------------------------------------------ by kernels

    def _grown(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, alpha: Tensor, omega: Tensor, _: Tensor | None
    ) -> Tensor:
        index, size, reader = self.index[layer], query.shape[-1], self.readers[layer]
        alpha, omega = self.settle or (alpha.flatten(), omega.flatten())
        key, value = key.reshape(-1, size), value.reshape(-1, size)
        own = reader.append(self.rows, index, key, value, alpha, omega, self.table_index, self.table)
        reader.encode(self.rows, index)
        query = _turn(query.to(own[0].dtype), self.now).to(self.rows.shape.dtype)
        return reader.attend(self.rows, index, query.view(len(index), -1, size), *own)[0].view(query.shape)

    # ------------------------------------------------------------------------------------ behind a window

    def _prepare_late(self, slots: Tensor, positions: Tensor, rope: Rope) -> None:
        rows = self.rows
        self.index = rows.indices(slots)
        if self.grows:
            growing.make_room(rows, self.index, self.closed)
        self.now = _signed(rope(positions))
        self.gone = late.leaving(self.policy.ring, positions, rope, merges=self.policy.merges)

    def _late(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, logits: Tensor, omega: Tensor, ahead: Tensor | None
    ) -> Tensor:
        rows, index, size, work = self.rows, self.index[layer], query.shape[-1], self.rows.z.dtype
        turned, values = _turn(key.to(work), self.now).reshape(-1, size), value.to(work).reshape(-1, size)
        queries = _turn(query.to(work), self.now)
        out, _ = self.readers[layer].attend(rows, index, queries.view(len(index), -1, size), turned, values)
        self.entering.append((key.reshape(-1, size), turned, values, logits.flatten(), omega.flatten(), ahead))
        if layer == rows.shape.layers - 1:
            self._leave()
        return out.view(query.shape).to(query.dtype)

    def _leave(self) -> None:
        """Moves the oldest tokens out of their rings and the newest ones in, in every layer."""
        rows, work, shape = self.rows, self.rows.z.dtype, (-1, len(self.slots), self.rows.shape.heads)
        self.gone_merged: list[Tensor] = [None] * rows.shape.layers
        for numbers in rows.layers_alike():
            entering = zip(*(self.entering[number] for number in numbers), strict=True)
            parts = [None if part[0] is None else torch.cat([x.flatten() for x in part]).to(work) for part in entering]
            parts[:3] = [part.view(-1, rows.shape.head_size) for part in parts[:3]]
            merged = late.leave(
                rows,
                rows.packings[numbers[0]],
                self.policy,
                self.index[numbers].flatten(),
                self.gone.repeat(len(numbers)),
                *parts,
                self.readers[numbers[0]] if self.grows else None,
                None if self.closed is None else self.closed[numbers].flatten(),
            )
            for number, each in zip(numbers, (merged & self.policy.merges).view(shape), strict=True):
                self.gone_merged[number] = each

    # ------------------------------------------------------------------------------------ nothing merges

    def _finish_all(self, numbers: list[int]) -> None:
        """Makes every accumulating entry of some layers with equal storage final."""
        rows, layers, size = self.rows, len(numbers), self.rows.shape.head_size
        index = self.index[numbers].flatten()
        means = rows.numerators[index] / rows.z[index, None]
        means = means.view(layers, len(self.slots), -1, 2 * size)
        keys, values = _turn(means[..., :size], self.before).view(-1, size), means[..., size:].reshape(-1, size)
        metadata = {}
        if rows.storage.with_positions:
            metadata["position"] = (self.following - 2).int().repeat(layers)
        if rows.storage.scored:
            metadata["score"] = rows.accumulating_score[index]
        rows.append(index, keys, values, metadata)
        if self.readers[numbers[0]].plans:
            for number, plan in zip(numbers, plans(rows, self.index[numbers]), strict=True):
                self.plans[number] = plan

    def _settled(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, alpha: Tensor, omega: Tensor, arrived: Tensor | None
    ) -> Tensor:
        rows, dtype = self.rows, self.rows.z.dtype
        key, value = key.to(dtype), value.to(dtype)
        self.tokens.append(torch.cat([key, value], dim=-1))
        if layer == rows.shape.layers - 1:
            index = self.index.flatten()
            rows.numerators[index] = torch.stack(self.tokens).view(len(index), -1)
            rows.z[index] = 1.0
        if rows.storage.scored and self.policy.statistics is None and not self.reads_hidden:
            at = self.following.view(len(self.slots), -1)[:, 0] - 1
            arrived = asking.numbers(self.policy, "arrival", key, value, at, shape=key.shape[:2])
        return self._attend(layer, query, _turn(key, self.now), value, alpha, arrived)

    # ------------------------------------------------------------------------------------ merging

    def _merging(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, alpha: Tensor, omega: Tensor, _: Tensor | None
    ) -> Tensor:
        rows, index = self.rows, self.index[layer]
        alpha, omega = alpha.flatten().to(rows.z.dtype), omega.flatten().to(rows.z.dtype)
        size = key.shape[-1]
        numerators, z = rows.numerators[index], rows.z[index]

        ending = alpha == 0
        if ending.any():
            self._finish(index, ending, numerators, z)
        token = torch.cat([key, value], dim=-1).view(-1, 2 * size).to(numerators.dtype)
        numerators = alpha[:, None] * numerators + omega[:, None] * token
        z = alpha * z + omega
        rows.numerators[index], rows.z[index] = numerators, z
        own = (numerators / z[:, None]).view(*key.shape[:2], -1)
        return self._attend(layer, query, _turn(own[..., :size], self.now), own[..., size:], alpha)

    def _finish(self, index: Tensor, ending: Tensor, numerators: Tensor, z: Tensor) -> None:
        """Makes the accumulating entries of some rows final."""
        size, heads = self.rows.shape.head_size, self.rows.shape.heads
        done = numerators / z[:, None]
        keys = _turn(done[:, :size].view(-1, heads, size), self.before).view(-1, size)
        some = slice(None) if bool(ending.all()) else ending
        metadata = {}
        if self.rows.storage.with_positions:
            metadata["position"] = (self.following[some] - 2).int()
        if self.rows.storage.scored:
            metadata["score"] = self.rows.accumulating_score[index[some]]
        self.rows.append(index[some], keys[some], done[some, size:], metadata)

    # ------------------------------------------------------------------------------------ both

    def _attend(
        self, layer: int, query: Tensor, own_key: Tensor, own_value: Tensor, alpha: Tensor, arrived: Tensor | None = None
    ) -> Tensor:
        """Attention of queries over their rows and their own rotated states ``[S, H, D]``; then scores and eviction.

        ``arrived``: fp32 ``[S, H]``, scores of the new tokens by `Policy.arrival` or `Policy.arrival_hidden`."""
        rows, index, size = self.rows, self.index[layer], query.shape[-1]
        queries = _turn(query.to(own_key.dtype), self.now).view(len(index), -1, size)  # [S * H, G, D]
        out, weight = self.readers[layer].attend(
            rows, index, queries, own_key.reshape(-1, size), own_value.reshape(-1, size), self.plans[layer]
        )
        if rows.storage.scored:
            self._score(index, alpha.flatten(), weight if arrived is None else arrived.flatten())
        if self.policy.evicts_later:
            there = entries(rows, index, self.following)
            evict(rows, index, there, asking.kept(self.policy, "keep", there))
        return out.view(query.shape).to(query.dtype)

    def _score(self, index: Tensor, alpha: Tensor, weight: Tensor | None) -> None:
        score = torch.zeros(len(index), device=index.device)
        if self.policy.statistics != "last":
            score = score + alpha.float() * self.rows.accumulating_score[index]
        self.rows.accumulating_score[index] = score if weight is None else score + weight


def _signed(table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(cos, sin), each ``[S, D]`` → ``[S, 1, D]`` for `_turn`."""
    cos, sin = table
    first, second = sin.chunk(2, dim=-1)
    return cos[:, None], torch.cat([-first, second], dim=-1)[:, None]


def _turn(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """`dmc.functional.rotate` of ``[..., S, heads, D]`` in fewer operations."""
    cos, sin = table
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def _cut(part: Tensor | None, sizes: list[int]) -> Sequence[Tensor | None]:
    """Cuts a tensor along its first dimension; None gives None for each part."""
    return [None] * len(sizes) if part is None else part.split(sizes)
