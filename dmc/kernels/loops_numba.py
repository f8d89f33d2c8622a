"""The loops of `dmc.kernels.decode_cpu`, compiled by numba when first called and kept on disk.

Arrays are whole storages and flat, so that the compiler knows them contiguous; ``where`` says at which element of each a field
begins and how far pages are apart. bf16 is read as the upper half of an fp32's bits.

Arguments of a side, keys or values (`dmc.kernels.decode_cpu._made`): ``(flats, where, sizes, table, lines)``.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np

DENSE, INT8, FP8, TRELLIS = range(4)
_ENCODED32, _ENCODED16, _ENCODED8, _SCALE16, _SCALE8, _TOP, _MEAN, _UNIT, _EXACT32, _EXACT16 = range(10)
_KIND, _PAGE, _PER_OPEN, _ENCODED_HALF, _EXACT_HALF, _HAS_MEAN = range(6)
_FALLS = 256  # entries of a trellis table before the levels: what scale codes stand for
KEPT = True  # whether what is compiled is kept on disk


def compiled(*, exact: bool = False) -> Callable[[Callable], Callable]:
    """A decorator: loops without Python's lock; with ``exact`` no sum is reordered and no product fused into one."""
    options = dict(fastmath=set() if exact else {"reassoc", "contract", "nsz"}, nogil=True, error_model="numpy")

    def wrap(loop: Callable) -> Callable:
        global KEPT
        try:
            return numba.njit(cache=True, **options)(loop)
        except RuntimeError:  # nowhere to keep it: compiled by each process
            KEPT = False
            return numba.njit(**options)(loop)

    return wrap


_compiled = compiled()


# Inner loops run over slices from 0 on: an index that numba cannot see to be positive it would check at every step, and then
# the compiler makes no vector instructions of the loop.


@_compiled
def _dot(a, b):  # noqa: ANN001, ANN202
    total = np.float32(0)
    for d in range(len(a)):
        total += a[d] * b[d]
    return total


@_compiled
def _widen(source, bits):  # noqa: ANN001, ANN202
    """bf16 to fp32, through the bits of the fp32."""
    for d in range(len(source)):
        bits[d] = np.uint32(source[d]) << np.uint32(16)


@_compiled
def _half(source, at, bits, value):  # noqa: ANN001, ANN202
    bits[0] = np.uint32(source[at]) << np.uint32(16)
    return value[0]


@_compiled
def _unpack(source, move, mask, shift, code):  # noqa: ANN001, ANN202
    for b in range(len(code)):
        code[b] |= ((np.uint16(source[b]) >> move) & mask) << shift


@_compiled
def _lowest(code, path):  # noqa: ANN001, ANN202
    for i in range(len(code)):
        path[i] = code[i] & np.uint16(1)


@_compiled
def _find(code, twice, once, place):  # noqa: ANN001, ANN202
    for i in range(len(code)):
        place[i] = np.uint16(2) * (code[i] ^ twice[i]) + once[i]


@_compiled
def _look_up(table, place, level):  # noqa: ANN001, ANN202
    for d in range(len(place)):
        level[d] = table[place[d]]


