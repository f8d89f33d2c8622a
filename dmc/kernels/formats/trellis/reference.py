"""Reference decoding of trellis pages."""

from __future__ import annotations

import torch
from torch import Tensor

from dmc.kernels.pages.layout import NO_SCALE, SCALE_STEPS, unpacked
from dmc.kernels.pages.paged import Trellis


def trellis_page(fields: dict[str, Tensor], layout: Trellis, part: str, work: torch.dtype) -> Tensor:
    """``[..., P, D]``: levels, found by the path that each code's lowest bit is part of, scaled, shifted, rotated back."""
    codes, start = [], 0
    for count, bits in layout.stretches(part):
        some, start = unpacked(fields["codes"], start, layout.page * count, bits)
        codes.append(some.unflatten(-1, (layout.page, count)))
    code = torch.cat(codes, dim=-1)
    once, twice = (torch.nn.functional.pad(code, (by, 0))[..., : layout.head_size] & 1 for by in (1, 2))
    index = 2 * ((code & 1) ^ twice) + once + 2 * (code & ~1)
    counts, widths = zip(*layout.stretches(part), strict=True)
    levels = [layout.levels[bits].to(work)[some] for bits, some in zip(widths, index.split(counts, -1), strict=True)]
    scale = torch.exp2(fields["scale"].to(work) / -SCALE_STEPS) * fields["top"].to(work)
    x = torch.cat(levels, dim=-1) * scale.masked_fill(fields["scale"] == NO_SCALE, 0.0)[..., None]
    if "mean" in fields:
        x = x + (fields["mean"].to(work) * fields["unit"].to(work))[..., None, :]
    return x @ layout.rotation.to(work).T
