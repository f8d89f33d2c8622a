"""The reference implementation of decode attention over pages."""

from __future__ import annotations

import torch
from torch import Tensor

from dmc.kernels.pages.paged import Paged


def decode_reference(
    query: Tensor, own_key: Tensor, own_value: Tensor, index: Tensor, paged: Paged, *, scale: float,
) -> Tensor:
    """Gathers every page of every row, padded to the longest row, in fp32 (fp64 for fp64 queries)."""
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    sides = []
    for part, own in (("k", own_key), ("v", own_value)):
        pages = paged.encoded_table[index].long()
        encoded = _decoded(paged, part, pages, work)
        if part == "k" and paged.key_bias is not None:
            heads = paged.heads[index, None].expand_as(pages)
            encoded = encoded + paged.key_bias.keys(heads, paged.encoded["position"][pages]).to(work)
        encoded = encoded.flatten(1, 2)
        full = paged.full(part, paged.full_table[index].long(), work).flatten(1, 2)
        sides.append(torch.cat([encoded, full, own[:, None].to(work)], dim=1))
    entries = paged.page * paged.encoded_table.shape[1]
    offset = torch.arange(sides[0].shape[1], device=query.device)
    seen = (offset < (paged.encoded_count[index] * paged.page)[:, None]) & (offset < entries)
    seen = seen | ((offset >= entries) & (offset - entries < paged.full_count[index][:, None]))
    seen[:, -1] = True
    scores = (query.to(work) @ sides[0].transpose(-1, -2)) * scale
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    return (weights @ sides[1].masked_fill(~seen[..., None], 0.0)).to(query.dtype)


def _decoded(paged: Paged, part: str, pages: Tensor, work: torch.dtype) -> Tensor:
    fields = {name: paged.encoded[name][pages] for name in paged.format.fields}
    return paged.format.reference(fields, part, work)
