"""Prefilling under a policy with a window; `dmc.cache.reading.late` describes the decisions about tokens that leave it.

As in `dmc.cache.reading.prompt`, queries attend to uncompressed states as the model computed them, for any division into
chunks: to recent tokens as they are, to final entries, and if tokens merge to the accumulating entry as of the query.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dmc.cache.policies import Policy
from dmc.cache.reading import asking
from dmc.cache.reading.prompt import NONE, Layer, select, states_of
from dmc.cache.reading.prompt_attention import compact
from dmc.functional import rotate_rounded

_SCORES = {"cpu": 1 << 18}  # scores held at once, over all heads: the fewer, the larger the part of them that queries see
_SCORES_ELSEWHERE = 1 << 24


@dataclass
class Recent:
    """The newest r tokens of one layer, at most the window: ``[H, r, D]`` and ``[H, r]`` each."""

    key: Tensor
    turned: Tensor
    value: Tensor
    logits: Tensor
    omega: Tensor

    def after(self, new: Recent) -> Recent:
        """These tokens followed by newer ones."""
        return Recent(*(torch.cat([mine, getattr(new, name)], 1) for name, mine in vars(self).items()))

    def part(self, start: int, stop: int | None = None) -> Recent:
        """A copy of some of the tokens, which does not keep the others' memory."""
        return Recent(*(x[:, start:stop].clone() for x in vars(self).values()))


