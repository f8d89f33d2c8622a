"""Layout of packed pages, for the codecs that write them (`dmc.cache.codecs`) and the kernels that read them."""

from __future__ import annotations

import torch
from torch import Tensor

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
"""Bits of a code → widths of the planes that it is cut into, the low bits first; see `dmc.cache.codecs.bits`."""

SCALE_STEPS, NO_SCALE = 32, 255
"""Scale codes of rotated pages: c means ``2 ** (-c / SCALE_STEPS)`` of the page's largest scale, `NO_SCALE` means 0."""


def unpacked(packed: Tensor, start: int, total: int, bits: int) -> tuple[Tensor, int]:
    """Unpacks ``total`` codes from byte ``start`` on, int32; also returns the byte behind them."""
    index = torch.arange(total, device=packed.device)
    codes, shift = 0, 0
    for width in PLANES[bits]:
        chunk = -(-total * width // 8)
        plane = packed[..., start + index % chunk].int() >> (index // chunk * width)
        codes = codes + ((plane & ((1 << width) - 1)) << shift)
        start, shift = start + chunk, shift + width
    return codes, start
