"""The search for codes of a trellis (`dmc.cache.codecs.trellis`) by CPU kernels.

PyTorch needs a dozen small operations for each value of a vector; here a value costs a few instructions, and the state of many
vectors stays in a core's cache. The codes are the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dmc.kernels.cpu.threads import share
from dmc.kernels.formats.trellis import viterbi_loop as loops

_LEAST = 1 << 15  # values from which another thread pays off


def choose(x: Tensor, chunks: Sequence[tuple[int, int]], levels: dict[int, Tensor]) -> Tensor:
    """The codes whose levels are nearest to x in least squares.

    Args:
        x: fp32 ``[..., T]`` on the CPU, each vector is coded independently.
        chunks: ``(values, bits)`` of each part of a vector; their values add up to T.
        levels: by bits, fp32 ``[2 ** (bits + 1)]``, rising.

    Returns:
        uint8 ``[..., T]``.
    """
    rows = x.detach().reshape(-1, x.shape[-1]).contiguous().numpy()
    out = np.empty(rows.shape, np.uint8)
    parts = tables(chunks, levels)
    blocks = -(-len(rows) // loops.LANES)

    def run(begin: int, end: int) -> None:
        loops.choose(begin * loops.LANES, min(end * loops.LANES, len(rows)), rows, *parts, out)

    share(np.arange(blocks + 1), run, most=rows.size // _LEAST)
    return torch.from_numpy(out).view(x.shape)


def tables(chunks: Sequence[tuple[int, int]], levels: dict[int, Tensor]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Chunks as arguments of `dmc.kernels.formats.trellis.viterbi_loop.choose`: counts, sizes and levels."""
    counts = np.array([count for count, _ in chunks], np.int64)
    sizes = np.array([2 ** (bits - 1) for _, bits in chunks], np.int64)
    table = np.zeros((len(counts), 4 * sizes.max(initial=1)), np.float32)
    for line, (_, bits) in zip(table, chunks, strict=True):
        line[: 2 ** (bits + 1)] = levels[bits].numpy()
    return counts, sizes, table
