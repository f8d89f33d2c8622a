"""Dynamic Memory Sparsification (arXiv 2506.05345): a cache that marked tokens leave, and attention over it.

A head that marks a token evicts it `window` tokens later: query i sees entry j where i - j <= window, or where j is not
marked. A token is marked where its logit is above 0; what the token `window` later adds to the logit, if the model looks
ahead, is there before any query asks. Nothing is merged. Dimension letters: B batch, T new tokens, H key/value heads,
G query heads per key/value head, D head size, N entries of the longest head.
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
        logits: fp32 `[B, H, N]`, above 0 for an entry that will be evicted.
        lengths: int64 `[B, H]`.
    """

    is_compileable = is_croppable = is_sliding = is_initialized = supports_early_init = False
    _fields = ("keys", "values", "places", "logits")

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.places: Tensor | None = None
        self.logits: Tensor | None = None
        self.lengths: Tensor | None = None

    def count(self, opened: Tensor) -> Tensor:
        """Entries of each head, `[B, H]` int64; ``opened`` [B, 1] is for caches that keep the newest one apart."""
        return self.lengths

    def append(self, keys: Tensor, values: Tensor, places: Tensor, logits: Tensor) -> None:
        """Add entries `[B, H, M, ...]` behind the filling of shorter heads; `keep` closes the gaps."""
        new = (keys, values, places, logits)
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
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logits: Tensor,
    ahead: Tensor,
    order: Tensor,
    begins: Tensor,
    real: Tensor,
    layer: EvictingLayerCache,
    *,
    window: int,
    dropout: float,
) -> Tensor:
    """Attention of new tokens over the cache, which takes them up and drops what no later query sees.

    Args:
        query: `[B, H * G, T, D]` fp32, rotated and scaled.
        key, value: `[B, H, T, D]` in the model's dtype, key rotated.
        logits: fp32 `[B, H, T]`, above 0 for a token to evict.
        ahead: fp32 `[B, H, T]`, what a token adds to the logit of the one `window` before it in its document.
        order: int64 `[B, T]`, how many real tokens came before each.
        begins: int64 `[B, T]`, `order` of the first token of each token's document: what came before is not seen.
        real: bool `[B, T]`, False for padding, which no query but its own sees.

    Returns:
        `[B, H * G, T, D]` fp32.
    """
    inputs = (query, key, value, logits, ahead, order, begins, real)
    parts = zip(*(x.split(_QUERIES, x.dim() - 2 if x.dim() > 3 else -1) for x in inputs), strict=True)
    return torch.cat([_attend(*part, layer, window, dropout) for part in parts], 2)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logits: Tensor,
    ahead: Tensor,
    order: Tensor,
    begins: Tensor,
    real: Tensor,
    layer: EvictingLayerCache,
    window: int,
    dropout: float,
) -> Tensor:
    heads, tokens = key.shape[1:3]
    old = 0 if layer.keys is None else layer.keys.shape[2]
    there = real[:, None].expand_as(logits)
    if old:
        filled = torch.arange(old, device=key.device) < layer.lengths[..., None]
        there = torch.cat([filled, there], -1)
    layer.append(key, value, order[:, None].expand_as(logits), logits)
    layer.logits = layer.logits + _later(layer.places + window, ahead, order, real)
    behind = order[:, None, :, None] - layer.places[:, :, None]  # [B, H, T, N]
    visible = there[:, :, None] & (behind >= 0) & ((behind <= window) | (layer.logits <= 0)[:, :, None])
    visible &= layer.places[:, :, None] >= begins[:, None, :, None]
    visible[..., old:] |= torch.eye(tokens, dtype=torch.bool, device=key.device)  # padding sees itself, so that no row is empty
    query = query.unflatten(1, (heads, -1))  # [B, H, G, T, D]
    scores = (query.flatten(2, 3).to(key.dtype) @ layer.keys.mT).unflatten(2, query.shape[2:4]).float()
    weights = scores.masked_fill(~visible[:, :, None], float("-inf")).softmax(-1)
    weights = F.dropout(weights, dropout, dropout > 0)
    out = (weights.flatten(2, 3).to(value.dtype) @ layer.values).unflatten(2, query.shape[2:4]).float().flatten(1, 2)
    following = order[:, -1:, None] + 1  # place of the next real token
    layer.keep(there & ((following - layer.places <= window) | (layer.logits <= 0)) & (layer.places >= begins[:, -1:, None]))
    return out


def _later(wanted: Tensor, ahead: Tensor, order: Tensor, real: Tensor) -> Tensor:
    """What the new tokens at the places ``wanted`` [B, H, N] add, `[B, H, N]`: 0 where there is none of that place."""
    column = torch.searchsorted(order.contiguous(), wanted.flatten(1).contiguous()).clamp(max=order.shape[1] - 1)
    # Padding has the place of the token before it, and may come first of that place: where it does, the token is not new.
    found = (order.gather(1, column).view_as(wanted) == wanted) & real.gather(1, column).view_as(wanted)
    return ahead.gather(2, column.view_as(wanted)).masked_fill(~found, 0.0)
