"""The CPU kernel of `dmc.kernels.formats.trellis.cpu`: encodes a page in the core's cache.

The steps and their precision are those of `dmc.cache.codecs.rotated.Rotated.encode`;
`dmc.kernels.formats.trellis.viterbi_loop` chooses codes. Entries are contiguous, channels follow one another.
"""

from __future__ import annotations

import numpy as np

from dmc.kernels.cpu.compiled import bits_of, compiled, float_of
from dmc.kernels.formats.trellis.viterbi_loop import LANES, paths, room
from dmc.kernels.pages.layout import NO_SCALE, SCALE_STEPS

_LARGEST = np.float32(3.3895313892515355e38)  # of bf16


@compiled(ordered=True)
def _bf16(x):  # noqa: ANN001, ANN202
    """Rounds to the nearest bf16, as fp32, up to bf16's largest number."""
    bits = np.uint32(bits_of(min(np.float32(x), _LARGEST)))
    return float_of(np.int32((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)))


@compiled(ordered=True)
def _largest(x):  # noqa: ANN001, ANN202
    """The largest magnitude; 0 without numbers."""
    most = x.dtype.type(0)
    for i in range(len(x)):
        most = max(most, abs(x[i]))
    return most


@compiled(ordered=True)
def _add(x, by, out):  # noqa: ANN001, ANN202
    for w in range(len(out)):
        out[w] += x[w] * by


@compiled(ordered=True)
def _times(x, by):  # noqa: ANN001, ANN202
    for w in range(len(x)):
        x[w] *= by


@compiled(ordered=True)
def _pair(x, y):  # noqa: ANN001, ANN202
    for w in range(len(x)):
        a, b = x[w], y[w]
        x[w], y[w] = a + b, a - b


@compiled(ordered=True)
def _turn(y, signs, power, mix, room):  # noqa: ANN001, ANN202
    """Rotates contiguous entries ``[D, W]``: signs, Hadamard's matrix of a power of 2, and the matrix that mixes its blocks."""
    for d in range(len(y)):
        _times(y[d], signs[d])
    half = 1
    while half < power:
        for first in range(0, len(y), 2 * half):
            for d in range(first, first + half):
                _pair(y[d], y[d + half])
        half *= 2
    if len(mix) > 1:
        for p in range(power):
            for new in range(len(mix)):
                room[new] = 0.0
                for old in range(len(mix)):
                    _add(y[old * power + p], mix[old, new], room[new])
            for new in range(len(mix)):
                y[new * power + p] = room[new]


@compiled(ordered=True)
def _minus(x, by):  # noqa: ANN001, ANN202
    for w in range(len(x)):
        x[w] -= by


@compiled(ordered=True)
def _sum(x):  # noqa: ANN001, ANN202
    total = 0.0
    for w in range(len(x)):
        total += x[w]
    return total


@compiled(ordered=True)
def _take_mean(y, size, mean, room):  # noqa: ANN001, ANN202
    """Subtracts the stored mean of each channel of ``[D, N]``: int8 in units of a bf16, which is returned."""
    most = 0.0
    for d in range(len(y)):
        room[d] = _sum(y[d]) / y.shape[1]
        most = max(most, abs(room[d]))
    unit = _bf16(most / 127 * size)
    step = np.float64(unit) / size
    for d in range(len(y)):
        whole = min(max(np.rint(room[d] / (step if step > 0 else 1.0)), -127.0), 127.0)
        mean[d] = np.int8(whole)
        _minus(y[d], whole * step)
    return unit


@compiled(ordered=True)
def _squares(x, out):  # noqa: ANN001, ANN202
    for w in range(len(x)):
        out[w] += x[w] * x[w]


@compiled(ordered=True)
def _divide(x, by, out):  # noqa: ANN001, ANN202
    for w in range(len(x)):
        out[w] = np.float32(x[w] / by[w])


@compiled(ordered=True)
def _scales(scale, unit, codes):  # noqa: ANN001, ANN202
    """Codes of scales in units of ``unit`` below the largest of them, a bf16, which is returned."""
    most = 0.0
    for n in range(len(scale)):
        most = max(most, scale[n])
    top = _bf16(most * unit)
    for n in range(len(scale)):
        if scale[n] > 0:
            code = np.log2(np.float64(top) / unit / scale[n]) * SCALE_STEPS if top > 0 else 0.0
            codes[n] = np.uint8(min(max(np.rint(code), 0.0), np.float64(NO_SCALE)))
        else:
            codes[n] = np.uint8(NO_SCALE)
    return top


@compiled(ordered=True)
def _levels(codes, before, first, table, out):  # noqa: ANN001, ANN202
    """The levels of one channel's codes, given those of the two channels before."""
    for w in range(len(codes)):
        code = np.int32(codes[w])
        subset = ((code ^ np.int32(first[w])) & np.int32(1)) * np.int32(2) + (np.int32(before[w]) & np.int32(1))
        out[w] = table[np.uint32((code >> np.int32(1)) * np.int32(4) + subset)]


@compiled(ordered=True)
def _compare(x, level, both, own):  # noqa: ANN001, ANN202
    for w in range(len(x)):
        both[w] += x[w] * np.float64(level[w])
        own[w] += np.float64(level[w]) * np.float64(level[w])


