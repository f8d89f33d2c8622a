"""Prefilling in chunks.

Queries attend to entries as the model computed them, for any division into chunks, so the full-precision entries of all
layers are kept outside of the page pool until the prompt is done. Then all pages are encoded at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmc.cache.policies import Policy
from dmc.cache.policies.entries import Moments, PromptEntries
from dmc.cache.reading import asking
from dmc.cache.reading.prompt_attention import Seen, compact, prompt_attention
from dmc.functional import accumulate_numerators, rotate_rounded
from dmc.kernels.backend import Backend

NONE = torch.iinfo(torch.int32).max  # position of a missing entry: no query is that late


@dataclass
class Layer:
    """One layer of a prompt: final entries so far, and the accumulating entry.

    Attributes:
        keys, values: ``[H, N, D]`` in the model's dtype, rotated.
        positions: int32 ``[H, N]``, positions of the newest tokens; `NONE` where a head has fewer than N entries.
        scores: fp32 ``[H, N]``, or None.
        numerators, z: ``[H, 2 D]`` and ``[H]`` of the accumulating entry.
        accumulating_score: fp32 ``[H]``, or None.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    scores: Tensor | None
    numerators: Tensor
    z: Tensor
    accumulating_score: Tensor | None = None


class Prompt:
    """Uncompressed state of one prompt.

    Args:
        layers: L.
        policy: which entries exist.
        backend: of its attention.

    Attributes:
        done: tokens that have gone through all layers.
        layers: state of each, None before the first chunk.
        queries: with `Policy.last_queries` the last ones of each layer so far, rotated, ``[Hq, n, D]``.
        moments: with `Policy.query_moments` those of all queries of each layer so far.
        rope: of the model, set when its first chunk is made ready.
    """

    def __init__(self, layers: int, policy: Policy, backend: Backend) -> None:
        self.policy, self.backend, self.done = policy, backend, 0
        self.layers: list[Layer | None] = [None] * layers
        self.queries: list[Tensor | None] = [None] * layers
        self.moments: list[Moments | None] = [None] * layers
        self.rope: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        tensors = [value for layer in self.layers if layer for value in vars(layer).values() if value is not None]
        tensors += [queries for queries in self.queries if queries is not None]
        tensors += [part for moments in self.moments if moments for part in (moments.total, moments.products)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        """Positions whose RoPE `attend` needs for a chunk of so many tokens: the accumulating entry's, then the chunk's."""
        return torch.arange(self.done - (self.done > 0), self.done + tokens, device=device)

    def attend(
        self,
        number: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        alpha: Tensor,
        omega: Tensor,
        late: Tensor | None,
        positions: Tensor,
        table: tuple[Tensor, Tensor],
    ) -> Tensor:
        """The next chunk in one layer; the caller adds its length to `done` after the last layer.

        Args:
            number: of the layer.
            query: ``[T, Hq, D]``; key, value ``[T, H, D]``; not rotated.
            alpha, omega: ``[T, H]``, as the policy decided.
            late: scores ``[T, H]`` of `Policy.arrival_hidden`, or None; late decisions are in `dmc.cache.reading.late_prompt`.
            positions: of `positions`.
            table: (cos, sin) of them.

        Returns:
            ``[T, Hq, D]``.
        """
        past, first, tokens = self.layers[number], self.done, len(query)
        states = states_of(past, key, value, alpha.T, omega.T, merges=self.policy.merges)
        lead = states.alpha.shape[1] - tokens  # 1 if the accumulating entry of the last chunk comes before this chunk's tokens
        size, dtype = query.shape[-1], query.dtype
        keys, values = rotate_rounded(states.mean[..., :size], table).to(dtype), states.mean[..., size:].to(dtype)

        ends = torch.cat([states.alpha[:, 1:] == 0, states.alpha.new_zeros(len(alpha.T), 1, dtype=torch.bool)], dim=-1)
        chosen, counts = compact(ends)
        there = torch.arange(chosen.shape[1], device=query.device) < counts[:, None]
        newest = torch.where(there, chosen + first - lead, NONE).int()
        if states.merged:
            final = chosen.clamp(max=lead + tokens - 1)[..., None].expand(-1, -1, size)
            entries = [keys.gather(1, final), values.gather(1, final), newest]
        else:
            entries = [keys[:, :-1], values[:, :-1], newest]
        if past is not None:
            entries = [torch.cat(pair, dim=1) for pair in zip((past.keys, past.values, past.positions), entries, strict=True)]
        rising = past is None or not self.policy.merges
        seen = Seen(*entries, keys[:, lead:], values[:, lead:], positions[lead:], states.merged, rising)
        turned = rotate_rounded(query.transpose(0, 1), tuple(part[lead:] for part in table))
        out, gathered = prompt_attention(turned, seen, self.policy, self.backend)
        self._note(number, query, turned)
        arrived = late
        if late is None and self.policy.scored and gathered is None:
            arrived = asking.numbers(self.policy, "arrival", key, value, positions[lead:], shape=key.shape[:2])
        scores, accumulating_score = self._scores(past, gathered, ends, counts, None if arrived is None else arrived.T)
        accumulating = states.numerators[:, -1].clone(), states.z[:, -1].clone()
        self.layers[number] = self._forget(Layer(*entries, scores, *accumulating, accumulating_score), first + tokens)
        return out.transpose(0, 1)

    def final(self, number: int) -> tuple[Layer, Tensor]:
        """Entries of a layer that go into pages when the prompt is done, left-aligned, and their number per head."""
        layer = self.layers[number]
        if not self.policy.evicts:
            return select(layer, layer.positions != NONE)
        positions = layer.positions.masked_fill(layer.positions == NONE, -1)
        following = torch.full((len(positions),), self.done, device=positions.device)
        queries = self.queries[number]
        there = PromptEntries(
            positions,
            layer.scores,
            len(positions),
            following,
            number,
            len(self.layers),
            layer.keys,
            layer.values,
            self._newest(layer),
            None if queries is None else queries.unflatten(0, (len(positions), -1)),
            self.moments[number],
            self.rope,
        )
        keep = asking.kept(self.policy, "keep_prompt", there)
        if (written := asking.rewritten(self.policy, there, keep)) is not None:
            layer = dataclasses.replace(layer, keys=written[0].to(layer.keys), values=written[1].to(layer.values))
        return select(layer, keep)

    def _newest(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Key (rotated) and value ``[H, D]`` of the newest token, if nothing merges."""
        size = layer.keys.shape[-1]
        mean = (layer.numerators / layer.z[:, None]).to(layer.keys.dtype)
        at = torch.full((len(mean), 1), self.done - 1, device=mean.device)
        return rotate_rounded(mean[:, None, :size], self.rope(at))[:, 0], mean[:, size:]

    def _note(self, number: int, query: Tensor, turned: Tensor) -> None:
        """Keeps the data that the policy declares about a chunk's queries ``[T, Hq, D]``, rotated ``[Hq, T, D]``."""
        if self.policy.last_queries:
            before = self.queries[number]
            both = turned if before is None else torch.cat([before, turned], dim=1)
            self.queries[number] = both[:, -self.policy.last_queries :].clone()
        if self.policy.query_moments:
            before, new = self.moments[number], Moments.of(query)
            self.moments[number] = new if before is None else before + new

    def _scores(
        self, past: Layer | None, gathered: tuple[Tensor, Tensor] | None, ends: Tensor, counts: Tensor, arrived: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        """Scores of final entries, and of the accumulating one. Each token's score is added to the entry that contains it.
        ``arrived [H, T]``: scores at arrival."""
        heads, states = ends.shape
        if not self.policy.scored:
            return None, torch.zeros(heads, device=ends.device)
        own = torch.zeros(heads, states, device=ends.device)
        fresh = past is None or self.policy.statistics == "last"
        if not fresh:
            own[:, 0] = past.accumulating_score
        before = 0 if past is None else past.positions.shape[1]
        old = torch.zeros(heads, before, device=ends.device) if fresh else past.scores
        tokens = states - (past is not None)
        new = torch.zeros(heads, int(counts.max()) + 1, device=ends.device)
        if gathered is not None or arrived is not None:
            own[:, -tokens:] += arrived if gathered is None else gathered[1]
        new.scatter_add_(1, ends.cumsum(-1) - ends.long(), own)
        accumulating = new.gather(1, counts[:, None])[:, 0]
        none = torch.arange(new.shape[1] - 1, device=new.device) >= counts[:, None]
        new = torch.cat([old, new[:, :-1].masked_fill(none, 0.0)], dim=1)
        return (new if gathered is None else new + gathered[0]), accumulating

    def _forget(self, layer: Layer, following: int) -> Layer:
        """The layer without the entries that no later query sees."""
        if not self.policy.evicts or not layer.positions.numel():
            return layer
        query = torch.full((len(layer.positions), 1), following, device=layer.positions.device)
        sight = asking.seen(self.policy, layer.positions, query)
        return layer if sight is None else select(layer, sight[:, 0] & (layer.positions != NONE))[0]


@dataclass(frozen=True)
class _States:
    """Intermediate states of a chunk, after the last one's accumulating entry: alpha, z ``[H, T]``, the rest ``[H, T, 2 D]``."""

    alpha: Tensor
    numerators: Tensor
    z: Tensor
    mean: Tensor
    merged: bool


def states_of(past: Any, key: Tensor, value: Tensor, alpha: Tensor, omega: Tensor, *, merges: bool) -> _States:
    """Intermediate states of tokens after ``past``, a layer's state or None.

    ``merges``: if the policy can merge; if not, a mean is a token, in the model's dtype.
    """
    x = torch.cat([key, value], dim=-1).transpose(0, 1)
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, alpha, omega = x.to(work if merges else x.dtype), alpha.to(work), omega.to(work)
    if past is None:
        alpha = torch.cat([torch.zeros_like(alpha[:, :1]), alpha[:, 1:]], dim=1)  # the first token starts an entry
    else:
        x = torch.cat([(past.numerators / past.z[:, None])[:, None].to(x.dtype), x], dim=1)
        alpha = torch.cat([torch.zeros_like(alpha[:, :1]), alpha], dim=1)
        omega = torch.cat([past.z[:, None], omega], dim=1)
    merged = bool(alpha.any())
    if merged:
        numerators, z = (part[0] for part in accumulate_numerators(x[None], alpha[None], omega[None]))
        return _States(alpha, numerators, z, numerators / z[..., None], merged)
    return _States(alpha, x[:, -1:].to(work) * omega[:, -1:, None], omega, x, merged)


def select(layer: Layer, kept: Tensor) -> tuple[Layer, Tensor]:
    """The entries that ``kept [H, N]`` names, left-aligned, and their counts ``[H]``."""
    counts = kept.sum(-1)
    most = int(counts.max())
    if most == kept.shape[1] and bool(kept.all()):
        return layer, counts
    order = kept.int().argsort(dim=-1, descending=True, stable=True)[:, :most]
    wide = order[..., None].expand(-1, -1, layer.keys.shape[-1])
    there = torch.arange(most, device=kept.device) < counts[:, None]
    positions = torch.where(there, layer.positions.gather(1, order), NONE)
    scores = None if layer.scores is None else layer.scores.gather(1, order)
    return Layer(
        layer.keys.gather(1, wide),
        layer.values.gather(1, wide),
        positions,
        scores,
        layer.numerators,
        layer.z,
        layer.accumulating_score,
    ), counts
