"""Entries of a cache from the tokens that merge into them. Dimension letters are those of `modeling_dmc_llama`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import rotate_half

_CHUNK = 32  # tokens that one small matrix product of the running sums covers


def states(kv: Tensor, opens: Tensor, omega: Tensor, tail: Tensor | None) -> Tensor:
    """The accumulating entry before the first token and after every token, as sums: `[B, H, T + 1, F]` fp32.

    kv `[B, H, T, 2 D]` unrotated; opens `[B, H, T]` bool; omega `[B, H, T]` fp32, 0 for padding.
    """
    with torch.autocast(kv.device.type, enabled=False):
        weighted = torch.cat([kv.float() * omega[..., None], omega[..., None]], -1)
        tail = torch.zeros_like(weighted[:, :, 0]) if tail is None else tail
        return _running_sums(torch.cat([tail[:, :, None], weighted], 2), F.pad(opens, (1, 0)))


def _running_sums(x: Tensor, opens: Tensor) -> Tensor:
    """Sum of x `[..., S, F]` since the last True of opens `[..., S]`, inclusive; no difference of long sums."""
    size = x.shape[-2]
    if size <= _CHUNK:
        entry = opens.cumsum(-1)
        return (entry[..., :, None] == entry[..., None, :]).tril().to(x.dtype) @ x
    pad = -size % _CHUNK
    opens = F.pad(opens, (0, pad)).unflatten(-1, (-1, _CHUNK))
    x = F.pad(x, (0, 0, 0, pad)).unflatten(-2, (-1, _CHUNK))
    within = _running_sums(x, opens)  # [..., chunks, _CHUNK, F]: each chunk on its own
    carried = opens.cumsum(-1) == 0  # tokens that the entry open before the chunk still reaches
    ends = _running_sums(within[..., -1, :], ~carried[..., -1])
    before = F.pad(ends[..., :-1, :], (0, 0, 1, 0))
    return (within + carried[..., None] * before[..., None, :]).flatten(-3, -2)[..., :size, :]


def positions_of(closes: Tensor, counts: Tensor) -> Tensor:
    """Where each head closes its 1st, 2nd, ... entry: `[B, H, T]` → `[B, H, M]`, M the most of any head."""
    most = int(counts[..., -1].max())
    slot = torch.where(closes, counts - 1, most)
    token = torch.arange(closes.shape[-1], device=closes.device).expand_as(slot)
    return token.new_zeros(*slot.shape[:2], most + 1).scatter_(2, slot, token)[..., :most]


def take(table: Tensor, index: Tensor) -> Tensor:
    """Rows of a table `[B, T, D]` by index `[B, H, M]` → `[B, H, M, D]`."""
    size = table.shape[-1]
    return table[:, None].expand(-1, index.shape[1], -1, -1).gather(2, index[..., None].expand(-1, -1, -1, size))


def mean(sums: Tensor) -> Tensor:
    """Keys and values of entries from their sums `[..., F]` → `[..., 2 D]`; 0 where nothing was summed."""
    return sums[..., :-1] / sums[..., -1:].clamp(min=torch.finfo(sums.dtype).tiny)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of `[..., D]` in the half-split layout."""
    return x * cos + rotate_half(x) * sin


def append(old: Tensor, lengths: Tensor, new: Tensor, total: Tensor) -> Tensor:
    """Entries old `[B, H, N, D]`, of which `lengths` [B, H] count, followed by new; `total` of them count."""
    most = int(total.max())
    slot = torch.arange(most, device=old.device) - lengths[..., None]  # [B, H, N'], negative: an old entry
    fresh = new.gather(2, slot.clamp(0, new.shape[2] - 1)[..., None].expand(-1, -1, -1, new.shape[-1]))
    return torch.where(slot[..., None] < 0, F.pad(old, (0, 0, 0, most - old.shape[2])), fresh)
