"""CPU kernels that read dense, int8 and fp8 pages, for a `dmc.kernels.pages.format.CpuReader`."""

from __future__ import annotations

import numpy as np

from dmc.kernels.cpu.callback import bytes_at, callback, halves_at, longs_at, matrix_at, singles_at, words_at
from dmc.kernels.cpu.compiled import compiled, whole, widen
from dmc.kernels.cpu.products import add, score, times

FULL, HALF, INT8, FP8 = range(4)  # dense fp32 and bf16, and the two with a scale per entry
FACTS = ("stored", "page", "head_size", "k", "k_scale", "v", "v_scale")  # the last four: offsets of these fields in a page


@compiled()
def e4m3(source, bits, out):  # noqa: ANN001, ANN201
    """Converts fp8 to fp32; ``bits`` and ``out`` are the same memory. Numbers are at most 448, so there is no NaN."""
    for i in range(len(source)):
        code = np.uint32(source[i])
        bits[i] = ((code & np.uint32(128)) << np.uint32(24)) | ((code & np.uint32(127)) << np.uint32(20))
    for i in range(len(source)):
        out[i] *= np.float32(2.0**120)  # the difference of the exponents' biases; exact, subnormal numbers included


@compiled()
def _entries(stored, at, entries, size, room):  # noqa: ANN001, ANN202
    """Entries ``[P, D]`` without their scales: in place, or unpacked."""
    if stored == FULL:
        return matrix_at(at, entries, size)
    count = entries * size
    numbers = singles_at(room, count)
    if stored == HALF:
        widen(halves_at(at, count), words_at(room, count))
    elif stored == INT8:
        whole(bytes_at(at, count), numbers)
    else:
        e4m3(bytes_at(at, count), words_at(room, count), numbers)
    return matrix_at(room, entries, size)


@compiled()
def _scale(at, count, room):  # noqa: ANN001, ANN202
    widen(halves_at(at, count), words_at(room, count))
    return singles_at(room, count)


@callback
def keys(page, facts, constants, queries, groups, scores, room):  # noqa: ANN001, ANN201, PLR0913, D103
    known = longs_at(facts, 7)
    stored, entries, size, main, scale = known[0], known[1], known[2], known[3], known[4]
    out = matrix_at(scores, groups, entries)
    there = _entries(stored, page + main, entries, size, room)
    score(matrix_at(queries, groups, size), there, out)
    if stored >= INT8:
        times(out, _scale(page + scale, entries, room))


@callback
def values(page, facts, constants, weights, groups, sums, room):  # noqa: ANN001, ANN201, PLR0913, D103
    known = longs_at(facts, 7)
    stored, entries, size, main, scale = known[0], known[1], known[2], known[5], known[6]
    weight = matrix_at(weights, groups, entries)
    if stored >= INT8:
        times(weight, _scale(page + scale, entries, room))
    there = _entries(stored, page + main, entries, size, room)
    add(weight, there, matrix_at(sums, groups, size))
