"""Entries stored as they are, in fp32, bf16 or fp16."""

from __future__ import annotations

import torch
from torch import Tensor

from dmc.cache.codecs.base import Blocks, Codec, Field
from dmc.kernels.formats.plain.format import PlainFormat
from dmc.kernels.pages.format import PageFormat

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class DenseCodec(Codec):
    """No compression: the baseline of every other codec.

    Args:
        dtype: "fp32", "bf16" or "fp16"; None keeps the dtype of the entries (the model's).

    Raises:
        ValueError: if ``dtype`` is none of these.
    """

    name = "dense"
    lossy = False
    page_size = 16

    def __init__(self, dtype: str | None = None) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dense codec: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        self.dtype = None if dtype is None else DTYPES[dtype]

    def encode(self, keys: Tensor, values: Tensor) -> Blocks:
        """Casts; see `Codec.encode`."""
        tensors = {"k": keys.to(self.dtype or keys.dtype), "v": values.to(self.dtype or values.dtype)}
        return Blocks(tensors, *keys.shape[-2:])

    def decode(self, blocks: Blocks) -> tuple[Tensor, Tensor]:
        """The stored tensors themselves, in their own dtype."""
        return blocks.tensors["k"], blocks.tensors["v"]

    def make_page_format(self, entries: int, head_size: int, fields: dict[str, Field], device: torch.device) -> PageFormat:
        """See `Codec.make_page_format`."""
        return PlainFormat("dense", entries, head_size, fields, self.fields)

    def scores(self, blocks: Blocks, query: Tensor) -> Tensor:
        """See `Codec.scores`."""
        return query @ blocks.tensors["k"].to(query.dtype).transpose(-1, -2)

    def row_scores(self, blocks: Blocks, query: Tensor) -> Tensor:
        """See `Codec.row_scores`; one matmul per row."""
        return query @ blocks.tensors["k"].flatten(1, 2).to(query.dtype).transpose(-1, -2)

    def row_combine(self, blocks: Blocks, weights: Tensor) -> Tensor:
        """See `Codec.row_combine`; one matmul per row."""
        return weights @ blocks.tensors["v"].flatten(1, 2).to(weights.dtype)

    def combine(self, blocks: Blocks, weights: Tensor) -> Tensor:
        """See `Codec.combine`."""
        return weights @ blocks.tensors["v"].to(weights.dtype)