@dataclass
class _Layer:
    """State of one layer: final entries, the accumulating entry, and the newest tokens.

    Attributes:
        keys, values, positions: final entries as in `dmc.cache.reading.prompt.Layer`. If tokens are dropped: the
            tokens that stayed.
        numerators, z: ``[H, 2 D]``, ``[H]`` of the accumulating entry, if tokens merge; 0 without one.
        own: ``[H, D]``, its key, rotated.
        recent: the newest tokens.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    numerators: Tensor
    z: Tensor
    own: Tensor
    recent: Recent


class LatePrompt:
    """Uncompressed state of one prompt; as `dmc.cache.reading.prompt.Prompt`.

    Args:
        layers: L.
        policy: with a window.
    """

    def __init__(self, layers: int, policy: Policy) -> None:
        self.policy, self.window, self.done = policy, policy.ring, 0
        self.layers: list[_Layer | None] = [None] * layers

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        tensors = [x for layer in self.layers if layer for x in (*vars(layer).values(), *vars(layer.recent).values())]
        return sum(x.nbytes for x in tensors if isinstance(x, Tensor))

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        """Positions whose RoPE `attend` needs for a chunk: those of the accumulating entry and the ring, then the chunk's."""
        return torch.arange(max(0, self.done - self.window - 1), self.done + tokens, device=device)

    def attend(
        self,
        number: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        logits: Tensor,
        omega: Tensor,
        late: Tensor | None,
        positions: Tensor,
        table: tuple[Tensor, Tensor],
    ) -> Tensor:
        """The next chunk in one layer; the caller adds its length to `done` after the last layer.

        Args:
            number: of the layer.
            query: ``[T, Hq, D]``; key, value ``[T, H, D]``; not rotated.
            logits, omega: ``[T, H]``; a logit above 0 merges or drops.
            late: ``[T, H]``, added to the logit of the token that leaves when this one arrives; None: nothing.
            positions: of `positions`.
            table: (cos, sin) of them.

        Returns:
            ``[T, Hq, D]``.
        """
        first, tokens, heads, lead = self.done, len(query), key.shape[1], len(positions) - len(query)
        work = torch.float64 if query.dtype == torch.float64 else torch.float32
        key, value, query = key.transpose(0, 1), value.transpose(0, 1), query.transpose(0, 1)
        here = tuple(part[lead:] for part in table)
        new = Recent(key, rotate_rounded(key, here), value, logits.T.to(work), omega.T.to(work))
        past = self.layers[number]
        if past is None:
            empty = key.new_zeros(heads, 0, key.shape[-1])
            sums = key.new_zeros(heads, 2 * key.shape[-1], dtype=work)
            none = torch.zeros(heads, 0, dtype=torch.int32, device=key.device)
            past = _Layer(empty, empty, none, sums, sums[:, 0], empty.new_zeros(heads, key.shape[-1]), new.part(0, 0))
        held = past.recent.after(new)
        ready = held.key.shape[1] - tokens  # newest tokens before this chunk
        count = max(0, ready + tokens - self.window)  # tokens that leave the window in it
        gone = held.part(0, count)
        if late is not None:
            gone.logits = gone.logits + late.T.to(work)[:, self.window - ready : self.window - ready + count]
        if self.policy.merges:
            gone.omega = asking.numbers(self.policy, "weigh", gone.logits, gone.omega, shape=gone.logits.shape)
        start = first - ready  # position of the first token that leaves
        always = max(0, min(count, self.policy.sinks + self.policy.merges - start))  # they leave as entries of their own
        gone.logits[:, :always] = 0
        change = self._merge if self.policy.merges else self._drop
        layer, accumulating = change(past, gone, start, table)
        # Decisions about the tokens that left, one per token of the chunk.
        merged = accumulating is not None and torch.nn.functional.pad(self._alpha, (tokens - count, 0)).T > 0
        self.merged = merged if count and self.policy.merges else torch.zeros_like(logits, dtype=torch.bool)
        layer.recent = held.part(count)
        self.layers[number] = layer
        seen = _Seen(held, layer, accumulating, first, ready, self.window)
        return _attend(rotate_rounded(query, here).unflatten(0, (heads, -1)), seen).flatten(0, 1).transpose(0, 1)

    def _merge(self, past: _Layer, gone: Recent, start: int, table: tuple[Tensor, Tensor]) -> tuple[_Layer, Accumulating]:
        """Tokens at ``start`` and later leave the window and merge. The table begins at the accumulating entry's position, or at
        ``start`` without one."""
        lead, dtype = int(start > 0), past.keys.dtype  # 1 if there is an accumulating entry already
        if not gone.key.shape[1]:
            return _Layer(**vars(past)), None
        alpha = (gone.logits > 0).to(gone.omega.dtype)
        if self.policy.max_entries is not None:
            held = (past.positions != NONE).sum(-1) + lead
            appended = held[:, None] + (alpha == 0).cumsum(-1)
            alpha = torch.where(appended > self.policy.max_entries, 1.0, alpha)
        self._alpha = alpha
        pair = gone.key.transpose(0, 1), gone.value.transpose(0, 1)
        states = states_of(past if lead else None, *pair, alpha, gone.omega, merges=True)
        size = gone.key.shape[-1]
        turned = rotate_rounded(states.mean[..., :size], tuple(part[: lead + gone.key.shape[1]] for part in table)).to(dtype)
        values = states.mean[..., size:].to(dtype)
        ends = torch.cat([states.alpha[:, 1:] == 0, torch.zeros_like(states.alpha[:, :1], dtype=torch.bool)], dim=-1)
        chosen, counts = compact(ends)
        there = torch.arange(chosen.shape[1], device=chosen.device) < counts[:, None]
        final = chosen.clamp(max=ends.shape[1] - 1)[..., None].expand(-1, -1, size)
        entries = turned.gather(1, final), values.gather(1, final), torch.where(there, chosen + start - lead, NONE).int()
        joined = [torch.cat(both, 1) for both in zip((past.keys, past.values, past.positions), entries, strict=True)]
        sums = states.numerators[:, -1].clone(), states.z[:, -1].clone()
        return _Layer(*joined, *sums, turned[:, -1].clone(), past.recent), (turned, values, start - lead)

    def _drop(self, past: _Layer, gone: Recent, start: int, table: tuple[Tensor, Tensor]) -> tuple[_Layer, None]:
        """Tokens at ``start`` and later leave the window; those that stay are final entries, unchanged."""
        if not gone.key.shape[1]:
            return _Layer(**vars(past)), None
        stays = gone.logits <= 0
        if self.policy.max_entries is not None:
            held = (past.positions != NONE).sum(-1, keepdim=True)
            stays = stays & (held + stays.cumsum(-1) <= self.policy.max_entries)
        chosen, counts = compact(stays)
        there = torch.arange(chosen.shape[1], device=chosen.device) < counts[:, None]
        which = chosen.clamp(max=stays.shape[1] - 1)[..., None].expand(-1, -1, gone.key.shape[-1])
        entries = gone.turned.gather(1, which), gone.value.gather(1, which), torch.where(there, chosen + start, NONE).int()
        joined = [torch.cat(both, 1) for both in zip((past.keys, past.values, past.positions), entries, strict=True)]
        return _Layer(*joined, past.numerators, past.z, past.own, past.recent), None

    def final(self, number: int) -> tuple[Layer, Tensor]:
        """Entries of a layer that go into the pool when the prompt is done, in the order of a row (`dmc.cache.reading.late`), and
        their number per head."""
        held, window, recent = self.layers[number], self.window, self.layers[number].recent
        slots = torch.arange(min(self.done, window), device=recent.value.device)
        age = (slots - self.done) % window if len(slots) == window and window else slots
        ring = recent.turned[:, age], recent.value[:, age], (self.done - len(slots) + age).int().expand(len(held.z), -1)
        layer = Layer(held.keys, held.values, held.positions, None, held.numerators, held.z)
        entries, counts = select(layer, held.positions != NONE)
        if self.done <= window:
            entries.keys, entries.values, entries.positions = ring
            return entries, counts + len(slots)
        own, newest = held.own, torch.full_like(counts, self.done - window - 1)
        if not self.policy.merges:  # the last token that stays is the accumulating entry
            some = counts > 0
            counts = counts - some.long()
            own, value, newest = (_nth(x, counts) for x in (entries.keys, entries.values, entries.positions))
            token = torch.cat([own, value], -1).to(held.numerators.dtype)
            entries.numerators, entries.z = token * some[:, None], some.to(token.dtype)
        value = entries.numerators[:, own.shape[-1] :] / entries.z.clamp(min=torch.finfo(entries.z.dtype).tiny)[:, None]
        accumulating = own[:, None], value[:, None].to(own.dtype), newest.int()[:, None]
        parts = zip(ring, accumulating, (entries.keys, entries.values, entries.positions), strict=True)
        entries.keys, entries.values, entries.positions = (torch.cat(some, 1) for some in parts)
        return entries, window + (entries.z > 0).long() + counts

    def notes(self, number: int) -> Tensor:
        """Content of `Rows.notes` for the ring, ``[H, r, 2]`` (1 where nothing merges) in the order of its slots."""
        recent = self.layers[number].recent
        slots = torch.arange(recent.logits.shape[1], device=recent.logits.device)
        age = (slots - self.done) % self.window if len(slots) == self.window and self.window else slots
        noted = [recent.logits, recent.omega] if self.policy.merges else [recent.logits]
        return torch.stack(noted, -1)[:, age]


