"""The CPU kernel of `dmc.kernels.decode.cpu`, compiled by numba when first called and kept on disk.

Each row's pages are read once, a page's keys and then its values, with the softmax of FlashAttention: sums are scaled down when
the largest score so far rises. So the result of a row does not depend on other rows.

Encoded pages are read by the functions of their format, which are called by address (`dmc.kernels.cpu.callback`). All pages
are in one storage, which is passed as one flat array per width, so that the compiler knows that it is contiguous. ``where``
holds the first element of a field and the distance between pages. Code with many arrays is inlined in `attend`: passed to a
function or bound to another name, each array would cost a reference count for every page.
"""

from __future__ import annotations

import numpy as np
import torch

from dmc.kernels.cpu.callback import call
from dmc.kernels.cpu.compiled import bits_of, compiled, dot, exponential, whole, widen
from dmc.kernels.cpu.products import add, score

FIELDS = ("k", "v", "k_scale", "v_scale", "full_score", "position", "score")  # the last two of encoded pages
_FULL_SCALE, _FULL_SCORE, _POSITION, _SCORE = 2, 4, 5, 6
_PAGE, _PER_FULL, _FULL_DTYPE, _POSITIONED, _FIRST, _STRIDE, _ROOM = range(7)
FULL_DTYPES = (torch.float32, torch.bfloat16, torch.int8)  # of full-precision entries; the codes have scales
_BF16, _INT8 = 1, 2
NONE, REPLACE, ADD = range(3)  # how statistics change the scores of entries


@compiled()
def _soften(scores, flat, top, total, out, coded):  # noqa: ANN001, ANN202
    """Turns scores ``[G, N]`` into weights relative to the largest score so far; ``flat`` is the same memory in one dimension."""
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
def _mask_evicted(positions, scores):  # noqa: ANN001, ANN202
    for n in range(len(positions)):
        if bits_of(positions[n]) < 0:  # int32s, held as fp32
            scores[:, n] = -np.inf


@compiled()
def _add_bias(positions, coefficients, features, scores):  # noqa: ANN001, ANN202
    """Adds the bias of keys to scores ``[G, N]``; the score of an evicted slot is undefined."""
    for n in range(len(positions)):
        mine = features[max(bits_of(positions[n]), 0)]
        for g in range(len(scores)):
            scores[g, n] += dot(coefficients[g], mine)


@compiled()
def _masses(kept, own, top, total):  # noqa: ANN001, ANN202
    """Turns scores ``[G, N]`` into softmax weights, summed over G into the first row; returns the own state's weight."""
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
def _scale(scales, bits, numbers, entries):  # noqa: ANN001, ANN202
    """Multiplies entries ``[n, D]`` by their bf16 scales ``[n]``; ``bits`` and ``numbers`` are the same memory."""
    widen(scales, bits)
    for n in range(len(entries)):
        mine, scale = entries[n], numbers[n]
        for d in range(len(mine)):
            mine[d] *= scale


