"""Encoding of rotated, trellis-coded pages (`dmc.cache.codecs.rotated`) by CPU kernels.

PyTorch takes about fifty passes over memory in fp64; here a page stays in a core's cache from its entries to its bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dmc.kernels.cpu.threads import share
from dmc.kernels.formats.trellis import loop as loops
from dmc.kernels.formats.trellis.viterbi_cpu import tables
from dmc.kernels.pages.layout import NO_SCALE, PLANES, SCALE_STEPS

_LEAST = 1 << 14  # values from which another thread pays off


def encode(
    x: Tensor, rotation: Tensor, chunks: Sequence[tuple[int, int]], levels: dict[int, Tensor], *, mean: bool, hadamard: bool,
) -> dict[str, Tensor]:
    """`dmc.cache.codecs.rotated.Rotated.encode` with the trellis.

    Args:
        x: fp32 ``[..., N, D]``.
        rotation: fp64 ``[D, D]``.
        chunks, levels: see `dmc.kernels.formats.trellis.viterbi_cpu.choose`.
        mean: whether the channels' mean is stored separately.
        hadamard: whether the rotation is random signs, then Hadamard of D's power of 2 and a mix of the blocks.

    Returns:
        The fields: codes, scale, top, and with a mean mean and unit.
    """
    entries, size = x.shape[-2:]
    pages = x.detach().reshape(-1, entries, size).contiguous()
    many, lead = len(pages), x.shape[:-2]
    planes = np.zeros((len(chunks), 3), np.int64)
    for line, (_, bits) in zip(planes, chunks, strict=True):
        line[: len(PLANES[bits])] = PLANES[bits]
    packed = sum(-(-count * entries * width // 8) for count, bits in chunks for width in PLANES[bits])
    falls = torch.exp2(torch.arange(256).float() / -SCALE_STEPS)
    falls[NO_SCALE] = 0.0
    codes, scale = torch.empty(many, packed, dtype=torch.uint8), torch.empty(many, entries, dtype=torch.uint8)
    means, unit, top = torch.empty(many, size if mean else 0, dtype=torch.int8), torch.empty(many), torch.empty(many)
    tensors = codes, means, unit, scale, top
    given = pages.numpy(), *_factors(rotation.numpy(), hadamard), *tables(chunks, levels), falls.numpy(), planes
    arguments = *given, *(one.numpy() for one in tensors)
    groups = -(-many // max(1, loops.LANES // entries))
    share(np.arange(groups + 1), lambda begin, end: loops.encode(begin, end, *arguments), most=pages.numel() // _LEAST)
    fields = {"scale": scale.view(*lead, entries), "top": top.bfloat16().view(*lead, 1), "codes": codes.view(*lead, packed)}
    return fields | ({"mean": means.view(*lead, size), "unit": unit.bfloat16().view(*lead, 1)} if mean else {})


def _factors(rotation: np.ndarray, hadamard: bool) -> tuple[np.ndarray, int, np.ndarray]:
    """Signs, power of 2 and mix of the rotation in `dmc.kernels.formats.trellis.loop`; the first column has all signs."""
    size = len(rotation)
    if not hadamard:
        return (np.ones(size), 1, np.ascontiguousarray(rotation)) if size > 1 else (rotation[0].copy(), 1, np.ones((1, 1)))
    power, signs = size & -size, np.sign(rotation[:, 0])
    mix = (signs[:, None] * rotation)[::power, ::power].copy()
    return (signs * mix[0, 0], power, np.ones((1, 1))) if power == size else (signs, power, mix)
