"""Gumbel noise as a pure function of its coordinates.

The noise of a decision depends on (seed, step, layer, sample, head, token) alone: a resumed run, and a run
under another parallel layout or with recomputed activations, draws the same numbers. A counter-based generator (a
32-bit integer hash of those six numbers) gives that without any state.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def logistic(
    seed: int, step: int, layer: int, *, samples: Tensor, heads: Tensor, tokens: Tensor,
) -> Tensor:
    """A Logistic(0, 1) sample (the difference of two Gumbels) for every (sample, head, token).

    Args:
        seed: of the run.
        step: global step, counted from 0.
        layer: global index of the layer.
        samples: ``[B]`` int64, global index of each sequence in the order of the data.
        heads: ``[H]`` int64, global indices of the key/value heads.
        tokens: ``[T]`` int64, positions in the sequence.

    Returns:
        ``[B, H, T]`` fp32 on the device of ``samples``.
    """
    drawn = _uniform(_mix_tensor(samples.view(-1, 1, 1) ^ layer_seed(seed, step, layer)), heads, tokens)
    return torch.log(drawn) - torch.log1p(-drawn)


def uniform(layer: int, *, heads: Tensor, positions: Tensor) -> Tensor:
    """A number between 0 and 1 for every (layer, head, position), the same in every run, step and sample.

    Args:
        layer: global index of the layer.
        heads: ``[H]`` int64, global indices of the key/value heads.
        positions: ``[B, T]`` int64.

    Returns:
        ``[B, H, T]`` fp32 on the device of ``positions``.
    """
    return _uniform(torch.tensor(layer_seed(0, 0, layer), device=positions.device), heads, positions[:, None])


def _uniform(state: Tensor, heads: Tensor, tokens: Tensor) -> Tensor:
    hashed = _mix_tensor((state + heads.view(1, -1, 1) * 0x85EBCA77) & _MASK)
    hashed = _mix_tensor((hashed + tokens * 0xC2B2AE3D) & _MASK)
    return ((hashed >> 9).float() + 0.5) * 2.0**-23  # 23 bits: never 0, never rounded to 1


def layer_seed(seed: int, step: int, layer: int) -> int:
    """The initial state of the hash for a layer and step, 32 bits."""
    state = _mix(seed & _MASK)
    for number in (seed >> 32, step, layer):
        state = _mix((state ^ (number & _MASK)) + 0x9E3779B9)
    return state


def _mix(x: int) -> int:
    """A full-avalanche permutation of 32-bit integers (two multiply-xorshift rounds)."""
    x &= _MASK
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK
    return x ^ (x >> 15)


def _mix_tensor(x: Tensor) -> Tensor:
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK  # products stay below 2^63: both factors fit 32 and 31 bits
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK
    return x ^ (x >> 15)
