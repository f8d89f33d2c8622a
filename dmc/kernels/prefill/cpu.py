"""Prefill attention on a CPU: a numba kernel, over entries in a layout with which matmuls reach the CPU's full rate.

PyTorch's attention for CPUs reaches half of that rate, and a quarter with a mask, which merged entries need.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dmc.kernels.cpu.threads import share
from dmc.kernels.cpu.tiles import LANES, PAIRED, WIDTH
from dmc.kernels.prefill import loop as loops

_LEAST = 1 << 19  # products from which another thread pays off


def prefill(
    query: Tensor, keys: Tensor, values: Tensor, entry_positions: Tensor, own_keys: Tensor, own_values: Tensor, positions: Tensor,
    scale: float,
) -> Tensor:
    """`dmc.kernels.prefill.prefill.prefill_attention` for fp32 and bf16 on a CPU.

    Products of bf16 use the CPU's instructions if it has them, and else fp32. Scores, the softmax and all sums are fp32; weights
    are rounded to bf16 before they are multiplied by the values, as in FlashAttention.
    """
    query, keys, values, own_keys, own_values = (x.detach() for x in (query, keys, values, own_keys, own_values))
    heads, groups, tokens, size = query.shape
    dtype = query.dtype
    if not query.numel():
        return torch.empty_like(query)
    paired = query.dtype == torch.bfloat16 and PAIRED
    query, own_keys, own_values = ((x if paired else x.float()).contiguous() for x in (query, own_keys, own_values))
    positions = positions.to(entry_positions.dtype).expand(heads, -1).contiguous()
    seen = torch.searchsorted(entry_positions.contiguous(), positions, out_int32=True).numpy()
    out = torch.empty(tokens, heads, groups, size, dtype=query.dtype)
    entries = (x.numpy() for x in _entries(keys, values, paired))
    arrays = _array(query), *entries, seen, *(_array(x) for x in (own_keys, own_values, out))

    last = np.minimum(np.arange(loops.BLOCK, tokens * groups + loops.BLOCK, loops.BLOCK), tokens * groups) - 1
    starts = np.zeros(heads * len(last) + 1, np.int64)
    np.cumsum(seen[:, last // groups].ravel() + 1, out=starts[1:])
    most = int(starts[-1]) * loops.BLOCK * size // _LEAST
    share(starts, lambda begin, end: loops.attend(begin, end, *arrays, np.float32(scale), paired), most=most)
    return out.permute(1, 2, 0, 3).to(dtype)


def _array(x: Tensor) -> np.ndarray:
    """NumPy array for the CPU kernels, which read bf16 as uint16."""
    return x.view(torch.int16).numpy().view(np.uint16) if x.dtype == torch.bfloat16 else x.numpy()


def _entries(keys: Tensor, values: Tensor, paired: bool) -> tuple[Tensor, Tensor]:
    """Keys ``[R, N, D]`` and values in the layout of `dmc.kernels.prefill.loop.attend`."""
    heads, count, size = keys.shape
    more, pair = -count % loops.KEYS, 2 if paired else 1
    keys = F.pad(keys, (0, -size % pair, 0, more)).unflatten(1, (-1, WIDTH)).unflatten(-1, (-1, pair))
    values = F.pad(values, (0, -size % LANES, 0, more)).unflatten(1, (-1, pair))
    return _words(keys.transpose(2, 3).flatten(-2), paired), _words(values.transpose(2, 3).flatten(-2), paired)


def _words(x: Tensor, paired: bool) -> Tensor:
    """Words of 32 bits: numbers in fp32, or pairs of adjacent bf16."""
    return (x if paired else x.float()).contiguous().view(torch.int32)
