"""Trellis-coded quantisation of values that look normal: b bits per value, 1.2 to 1.6 dB closer than b-bit scalars.

Marcellin & Fischer, "Trellis coded quantization of memoryless and Gauss-Markov sources" (1990), with Ungerboeck's
four-state code. There are ``2**(b + 1)`` levels, twice as many as b bits can distinguish, distributed in turn over four
subsets. The lowest bit of a code, u, is the path through the trellis: it and the two before it name the subset,

    subset of value t = 2 (u_t xor u_{t-2}) + u_{t-1}          (u before the first value: 0)

and the code's other bits, the cell, name the level in the subset. Viterbi's algorithm finds the best path.
A code is read without a loop: the subset is two shifted copies of the path.

The levels are the quantiles of a wider normal distribution, which are optimal as b grows (Panter and Dite); at 1 and
2 bits they were fitted by Lloyd's iteration on normal samples.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from dmc.kernels.cpu.runs import runs_on_cpu

RATES = tuple(quarter / 4 for quarter in range(4, 33))  # bits per value: 1 to 8, see `chunks`
_FITTED = {1: (0.3963, 1.1817), 2: (0.1680, 0.6470, 1.0708, 1.8779)}  # the positive levels
_WIDTH = {3: 1.35, 4: 1.45, 5: 1.5}  # of the wider normal distribution; 1.55 above
_SUBSETS = 4
_ROWS = 1024  # vectors per search, so that the costs stay in a core's cache


def chunks(rate: float, length: int) -> list[tuple[int, int]]:
    """Divides a vector of ``length`` values: ``(values, bits)`` of each chunk, the one with more bits first.

    At 2.25 bits a quarter of the values has 3 bits and the others 2; the count is rounded to whole values.
    """
    low = int(rate)
    more = round((rate - low) * length)
    return [(count, bits) for count, bits in ((more, low + 1), (length - more, low)) if count]


@lru_cache
def levels(bits: int) -> Tensor:
    """The ``2**(bits + 1)`` levels for values of mean 0 and variance 1, fp32, rising."""
    if bits in _FITTED:
        half = torch.tensor(_FITTED[bits])
        return torch.cat([-half.flip(0), half])
    count = 2 ** (bits + 1)
    quantile = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return (_WIDTH.get(bits, 1.55) * math.sqrt(2) * torch.erfinv(2 * quantile - 1)).float()


def choose(x: Tensor, rate: float) -> Tensor:
    """The codes whose levels are nearest to x in least squares: fp32 ``[..., T]`` → uint8 ``[..., T]``.

    Args:
        x: vectors of about variance 1; each is coded independently.
        rate: bits per value, one of `RATES`.
    """
    if runs_on_cpu(x):
        from dmc.kernels.formats.trellis import viterbi_cpu as trellis_cpu

        parts = chunks(rate, x.shape[-1])
        return trellis_cpu.choose(x, parts, {bits: levels(bits) for _, bits in parts})
    rows = x.reshape(-1, x.shape[-1])
    return torch.cat([_choose(some.T, rate) for some in rows.split(_ROWS)]).view(x.shape)


def read(codes: Tensor, rate: float) -> Tensor:
    """The levels of codes: uint8 ``[..., T]`` → fp32 ``[..., T]``."""
    path = codes & 1
    index = torch.zeros_like(path)  # of the subset
    index[..., 1:] = path[..., :-1]
    first = path.clone()
    first[..., 2:] ^= path[..., :-2]
    index = (index + 2 * first).int() + 2 * (codes & 254).int()
    parts, start = [], 0
    for count, bits in chunks(rate, codes.shape[-1]):
        table = levels(bits).to(codes.device)
        part = index[..., start : start + count]
        parts.append(table.index_select(0, part.reshape(-1)).view(part.shape))
        start += count
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


@lru_cache
def _nearest(bits: int) -> tuple[Tensor, Tensor]:
    """Edges ``[e]`` between which the nearest level of each subset does not change, and its cell ``[4, e + 1]``."""
    subset = levels(bits).view(-1, _SUBSETS).T  # [4, cells]
    middles = (subset[:, 1:] + subset[:, :-1]) / 2
    edges = middles.flatten().sort().values
    edges_and_end = torch.cat([edges, edges.new_tensor([torch.inf])])
    cells = torch.searchsorted(middles.contiguous(), edges_and_end.expand(_SUBSETS, -1).contiguous())
    return edges, cells.to(torch.uint8)


def _choose(x: Tensor, rate: float) -> Tensor:
    """`choose` for ``[T, R]``, the values of a vector below each other → ``[R, T]``."""
    cost, cell = [], []  # of the nearest level of each subset: [T, 4, R]
    start = 0
    for count, bits in chunks(rate, len(x)):
        part = x[start : start + count]
        edges, cells = (table.to(x.device) for table in _nearest(bits))
        interval = torch.bucketize(part.contiguous(), edges).flatten()
        near = cells.index_select(1, interval).view(_SUBSETS, *part.shape).transpose(0, 1)
        subsets = torch.arange(_SUBSETS, device=x.device)[:, None]
        level = levels(bits).to(x.device).index_select(0, (near.int() * _SUBSETS + subsets).flatten())
        cost.append((part[:, None] - level.view(near.shape)).square_())
        cell.append(near)
        start += count
    path, subset = _viterbi(torch.cat(cost))
    cell = torch.cat(cell).gather(1, subset[:, None])[:, 0]
    return ((cell << 1) | path).T


def _viterbi(cost: Tensor) -> tuple[Tensor, Tensor]:
    """The cheapest path: cost of each subset ``[T, 4, R]`` → (path uint8 ``[T, R]``, subset int64 ``[T, R]``).

    A state is ``2 u_{t-1} + u_t``; a step comes from one of two states that differ in u_{t-2}.
    """
    steps, _, rows = cost.shape
    # subset of each (u_{t-2}, u_{t-1}, u_t)
    subset = torch.tensor([2 * (old ^ new) + mid for old in (0, 1) for mid in (0, 1) for new in (0, 1)], device=cost.device)
    branch = cost.index_select(1, subset).view(steps, 2, 2, 2, rows)
    total = cost.new_full((2, 2, rows), torch.inf)
    total[0, 0] = 0.0
    came = torch.empty(steps, 2, 2, rows, dtype=torch.bool, device=cost.device)  # whether u_{t-2} was 1
    for step in range(steps):
        both = total[:, :, None] + branch[step]
        torch.lt(both[1], both[0], out=came[step])
        total = torch.minimum(both[0], both[1])
    came = came.view(steps, 4, rows).to(torch.uint8)
    state = total.view(4, rows).argmin(0, keepdim=True)
    states = torch.empty(steps, rows, dtype=torch.int64, device=cost.device)  # 4 u_{t-2} + 2 u_{t-1} + u_t
    for step in range(steps - 1, -1, -1):
        full = came[step].gather(0, state) * 4 + state
        states[step] = full[0]
        state = full >> 1
    return (states & 1).to(torch.uint8), subset[states]
