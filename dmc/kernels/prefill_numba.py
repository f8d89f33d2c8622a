"""The loop of `dmc.kernels.prefill_cpu`, compiled by numba when first called and kept on disk.

FlashAttention: some queries at a time meet some entries at a time, and what was summed is scaled down when the largest score so
far rises. A query meets the entries in stretches that begin at multiples of `KEYS` whatever chunk of a prompt it is in, so that
it comes out the same, bit for bit.
"""

from __future__ import annotations

import numpy as np

from dmc.kernels.loops_numba import bits_of, compiled, exponential, float_of, narrow, wide
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
def _own(query, key):  # noqa: ANN001, ANN202
    total = np.float32(0)
    for d in range(len(query)):
        total += wide(query[d]) * wide(key[d])
    return total


@compiled()
def _copy(source, out):  # noqa: ANN001, ANN202
    for d in range(len(source)):
        out[d] = source[d]


@compiled()
def _widen(source, out):  # noqa: ANN001, ANN202
    for d in range(len(source)):
        out[d] = wide(source[d])


@compiled()
def _finish(source, by, out):  # noqa: ANN001, ANN202
    for d in range(len(out)):
        out[d] = narrow(out, source[d] * by)


@compiled()
def attend(begin, end, query, keys, values, seen, own_keys, own_values, out, scale, paired):  # noqa: ANN001, ANN201, PLR0913
    """Attention of blocks of queries ``begin`` to ``end``, each `BLOCK` queries of one row, the rows' blocks one after another.

    The queries of a row are those of its G heads of a token side by side, token after token.

    Args:
        begin, end: blocks.
        query: ``[R, G, T, D]``, fp32 or bf16.
        keys: int32 ``[R, N / WIDTH, S, WIDTH]``, S words of fp32 or of pairs of bf16; N a multiple of `KEYS`.
        values: int32 ``[R, N, E]``, or ``[R, N / 2, E]`` of pairs; E a multiple of `LANES`.
        seen: int32 ``[R, T]``, rising: entries that each token sees.
        own_keys, own_values: ``[R, T, D]``, as ``query``.
        out: ``[T, R, G, D]``, as ``query``, to be filled.
        scale: fp32, of scores.
        paired: whether words are pairs.
    """
    groups, tokens, head = query.shape[1:]
    rows, steps, size, share = tokens * groups, keys.shape[2], values.shape[2], 2 if paired else 1
    stretches, blocks = keys.shape[1], (rows + BLOCK - 1) // BLOCK
    bits, halves = np.empty(ROWS * KEYS, np.uint32), np.empty(ROWS * KEYS, np.uint16)
    room = bits.view(np.float32)
    top, total = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    mine, sums = np.zeros((BLOCK, steps * share), query.dtype), np.zeros((BLOCK, size), np.float32)
    mine_at, keys_at, values_at = np.int64(mine.ctypes.data), np.int64(keys.ctypes.data), np.int64(values.ctypes.data)
    sums_at, weights_at = np.int64(sums.ctypes.data), np.int64(halves.ctypes.data if paired else bits.ctypes.data)
    scores_at, counts = np.int64(bits.ctypes.data), np.empty(BLOCK, np.int64)

    for unit in range(begin, end):
        r, first = unit // blocks, unit % blocks * BLOCK
        many = min(BLOCK, rows - first)
        whole = (many + ROWS - 1) // ROWS * ROWS
        for m in range(whole):
            t, g = min(first + m, rows - 1) // groups, min(first + m, rows - 1) % groups
            counts[m], total[m] = seen[r, t], np.float32(1)
            top[m] = _own(query[r, g, t], own_keys[r, t]) * scale
            _copy(query[r, g, t], mine[m])
            _widen(own_values[r, t], sums[m])
        for n in range(0, counts[whole - 1], KEYS):
            for tile in range(0, whole, ROWS):
                left = counts[tile + ROWS - 1] - n
                if left <= 0:
                    continue
                columns = min(KEYS, (left + WIDTH - 1) // WIDTH * WIDTH)
                used = ROWS * columns
                for column in range(0, columns, WIDTH):
                    stretch, place = keys_at + 4 * (r * stretches + (n + column) // WIDTH) * steps * WIDTH, scores_at + 4 * column
                    product(mine_at + 4 * tile * steps, steps, stretch, WIDTH, place, columns, steps, WIDTH, paired, False)
                for i in range(ROWS):
                    m, line = tile + i, room[i * columns : i * columns + columns]
                    _scale(line, scale)
                    line[max(0, min(columns, counts[m] - n)) :] = -np.inf
                    most = _largest(line, top[m])
                    if not most <= top[m]:
                        fall = np.exp(top[m] - most)
                        top[m] = most
                        total[m] *= fall
                        _scale(sums[m], fall)
                    _add(line, -top[m])
                exponential(room[:used])
                for i in range(ROWS):
                    total[tile + i] += _sum(room[i * columns : i * columns + columns])
                if paired:
                    _halve(bits[:used], halves)
                product(
                    weights_at, columns // share, values_at + 4 * (r * stretches * WIDTH + n) // share * size, size,
                    sums_at + 4 * tile * size, size, columns // share, size, paired, True,
                )
        for m in range(many):
            _finish(sums[m], np.float32(1) / total[m], out[(first + m) // groups, r, (first + m) % groups])