Accumulating = tuple[Tensor, Tensor, int] | None
"""Accumulating entries as tokens leave the window, keys rotated and values ``[H, A, D]``, and the first one's position."""


@dataclass(frozen=True)
class _Seen:
    """Input of the queries of a chunk, which begin at position ``first``; ``ready`` of the tokens came before the chunk."""

    tokens: Recent
    layer: _Layer
    accumulating: Accumulating
    first: int
    ready: int
    window: int


def _attend(query: Tensor, seen: _Seen) -> Tensor:
    """Attention of queries ``[H, G, T, D]``, some at a time; softmax in fp32 or more."""
    heads, groups, tokens, size = query.shape
    layer, recent, window = seen.layer, seen.tokens, seen.window
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    dtype = work if query.device.type == "cpu" else query.dtype
    keys, values, near, near_values = (x.to(dtype) for x in (layer.keys, layer.values, recent.turned, recent.value))
    scaled, out = query.to(dtype) * size**-0.5, torch.empty_like(query)
    gap = window + 1 if seen.accumulating is None else window + 2  # how far the newest final entry is behind a query
    ages = torch.arange(tokens, device=query.device)
    for start, end in _blocks(heads * groups, tokens, keys.shape[1] + window, query.device.type):
        part, at = scaled[:, :, start:end], ages[start:end, None]
        shown = (layer.positions <= seen.first + end - 1 - gap).any(0).nonzero().flatten()
        count = int(shown[-1]) + 1 if len(shown) else 0
        low = max(0, seen.ready + start - window)
        behind = seen.ready + at - torch.arange(low, seen.ready + end, device=query.device)  # [t, n]
        scores = (part.flatten(1, 2) @ near[:, low : seen.ready + end].mT).unflatten(1, (groups, -1))
        scores = [scores.masked_fill_((behind < 0) | (behind > window), -torch.inf)]
        mix = [near_values[:, low : seen.ready + end]]
        if count:
            far = (part.flatten(1, 2) @ keys[:, :count].mT).unflatten(1, (groups, -1))
            hidden = layer.positions[:, None, None, :count] > seen.first + at - gap
            scores.append(far.masked_fill_(hidden, -torch.inf))
            mix.append(values[:, :count])
        own = None
        if seen.accumulating is not None:
            turned, own_values, begin = seen.accumulating
            state = seen.first + ages[start:end] - window - 1 - begin
            own = own_values.to(dtype)[:, state.clamp(min=0)]
            score = (part * turned.to(dtype)[:, None, state.clamp(min=0)]).sum(-1, keepdim=True)
            scores.append(score.masked_fill_((state < 0)[:, None], -torch.inf))
        weights = torch.cat(scores, -1).softmax(-1, dtype=work).to(dtype)
        kept = weights.shape[-1] - (own is not None)
        block = (weights[..., :kept].flatten(1, 2) @ torch.cat(mix, 1)).view_as(part)
        if own is not None:
            block = block + weights[..., kept:] * own[:, None]
        out[:, :, start:end] = block
    return out


def _blocks(rows: int, tokens: int, width: int, device: str) -> Iterator[tuple[int, int]]:
    most = _SCORES.get(device, _SCORES_ELSEWHERE)
    step = min(256, max(16, most // (rows * (width + 1))))
    return ((start, min(tokens, start + step)) for start in range(0, tokens, step))


def _nth(x: Tensor, index: Tensor) -> Tensor:
    """``[H, N, ...], [H] → [H, ...]``: one entry per head; 0 if there are no entries at all."""
    if not x.shape[1]:
        return x.new_zeros(x.shape[0], *x.shape[2:])
    return x[torch.arange(len(x), device=x.device), index.clamp(max=x.shape[1] - 1)]
