"""Attention of the serving side: of a prompt over compacted keys, and of one new token over pages.

Both end with one extra term, the query's own intermediate state, which no other query sees.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dmc.cache import gathered, onpages
from dmc.cache.gathered import Plan, plans
from dmc.cache.policies import Policy
from dmc.cache.rows import Rows
from dmc.kernels.decode import decode_attention, decode_watched
from dmc.kernels.prefill import loops_read, prefill_attention

_PROMPT_SCORES = 1 << 22  # scores of a prompt held at once, over all heads
_BLOCK_SCORES = 1 << 18  # the same on a CPU where tokens merge, 16 queries at least: the fewer, the fewer keys are met in vain
_PAGE_VALUES = 1 << 18  # values of encoded pages unpacked at once: they stay in a core's cache


def compact(closes: Tensor) -> tuple[Tensor, Tensor]:
    """Where the final entries of a prompt are among its intermediate states.

    Args:
        closes: ``[H, T]`` bool, True where the next token of the prompt opens a new entry.

    Returns:
        ``(places [H, N] int64, counts [H] int64)``: the places in rising order, T where a head has fewer than N; N is
        the longest count.
    """
    heads, tokens = closes.shape
    order = closes.cumsum(-1)
    counts = order[..., -1]
    most = int(counts.max())
    places = order.new_full((heads, most + 1), tokens)
    target = torch.where(closes, order - 1, most)  # states that do not close all land in the spare last place
    places.scatter_(-1, target, torch.arange(tokens, device=closes.device).expand_as(target))
    return places[..., :most], counts


@dataclass(frozen=True)
class Seen:
    """What the queries of a prompt attend to: entries, and each its own state; all rotated.

    Attributes:
        keys, values: ``[H, N, D]``, final entries.
        places: int32 ``[H, N]``, position of each entry's newest token; a query sees those below its own position.
        own_keys, own_values: ``[H, T, D]``.
        queries: int64 ``[T]``, positions.
        merged: whether an own state can be anything else than the entry that it becomes.
        rising: whether the places of a head's entries rise; heads of unequal length are filled up after each chunk.
        marks: fp32 ``[H, N]``, what `Policy.mark` said of each entry; None without.
    """

    keys: Tensor
    values: Tensor
    places: Tensor
    own_keys: Tensor
    own_values: Tensor
    queries: Tensor
    merged: bool
    rising: bool = True
    marks: Tensor | None = None


def prompt_attention(query: Tensor, seen: Seen, policy: Policy) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Queries ``[Hq, T, D]`` of a prompt, rotated, over what they see; softmax in fp32 at least.

    Returns:
        ``(out [Hq, T, D], gathered)``: what `Policy.watches` asks for, of entries ``[H, N]`` and of own states
        ``[H, T]``; None if nothing.
    """
    heads, tokens = seen.own_keys.shape[:2]
    query = query.unflatten(0, (heads, -1))  # [H, G, T, D]
    plain, causal = policy.watches is None and not policy.evicts, not seen.merged and seen.keys.shape[1] == tokens - 1
    if plain and (loops_read(query) or (not causal and seen.keys.shape[1] and onpages.runs(query))):
        own = seen.own_keys, seen.own_values, seen.queries.int()
        return prefill_attention(query, *_rising(seen), *own).flatten(0, 1), None
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
        shown = seen.places[:, None] < at[:, None]  # [H, t, N]
        if (sight := policy.sees(seen.places, seen.marks, at.expand(heads, -1))) is not None:
            shown &= sight
        scores = (part @ seen.keys[:, None].transpose(-1, -2)).masked_fill_(~shown[:, None], -torch.inf)
        weights = torch.cat([scores, (part * keys).sum(-1, keepdim=True)], dim=-1)
        weights = weights.softmax(-1, dtype=_work_dtype(weights.dtype))
        if policy.watches is not None:
            mass = weights.sum(1).float()  # [H, t, N + 1]
            mass = mass if policy.watches == "sum" else mass[:, -1:] * (start + step >= tokens)
            gathered[:, : seen.keys.shape[1]] += mass[..., :-1].sum(1)
            last = seen.keys.shape[1] + min(start + step, tokens)
            gathered[:, last - mass.shape[1] : last] += mass[..., -1]
        weights = weights.to(query.dtype)
        out[:, :, start : start + step] = weights[..., :-1] @ seen.values[:, None] + weights[..., -1:] * values
    split = [seen.keys.shape[1], tokens]
    return out.flatten(0, 1), None if policy.watches is None else tuple(gathered.split(split, dim=-1))


