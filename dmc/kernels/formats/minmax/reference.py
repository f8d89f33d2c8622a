"""Reference decoding of GEAR pages with a backbone of min/max groups."""

from __future__ import annotations

import torch
from torch import Tensor

from dmc.kernels.pages.layout import unpacked
from dmc.kernels.pages.paged import Gear


def gear_page(fields: dict[str, Tensor], gear: Gear, part: str, work: torch.dtype) -> Tensor:
    """``[..., P, D]``: backbone, outliers and low-rank part added up."""
    total, (groups, size) = gear.page * gear.head_size, gear.groups(part)
    index = torch.arange(total, device=fields["codes"].device)
    codes, _ = unpacked(fields["codes"], 0, total, gear.bits)
    vectors, length = (gear.head_size, gear.page) if gear.channel(part) else (gear.page, gear.head_size)
    at = index // length * groups + index % length // size
    x = codes.to(work) * fields["scale"].to(work)[..., at] + fields["zero"].to(work)[..., at]
    x = x.unflatten(-1, (vectors, length))
    x = x.transpose(-1, -2) if gear.channel(part) else x  # [..., P, D]
    if "outliers" in fields:
        side = x.transpose(-1, -2).clone() if part == "k" else x.clone()
        side.scatter_add_(-1, fields["places"].long(), fields["outliers"].to(work))
        x = side.transpose(-1, -2) if part == "k" else side
    if "left" in fields:
        x = x + fields["left"].to(work) @ fields["right"].to(work).transpose(-1, -2)
    return x
