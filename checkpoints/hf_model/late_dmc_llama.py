"""Late merging: the newest tokens stay as they are, and a token merges when it is more than `window` tokens old.

Query i sees the tokens j of its document with i - j <= window, and of the tokens before these the entries that they have
been merged into. Dimension letters: B batch, T new tokens, R tokens of the ring, S = R + T, H key/value heads, G query
heads per key/value head, D head size, N final entries of the longest head, F = 2 D + 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .entries_dmc_llama import append, mean, positions_of, rotate, states, take

_TOKENS = {"key": 2, "value": 2, "logit": 2, "ahead": 2, "omega": 2, "cos": 1, "sin": 1, "order": 1, "starts": 1, "real": 1}
"""Which dimension of a tensor of the ring is that of tokens."""
_QUERIES = 256  # queries that attend at once: bounds the memory of the scores in a long prompt


class LateLayerCache:
    """The entries of one layer, and its newest tokens.

    Attributes:
        keys, values: final entries, keys rotated, `[B, H, N, D]` in the model's dtype; a head's first `lengths` are its
            entries, the rest is filling. None before the first token.
        lengths: `[B, H]` int64.
        tail: the accumulating entry, `[B, H, F]` fp32: weighted sums of unrotated keys, of values, of weights; 0: none.
        rotation: (cos, sin) of its newest token, `[B, 2, D]` fp32.
        ring: the newest `window` + 1 tokens at most, newest last. By name: key (unrotated) and value `[B, H, R, D]`,
            logit, ahead, omega `[B, H, R]`, cos and sin `[B, R, D]`, order (-1: none), starts, real `[B, R]`.
    """

    is_compileable = is_croppable = is_sliding = is_initialized = supports_early_init = False
    _fields = ("keys", "values", "lengths", "tail", "rotation")

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        for name in self._fields:
            setattr(self, name, None)
        self.ring: dict[str, Tensor] | None = None

    def count(self, opened: Tensor) -> Tensor:
        """Entries of each head, the accumulating one and the ring's tokens included: `[B, H]` int64."""
        return self.lengths + (self.tail[..., -1] > 0) + (self.ring["order"] >= 0).sum(-1)[:, None]

    def map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor, batch first, by `function(tensor)`."""
        for name in self._fields:
            if getattr(self, name) is not None:
                setattr(self, name, function(getattr(self, name)))
        if self.ring is not None:
            self.ring = {name: function(x) for name, x in self.ring.items()}


def attend_late(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logit: Tensor,
    ahead: Tensor | None,
    omega: Tensor,
    step,
    layer: LateLayerCache,  # noqa: ANN001
    *,
    window: int,
    dropout: float,
) -> Tensor:
    """Attention of new tokens, which enter the ring, while the oldest leave it and merge.

    Args:
        query: `[B, H * G, T, D]`, key and value `[B, H, T, D]`, not rotated.
        logit: `[B, H, T]` fp32, above 0 where a token merges when it leaves.
        ahead: `[B, H, T]`, what a token adds to the logit of the one `window` before it; None for nothing.
        omega: `[B, H, T]`, weights.
        step: `step_dmc_llama.Step`.

    Returns:
        `[B, H * G, T, D]` fp32.
    """
    real, size, dtype = step.real, key.shape[-1], key.dtype
    new = {
        "key": key,
        "value": value,
        "logit": logit,
        "ahead": torch.zeros_like(logit) if ahead is None else ahead,
        "omega": omega * real[:, None],
        "cos": step.cos[:, 1:],
        "sin": step.sin[:, 1:],
        "order": step.order,
        "starts": step.starts,
        "real": real,
    }
    if layer.ring is None:
        layer.keys, layer.values = key[:, :, :0], value[:, :, :0]
        layer.lengths = torch.zeros_like(logit[..., 0], dtype=torch.long)
        layer.tail = logit.new_zeros(*key.shape[:2], 2 * size + 1)
        layer.rotation = step.cos.new_zeros(len(key), 2, size)
        held = new
    else:
        held = {name: torch.cat([layer.ring[name], x], _TOKENS[name]) for name, x in new.items()}
    seen = _Columns(held, step, window)
    later = held["ahead"].gather(2, seen.comes[:, None].expand_as(held["logit"])).masked_fill(~seen.coming[:, None], 0.0)
    opens = (~(held["logit"] + later > 0) | held["starts"][:, None]) & held["real"][:, None]
    merged = states(torch.cat([held["key"], held["value"]], -1), opens, held["omega"], layer.tail)  # [B, H, S + 1, F]
    # An entry is final where the next token that has left opens another; of a document that ended nobody sees the last one.
    counts = (opens & ~held["starts"][:, None] & seen.left[:, None]).cumsum(-1)
    index = positions_of(counts.diff(dim=-1, prepend=torch.zeros_like(counts[..., :1])) > 0, counts)  # [B, H, M]
    closed = mean(merged.gather(2, index[..., None].expand(-1, -1, -1, merged.shape[-1])))
    tables = (torch.cat([layer.rotation[:, i, None], held[name]], 1) for i, name in enumerate(("cos", "sin")))
    keys, values = rotate(closed[..., :size], *(take(table, index) for table in tables)), closed[..., size:]
    before, total = layer.lengths, layer.lengths + counts[..., -1]
    if keys.shape[2]:
        layer.keys = append(layer.keys, before, keys.to(dtype), total)
        layer.values = append(layer.values, before, values.to(dtype), total)
    final = before[..., None] + F.pad(counts, (1, 0))
    out = _attend(query, held, merged, layer, final, seen, dropout)
    _forget(layer, held, merged, total, final, seen)
    return out


class _Columns:
    """Where tokens are among the S columns of ring and new tokens, by their order.

    Attributes:
        window: w.
        left: bool `[B, S]`, tokens that have left the window of the next query, or whose document has ended.
        comes, coming: `[B, S]`, the column of the token `window` later, and whether there is one.
        newest: `[B, T]`, the column of the newest token that has left the window of each query ...
        exists: ... and whether there is one of its document.
        start: `[B, T]`, the column of the first token of the query's document; -1 if it is before the ring.
        order, begins: of the queries, as in `Step`.
    """

    def __init__(self, held: dict[str, Tensor], step, window: int) -> None:  # noqa: ANN001
        order = held["order"].contiguous()
        width = order.shape[1]
        self.window, self.order, self.begins = window, step.order, step.begins
        self.left = (order <= order[:, -1:] - window - 1) | (order < step.begins[:, -1:])
        comes = torch.searchsorted(order, order + window)  # the first of that order: padding has that of the token before it
        self.comes = comes.clamp(max=width - 1)
        self.coming = (comes < width) & (order.gather(1, self.comes) == order + window)
        self.newest = self.column(order, step.order - window - 1)
        self.exists = step.order - window - 1 >= step.begins
        self.start = torch.where(order[:, :1] <= step.begins, self.column(order, step.begins), -1)

    @staticmethod
    def column(order: Tensor, wanted: Tensor) -> Tensor:
        return torch.searchsorted(order, wanted.contiguous(), right=True) - 1


def _attend(
    query: Tensor, held: dict[str, Tensor], merged: Tensor, layer: LateLayerCache, counts: Tensor, seen: _Columns, dropout: float
) -> Tensor:
    """counts `[B, H, S + 1]`: final entries before each column, those of the ring's past included."""
    size, heads, dtype = query.shape[-1], counts.shape[1], layer.keys.dtype
    tokens, columns = query.shape[2], held["order"].shape[1]
    cos, sin = held["cos"][:, None], held["sin"][:, None]
    query = (rotate(query.float(), cos[:, :, -tokens:], sin[:, :, -tokens:]) * size**-0.5).unflatten(1, (heads, -1))
    near = rotate(held["key"].float(), cos, sin).to(dtype)
    state = (seen.newest + 1).clamp(min=0)[:, None].expand(-1, heads, -1)
    own = mean(merged.gather(2, state[..., None].expand(-1, -1, -1, merged.shape[-1])))  # [B, H, T, 2 D]
    at = seen.newest.clamp(min=0)[:, None].expand(-1, heads, -1)
    turned = rotate(own[..., :size], take(held["cos"], at), take(held["sin"], at))
    visible = counts.gather(2, state)
    hidden = counts.gather(2, (seen.start + 1).clamp(min=0)[:, None].expand_as(state)) * (seen.start >= 0)[:, None]
    entry, column = (torch.arange(n, device=query.device) for n in (layer.keys.shape[2], columns))
    out = []
    for begin in range(0, tokens, _QUERIES):
        part = slice(begin, min(tokens, begin + _QUERIES))
        q = query[..., part, :]  # [B, H, G, t, D]
        flat = q.flatten(2, 3).to(dtype)
        behind = seen.order[:, part, None] - held["order"][:, None]  # [B, t, S]
        recent = (behind >= 0) & (behind <= seen.window) & held["real"][:, None]
        recent &= held["order"][:, None] >= seen.begins[:, part, None]
        recent |= column == columns - tokens + torch.arange(part.start, part.stop, device=query.device)[:, None]  # padding
        exists = seen.exists[:, None, part, None]  # [B, 1, t, 1]
        shown = (entry < visible[:, :, part, None]) & (entry >= hidden[:, :, part, None]) & exists
        scores = (flat @ torch.cat([near, layer.keys], 2).mT).unflatten(2, q.shape[2:4]).float()
        mask = torch.cat([recent[:, None].expand(-1, heads, -1, -1), shown], -1)
        scores = scores.masked_fill(~mask[:, :, None], float("-inf"))
        open_ = (q * turned[:, :, None, part]).sum(-1, keepdim=True).masked_fill(~exists[:, :, None], float("-inf"))
        weights = F.dropout(torch.cat([scores, open_], -1).softmax(-1), dropout, dropout > 0)
        mixed = weights[..., :-1].flatten(2, 3).to(dtype) @ torch.cat([held["value"], layer.values], 2)
        out.append(mixed.unflatten(2, q.shape[2:4]).float() + weights[..., -1:] * own[:, :, None, part, size:])
    return torch.cat(out, 3).flatten(1, 2)


