"""Attention of the queries of a prompt over compacted keys, and each query's own state, which no other query sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dmc.cache.policies import Policy
from dmc.cache.reading import asking
from dmc.kernels.backend import Backend
from dmc.kernels.prefill.prefill import prefill_attention

_PROMPT_SCORES = 1 << 22  # scores of a prompt held at once, over all heads
_BLOCK_SCORES = 1 << 18  # the same on a CPU if tokens merge, for 16 queries or more: the fewer, the fewer are masked


def compact(ends: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the final entries of a prompt among its intermediate states.

    Args:
        ends: ``[H, T]`` bool, True where the next token of the prompt starts a new entry.

    Returns:
        ``(index [H, N] int64, counts [H] int64)``: the states in rising order, T where a head has fewer than N; N is
        the longest count.
    """
    heads, tokens = ends.shape
    order = ends.cumsum(-1)
    counts = order[..., -1]
    most = int(counts.max())
    index = order.new_full((heads, most + 1), tokens)
    target = torch.where(ends, order - 1, most)  # states that are not final all go to the spare last column
    index.scatter_(-1, target, torch.arange(tokens, device=ends.device).expand_as(target))
    return index[..., :most], counts


@dataclass(frozen=True)
class Seen:
    """Input of a prompt's queries: entries, and each query's own state; all rotated.

    Attributes:
        keys, values: ``[H, N, D]``, final entries.
        positions: int32 ``[H, N]``, position of each entry's newest token; a query sees those below its own position.
        own_keys, own_values: ``[H, T, D]``.
        queries: int64 ``[T]``, positions.
        merged: whether an own state can differ from the entry that it becomes.
        rising: whether the positions of a head's entries rise; shorter heads are padded after each chunk.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    own_keys: Tensor
    own_values: Tensor
    queries: Tensor
    merged: bool
    rising: bool = True


def prompt_attention(query: Tensor, seen: Seen, policy: Policy, backend: Backend) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Attention of a prompt's rotated queries ``[Hq, T, D]``; softmax in fp32 or more. ``backend``: of the cache.

    Returns:
        ``(out [Hq, T, D], gathered)``: gathered are the statistics that `Policy.statistics` asks for, of entries
        ``[H, N]`` and of own states ``[H, T]``, or None.
    """
    heads, tokens = seen.own_keys.shape[:2]
    query = query.unflatten(0, (heads, -1))  # [H, G, T, D]
    plain, causal = policy.statistics is None and not policy.evicts_later, not seen.merged and seen.keys.shape[1] == tokens - 1
    by_triton = backend is Backend.TRITON and not causal and seen.keys.shape[1]
    if plain and (backend is Backend.CPU or by_triton):
        own = seen.own_keys, seen.own_values, seen.queries.int()
        return prefill_attention(query, *_rising(seen), *own, backend=backend).flatten(0, 1), None
    if plain and not seen.merged:
        return _unmerged(query, seen).flatten(0, 1), None
    if plain and query.device.type == "cpu":
        return _blocks(query, seen).flatten(0, 1), None
    query = query * query.shape[-1] ** -0.5
    out = torch.empty_like(query)
    gathered = torch.zeros(heads, seen.keys.shape[1] + tokens, device=query.device)
    step = max(1, _PROMPT_SCORES // (query.shape[0] * query.shape[1] * (seen.keys.shape[1] + 1)))
    for start in range(0, tokens, step):
        part, at = query[:, :, start : start + step], seen.queries[start : start + step]
        keys, values = seen.own_keys[:, None, start : start + step], seen.own_values[:, None, start : start + step]
        shown = seen.positions[:, None] < at[:, None]  # [H, t, N]
        if (sight := asking.seen(policy, seen.positions, at.expand(heads, -1))) is not None:
            shown &= sight
        scores = (part @ seen.keys[:, None].transpose(-1, -2)).masked_fill_(~shown[:, None], -torch.inf)
        weights = torch.cat([scores, (part * keys).sum(-1, keepdim=True)], dim=-1)
        weights = weights.softmax(-1, dtype=_work_dtype(weights.dtype))
        if policy.statistics is not None:
            mass = weights.sum(1).float()  # [H, t, N + 1]
            mass = mass if policy.statistics == "sum" else mass[:, -1:] * (start + step >= tokens)
            gathered[:, : seen.keys.shape[1]] += mass[..., :-1].sum(1)
            last = seen.keys.shape[1] + min(start + step, tokens)
            gathered[:, last - mass.shape[1] : last] += mass[..., -1]
        weights = weights.to(query.dtype)
        out[:, :, start : start + step] = weights[..., :-1] @ seen.values[:, None] + weights[..., -1:] * values
    split = [seen.keys.shape[1], tokens]
    return out.flatten(0, 1), None if policy.statistics is None else tuple(gathered.split(split, dim=-1))


def _rising(seen: Seen) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and positions of the entries, in the order of their positions."""
    if seen.rising:
        return seen.keys, seen.values, seen.positions
    positions, order = seen.positions.sort(dim=-1)
    order = order[..., None].expand_as(seen.keys)
    return seen.keys.gather(1, order), seen.values.gather(1, order), positions


def _unmerged(query: Tensor, seen: Seen) -> Tensor:
    """PyTorch's fused attention, if nothing merges: each own state except the last is already an entry."""
    keys = torch.cat([seen.keys, seen.own_keys[:, -1:]], dim=1)
    values = torch.cat([seen.values, seen.own_values[:, -1:]], dim=1)
    shape = (-1, query.shape[1], -1, -1)
    keys, values = keys[:, None].expand(shape), values[:, None].expand(shape)
    if keys.shape[2] == query.shape[2]:
        return F.scaled_dot_product_attention(query, keys, values, is_causal=True)
    positions = torch.cat([seen.positions, seen.queries[-1:].int().expand(len(seen.positions), 1)], dim=1)
    shown = (positions[:, None] <= seen.queries[:, None])[:, None]
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=shown)


def _blocks(query: Tensor, seen: Seen) -> Tensor:
    """For CPUs: some queries at a time over the entries that the last of them sees, in fp32 or more; ``[H, G, T, D]``."""
    heads, groups, tokens, size = query.shape
    work = _work_dtype(query.dtype)
    keys, values, positions = _rising(seen)
    keys, values, own_values = keys.to(work), values.to(work), seen.own_values.to(work)
    scaled = query.to(work) * size**-0.5
    own = (scaled * seen.own_keys[:, None]).sum(-1, keepdim=True)
    most = torch.searchsorted(positions, seen.queries.int().expand(heads, -1).contiguous())  # [H, T] entries that each sees
    fewest, most = most.amin(0).tolist(), most.amax(0).tolist()
    out = torch.empty_like(query)
    step = min(64, max(16, _BLOCK_SCORES // (heads * groups * (keys.shape[1] + 1))))
    for start in range(0, tokens, step):
        end = min(tokens, start + step)
        sure, count, part = fewest[start], most[end - 1], scaled[:, :, start:end]
        scores = (part.flatten(1, 2) @ keys[:, :count].transpose(-1, -2)).view(heads, groups, end - start, count)
        hidden = positions[:, None, None, sure:count] >= seen.queries[start:end, None]
        scores[..., sure:].masked_fill_(hidden, -torch.inf)
        weights = torch.cat([scores, own[:, :, start:end]], dim=-1).softmax(-1)
        means = weights[..., :-1].flatten(1, 2) @ values[:, :count]
        out[:, :, start:end] = means.view(part.shape) + weights[..., -1:] * own_values[:, None, start:end]
    return out


def _work_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
