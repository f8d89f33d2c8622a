"""The loops of `dmc.kernels.decode.cpu`, compiled by numba when first called and kept on disk.

Each row's pages are walked once, a page's keys and then its values, with the softmax of FlashAttention: the largest score so far
is known, and what was summed is scaled down when it rises. So a row is what it is whatever rows are beside it.

All pages lie in one storage, which comes as one flat array of each width, so that the compiler knows it contiguous; ``where``
says at which element a field begins and how far pages are apart. What takes many arrays is written out in `attend`: handed to a
function or bound to another name, each would cost a counted reference for every page.
"""

from __future__ import annotations

import numpy as np

from dmc.kernels.cpu.compiled import bits_of, compiled, dot, exponential, half, widen
from dmc.kernels.formats.plain.loop import e4m3, look_up, whole
from dmc.kernels.formats.trellis.codes_loop import trellis

DENSE, INT8, FP8, TRELLIS = range(4)
FIELDS = ("main", "scale", "top", "mean", "unit", "exact", "place", "score", "exact_score")
_MAIN, _SCALE, _TOP, _MEAN, _UNIT, _EXACT, _PLACE, _SCORE, _EXACT_SCORE = range(9)
_KIND, _PAGE, _PER_OPEN, _ENCODED_HALF, _EXACT_HALF, _HAS_MEAN, _HOLES = range(7)
NONE, REPLACE, ADD = range(3)  # what becomes of the scores of entries


# Queries of a group meet an entry together, so that it is read once. Two or three at a time: with more the compiler runs out of
# registers.


@compiled()
def _dots(entry, first, second):  # noqa: ANN001, ANN202
    a = b = np.float32(0)
    for d in range(len(entry)):
        x = entry[d]
        a += x * first[d]
        b += x * second[d]
    return a, b


@compiled()
def _score(query, entries, out):  # noqa: ANN001, ANN202
    """Queries ``[G, D]`` over entries ``[N, D]`` → ``[G, N]``."""
    groups, g = len(query), 0
    while g < groups:
        if g + 1 < groups:
            first, second = query[g], query[g + 1]
            for n in range(len(entries)):
                out[g, n], out[g + 1, n] = _dots(entries[n], first, second)
        else:
            first = query[g]
            for n in range(len(entries)):
                out[g, n] = dot(first, entries[n])
        g += 2


@compiled()
def _add_one(weights, entries, out):  # noqa: ANN001, ANN202
    """Four entries at a time, so that the sums are read and written a quarter as often."""
    four = len(entries) // 4 * 4
    for n in range(0, four, 4):
        a, b, c, e = entries[n], entries[n + 1], entries[n + 2], entries[n + 3]
        s, t, u, v = weights[n], weights[n + 1], weights[n + 2], weights[n + 3]
        for d in range(len(out)):
            out[d] += s * a[d] + t * b[d] + u * c[d] + v * e[d]
    for n in range(four, len(entries)):
        a, s = entries[n], weights[n]
        for d in range(len(out)):
            out[d] += s * a[d]


@compiled()
def _add_three(weights, entries, first, second, third):  # noqa: ANN001, ANN202
    """The same for weights ``[3, N]``."""
    four = len(entries) // 4 * 4
    for n in range(0, four, 4):
        a, b, c, e = entries[n], entries[n + 1], entries[n + 2], entries[n + 3]
        s, t, u, v = weights[0, n], weights[0, n + 1], weights[0, n + 2], weights[0, n + 3]
        s2, t2, u2, v2 = weights[1, n], weights[1, n + 1], weights[1, n + 2], weights[1, n + 3]
        s3, t3, u3, v3 = weights[2, n], weights[2, n + 1], weights[2, n + 2], weights[2, n + 3]
        for d in range(len(first)):
            w, x, y, z = a[d], b[d], c[d], e[d]
            first[d] += s * w + t * x + u * y + v * z
            second[d] += s2 * w + t2 * x + u2 * y + v2 * z
            third[d] += s3 * w + t3 * x + u3 * y + v3 * z
    for n in range(four, len(entries)):
        a, s, s2, s3 = entries[n], weights[0, n], weights[1, n], weights[2, n]
        for d in range(len(first)):
            first[d] += s * a[d]
            second[d] += s2 * a[d]
            third[d] += s3 * a[d]


@compiled()
def _add(weights, entries, out):  # noqa: ANN001, ANN202
    """``out += weights @ entries``: ``[G, N]``, ``[N, D]`` → ``[G, D]``."""
    groups, g = len(out), 0
    while g < groups:
        if g + 2 < groups:
            _add_three(weights[g : g + 3], entries, out[g], out[g + 1], out[g + 2])
            g += 3
        else:
            _add_one(weights[g], entries, out[g])
            g += 1


