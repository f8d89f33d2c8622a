"""INT8: symmetric, one scale for each token and head."""

from __future__ import annotations

import torch
from torch import Tensor

from dmc.cache.codecs.base import Blocks, Codec, Field
from dmc.kernels.formats.plain.format import PlainFormat
from dmc.kernels.pages.format import PageFormat

LEVELS = 127
"""Largest code."""


class Int8Codec(Codec):
    """``x ≈ codes * scale`` with codes from -127 to 127 and ``scale = max |x| / 127`` of a token's D channels.

    Scales are bf16, which has fp32's range, rounded up so that no code is clipped; codes are taken against the rounded
    scale. Bits per element: ``8 + 16 / D``.
    """

    name = "int8"
    lossy = True
    page_size = 16

    def encode(self, keys: Tensor, values: Tensor) -> Blocks:
        """See `Codec.encode`."""
        tensors = {}
        for part, x in (("k", keys.float()), ("v", values.float())):
            scale = round_up(x.abs().amax(-1) / LEVELS)
            tensors |= {f"{part}_codes": codes(x, scale), f"{part}_scale": scale}
        return Blocks(tensors, *keys.shape[-2:])

    def decode(self, blocks: Blocks) -> tuple[Tensor, Tensor]:
        """See `Codec.decode`."""
        fields = blocks.tensors
        keys, values = (fields[f"{part}_codes"].float() * fields[f"{part}_scale"].float()[..., None] for part in "kv")
        return keys, values

    def make_page_format(self, entries: int, head_size: int, fields: dict[str, Field], device: torch.device) -> PageFormat:
        """See `Codec.make_page_format`."""
        return PlainFormat("int8", entries, head_size, fields, self.fields)

    def scores(self, blocks: Blocks, query: Tensor) -> Tensor:
        """See `Codec.scores`; the scale is applied after the product."""
        codes, scale = blocks.tensors["k_codes"].to(query.dtype), blocks.tensors["k_scale"].to(query.dtype)
        return (query @ codes.transpose(-1, -2)).mul_(scale[..., None, :])

    def combine(self, blocks: Blocks, weights: Tensor) -> Tensor:
        """See `Codec.combine`; the scale is applied before the product."""
        codes, scale = blocks.tensors["v_codes"].to(weights.dtype), blocks.tensors["v_scale"].to(weights.dtype)
        return (weights * scale[..., None, :]) @ codes


def codes(x: Tensor, scale: Tensor) -> Tensor:
    """int8 codes from -127 to 127 of fp32 vectors ``[..., D]`` with scales ``[...]``; 0 where the scale is 0."""
    step = torch.where(scale > 0, scale, 1.0).float()[..., None]
    return (x / step).round_().clamp_(-LEVELS, LEVELS).to(torch.int8)


def round_up(x: Tensor) -> Tensor:
    """Casts x (fp32, not negative) to bf16, rounding up."""
    rounded = x.bfloat16()
    above = (rounded.view(torch.int16) + 1).view(torch.bfloat16)  # the next number of the same sign
    return torch.where(rounded.float() < x, above, rounded)