@_compiled
def _trellis(codes, page, size, table, lines, code, path, place, level):  # noqa: ANN001, ANN202
    """Levels of a page ``[page * size]`` into ``level``."""
    line, last = 0, 0  # `last`: codes an entry of the stretch before; its path is kept behind this one's
    for_last = path[len(path) // 2 :]
    while line < len(lines):
        first, count, offset = lines[line, 0], lines[line, 1], lines[line, 5] + _FALLS
        total = page * count
        code[:total] = 0
        while line < len(lines) and lines[line, 0] == first:
            width, stretch = lines[line, 2], (total * lines[line, 2] + 7) // 8
            mask, shift = np.uint16((1 << width) - 1), np.uint16(lines[line, 3])
            plane = codes[lines[line, 4] : lines[line, 4] + stretch]
            for stream in range((total + stretch - 1) // stretch):
                begin, end = stream * stretch, min(total, (stream + 1) * stretch)
                _unpack(plane, np.uint16(stream * width), mask, shift, code[begin:end])
            line += 1
        _lowest(code[:total], path[:total])
        _find(code[2:total], path[: total - 2], path[1 : total - 1], place[2:total])
        known = table[offset:]
        for n in range(page):  # where an entry begins, the path comes from the stretch before, or is 0
            at, twice, once = n * count, np.uint16(0), np.uint16(0)
            if last:
                once = for_last[(n + 1) * last - 1]
                twice = for_last[(n + 1) * last - 2] if last > 1 else twice
            place[at] = np.uint16(2) * (code[at] ^ twice) + once
            if count > 1:
                place[at + 1] = np.uint16(2) * (code[at + 1] ^ once) + path[at]
            _look_up(known, place[at : at + count], level[n * size + first : n * size + first + count])
        for_last[:total], last = path[:total], count


@_compiled
def _read(p, size, side, buffers):  # noqa: ANN001, ANN202
    """An encoded page: its entries ``[page, size]``, and in the buffers what each is multiplied by."""
    flats, where, sizes, table, lines = side
    code, path, place, bits, values, scale = buffers
    kind, page = sizes[_KIND], sizes[_PAGE]
    count = page * size
    if kind == DENSE:
        scale[:page] = np.float32(1)
        if not sizes[_ENCODED_HALF]:
            at = where[_ENCODED32, 0] + p * where[_ENCODED32, 1]
            return flats[_ENCODED32][at : at + count].reshape(page, size)
        at = where[_ENCODED16, 0] + p * where[_ENCODED16, 1]
        _widen(flats[_ENCODED16][at : at + count], bits)
        return values[:count].reshape(page, size)
    at = where[_ENCODED8, 0] + p * where[_ENCODED8, 1]
    codes = flats[_ENCODED8][at:]
    if kind == TRELLIS:
        _trellis(codes, page, size, table, lines, code, path, place, values)
        begin = where[_SCALE8, 0] + p * where[_SCALE8, 1]
        top = _half(flats[_TOP], where[_TOP, 0] + p * where[_TOP, 1], bits[count:], values[count:])
        for n in range(page):
            scale[n] = table[flats[_SCALE8][begin + n]] * top
        return values[:count].reshape(page, size)
    if kind == INT8:
        for i in range(count):
            values[i] = np.float32(np.int8(codes[i]))
    else:
        for i in range(count):
            values[i] = table[codes[i]]
    begin = where[_SCALE16, 0] + p * where[_SCALE16, 1]
    for n in range(page):
        scale[n] = _half(flats[_SCALE16], begin + n, bits[count:], values[count:])
    return values[:count].reshape(page, size)


@_compiled
def _read_exact(p, count, size, side, buffers):  # noqa: ANN001, ANN202
    """The first ``count`` entries of an exact page ``[count, size]``."""
    flats, where, sizes = side[0], side[1], side[2]
    if not sizes[_EXACT_HALF]:
        at = where[_EXACT32, 0] + p * where[_EXACT32, 1]
        return flats[_EXACT32][at : at + count * size].reshape(count, size)
    at = where[_EXACT16, 0] + p * where[_EXACT16, 1]
    _widen(flats[_EXACT16][at : at + count * size], buffers[3])
    return buffers[4][: count * size].reshape(count, size)


@_compiled
def _buffers(side, size):  # noqa: ANN001, ANN202
    """Codes, path, places in the table, an fp32's bits and the fp32 itself, scales."""
    page = max(side[2][_PAGE], side[2][_PER_OPEN])
    bits = np.empty(page * size + 1, np.uint32)
    return (
        np.empty(page * size, np.uint16), np.empty(2 * page * size, np.uint16), np.empty(page * size, np.uint16), bits,
        bits.view(np.float32), np.empty(page, np.float32),
    )


@_compiled
def _score(query, entries, scale, mean, out):  # noqa: ANN001, ANN202
    """One query over some entries."""
    for n in range(len(entries)):
        out[n] = _dot(query, entries[n]) * scale[n] + mean


@_compiled
def _lower(scores):  # noqa: ANN001, ANN202
    """By the largest."""
    top = scores[0]
    for n in range(len(scores)):
        top = max(top, scores[n])
    for n in range(len(scores)):
        scores[n] -= top


@_compiled
def scores(begin, end, query, turned, own, out, starts, index, encoded_table, open_table, encoded, exact, side):  # noqa: ANN001, ANN201
    """Scores of rows ``begin`` to ``end`` less the largest of each query: entries in their order, and the own state's.

    Args:
        begin, end: rows.
        query, turned: ``[R, G, D]``, scaled; for exact entries and for encoded ones.
        own: ``[R, D]``.
        out: flat, to be filled: row r's scores ``[G, its entries + 1]`` from ``starts[r]`` on.
        starts: ``[R + 1]``.
        index, encoded_table, open_table, encoded, exact: as in `dmc.kernels.decode`.
        side: of the keys.
    """
    flats, where, sizes = side[0], side[1], side[2]
    groups, size, page, per = query.shape[1], query.shape[2], sizes[_PAGE], sizes[_PER_OPEN]
    buffers, ones = _buffers(side, size), np.ones(per, np.float32)
    mean = np.zeros(size, np.float32)
    for r in range(begin, end):
        row, place = index[r], 0
        width = (starts[r + 1] - starts[r]) // groups
        mine = out[starts[r] : starts[r + 1]].reshape(groups, width)
        for column in range(encoded[row]):
            p = encoded_table[row, column]
            entries = _read(p, size, side, buffers)
            if sizes[_HAS_MEAN]:
                at = where[_MEAN, 0] + p * where[_MEAN, 1]
                spare = page * size
                unit = _half(flats[_UNIT], where[_UNIT, 0] + p * where[_UNIT, 1], buffers[3][spare:], buffers[4][spare:])
                for d in range(size):
                    mean[d] = flats[_MEAN][at + d] * unit
            for g in range(groups):
                shift = _dot(turned[r, g], mean)
                _score(turned[r, g], entries, buffers[5], shift, mine[g, place : place + page])
            place += page
        left, column = exact[row], 0
        while left > 0:
            count = min(left, per)
            entries = _read_exact(open_table[row, column], count, size, side, buffers)
            for g in range(groups):
                _score(query[r, g], entries, ones, np.float32(0), mine[g, place : place + count])
            place, left, column = place + count, left - count, column + 1
        for g in range(groups):
            mine[g, place] = _dot(query[r, g], own[r])
            _lower(mine[g])


@_compiled
def _add(weights, scale, entries, out):  # noqa: ANN001, ANN202
    """Four entries at a time, so that the sums are read and written a quarter as often."""
    whole = len(entries) // 4 * 4
    for n in range(0, whole, 4):
        a, b, c, e = entries[n], entries[n + 1], entries[n + 2], entries[n + 3]
        u, v = weights[n] * scale[n], weights[n + 1] * scale[n + 1]
        w, x = weights[n + 2] * scale[n + 2], weights[n + 3] * scale[n + 3]
        for d in range(len(out)):
            out[d] += u * a[d] + v * b[d] + w * c[d] + x * e[d]
    for n in range(whole, len(entries)):
        a, u = entries[n], weights[n] * scale[n]
        for d in range(len(out)):
            out[d] += u * a[d]


@_compiled
def _divide(weights):  # noqa: ANN001, ANN202
    """By their sum."""
    total = np.float32(0)
    for n in range(len(weights)):
        total += weights[n]
    for n in range(len(weights)):
        weights[n] /= total


@_compiled
def combine(begin, end, weights, own, out, coded, starts, index, encoded_table, open_table, encoded, exact, side):  # noqa: ANN001, ANN201
    """Means of rows ``begin`` to ``end`` ``[R, G, D]``: the part of encoded entries into ``coded``, of the others into ``out``;
    both may be one array. ``weights`` as `scores` places them, not yet divided by their sums."""
    sizes = side[2]
    groups, size, page, per = out.shape[1], out.shape[2], sizes[_PAGE], sizes[_PER_OPEN]
    buffers, ones = _buffers(side, size), np.ones(per, np.float32)
    for r in range(begin, end):
        row, place = index[r], 0
        width = (starts[r + 1] - starts[r]) // groups
        mine = weights[starts[r] : starts[r + 1]].reshape(groups, width)
        for g in range(groups):
            _divide(mine[g])
        out[r] = np.float32(0)
        coded[r] = np.float32(0)
        for column in range(encoded[row]):
            entries = _read(encoded_table[row, column], size, side, buffers)
            for g in range(groups):
                _add(mine[g, place : place + page], buffers[5], entries, coded[r, g])
            place += page
        left, column = exact[row], 0
        while left > 0:
            count = min(left, per)
            entries = _read_exact(open_table[row, column], count, size, side, buffers)
            for g in range(groups):
                _add(mine[g, place : place + count], ones, entries, out[r, g])
            place, left, column = place + count, left - count, column + 1
        for g in range(groups):
            for d in range(size):
                out[r, g, d] += mine[g, place] * own[r, d]