@compiled()
def _soften(scores, flat, top, total, out, coded):  # noqa: ANN001, ANN202
    """Scores ``[G, N]`` become weights under the largest score so far; ``flat`` is the same memory in one dimension."""
    for g in range(len(scores)):
        mine = scores[g]
        best = mine[0]
        for n in range(len(mine)):
            best = max(best, mine[n])
        if best > top[g]:
            fall = np.exp(top[g] - best)
            top[g] = best
            total[g] *= fall
            for d in range(out.shape[1]):
                out[g, d] *= fall
            for d in range(out.shape[1]):
                coded[g, d] *= fall
        best = top[g]
        for n in range(len(mine)):
            mine[n] -= best
    exponential(flat)
    for g in range(len(scores)):
        mine, extra = scores[g], np.float32(0)
        for n in range(len(mine)):
            extra += mine[n]
        total[g] += extra


@compiled()
def _times(scores, scale):  # noqa: ANN001, ANN202
    for g in range(len(scores)):
        mine = scores[g]
        for n in range(len(mine)):
            mine[n] *= scale[n]


@compiled()
def _shift(codes, unit, query, scores, mean):  # noqa: ANN001, ANN202
    """Scores of a page whose keys lack their mean, ``codes * unit``."""
    for d in range(len(mean)):
        mean[d] = np.float32(np.int8(codes[d])) * unit
    for g in range(len(scores)):
        extra = dot(query[g], mean)
        for n in range(scores.shape[1]):
            scores[g, n] += extra


@compiled()
def _drop_holes(places, scores):  # noqa: ANN001, ANN202
    for n in range(len(places)):
        if bits_of(places[n]) < 0:  # int32s, held as fp32
            scores[:, n] = -np.inf


@compiled()
def _masses(kept, own, top, total):  # noqa: ANN001, ANN202
    """Scores ``[G, N]`` become softmax weights, summed over G into the first line; the own state's are returned."""
    mass = np.float32(0)
    for g in range(len(kept)):
        mine, by = kept[g], np.float32(1) / total[g]
        for n in range(len(mine)):
            mine[n] -= top[g]
        exponential(mine)
        for n in range(len(mine)):
            mine[n] *= by
        mass += np.exp(own[g] - top[g]) * by
    first = kept[0]
    for g in range(1, len(kept)):
        mine = kept[g]
        for n in range(len(first)):
            first[n] += mine[n]
    return mass


@compiled()
def _note(mass, scores, how):  # noqa: ANN001, ANN202
    for n in range(len(mass)):
        scores[n] = scores[n] + mass[n] if how == ADD else mass[n]


