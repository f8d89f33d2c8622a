"""The CPU kernel of `dmc.kernels.prefill.cpu`, compiled by numba when first called and kept on disk.

FlashAttention: some queries at a time, over some entries at a time; sums are scaled down when the largest score so far rises.
The entries are cut into segments that begin at multiples of `KEYS` for any division of a prompt into chunks, so results are the
same bit for bit.
"""

from __future__ import annotations

from math import inf

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from dmc.kernels.cpu.compiled import compiled, narrow, wide
from dmc.kernels.cpu.tiles import ROWS, WIDTH, product
from dmc.kernels.cpu.vectors import Vectors, over

BLOCK = 8 * ROWS  # queries that use a segment of entries while it is in the core's cache
KEYS = 128  # entries of a segment, a multiple of WIDTH


@intrinsic
def _peak_of(context, scores, count, scale):  # noqa: ANN001, ANN202
    def generate(context, builder, signature, arguments):  # noqa: ANN001, ANN202
        scores, count, scale = arguments

        def larger(vectors, i, found):  # noqa: ANN001, ANN202
            score = builder.fmul(vectors.load(scores, i, False), vectors.all(scale))
            return [vectors.larger(score, found[0])]

        return over(builder, count, larger, [ir.Constant(ir.FloatType(), -inf)], Vectors.largest)[0]

    return types.float32(types.int64, types.int64, types.float32), generate


@compiled(exact=True)
def _peak(scores, count, scale):  # noqa: ANN001, ANN202
    """The largest of the scores at an address, times ``scale``; NaN is ignored."""
    return _peak_of(scores, count, scale)


@intrinsic(prefer_literal=True)
def _weigh_of(context, half, scores, count, scale, top, out):  # noqa: ANN001, ANN202, PLR0913
    def generate(context, builder, signature, arguments):  # noqa: ANN001, ANN202
        _, scores, count, scale, top, out = arguments

        def weigh(vectors, i, sums):  # noqa: ANN001, ANN202
            score = builder.fmul(vectors.load(scores, i, False), vectors.all(scale))  # rounded, as it was for ``top``
            weight = vectors.exponential(builder.fsub(score, vectors.all(top)))
            vectors.store(weight, out, i, bool(half.literal_value))
            return [builder.fadd(sums[0], weight)]

        return over(builder, count, weigh, [ir.Constant(ir.FloatType(), 0.0)])[0]

    whole = types.int64
    return types.float32(half, whole, whole, types.float32, types.float32, whole), generate


@compiled(exact=True)
def _weigh(paired, scores, count, scale, top, out):  # noqa: ANN001, ANN202, PLR0913
    """Writes ``exp(score scale - top)`` of the scores at an address to ``out``, in bf16 if ``paired``; returns their sum."""
    if paired:
        return _weigh_of(1, scores, count, scale, top, out)
    return _weigh_of(0, scores, count, scale, top, out)


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

    The queries of a row are ordered token by token, and within a token by its G heads.

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
    segments, blocks = keys.shape[1], (rows + BLOCK - 1) // BLOCK
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
                for column in range(0, columns, WIDTH):
                    segment, target = keys_at + 4 * (r * segments + (n + column) // WIDTH) * steps * WIDTH, scores_at + 4 * column
                    product(mine_at + 4 * tile * steps, steps, segment, WIDTH, target, columns, steps, WIDTH, paired, False)
                for i in range(ROWS):
                    m, count = tile + i, max(0, min(columns, counts[tile + i] - n))
                    most = _peak(scores_at + 4 * i * columns, count, scale)
                    if most > top[m]:
                        fall = np.exp(top[m] - most)
                        top[m] = most
                        total[m] *= fall
                        _scale(sums[m], fall)
                    target = weights_at + 4 // share * i * columns
                    total[m] += _weigh(paired, scores_at + 4 * i * columns, count, scale, top[m], target)
                    if paired:
                        halves[i * columns + count : i * columns + columns] = np.uint16(0)
                    else:
                        room[i * columns + count : i * columns + columns] = np.float32(0)
                product(
                    weights_at, columns // share, values_at + 4 * (r * segments * WIDTH + n) // share * size, size,
                    sums_at + 4 * tile * size, size, columns // share, size, paired, True,
                )
        for m in range(many):
            _finish(sums[m], np.float32(1) / total[m], out[(first + m) // groups, r, (first + m) % groups])