def _rising(seen: Seen) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and places of the entries, in the order of their places."""
    if seen.rising:
        return seen.keys, seen.values, seen.places
    places, order = seen.places.sort(dim=-1)
    order = order[..., None].expand_as(seen.keys)
    return seen.keys.gather(1, order), seen.values.gather(1, order), places


def _unmerged(query: Tensor, seen: Seen) -> Tensor:
    """Where nothing merges, each own state but the last is an entry already, and PyTorch's fused attention will do."""
    keys = torch.cat([seen.keys, seen.own_keys[:, -1:]], dim=1)
    values = torch.cat([seen.values, seen.own_values[:, -1:]], dim=1)
    shape = (-1, query.shape[1], -1, -1)
    keys, values = keys[:, None].expand(shape), values[:, None].expand(shape)
    if keys.shape[2] == query.shape[2]:
        return F.scaled_dot_product_attention(query, keys, values, is_causal=True)
    places = torch.cat([seen.places, seen.queries[-1:].int().expand(len(seen.places), 1)], dim=1)
    shown = (places[:, None] <= seen.queries[:, None])[:, None]
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=shown)


def _blocks(query: Tensor, seen: Seen) -> Tensor:
    """For CPUs: some queries at a time over the entries that the last of them sees, in fp32 at least; ``[H, G, T, D]``."""
    heads, groups, tokens, size = query.shape
    work = _work_dtype(query.dtype)
    keys, values, places = _rising(seen)
    keys, values, own_values = keys.to(work), values.to(work), seen.own_values.to(work)
    scaled = query.to(work) * size**-0.5
    own = (scaled * seen.own_keys[:, None]).sum(-1, keepdim=True)
    most = torch.searchsorted(places, seen.queries.int().expand(heads, -1).contiguous())  # [H, T] entries that each sees
    fewest, most = most.amin(0).tolist(), most.amax(0).tolist()
    out = torch.empty_like(query)
    step = min(64, max(16, _BLOCK_SCORES // (heads * groups * (keys.shape[1] + 1))))
    for start in range(0, tokens, step):
        end = min(tokens, start + step)
        sure, count, part = fewest[start], most[end - 1], scaled[:, :, start:end]
        scores = (part.flatten(1, 2) @ keys[:, :count].transpose(-1, -2)).view(heads, groups, end - start, count)
        hidden = places[:, None, None, sure:count] >= seen.queries[start:end, None]
        scores[..., sure:].masked_fill_(hidden, -torch.inf)
        weights = torch.cat([scores, own[:, :, start:end]], dim=-1).softmax(-1)
        means = weights[..., :-1].flatten(1, 2) @ values[:, :count]
        out[:, :, start:end] = means.view(part.shape) + weights[..., -1:] * own_values[:, None, start:end]
    return out


def row_attention(
    rows: Rows, index: Tensor, query: Tensor, own_key: Tensor, own_value: Tensor, *, watch: str | None = None,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One query of each head over what a row holds: encoded pages, exact entries, and its own state.

    Where a kernel knows the codec (`dmc.cache.onpages`: Triton's on a GPU, numba's loops on a CPU, always in fp32) it reads
    every page where it lies; the loops also where weights are watched or pages have holes. Elsewhere rows of about one length are
    gathered and attended to whole, a few at a time, or, watched or with holes, page by page, their parts summed by row. In every
    case a row costs what it holds.

    Args:
        rows: the cache.
        index: ``[R]``, rows of the queries.
        query: ``[R, G, D]``, rotated, fp32 or fp64.
        own_key, own_value: ``[R, D]``, the tail as it is now, rotated.
        watch: `Policy.watches`: the weights are then added to the scores of entries, or take their place.
        plan: of these rows, if there is one already.

    Returns:
        ``(out [R, G, D], own [R])``: own is the tail's weight, summed over G; None without ``watch``.
    """
    if onpages.reads(rows, rows.packing(index), watch=watch):
        own, work = (own_key, own_value), rows.shape.dtype if query.device.type == "cuda" else query.dtype
        arguments = query.to(work), *(x.to(work) for x in own), index, onpages.paged(rows, rows.packing(index))
        if watch is not None:
            out, mass = decode_watched(*arguments, watch=watch)
            return out.to(query.dtype), mass
        return decode_attention(*arguments).to(query.dtype), None
    query = query * query.shape[-1] ** -0.5
    if watch is None and not rows.storage.holes:
        plan = plans(rows, index[None])[0] if plan is None else plan
        return gathered.attend(rows, plan, query, own_key, own_value), None
    return _ragged(rows, index, query, own_key, own_value, watch)


def _ragged(
    rows: Rows, index: Tensor, query: Tensor, own_key: Tensor, own_value: Tensor, watch: str | None,
) -> tuple[Tensor, Tensor | None]:
    """`row_attention` page by page; the query is scaled already."""
    keys, values, valid = rows.exact_entries(index)
    scores = (query @ keys.to(query.dtype).transpose(-1, -2)).masked_fill_(~valid[:, None], -torch.inf)
    scores = torch.cat([scores, query @ own_key[:, :, None]], dim=-1)
    top = scores.amax(-1)  # [R, G]

    packing = rows.packing(index)
    pages, owner = rows.closed_pages(index)
    parts = []  # (pages, owner, blocks, scores [n, G, P]) of some pages each
    per_part = max(1, _PAGE_VALUES // (packing.page_size * rows.shape.head_size))
    for some, owners in zip(pages.split(per_part), owner.split(per_part), strict=True):
        blocks, marks = rows.read_closed(some, packing)
        paged = packing.codec.scores(blocks, query[owners])
        if rows.storage.holes:
            paged = paged.masked_fill_((marks["place"] < 0)[:, None], -torch.inf)
        top.scatter_reduce_(0, owners[:, None].expand(-1, top.shape[1]), paged.amax(-1), "amax")
        parts.append((some, owners, blocks, paged))

    weights = (scores - top[..., None]).exp_()
    total = weights.sum(-1)
    out = weights[..., :-1] @ values.to(query.dtype) + weights[..., -1:] * own_value[:, None]
    for number, (some, owners, blocks, paged) in enumerate(parts):
        paged = paged.sub_(top[owners][..., None]).exp_()
        total.index_add_(0, owners, paged.sum(-1))
        out.index_add_(0, owners, packing.codec.combine(blocks, paged))
        parts[number] = (some, owners, paged)
    own = None
    if watch:
        own = _watch(rows, index, weights, parts, total, add=watch == "sum")
    return out / total[..., None], own


def _watch(rows: Rows, index: Tensor, weights: Tensor, parts: list, total: Tensor, *, add: bool) -> Tensor:
    """Writes each entry's softmax weight, summed over the queries of its head, to its score → the tail's."""
    layouts = rows.packing(index).layout, rows.open_layout
    closed, opened = (rows.pool.views(layout)["e_score"] for layout in layouts)
    for pages, owners, paged in parts:
        mass = (paged / total[owners][..., None]).sum(1).float()
        closed[pages] = closed[pages] + mass if add else mass
    mass = (weights / total[..., None]).sum(1).float()
    table = rows.open_table[index, : rows.open_pages(weights.shape[-1] - 1)]
    there = table != 0
    fresh = mass[:, :-1].unflatten(-1, (-1, rows.per_open_page))[there]
    opened[table[there]] = opened[table[there]] + fresh if add else fresh
    return mass[:, -1]


def _work_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