@compiled()
def attend(begin, end, query, rotation, back, coefficients, features, own_key, own_value, out, coded, own_mass, statistics, index, encoded_table, full_table, encoded_count, full_count, singles, halves, codes, where, sizes, facts, constants, read_keys, read_values):  # noqa: ANN001, ANN201, E501, PLR0913, PLR0915
    """Attention of rows ``begin`` to ``end``.

    Args:
        begin, end: rows.
        query: ``[R, G, D]``, scaled.
        rotation, back: ``[D, D]``, the rotation of encoded entries and its transpose; ``[0, 0]`` without one.
        coefficients, features: ``[R, G, D]`` and ``[positions, D]``, of the bias of keys (`dmc.kernels.pages.key_bias`);
            ``[0, 0, 0]`` and ``[0, 0]`` without one.
        own_key, own_value: ``[R, D]``.
        out: ``[R, G, D]``, to be filled.
        coded: ``[R, G, D]``, to be overwritten: the part of encoded entries before it is rotated back.
        own_mass: ``[R]``, to be filled unless ``statistics`` is `NONE`: the own state's softmax weight, summed over G.
        statistics: `NONE`, or how weights change the entries' scores: `REPLACE` or `ADD`.
        index, encoded_table, full_table, encoded_count, full_count: as in `dmc.kernels.pages.paged.Paged`.
        singles, halves, codes: the storage as fp32, uint16 and uint8.
        where: int64 ``[fields, 2]``.
        sizes: int64, see the names above.
        facts, constants, read_keys, read_values: of the format, see `dmc.kernels.pages.format.CpuReader`; the last two are
            addresses.
    """
    page, per, full_dtype = sizes[_PAGE], sizes[_PER_FULL], sizes[_FULL_DTYPE]
    groups, size = query.shape[1], query.shape[2]
    most, furthest = max(page, per), 0
    if statistics != NONE:
        for r in range(begin, end):
            furthest = max(furthest, encoded_count[index[r]] * page + full_count[index[r]])
    own, turned = np.empty(groups, np.float32), np.empty((groups, size), np.float32)
    known = np.empty(groups * furthest, np.float32)
    bits, scratch = np.empty(per * size, np.uint32), np.empty(sizes[_ROOM] // 8 + 8, np.float64)
    numbers, scale_bits = bits.view(np.float32), np.empty(per, np.uint32)
    scale_numbers = scale_bits.view(np.float32)
    room, top, total = np.empty(groups * most, np.float32), np.empty(groups, np.float32), np.empty(groups, np.float32)
    flat = room[: groups * page]
    scores = flat.reshape(groups, page)
    facts_at, constants_at, scratch_at = facts.ctypes.data, constants.ctypes.data, scratch.ctypes.data
    first_page, scores_at = codes.ctypes.data + sizes[_FIRST], room.ctypes.data

    for r in range(begin, end):
        row, mine, mine_turned, mine_out, mine_coded = index[r], query[r], query[r], out[r], coded[r]
        if len(rotation):  # not one matmul of all rows: a library's sums depend on the number of rows
            mine_turned = turned
            turned[:] = np.float32(0)
            add(mine, rotation, turned)
        for g in range(groups):
            own[g], total[g] = dot(mine[g], own_key[r]), np.float32(1)
            top[g] = own[g]
            mine_out[g], mine_coded[g] = own_value[r], np.float32(0)

        kept = known[: groups * (encoded_count[row] * page + full_count[row]) if statistics != NONE else 0].reshape(groups, -1)
        query_at, coded_at = mine_turned.ctypes.data, mine_coded.ctypes.data
        for column in range(encoded_count[row]):
            p = encoded_table[row, column]
            at = first_page + p * sizes[_STRIDE]
            call(read_keys, at, facts_at, constants_at, query_at, groups, scores_at, scratch_at)
            if sizes[_POSITIONED]:
                positions = where[_POSITION, 0] + p * where[_POSITION, 1]
                if len(features):
                    _add_bias(singles[positions : positions + page], coefficients[r], features, scores)
                _mask_evicted(singles[positions : positions + page], scores)
            if statistics != NONE:
                kept[:, column * page : column * page + page] = scores
            _soften(scores, flat, top, total, mine_out, mine_coded)
            call(read_values, at, facts_at, constants_at, scores_at, groups, coded_at, scratch_at)

        left, column = full_count[row], 0
        while left > 0:
            some, p = min(left, per), full_table[row, column]
            flat_near = room[: groups * some]
            near = flat_near.reshape(groups, some)
            for part in range(2):
                at = where[part, 0] + p * where[part, 1]
                if full_dtype == _BF16:
                    widen(halves[at : at + some * size], bits)
                    entries = numbers[: some * size].reshape(some, size)
                elif full_dtype == _INT8:
                    scales = where[_FULL_SCALE + part, 0] + p * where[_FULL_SCALE + part, 1]
                    whole(codes[at : at + some * size], numbers)
                    entries = numbers[: some * size].reshape(some, size)
                    _scale(halves[scales : scales + some], scale_bits, scale_numbers, entries)
                else:
                    entries = singles[at : at + some * size].reshape(some, size)
                if part == 0:
                    score(mine, entries, near)
                    if statistics != NONE:
                        begun = encoded_count[row] * page + full_count[row] - left
                        kept[:, begun : begun + some] = near
                    _soften(near, flat_near, top, total, mine_out, mine_coded)
                else:
                    add(near, entries, mine_out)
            left, column = left - some, column + 1

        if statistics != NONE:
            own_mass[r] = _masses(kept, own, top, total)
            for column in range(encoded_count[row]):
                at = where[_SCORE, 0] + encoded_table[row, column] * where[_SCORE, 1]
                _note(kept[0, column * page : column * page + page], singles[at : at + page], statistics)
            for first in range(0, full_count[row], per):
                at = where[_FULL_SCORE, 0] + full_table[row, first // per] * where[_FULL_SCORE, 1]
                mass = kept[0, encoded_count[row] * page + first : encoded_count[row] * page + min(first + per, full_count[row])]
                _note(mass, singles[at : at + per], statistics)
        for g in range(groups):
            for d in range(size):
                mine_out[g, d] /= total[g]
                mine_coded[g, d] /= total[g]
        if len(rotation):
            add(mine_coded, back, mine_out)
        else:
            for g in range(groups):
                for d in range(size):
                    mine_out[g, d] += mine_coded[g, d]
    scratch[0] = 0.0  # keeps it alive until here: functions that are called by address hold no reference