@compiled(ordered=True)
def _gains(y, codes, levels, counts, room, level):  # noqa: ANN001, ANN202, PLR0913
    """Writes the least-squares scale of each entry's levels to ``room[0]``."""
    room[:] = 0.0
    none, t = np.zeros(codes.shape[1], np.uint8), 0
    for chunk in range(len(counts)):
        for _ in range(counts[chunk]):
            before, first = codes[t - 1] if t > 0 else none, codes[t - 2] if t > 1 else none
            _levels(codes[t], before, first, levels[chunk], level)
            _compare(y[t], level, room[0], room[1])
            t += 1
    for w in range(room.shape[1]):
        room[0, w] = max(room[0, w] / room[1, w], 0.0)


@compiled()
def _plane(codes, shift, mask, up, out):  # noqa: ANN001, ANN202
    for i in range(len(codes)):
        out[i] |= ((codes[i] >> shift) & mask) << up


@compiled(ordered=True)
def _pack(codes, counts, planes, flat, out):  # noqa: ANN001, ANN202
    """Packs codes ``[D, N]`` in the layout of `dmc.cache.codecs.bits`, entry after entry, chunk after chunk."""
    out[:] = np.uint8(0)
    start, first = 0, 0
    for chunk in range(len(counts)):
        count, total = counts[chunk], counts[chunk] * codes.shape[1]
        for n in range(codes.shape[1]):
            for c in range(count):
                flat[n * count + c] = codes[first + c, n]
        shift = 0
        for width in planes[chunk]:
            if width == 0:
                break
            share = (total * width + 7) // 8  # bytes; codes with the same shift
            for part in range(8 // width):
                some = flat[min(part * share, total) : min(part * share + share, total)]
                _plane(some, np.uint8(shift), np.uint8((1 << width) - 1), np.uint8(part * width), out[start : start + share])
            start, shift = start + share, shift + width
        first += count


@compiled(ordered=True)
def encode(begin, end, x, signs, power, mix, counts, sizes, levels, falls, planes, out, mean, unit, scale, top):  # noqa: ANN001, ANN201, PLR0913
    """Encodes groups of pages ``begin`` to ``end``, each of as many pages as fit into `LANES`, at least one.

    Args:
        x: fp32 ``[B, N, D]``.
        signs, power, mix: of the rotation, see `_turn`: fp64 ``[D]``, a number, fp64 ``[D / power, D / power]``.
        counts, sizes, levels: of the chunks, see `dmc.kernels.formats.trellis.viterbi_loop.choose`.
        falls: fp32 ``[256]``, the scale of each code in units of the largest.
        planes: int64 ``[S, 3]``, widths of the planes of a chunk's codes, then 0.
        out: uint8 ``[B, bytes]``, packed codes, to be filled, as are the next.
        mean: int8 ``[B, D]``, or ``[B, 0]`` without.
        unit: fp32 ``[B]``, of the mean.
        scale: uint8 ``[B, N]``.
        top: fp32 ``[B]``, the largest scale.
    """
    entries, length = x.shape[1:]
    pages = max(1, LANES // entries)
    width = (pages * entries + LANES - 1) // LANES * LANES
    y, codes = np.zeros((length, width), np.float64), np.zeros((length, width), np.uint8)
    column, some = np.empty((length, LANES), np.float32), np.empty((length, LANES), np.uint8)
    mixed, level = np.empty((max(len(mix), 2), width), np.float64), np.empty(width, np.float32)
    size, means, by, coded = np.ones(pages), np.empty(length), np.ones(width), np.zeros(entries, np.uint8)
    flat, work = np.empty(entries * length, np.uint8), room(length, levels.shape[1] // 4)
    for group in range(begin, end):
        first = group * pages
        here = min(pages, len(x) - first)
        for b in range(here):
            largest = np.float64(_largest(x[first + b].ravel()))
            size[b] = largest if largest > 0 else 1.0
            for n in range(entries):
                for d in range(length):
                    y[d, b * entries + n] = np.float64(x[first + b, n, d]) / size[b]
        _turn(y, signs, power, mix, mixed)
        if mean.shape[1]:
            for b in range(here):
                unit[first + b] = _take_mean(y[:, b * entries : b * entries + entries], size[b], mean[first + b], means)
        squares = mixed[0]
        squares[:] = 0.0
        for d in range(length):
            _squares(y[d], squares)
        for w in range(width):
            squares[w] = np.sqrt(squares[w] / length)
        for b in range(here):
            most = _scales(squares[b * entries : b * entries + entries], 1.0, coded)
            for n in range(entries):
                scaled = np.float64(falls[coded[n]] * most)
                by[b * entries + n] = scaled if scaled > 0 else 1.0
        for w in range(0, width, LANES):
            for d in range(length):
                _divide(y[d, w : w + LANES], by[w : w + LANES], column[d])
            paths(column, counts, sizes, levels, work, some)
            codes[:, w : w + LANES] = some
        _gains(y, codes, levels, counts, mixed, level)
        for b in range(here):
            mine = slice(b * entries, b * entries + entries)
            top[first + b] = _scales(mixed[0, mine], size[b], scale[first + b])
            _pack(codes[:, mine], counts, planes, flat, out[first + b])
