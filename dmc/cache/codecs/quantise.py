"""Asymmetric min/max quantisation of pages in groups: the backbone of GEAR, and on its own KIVI and KCVT."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dmc.cache.codecs.bits import pack, unpack


@dataclass(frozen=True)
class Quantiser:
    """``x ≈ codes * scale + zero`` with one scale and zero for each group.

    Attributes:
        bits: 2, 3, 4 or 8; ``2**bits - 1`` steps between a group's lowest and highest value.
        axis: "token": a group is a run of channels of one token; "channel": a group is a run of
            tokens of one channel.
        group: longest group; None: the whole vector. A vector that it does not divide is cut into equal groups
            below that length.
        scale_dtype: of scales and zeros. bf16 has fp32's range, so no value overflows; the codes are taken
            against the stored, rounded scale and zero, so that rounding those costs no clipping.
    """

    bits: int
    axis: str
    group: int | None
    scale_dtype: torch.dtype

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Quantises fp32 ``[..., N, D]`` → codes (packed uint8 ``[..., bytes]``), scale, zero ``[..., groups]``."""
        vectors = x if self.axis == "token" else x.transpose(-1, -2)
        grouped = _in_groups(vectors, self.group)  # [..., vectors, groups, size]
        low, high = grouped.aminmax(dim=-1, keepdim=True)
        levels = 2**self.bits - 1
        zero = _round_down(low, self.scale_dtype)
        scale = -_round_down(-(high - zero.float()) / levels, self.scale_dtype)
        step = scale.float()
        step = torch.where(step > 0, step, 1.0)  # a constant group has scale 0 and all its codes are 0
        codes = ((grouped - zero.float()) / step).round_().clamp_(0, levels).to(torch.uint8)
        codes = codes.flatten(-2)[..., : vectors.shape[-1]].flatten(-2)
        return {"codes": pack(codes, self.bits), "scale": scale.flatten(-3), "zero": zero.flatten(-3)}

    def decode(self, fields: dict[str, Tensor], entries: int, head_size: int) -> Tensor:
        """Decodes the fields of `encode`: fp32 ``[..., N, D]``."""
        count, length = (entries, head_size) if self.axis == "token" else (head_size, entries)
        codes = unpack(fields["codes"], self.bits, entries * head_size, torch.float32)
        scale = fields["scale"].float().unflatten(-1, (count, -1, 1))
        zero = fields["zero"].float().unflatten(-1, (count, -1, 1))
        grouped = _in_groups(codes.unflatten(-1, (count, length)), self.group)
        vectors = torch.addcmul(zero, grouped, scale).flatten(-2)[..., :length]
        return vectors if self.axis == "token" else vectors.transpose(-1, -2)

    def scores(self, fields: dict[str, Tensor], entries: int, query: Tensor) -> Tensor:
        """Query ``[..., G, D]`` times what `decode` gives → ``[..., G, N]``, in the query's dtype."""
        return query @ self.decode(fields, entries, query.shape[-1]).to(query.dtype).transpose(-1, -2)

    def combine(self, fields: dict[str, Tensor], head_size: int, weights: Tensor) -> Tensor:
        """Weights ``[..., G, N]`` times what `decode` gives → ``[..., G, D]``, in the weights' dtype."""
        return weights @ self.decode(fields, weights.shape[-1], head_size).to(weights.dtype)


def _in_groups(vectors: Tensor, group: int | None) -> Tensor:
    """``[..., n] → [..., groups, size]``; where n does not divide, the last value fills the last group."""
    length = vectors.shape[-1]
    groups = 1 if group is None else math.ceil(length / group)
    pad = -length % groups
    if pad:
        vectors = torch.cat([vectors, vectors[..., -1:].expand(*vectors.shape[:-1], pad)], dim=-1)
    return vectors.unflatten(-1, (groups, -1))


def _round_down(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts x to ``dtype``, rounding down."""
    rounded = x.to(dtype)
    below = (x - x.abs() * torch.finfo(dtype).eps - torch.finfo(dtype).tiny).to(dtype)
    return torch.where(rounded.float() > x, below, rounded)
