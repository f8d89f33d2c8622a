"""What all layers of one forward pass share: which tokens are real, where documents start, the rotary tables.

A token whose position is not above that of the real token before it starts a new document (as in a batch packed with
`DataCollatorWithFlattening`): it sees nothing of the documents before, and nothing of it merges into them. Dimension
letters: B batch, T new tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache_dmc_llama import DmcCache


@dataclass
class Step:
    """One forward pass.

    Attributes:
        real: False for padding, `[B, T]`.
        starts: first real token of its document, `[B, T]`.
        restarts: True if a document starts behind another one of its row.
        order: int64 `[B, T]`, how many real tokens of the row come before (for padding: before the newest real one).
        begins: int64 `[B, T]`, `order` of the first token of the token's document.
        cos, sin: rotary tables fp32 `[B, T + 1, D]`: entry t is of the newest real token before token t, the
            last of the newest of all.
        newest: int64 `[B]`, position of the newest real token after this pass.
    """

    real: Tensor
    starts: Tensor
    restarts: bool
    order: Tensor
    begins: Tensor
    cos: Tensor
    sin: Tensor
    newest: Tensor


def plan(
    hidden: Tensor,
    mask: Tensor | None,
    position_ids: Tensor | None,
    cache: DmcCache | None,
    rotary: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> Step:
    """The step of new tokens behind those of a cache.

    Args:
        hidden: `[B, T, hidden]`, read for its shape and device.
        mask: `[B, tokens so far]`, 0 for padding; None for none.
        position_ids: `[B or 1, T]`; None counts real tokens on from the cache.
        cache: None, or the cache, new or used.
        rotary: Llama's rotary embedding: (a tensor of the wanted dtype, positions) to (cos, sin).

    Raises:
        ValueError: if `mask` or `position_ids` have another shape, `mask` is not that of the tokens in the cache, or
            `position_ids` leave open where a document starts.
    """
    batch, width = hidden.shape[:2]
    real = _real(mask, batch, width, cache, hidden.device)
    none = torch.zeros(batch, dtype=torch.long, device=hidden.device)
    fresh = cache is None or cache.tokens is None
    tokens, document, newest = (none, none, none - 1) if fresh else (cache.tokens, cache.document, cache.positions)
    counted = newest[:, None] + real.cumsum(-1)
    positions = counted if position_ids is None else _checked(position_ids, batch, width).to(counted)
    # Padding takes the position of the real token before it, since the accumulating entry passes through it.
    place = torch.arange(1, width + 1, device=hidden.device)
    last = F.pad((real * place).cummax(-1).values, (1, 0))  # [B, T + 1], into the columns of `positions`, 0: before them
    known = torch.cat([newest[:, None], positions], 1).gather(1, last)
    before = known[:, :-1]
    seen = tokens[:, None] + real.cumsum(-1)
    behind = seen - real.long() > 0
    if position_ids is not None and mask is None:
        jumps = behind & (positions > before + 1)
        if bool(jumps[:, 1:].any()):
            raise ValueError(
                "position_ids jump forward inside a row: positions rise by 1 within a document and restart lower with the next "
                "one; pass attention_mask to leave positions out on purpose"
            )
    starts = real & (~behind | (positions <= before))
    order = (seen - 1).clamp(min=0)
    begins = torch.cat([document[:, None], order * starts], 1).cummax(-1).values[:, 1:]
    cos, sin = rotary(hidden.new_empty(0, dtype=torch.float32), positions)
    # The newest token of the passes before keeps the table of its own pass: dynamic scaling changes it with the length.
    old = cos.new_zeros(batch, 2, cos.shape[-1]) if fresh else cache.rotation
    index = last[..., None].expand(-1, -1, cos.shape[-1])
    cos = torch.cat([old[:, :1], cos], 1).gather(1, index)
    sin = torch.cat([old[:, 1:], sin], 1).gather(1, index)
    return Step(real, starts, bool((starts & behind).any()), order, begins, cos, sin, known[:, -1])


def _real(mask: Tensor | None, batch: int, width: int, cache: DmcCache | None, device: torch.device) -> Tensor:
    past = 0 if cache is None else cache.columns
    if mask is None:
        return torch.ones(batch, width, dtype=torch.bool, device=device)
    if mask.shape != (batch, past + width):
        raise ValueError(f"attention_mask must be [batch, tokens so far] = {(batch, past + width)}, got {tuple(mask.shape)}")
    mask = mask.to(device).bool()
    if past and not torch.equal(mask[:, :past], cache.real):
        raise ValueError(
            "attention_mask changes tokens that are in past_key_values already, where they may be merged into others: start a "
            "new cache with the whole text"
        )
    return mask[:, past:]


def _checked(position_ids: Tensor, batch: int, width: int) -> Tensor:
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != width:
        raise ValueError(f"position_ids must be [batch or 1, new tokens] = {(batch, width)}, got {tuple(position_ids.shape)}")
    return position_ids.expand(batch, -1)
