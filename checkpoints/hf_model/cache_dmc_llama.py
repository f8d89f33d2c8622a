"""The key/value cache of a DMC Llama: entries that merged tokens share; with DMS, tokens that are not evicted.

Dimension letters: B batch, H key/value heads, D head size, L layers, N closed entries of the longest head,
M new entries, F = 2 D + 1 (key, value and weight of an entry).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .entries_dmc_llama import append
from .eviction_dmc_llama import EvictingLayerCache
from .late_dmc_llama import LateLayerCache


class DmcLayerCache:
    """The entries of one layer.

    Attributes:
        keys, values: closed entries, keys rotated, `[B, H, N, D]` in the model's dtype; a head's first
            `lengths` are its entries, the rest is filling. None before the first token.
        lengths: closed entries of each head, `[B, H]` int64.
        tail: the accumulating entry, `[B, H, F]` fp32: weighted sum of the unrotated keys, of the values, of the weights.
    """

    is_compileable = is_croppable = is_sliding = is_initialized = supports_early_init = False

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.lengths: Tensor | None = None
        self.tail: Tensor | None = None

    def count(self, opened: Tensor) -> Tensor:
        """Entries of each head, the open one included where ``opened`` [B, 1] says that there is one: `[B, H]` int64."""
        return self.lengths + opened

    def append(self, keys: Tensor, values: Tensor, counts: Tensor, tail: Tensor) -> None:
        """Add each head's first `counts` [B, H] of the entries `[B, H, M, D]`, and replace the accumulating entry."""
        self.tail = tail
        if self.keys is None:
            self.keys, self.values, self.lengths = keys, values, counts
        elif keys.shape[2]:
            lengths = self.lengths + counts
            self.keys = append(self.keys, self.lengths, keys, lengths)
            self.values = append(self.values, self.lengths, values, lengths)
            self.lengths = lengths

    def drop(self, counts: Tensor) -> None:
        """Forget each head's first `counts` [B, H] entries: those of documents that have ended."""
        self.lengths = self.lengths - counts
        entry = torch.arange(int(self.lengths.max()), device=counts.device) + counts[..., None]
        entry = entry.clamp(max=max(self.keys.shape[2] - 1, 0))[..., None].expand(-1, -1, -1, self.keys.shape[-1])
        self.keys, self.values = self.keys.gather(2, entry), self.values.gather(2, entry)

    def map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor, batch first, by `function(tensor)`."""
        for name in ("keys", "values", "lengths", "tail"):
            if getattr(self, name) is not None:
                setattr(self, name, function(getattr(self, name)))


class DmcCache(Cache):
    """The compressed cache of all layers, and how far it compressed.

    `method` is "dmc" or "dms"; `window` how many of the newest tokens before a query stay as they are, None for none.

    Closed entries are padded to the longest head of a layer, so this form shows what is kept and does not yet
    save all of the memory; ratios count entries.

    In a batch `generate` feeds sequences that have ended with padding until the last one ends; those tokens
    are counted here like any other.

    Only the newest document of a row is held: a token whose position restarts begins a new one and drops those before.

    Attributes:
        real: False for padding, of every token so far, `[B, columns]`; None before the first token, as the following.
        tokens: real tokens seen by each sequence, `[B]` int64.
        document: how many of them came before the document that is held, `[B]` int64.
        positions: rotary position of the newest real token of each sequence, `[B]` int64.
        rotation: (cos, sin) of it, as its own pass computed them, `[B, 2, D]` fp32.
    """

    _fields = ("real", "tokens", "document", "positions", "rotation")

    def __init__(self, layers: int, method: str = "dmc", window: int | None = None) -> None:
        layer = EvictingLayerCache if method == "dms" else DmcLayerCache if window is None else LateLayerCache
        super().__init__(layers=[layer() for _ in range(layers)])
        self.method, self.window = method, window
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.columns = 0
        for name in self._fields:
            setattr(self, name, None)

    def advance(self, *, real: Tensor, document: Tensor, positions: Tensor, rotation: Tensor) -> None:
        """Count a forward pass over the tokens `real` [B, T], after its last layer; the rest as the attributes."""
        self.columns += real.shape[1]
        new = real.sum(-1)
        self.tokens = new if self.tokens is None else self.tokens + new
        self.real = real if self.real is None else torch.cat([self.real, real], 1)
        self.document, self.positions, self.rotation = document, positions, rotation

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, padding included: the width of the attention mask so far."""
        return self.columns

    def lengths(self) -> Tensor:
        """Entries of every head, those still changing or still to be evicted included: `[L, B, H]` int64."""
        if self.tokens is None:
            raise ValueError("the cache is empty: run the model on some tokens first")
        opened = (self.tokens > 0).long()[:, None]
        return torch.stack([layer.count(opened).cpu() for layer in self.layers])

    def compression_ratio(self, layer: int | None = None, head: int | None = None, sequence: int | None = None) -> float:
        """Tokens per entry, over everything or over one layer, key/value head, sequence of the batch."""
        lengths, tokens = self.lengths(), self._held()[None, :, None]
        tokens = tokens.expand_as(lengths)
        index = tuple(slice(None) if chosen is None else chosen for chosen in (layer, sequence, head))
        return tokens[index].sum().item() / max(lengths[index].sum().item(), 1)

    def compression_ratios(self) -> Tensor:
        """Tokens per entry of each layer and key/value head over the batch: `[L, H]` fp32."""
        return self._held().sum().item() / self.lengths().sum(1).clamp(min=1)

    def _held(self) -> Tensor:
        """Tokens of the documents that are held, `[B]` int64 on the CPU."""
        return (self.tokens - self.document).cpu()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the chosen beams, `[B]`."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices`."""
        self._map_batch(lambda x: x.index_select(0, indices.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        self._map_batch(lambda x: x.repeat_interleave(repeats, 0))

    def crop(self, *args, **kwargs) -> None:
        """Refused: a token that was merged cannot be taken out again, nor one that was evicted brought back."""
        raise ValueError(
            "a DmcCache cannot be cropped: merged tokens cannot be taken out nor evicted ones brought back; start a new cache"
        )

    def _map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        for layer in self.layers:
            layer.map_batch(function)
        for name in self._fields:
            if getattr(self, name) is not None:
                setattr(self, name, function(getattr(self, name)))
