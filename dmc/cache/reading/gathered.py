"""Attention of new tokens over gathered pages: a few rows at a time, rows of similar length together."""

from __future__ import annotations

import torch
from torch import Tensor

from dmc.cache.codecs import Blocks
from dmc.cache.reading.plan import Group, Plan, plans
from dmc.cache.reading.reader import Reader
from dmc.cache.storage.packing import Packing
from dmc.cache.storage.rows import Rows


class Gathered(Reader):
    """Attention over copies of pages, which the codec reads in PyTorch.

    Args:
        packing: of the layers.
    """

    plans = True

    def __init__(self, packing: Packing) -> None:
        self.packing = packing

    def attend(
        self, rows: Rows, index: Tensor, query: Tensor, own_key: Tensor, own_value: Tensor, plan: Plan | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See `Reader.attend`."""
        plan = plans(rows, index[None])[0] if plan is None else plan
        query = query * query.shape[-1] ** -0.5
        if plan.order is not None:
            query, own_key, own_value = query[plan.order], own_key[plan.order], own_value[plan.order]
        scores, values = query @ own_key[:, :, None], own_value[:, None]
        if plan.full_pages is not None:
            keys, full_values = rows.read_full_pages(plan.full_pages, len(query))
            full = query @ keys.to(query.dtype).transpose(-1, -2)
            if plan.full_gone is not None:
                full = full.masked_fill_(plan.full_gone, -torch.inf)
            scores, values = torch.cat([full, scores], dim=-1), torch.cat([full_values.to(query.dtype), values], dim=1)
        if len(plan.groups) == 1:
            out = _group(rows, plan, plan.groups[0], query, scores, values)
        else:
            cut = ((group, slice(group.start, group.end)) for group in plan.groups)
            out = torch.cat([_group(rows, plan, group, query[at], scores[at], values[at]) for group, at in cut])
        return (out if plan.back is None else out[plan.back]), None


def _group(rows: Rows, plan: Plan, group: Group, query: Tensor, scores: Tensor, values: Tensor) -> Tensor:
    """Attention of some rows. Scores ``[r, G, n]`` and values ``[r, n, D]`` are those of entries outside of the group's pages."""
    if not group.columns:
        return scores.softmax(-1) @ values
    codec = plan.packing.codec
    blocks = rows.blocks(group.pages, plan.packing)
    fields = {name: field.unflatten(0, (len(query), group.columns)) for name, field in blocks.tensors.items()}
    blocks = Blocks(fields, blocks.entries, blocks.head_size)
    paged = codec.row_scores(blocks, query)
    if group.gone is not None:
        paged = paged.masked_fill_(group.gone, -torch.inf)
    weights = torch.cat([paged, scores], dim=-1).softmax(-1)
    width = paged.shape[-1]
    return torch.baddbmm(codec.row_combine(blocks, weights[..., :width]), weights[..., width:], values)
