"""Dynamic Memory Sparsification (arXiv 2506.05345): a cache that marked tokens leave, and attention over it.

A head that marks a token evicts it `window` tokens later: query i sees entry j where i - j <= window, or where j is not
marked. Nothing is merged. Dimension letters: B batch, T new tokens, H key/value heads, G query heads per key/value head,
D head size, N entries of the longest head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_QUERIES = 1024  # queries that attend, and then evict, at once: bounds the memory of the scores in a long prompt


class EvictingLayerCache:
    """The entries of one layer.

    Attributes:
        keys, values: keys rotated, `[B, H, N, D]` in the model's dtype; a head's first `lengths` are its entries, the
            rest is filling. None before the first token.
        places: int64 `[B, H, N]`, how many real tokens came before each entry's own.
        marks: bool `[B, H, N]`, True for an entry that will be evicted.
        lengths: int64 `[B, H]`.
    """

    is_compileable = is_croppable = is_sliding = is_initialized = supports_early_init = False
    _fields = ("keys", "values", "places", "marks")

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.places: Tensor | None = None
        self.marks: Tensor | None = None
        self.lengths: Tensor | None = None

    def count(self, opened: Tensor) -> Tensor:
        """Entries of each head, `[B, H]` int64; ``opened`` [B, 1] is for caches that keep the newest one apart."""
        return self.lengths

    def append(self, keys: Tensor, values: Tensor, places: Tensor, marks: Tensor) -> None:
        """Add entries `[B, H, M, ...]` behind the filling of shorter heads; `keep` closes the gaps."""
        new = (keys, values, places, marks)
        for name, more in zip(self._fields, new, strict=True):
            old = getattr(self, name)
            setattr(self, name, more if old is None else torch.cat([old, more], 2))

    def keep(self, kept: Tensor) -> None:
        """Drop the entries that `kept` [B, H, N] leaves out, and left-align the others in their order."""
        self.lengths = kept.sum(-1)
        if bool(kept.all()):
            return
        order = kept.int().argsort(dim=-1, descending=True, stable=True)[..., : int(self.lengths.max())]
        for name in self._fields:
            x = getattr(self, name)
            wide = order if x.dim() == 3 else order[..., None].expand(*order.shape, x.shape[-1])
            setattr(self, name, x.gather(2, wide))

    def map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor, batch first, by `function(tensor)`."""
        for name in (*self._fields, "lengths"):
            if getattr(self, name) is not None:
                setattr(self, name, function(getattr(self, name)))


def attend_and_evict(
    query: Tensor, key: Tensor, value: Tensor, marks: Tensor, order: Tensor, begins: Tensor, real: Tensor,
    layer: EvictingLayerCache, *, window: int, dropout: float,
) -> Tensor:
    """Attention of new tokens over the cache, which takes them up and drops what no later query sees.

    Args:
        query: `[B, H * G, T, D]` fp32, rotated and scaled.
        key, value: `[B, H, T, D]` in the model's dtype, key rotated.
        marks: bool `[B, H, T]`.
        order: int64 `[B, T]`, how many real tokens came before each.
        begins: int64 `[B, T]`, `order` of the first token of each token's document: what came before is not seen.
        real: bool `[B, T]`, False for padding, which no query but its own sees.

    Returns:
        `[B, H * G, T, D]` fp32.
    """
    inputs = (query, key, value, marks, order, begins, real)
    parts = zip(*(x.split(_QUERIES, x.dim() - 2 if x.dim() > 3 else -1) for x in inputs), strict=True)
    return torch.cat([_attend(*part, layer, window, dropout) for part in parts], 2)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, marks: Tensor, order: Tensor, begins: Tensor, real: Tensor,
    layer: EvictingLayerCache, window: int, dropout: float,
) -> Tensor:
    heads, tokens = key.shape[1:3]
    old = 0 if layer.keys is None else layer.keys.shape[2]
    there = real[:, None].expand_as(marks)
    if old:
        filled = torch.arange(old, device=key.device) < layer.lengths[..., None]
        there = torch.cat([filled, there], -1)
    layer.append(key, value, order[:, None].expand_as(marks), marks)
    behind = order[:, None, :, None] - layer.places[:, :, None]  # [B, H, T, N]
    visible = there[:, :, None] & (behind >= 0) & ((behind <= window) | ~layer.marks[:, :, None])
    visible &= layer.places[:, :, None] >= begins[:, None, :, None]
    visible[..., old:] |= torch.eye(tokens, dtype=torch.bool, device=key.device)  # padding sees itself, so that no row is empty
    query = query.unflatten(1, (heads, -1))  # [B, H, G, T, D]
    scores = (query.flatten(2, 3).to(key.dtype) @ layer.keys.mT).unflatten(2, query.shape[2:4]).float()
    weights = scores.masked_fill(~visible[:, :, None], float("-inf")).softmax(-1)
    weights = F.dropout(weights, dropout, dropout > 0)
    out = (weights.flatten(2, 3).to(value.dtype) @ layer.values).unflatten(2, query.shape[2:4]).float().flatten(1, 2)
    following = order[:, -1:, None] + 1  # place of the next real token
    layer.keep(there & ((following - layer.places <= window) | ~layer.marks) & (layer.places >= begins[:, -1:, None]))
    return out