@compiled()
def attend(begin, end, query, rotation, back, own_key, own_value, out, coded, own_mass, watch, index, encoded_table, open_table, encoded, exact, full, halves, codes, where, sizes, table, lines, line_starts):  # noqa: ANN001, ANN201, E501, PLR0913, PLR0915
    """Attention of rows ``begin`` to ``end``.

    Args:
        begin, end: rows.
        query: ``[R, G, D]``, scaled.
        rotation, back: ``[D, D]``, the rotation that encoded entries lie in and its transpose; ``[0, 0]`` where they lie in none.
        own_key, own_value: ``[R, D]``.
        out: ``[R, G, D]``, to be filled.
        coded: ``[R, G, D]``, to be overwritten: the part of encoded entries before it is turned back.
        own_mass: ``[R]``, to be filled unless ``watch`` is `NONE`: the own state's softmax weight, summed over G.
        watch: what becomes of entries' scores: such weights take their place, or are added.
        index, encoded_table, open_table, encoded, exact: as in `dmc.kernels.decode.decode`.
        full, halves, codes: the storage as fp32, uint16 and uint8.
        where: int64 ``[2, fields, 2]``, of keys and values.
        sizes: int64, see the names above.
        table, lines, line_starts: what codes stand for, see `dmc.kernels.decode.cpu`.
    """
    kind, page, per, narrow, narrow_exact = sizes[_KIND], sizes[_PAGE], sizes[_PER_OPEN], sizes[_ENCODED_HALF], sizes[_EXACT_HALF]
    groups, size, count = query.shape[1], query.shape[2], page * query.shape[2]
    most, furthest = max(page, per), 0
    if watch != NONE:
        for r in range(begin, end):
            furthest = max(furthest, encoded[index[r]] * page + exact[index[r]])
    own, turned = np.empty(groups, np.float32), np.empty((groups, size), np.float32)
    known = np.empty(groups * furthest, np.float32)
    bits, one, scale_bits = np.empty(most * size, np.uint32), np.empty(1, np.uint32), np.empty(page, np.uint32)
    numbers, value, scale = bits.view(np.float32), one.view(np.float32), scale_bits.view(np.float32)
    code, path, mean = np.empty(count, np.uint16), np.empty(page * (size + 2), np.uint16), np.empty(size, np.float32)
    last_bits = np.empty((page, 16), np.int32)
    room, top, total = np.empty(groups * most, np.float32), np.empty(groups, np.float32), np.empty(groups, np.float32)
    flat, unpacked = room[: groups * page], numbers[:count].reshape(page, size)
    scores = flat.reshape(groups, page)

    for r in range(begin, end):
        row, mine, mine_turned, mine_out, mine_coded = index[r], query[r], query[r], out[r], coded[r]
        if len(rotation):  # here and not by a product of all rows: a library's sums depend on how many there are
            mine_turned = turned
            turned[:] = np.float32(0)
            _add(mine, rotation, turned)
        for g in range(groups):
            own[g], total[g] = dot(mine[g], own_key[r]), np.float32(1)
            top[g] = own[g]
            mine_out[g], mine_coded[g] = own_value[r], np.float32(0)

        kept = known[: groups * (encoded[row] * page + exact[row]) if watch != NONE else 0].reshape(groups, -1)
        for column in range(encoded[row]):
            p = encoded_table[row, column]
            for part in range(2):
                at = where[part, _MAIN, 0] + p * where[part, _MAIN, 1]
                if kind == DENSE and not narrow:
                    entries = full[at : at + count].reshape(page, size)
                else:
                    entries = unpacked
                    if kind == DENSE:
                        widen(halves[at : at + count], bits)
                    elif kind == INT8:
                        whole(codes[at : at + count], numbers)
                    elif kind == FP8:
                        e4m3(codes[at : at + count], bits, numbers)
                    else:
                        planes = lines[line_starts[part] : line_starts[part + 1]]
                        trellis(codes[at:], page, size, table, planes, code, path, last_bits, numbers)
                if part == 0:
                    _score(mine_turned, entries, scores)
                if kind != DENSE:
                    at = where[part, _SCALE, 0] + p * where[part, _SCALE, 1]
                    if kind == TRELLIS:
                        look_up(codes[at : at + page], table, scale)
                        largest = half(halves, where[part, _TOP, 0] + p * where[part, _TOP, 1], one, value)
                        for n in range(page):
                            scale[n] *= largest
                    else:
                        widen(halves[at : at + page], scale_bits)
                    _times(scores, scale)
                if part == 0:
                    if sizes[_HAS_MEAN]:
                        at = where[part, _MEAN, 0] + p * where[part, _MEAN, 1]
                        unit = half(halves, where[part, _UNIT, 0] + p * where[part, _UNIT, 1], one, value)
                        _shift(codes[at : at + size], unit, mine_turned, scores, mean)
                    if sizes[_HOLES]:
                        at = where[0, _PLACE, 0] + p * where[0, _PLACE, 1]
                        _drop_holes(full[at : at + page], scores)
                    if watch != NONE:
                        kept[:, column * page : column * page + page] = scores
                    _soften(scores, flat, top, total, mine_out, mine_coded)
                else:
                    _add(scores, entries, mine_coded)

        left, column = exact[row], 0
        while left > 0:
            some, p = min(left, per), open_table[row, column]
            flat_near = room[: groups * some]
            near = flat_near.reshape(groups, some)
            for part in range(2):
                at = where[part, _EXACT, 0] + p * where[part, _EXACT, 1]
                if narrow_exact:
                    widen(halves[at : at + some * size], bits)
                    entries = numbers[: some * size].reshape(some, size)
                else:
                    entries = full[at : at + some * size].reshape(some, size)
                if part == 0:
                    _score(mine, entries, near)
                    if watch != NONE:
                        begun = encoded[row] * page + exact[row] - left
                        kept[:, begun : begun + some] = near
                    _soften(near, flat_near, top, total, mine_out, mine_coded)
                else:
                    _add(near, entries, mine_out)
            left, column = left - some, column + 1

        if watch != NONE:
            own_mass[r] = _masses(kept, own, top, total)
            for column in range(encoded[row]):
                at = where[0, _SCORE, 0] + encoded_table[row, column] * where[0, _SCORE, 1]
                _note(kept[0, column * page : column * page + page], full[at : at + page], watch)
            for first in range(0, exact[row], per):
                at = where[0, _EXACT_SCORE, 0] + open_table[row, first // per] * where[0, _EXACT_SCORE, 1]
                mass = kept[0, encoded[row] * page + first : encoded[row] * page + min(first + per, exact[row])]
                _note(mass, full[at : at + per], watch)
        for g in range(groups):
            for d in range(size):
                mine_out[g, d] /= total[g]
                mine_coded[g, d] /= total[g]
        if len(rotation):
            _add(mine_coded, back, mine_out)
        else:
            for g in range(groups):
                for d in range(size):
                    mine_out[g, d] += mine_coded[g, d]
