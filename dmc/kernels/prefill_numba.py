"""The loop of `dmc.kernels.prefill_cpu`, compiled by numba when first called and kept on disk.

FlashAttention: some queries at a time meet some entries at a time, and what was summed is scaled down when the largest score so
far rises. A query meets the entries in stretches that begin at multiples of `KEYS` whatever chunk of a prompt it is in, so that
it comes out the same, bit for bit.
"""

from __future__ import annotations

import numpy as np

from dmc.kernels.loops_numba import bits_of, compiled, exponential, float_of
from dmc.kernels.tiles_numba import ROWS, WIDTH, product

BLOCK = 8 * ROWS  # queries that meet a stretch of entries while it is in the core's cache
KEYS = 128  # entries of a stretch, a multiple of WIDTH


@compiled()
def _largest(x, least):  # noqa: ANN001, ANN202
    """The largest number, ``least`` at least: by the bits, which the compiler makes vectors of. A NaN is above or below all."""
    most = _order(least)
    for n in range(len(x)):
        most = max(most, _order(x[n]))
    return float_of(most ^ ((most >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@compiled()
def _order(x):  # noqa: ANN001, ANN202
    """An int32 that rises with an fp32."""
    bits = bits_of(x)
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


@compiled()
def _sum_of_piece(x):  # noqa: ANN001, ANN202
    total = np.float32(0)
    for n in range(len(x)):
        total += x[n]
    return total


@compiled(ordered=True)
def _sum(x):  # noqa: ANN001, ANN202
    """In pieces of one length, so that zeros behind do not change in which order numbers are added."""
    total = np.float32(0)
    for start in range(0, len(x), WIDTH):
        total += _sum_of_piece(x[start : start + WIDTH])
    return total


@compiled()
def _halve(bits, out):  # noqa: ANN001, ANN202
    """fp32's bits to bf16's, to the nearest even."""
    for n in range(len(bits)):
        rest = (bits[n] >> np.uint32(16)) & np.uint32(1)
        out[n] = np.uint16((bits[n] + np.uint32(0x7FFF) + rest) >> np.uint32(16))


@compiled()
def _add(x, what):  # noqa: ANN001, ANN202
    for d in range(len(x)):
        x[d] += what


@compiled()
def _scale(x, by):  # noqa: ANN001, ANN202
    for d in range(len(x)):
        x[d] *= by


@compiled()
def attend(begin, end, query, keys, values, counts, own, out, scale, paired):  # noqa: ANN001, ANN201, PLR0913
    """Attention of blocks of queries ``begin`` to ``end``, each `BLOCK` queries of one row, the rows' blocks one after another.

    Args:
        begin, end: blocks.
        query: int32 ``[R, M, S]``, S words of fp32 or of pairs of bf16; M a multiple of `ROWS`.
        keys: int32 ``[R, N / WIDTH, S, WIDTH]``; N a multiple of `KEYS`.
        values: int32 ``[R, N, E]``, or ``[R, N / 2, E]`` of pairs; E a multiple of `LANES`.
        counts: int32 ``[R, M]``, rising: entries that each query sees.
        own: fp32 ``[R, M]``, score of each query's own state.
        out: fp32 ``[R, M, E]``; holds the own states' values, and then what is asked for.
        scale: fp32, of scores of entries.
        paired: whether words are pairs.
    """
    rows, steps, size, share = query.shape[1], query.shape[2], out.shape[2], 2 if paired else 1
    stretches, blocks = keys.shape[1], (rows + BLOCK - 1) // BLOCK
    bits, halves = np.empty(ROWS * KEYS, np.uint32), np.empty(ROWS * KEYS, np.uint16)
    room = bits.view(np.float32)
    top, total = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    query_at, keys_at, values_at = np.int64(query.ctypes.data), np.int64(keys.ctypes.data), np.int64(values.ctypes.data)
    out_at, weights_at = np.int64(out.ctypes.data), np.int64(halves.ctypes.data if paired else bits.ctypes.data)
    scores_at = np.int64(bits.ctypes.data)

    for unit in range(begin, end):
        r, first = unit // blocks, unit % blocks * BLOCK
        last = min(first + BLOCK, rows)
        for m in range(first, last):
            top[m - first], total[m - first] = own[r, m], np.float32(1)
        for n in range(0, counts[r, last - 1], KEYS):
            for tile in range(first, last, ROWS):
                seen = counts[r, tile + ROWS - 1] - n
                if seen <= 0:
                    continue
                columns = min(KEYS, (seen + WIDTH - 1) // WIDTH * WIDTH)
                used = ROWS * columns
                mine = query_at + 4 * (r * rows + tile) * steps
                for column in range(0, columns, WIDTH):
                    stretch = keys_at + 4 * (r * stretches + (n + column) // WIDTH) * steps * WIDTH
                    product(mine, steps, stretch, WIDTH, scores_at + 4 * column, columns, steps, WIDTH, paired, False)
                for i in range(ROWS):
                    m, line = tile + i - first, room[i * columns : i * columns + columns]
                    _scale(line, scale)
                    line[max(0, min(columns, counts[r, tile + i] - n)) :] = -np.inf
                    most = _largest(line, top[m])
                    if not most <= top[m]:
                        fall = np.exp(top[m] - most)
                        top[m] = most
                        total[m] *= fall
                        _scale(out[r, tile + i], fall)
                    _add(line, -top[m])
                exponential(room[:used])
                for i in range(ROWS):
                    total[tile + i - first] += _sum(room[i * columns : i * columns + columns])
                if paired:
                    _halve(bits[:used], halves)
                product(
                    weights_at, columns // share, values_at + 4 * (r * stretches * WIDTH + n) // share * size, size,
                    out_at + 4 * (r * rows + tile) * size, size, columns // share, size, paired, True,
                )
        for m in range(first, last):
            _scale(out[r, m], np.float32(1) / total[m - first])
