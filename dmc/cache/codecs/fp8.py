"""FP8: E4M3 numbers, one scale for each token and head."""

from __future__ import annotations

import torch
from torch import Tensor

from dmc.cache.codecs.base import Blocks, Codec, Field
from dmc.cache.codecs.int8 import round_up
from dmc.kernels.formats.plain.format import PlainFormat
from dmc.kernels.pages.format import PageFormat

_LARGEST = 448.0  # of E4M3


class Fp8Codec(Codec):
    """``x ≈ number * scale`` with an E4M3 number and ``scale = max |x| / 448`` of a token's D channels.

    Scales are bf16 rounded up, so that no number overflows. Bits per element: ``8 + 16 / D``. The numbers are held as
    bytes: gathering float8 tensors is not implemented everywhere.
    """

    name = "fp8"
    lossy = True
    page_size = 16

    def encode(self, keys: Tensor, values: Tensor) -> Blocks:
        """See `Codec.encode`."""
        tensors = {}
        for part, x in (("k", keys.float()), ("v", values.float())):
            scale = round_up(x.abs().amax(-1) / _LARGEST)
            step = torch.where(scale > 0, scale, 1.0).float()[..., None]
            numbers = (x / step).clamp_(-_LARGEST, _LARGEST)
            tensors[f"{part}_numbers"] = numbers.to(torch.float8_e4m3fn).view(torch.uint8)
            tensors[f"{part}_scale"] = scale
        return Blocks(tensors, *keys.shape[-2:])

    def decode(self, blocks: Blocks) -> tuple[Tensor, Tensor]:
        """See `Codec.decode`."""
        keys, values = (
            self._numbers(blocks, part, torch.float32) * blocks.tensors[f"{part}_scale"].float()[..., None] for part in "kv"
        )
        return keys, values

    def make_page_format(self, entries: int, head_size: int, fields: dict[str, Field], device: torch.device) -> PageFormat:
        """See `Codec.make_page_format`."""
        return PlainFormat("fp8", entries, head_size, fields, self.fields)

    def scores(self, blocks: Blocks, query: Tensor) -> Tensor:
        """See `Codec.scores`; the scale is applied after the product."""
        scale = blocks.tensors["k_scale"].to(query.dtype)
        return (query @ self._numbers(blocks, "k", query.dtype).transpose(-1, -2)).mul_(scale[..., None, :])

    def combine(self, blocks: Blocks, weights: Tensor) -> Tensor:
        """See `Codec.combine`; the scale is applied before the product."""
        scale = blocks.tensors["v_scale"].to(weights.dtype)
        return (weights * scale[..., None, :]) @ self._numbers(blocks, "v", weights.dtype)

    @staticmethod
    def _numbers(blocks: Blocks, part: str, dtype: torch.dtype) -> Tensor:
        return blocks.tensors[f"{part}_numbers"].view(torch.float8_e4m3fn).to(dtype)
