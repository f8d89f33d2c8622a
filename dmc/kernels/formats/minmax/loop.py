"""CPU kernels that read min/max pages, with outliers and low rank in the same pass, for a
`dmc.kernels.pages.format.CpuReader`.

A side of a page is decoded into a buffer that stays in the core's cache: codes by whole planes, then a scale and a zero for each
group, then the outliers at their indices. The low-rank part is not added there: it enters as ``(q B) Aᵀ`` and ``(w A) Bᵀ``.
"""

from __future__ import annotations

import numpy as np

from dmc.kernels.cpu.callback import bytes_at, callback, halves_at, longs_at, matrix_at, singles_at, words_at
from dmc.kernels.cpu.compiled import compiled, widen
from dmc.kernels.cpu.products import add, score

FIELDS = ("codes", "scale", "zero", "outliers", "indices", "left", "right")  # of a side: their offsets in a page
SIDE = ("channel", "groups", "size", "outliers")  # of a side before its fields: see `dmc.kernels.formats.minmax.format`
_CODES, _SCALE, _ZERO, _OUTLIERS, _INDICES, _LEFT, _RIGHT = range(4, 11)
_CHANNEL, _GROUPS, _SIZE, _COUNT = range(4)
HEAD = 4  # entries, head size, bits, rank
_PER_SIDE = len(SIDE) + len(FIELDS)
FACTS = HEAD + 2 * _PER_SIDE


def room(page: int, size: int, scales: int, outliers: int, rank: int) -> int:
    """Bytes of scratch memory: decoded values, then scales and zeros, outliers or a row. The factors reuse the same memory.

    Args:
        page, size: P, D.
        scales, outliers: largest number per side.
        rank: r.
    """
    return 4 * max(page * size + 2 * scales + max(outliers, size), rank * (page + size + 1))


@compiled()
def _first(source, shift, mask, out):  # noqa: ANN001, ANN202
    for i in range(len(out)):
        out[i] = np.float32((source[i] >> shift) & mask)


@compiled()
def _more(source, shift, mask, unit, out):  # noqa: ANN001, ANN202
    for i in range(len(out)):
        out[i] += np.float32((source[i] >> shift) & mask) * unit


@compiled()
def _plane(source, total, width, unit, out):  # noqa: ANN001, ANN202
    """A plane of codes: element i is in byte ``i % share``, shifted by ``width * (i // share)`` bits."""
    share, mask = (total * width + 7) // 8, np.uint8((1 << width) - 1)
    for part in range(8 // width):
        begin, end = min(part * share, total), min(part * share + share, total)
        some = source[: end - begin]
        if unit == 1:
            _first(some, np.uint8(part * width), mask, out[begin:end])
        else:
            _more(some, np.uint8(part * width), mask, np.float32(unit), out[begin:end])
    return share


@compiled()
def _times_and_plus(x, scale, zero):  # noqa: ANN001, ANN202
    for i in range(len(x)):
        x[i] = x[i] * scale + zero


@compiled()
def _base(page, known, part, room):  # noqa: ANN001, ANN202
    """Codes, scales, zeros and outliers of a side → fp32 ``[P, D]``, or ``[D, P]`` where vectors are channels."""
    entries, size, bits, side = known[0], known[1], known[2], known[HEAD + _PER_SIDE * part : HEAD + _PER_SIDE * (part + 1)]
    total, channel, groups = entries * size, side[_CHANNEL], side[_GROUPS]
    vectors, length = (size, entries) if channel else (entries, size)
    flat, codes = singles_at(room, total), bytes_at(page + side[_CODES], total)
    if bits == 3:
        share = _plane(codes, total, 2, 1, flat)
        _plane(codes[share:], total, 1, 4, flat)
    else:
        _plane(codes, total, bits, 1, flat)
    at = room + 4 * total
    widen(halves_at(page + side[_SCALE], vectors * groups), words_at(at, vectors * groups))
    scale, at = singles_at(at, vectors * groups), at + 4 * vectors * groups
    widen(halves_at(page + side[_ZERO], vectors * groups), words_at(at, vectors * groups))
    zero = singles_at(at, vectors * groups)
    for vector in range(vectors):
        for group in range(groups):
            begin = vector * length + group * side[_SIZE]
            end = min(begin + side[_SIZE], vector * length + length)
            _times_and_plus(flat[begin:end], scale[vector * groups + group], zero[vector * groups + group])
    out = matrix_at(room, vectors, length)
    if side[_COUNT]:
        count, of_keys = side[_COUNT], part == 0
        many = size if of_keys else entries  # vectors of outliers: channels of keys, entries of values
        indices = bytes_at(page + side[_INDICES], many * count)
        widen(halves_at(page + side[_OUTLIERS], many * count), words_at(at, many * count))  # over the scales
        much = singles_at(at, many * count)
        if of_keys == (channel == 1):
            for i in range(many * count):
                out[i // count, indices[i]] += much[i]
        else:
            for i in range(many * count):
                out[indices[i], i // count] += much[i]
    return out


@compiled()
def _factor(page, count, rank, room):  # noqa: ANN001, ANN202
    """A bf16 factor ``[n, r]`` as fp32 ``[r, n]``."""
    source, out, bits = halves_at(page, count * rank), matrix_at(room, rank, count), words_at(room, count * rank)
    for r in range(rank):
        for n in range(count):
            bits[r * count + n] = np.uint32(source[n * rank + r]) << np.uint32(16)
    return out


@callback
def keys(page, facts, constants, queries, groups, scores, room):  # noqa: ANN001, ANN201, PLR0913, D103
    known = longs_at(facts, FACTS)
    entries, size, rank, side = known[0], known[1], known[3], known[HEAD : HEAD + _PER_SIDE]
    query, out = matrix_at(queries, groups, size), matrix_at(scores, groups, entries)
    base = _base(page, known, 0, room)
    if side[_CHANNEL]:
        out[:] = np.float32(0)
        add(query, base, out)
    else:
        score(query, base, out)
    if rank:
        left = _factor(page + side[_LEFT], entries, rank, room)  # overwrites the decoded values, which are no longer needed
        right = _factor(page + side[_RIGHT], size, rank, room + 4 * rank * entries)
        product = matrix_at(room + 4 * rank * (entries + size), 1, rank)
        for g in range(groups):
            score(query[g : g + 1], right, product)
            add(product, left, out[g : g + 1])


@callback
def values(page, facts, constants, weights, groups, sums, room):  # noqa: ANN001, ANN201, PLR0913, D103
    known = longs_at(facts, FACTS)
    entries, size, rank, side = known[0], known[1], known[3], known[HEAD + _PER_SIDE :]
    weight, out = matrix_at(weights, groups, entries), matrix_at(sums, groups, size)
    base = _base(page, known, 1, room)
    if side[_CHANNEL]:
        product = matrix_at(room + 4 * entries * size, 1, size)
        for g in range(groups):
            score(weight[g : g + 1], base, product)
            for d in range(size):
                out[g, d] += product[0, d]
    else:
        add(weight, base, out)
    if rank:
        left = _factor(page + side[_LEFT], entries, rank, room)
        right = _factor(page + side[_RIGHT], size, rank, room + 4 * rank * entries)
        product = matrix_at(room + 4 * rank * (entries + size), 1, rank)
        for g in range(groups):
            score(weight[g : g + 1], left, product)
            add(product, right, out[g : g + 1])
