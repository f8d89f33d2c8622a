"""A codec for models whose keys have a bias: it encodes keys without the bias (reasons: `dmc.kernels.pages.key_bias`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dmc.cache.codecs.base import POSITION, Blocks, Codec, Field
from dmc.kernels.pages.format import PageFormat
from dmc.kernels.pages.key_bias import KeyBias

_HEAD = "head"  # field: the key/value head of a page, counted over all layers


class WithoutKeyBias(Codec):
    """Another codec, which gets keys without their bias. The bias is added again when pages are read.

    A page also keeps the positions of its entries, 4 bytes each, and its head, 4 bytes.

    Args:
        inner: the codec.
        key_bias: of the model.
    """

    needs_positions = True

    def __init__(self, inner: Codec, key_bias: KeyBias) -> None:
        self.inner, self.key_bias = inner, key_bias
        self.name, self.lossy, self.page_size, self.window = inner.name, inner.lossy, inner.page_size, inner.window
        self.compiles, self.made_for = inner.compiles, inner.made_for

    def layout(self, entries: int, head_size: int, dtype: torch.dtype) -> dict[str, Field]:
        """See `Codec.layout`."""
        own = {POSITION: (torch.int32, (entries,)), _HEAD: (torch.int32, (1,))}
        return self.inner.layout(entries, head_size, dtype) | own

    def make_page_format(self, entries: int, head_size: int, fields: dict[str, Field], device: torch.device) -> PageFormat:
        """The page format of the inner codec: its kernels read these pages, and their caller adds the bias."""
        inner = {name: field for name, field in fields.items() if name not in (POSITION, _HEAD)}
        return self.inner.make_page_format(entries, head_size, inner, device)

    def encode(self, keys: Tensor, values: Tensor) -> Blocks:
        """Raises ValueError: encoding needs heads and positions, see `encode_at`."""
        raise ValueError(f"{self.name} codec without the keys' bias: this needs heads and positions; call `encode_at`")

    def encode_at(self, keys: Tensor, values: Tensor, heads: Tensor, positions: Tensor) -> Blocks:
        """See `Codec.encode_at`; the difference is computed in fp32 and rounded to the dtype of ``keys``."""
        plain = keys.float() - self.key_bias.keys(heads, positions)
        empty = (positions < 0)[..., None]  # nothing reads them, but a codec's scales may cover a page: they become its mean
        if empty.any():
            mean = plain.masked_fill(empty, 0.0).sum(-2, keepdim=True) / (~empty).sum(-2, keepdim=True).clamp(min=1)
            plain = torch.where(empty, mean, plain)
        plain = plain.to(keys.dtype)
        own = {POSITION: positions.int(), _HEAD: heads[..., None].int()}
        self.key_bias.features(positions)  # before any kernel reads these positions
        return Blocks(self.inner.encode(plain, values).tensors | own, *keys.shape[-2:])

    def decode(self, blocks: Blocks) -> tuple[Tensor, Tensor]:
        """See `Codec.decode`."""
        keys, values = self.inner.decode(self._inner(blocks))
        return keys + self.key_bias.keys(_heads(blocks), blocks.tensors[POSITION]).to(keys.dtype), values

    def scores(self, blocks: Blocks, query: Tensor) -> Tensor:
        """See `Codec.scores`."""
        bias = self.key_bias.scores(query, _heads(blocks), blocks.tensors[POSITION])
        return self.inner.scores(self._inner(blocks), query) + bias

    def row_scores(self, blocks: Blocks, query: Tensor) -> Tensor:
        """See `Codec.row_scores`; all pages of a row belong to one head."""
        bias = self.key_bias.scores(query, _heads(blocks)[:, 0], blocks.tensors[POSITION].flatten(1))
        return self.inner.row_scores(self._inner(blocks), query) + bias

    def combine(self, blocks: Blocks, weights: Tensor) -> Tensor:
        """See `Codec.combine`: values have no bias."""
        return self.inner.combine(self._inner(blocks), weights)

    def row_combine(self, blocks: Blocks, weights: Tensor) -> Tensor:
        """See `Codec.row_combine`."""
        return self.inner.row_combine(self._inner(blocks), weights)

    def _inner(self, blocks: Blocks) -> Blocks:
        fields = {name: field for name, field in blocks.tensors.items() if name not in (POSITION, _HEAD)}
        return Blocks(fields, blocks.entries, blocks.head_size)


def without_key_bias(codecs: Sequence[Codec], key_bias: KeyBias | None) -> list[Codec]:
    """The codecs of each layer for a model whose keys have this bias. Layers that share a codec object still share one.

    Lossless codecs are returned unchanged. So are codecs that rotate keys back themselves (`Codec.needs_positions`): the bases
    of eigen apply before RoPE, where the bias is one of their directions.
    """
    if key_bias is None:
        return list(codecs)
    made = {id(one): WithoutKeyBias(one, key_bias) if one.lossy and not one.needs_positions else one for one in codecs}
    return [made[id(one)] for one in codecs]


def _heads(blocks: Blocks) -> Tensor:
    return blocks.tensors[_HEAD][..., 0].long()
