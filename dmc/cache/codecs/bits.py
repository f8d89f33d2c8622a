"""Codes of 1 to 8 bits packed into bytes.

A code is cut into planes of 1, 2, 4 or 8 bits (3 = 2 + 1). A plane of width w stores 8 / w codes in each byte: the codes
are laid out as 8 / w equal chunks, and byte i holds element i of every chunk. Unpacking is then a shift and a mask over a
contiguous chunk, without interleaving. A row of n codes takes ``sum over planes of ceil(n w / 8)`` bytes, so at most one
byte per plane is unused.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dmc.kernels.pages.layout import PLANES


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of ``count`` packed codes of ``bits`` bits."""
    return sum(-(-count * width // 8) for width in PLANES[bits])


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs codes below ``2**bits``: uint8 ``[..., n]`` → uint8 ``[..., packed_bytes(n, bits)]``."""
    out, shift = [], 0
    for width in PLANES[bits]:
        per_byte = 8 // width
        plane = (codes >> shift) & ((1 << width) - 1)
        plane = F.pad(plane, (0, -plane.shape[-1] % per_byte)).unflatten(-1, (per_byte, -1))
        packed = plane[..., 0, :].clone()
        for part in range(1, per_byte):
            packed |= plane[..., part, :] << (part * width)
        out.append(packed)
        shift += width
    return torch.cat(out, dim=-1)


def unpack(packed: Tensor, bits: int, count: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """The inverse of `pack`: ``[..., count]`` codes in ``dtype`` (a float dtype where arithmetic follows)."""
    codes, start, shift = None, 0, 0
    for width in PLANES[bits]:
        per_byte = 8 // width
        size = -(-count // per_byte)
        chunk = packed[..., start : start + size]
        plane = torch.empty(*packed.shape[:-1], per_byte, size, dtype=dtype, device=packed.device)
        for part in range(per_byte):
            plane[..., part, :] = (chunk >> (part * width)) & ((1 << width) - 1)
        plane = plane.flatten(-2)[..., :count]
        codes = plane if codes is None else codes + plane * (1 << shift)
        start, shift = start + size, shift + width
    return codes
