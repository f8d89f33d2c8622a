"""CPU kernels that read trellis pages, for a `dmc.kernels.pages.format.CpuReader`. Scores and sums are in the rotated space."""

from __future__ import annotations

import numpy as np

from dmc.kernels.cpu.callback import bytes_at, callback, halves_at, longs_at, matrix_at, singles_at, words_at
from dmc.kernels.cpu.compiled import compiled, dot, half
from dmc.kernels.cpu.products import add, score, times
from dmc.kernels.formats.trellis.codes_loop import trellis

FIELDS = ("codes", "scale", "top", "mean", "unit")  # of a side: their offsets in a page; -1: missing
_CODES, _SCALE, _TOP, _MEAN, _UNIT = range(5)
_SIDE, _STARTS, _LINES = 4, 14, 17  # index in the facts of the keys' fields, of the starts of lines and of the lines


def room(page: int, size: int) -> int:
    """Bytes of scratch memory: levels, codes, paths, last bits, and scales, or the mean and one more number."""
    parts = 4 * page * size, 2 * page * size, 2 * page * (size + 2), 64 * page, 4 * max(page, size) + 4
    return sum(-(-nbytes // 64) * 64 for nbytes in parts)


@compiled()
def _wide(nbytes):  # noqa: ANN001, ANN202
    return (nbytes + 63) // 64 * 64


@compiled()
def _entries(page, facts, constants, part, room):  # noqa: ANN001, ANN202
    """Levels of a page ``[P, D]``, and the address of the unused scratch memory."""
    entries, size = facts[0], facts[1]
    begin, end = facts[_STARTS + part], facts[_STARTS + part + 1]
    lines = facts[_LINES + 6 * begin : _LINES + 6 * end].reshape(end - begin, 6)
    codes_at = room + _wide(4 * entries * size)
    path_at = codes_at + _wide(2 * entries * size)
    last_at = path_at + _wide(2 * entries * (size + 2))
    levels = singles_at(room, entries * size)
    code, path = halves_at(codes_at, entries * size), halves_at(path_at, entries * (size + 2))
    last = words_at(last_at, entries * 16).view(np.int32).reshape(entries, 16)
    begins, nbytes = facts[_SIDE + 5 * part + _CODES], lines[-1, 4] + (entries * lines[-1, 1] * lines[-1, 2] + 7) // 8
    table = singles_at(constants, facts[3])
    trellis(bytes_at(page + begins, nbytes), entries, size, table, lines, code, path, last, levels)
    return matrix_at(room, entries, size), last_at + _wide(64 * entries)


@compiled()
def _scales(page, facts, constants, part, at):  # noqa: ANN001, ANN202
    """Scales of the entries, fp32 ``[P]``."""
    entries = facts[0]
    codes, scale = bytes_at(page + facts[_SIDE + 5 * part + _SCALE], entries), singles_at(at, entries)
    falls = singles_at(constants, 256)
    for n in range(entries):
        scale[n] = falls[codes[n]]
    largest = _half(page + facts[_SIDE + 5 * part + _TOP], at + 4 * entries)
    for n in range(entries):
        scale[n] *= largest
    return scale


@compiled()
def _half(address, at):  # noqa: ANN001, ANN202
    return half(halves_at(address, 1), 0, words_at(at, 1), singles_at(at, 1))


@compiled()
def _shift(codes, unit, queries, scores, mean):  # noqa: ANN001, ANN202
    """Scores of a page whose keys lack their mean, ``codes * unit``."""
    for d in range(len(mean)):
        mean[d] = np.float32(np.int8(codes[d])) * unit
    for g in range(len(scores)):
        extra = dot(queries[g], mean)
        for n in range(scores.shape[1]):
            scores[g, n] += extra


@callback
def keys(page, facts, constants, queries, groups, scores, room):  # noqa: ANN001, ANN201, PLR0913, D103
    head = longs_at(facts, _LINES)
    known = longs_at(facts, _LINES + 6 * head[2])
    entries, size = known[0], known[1]
    query, out = matrix_at(queries, groups, size), matrix_at(scores, groups, entries)
    levels, rest = _entries(page, known, constants, 0, room)
    score(query, levels, out)
    times(out, _scales(page, known, constants, 0, rest))
    if known[_SIDE + _MEAN] >= 0:
        unit = _half(page + known[_SIDE + _UNIT], rest)
        _shift(bytes_at(page + known[_SIDE + _MEAN], size), unit, query, out, singles_at(rest, size))


@callback
def values(page, facts, constants, weights, groups, sums, room):  # noqa: ANN001, ANN201, PLR0913, D103
    head = longs_at(facts, _LINES)
    known = longs_at(facts, _LINES + 6 * head[2])
    entries, size = known[0], known[1]
    weight = matrix_at(weights, groups, entries)
    levels, rest = _entries(page, known, constants, 1, room)
    times(weight, _scales(page, known, constants, 1, rest))
    add(weight, levels, matrix_at(sums, groups, size))