def _forget(
    layer: LateLayerCache, held: dict[str, Tensor], merged: Tensor, total: Tensor, counts: Tensor, seen: _Columns
) -> None:
    """What the next query does not see goes: entries of documents that ended, and tokens that have left the window."""
    last, begins = held["order"][:, -1], seen.begins[:, -1]
    there = last - seen.window - 1 >= begins
    column = seen.column(held["order"].contiguous(), (last - seen.window - 1)[:, None])[:, 0]
    column = torch.where(there, column, -1)
    state = (column + 1)[:, None, None, None].expand(-1, merged.shape[1], 1, merged.shape[-1])
    layer.tail = merged.gather(2, state)[:, :, 0] * there[:, None, None]
    at = (column + 1)[:, None, None].expand(-1, 1, held["cos"].shape[-1])
    tables = (torch.cat([layer.rotation[:, i, None], held[name]], 1) for i, name in enumerate(("cos", "sin")))
    layer.rotation = torch.cat([table.gather(1, at) for table in tables], 1)
    start = seen.start[:, -1]
    first = (start + 1).clamp(min=0)[:, None, None].expand(-1, counts.shape[1], 1)
    gone = counts.gather(2, first)[..., 0] * (start >= 0)[:, None]
    layer.lengths = total - gone
    if bool(gone.any()):
        entry = torch.arange(int(layer.lengths.max()), device=gone.device) + gone[..., None]
        entry = entry.clamp(max=max(layer.keys.shape[2] - 1, 0))[..., None].expand(-1, -1, -1, layer.keys.shape[-1])
        layer.keys, layer.values = layer.keys.gather(2, entry), layer.values.gather(2, entry)
    stays = held["real"] & ~seen.left
    width = int(stays.sum(-1).max())
    chosen = stays.int().argsort(dim=-1, stable=True)[:, stays.shape[1] - width :]
    ring = {}
    for name, x in held.items():
        dim = _TOKENS[name]
        index = chosen if x.dim() == 2 else chosen[:, None] if dim == 2 else chosen[..., None]
        index = (
            index.expand(*x.shape[:dim], width)
            if x.dim() == dim + 1
            else (index[..., None] if dim == 2 else index).expand(*x.shape[:dim], width, x.shape[-1])
        )
        ring[name] = x.gather(dim, index)
    empty = ~ring["real"]
    ring["order"], ring["starts"] = ring["order"].masked_fill(empty, -1), ring["starts"] & ~empty
    ring["omega"] = ring["omega"].masked_fill(empty[:, None], 0.0)
    layer.ring = ring
