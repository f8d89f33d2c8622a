"""CPU kernels that read the codes of encoded pages (`dmc.kernels.decode.loop`)."""

from __future__ import annotations

import numpy as np

from dmc.kernels.cpu.compiled import compiled
from dmc.kernels.cpu.lookup import WIDE
from dmc.kernels.formats.trellis.levels_loop import MOST, chunk


@compiled()
def _unpack(source, move, mask, shift, code):  # noqa: ANN001, ANN202
    for b in range(len(code)):
        code[b] |= ((np.uint16(source[b]) >> move) & mask) << shift


@compiled()
def _paths(code, entries, count, path):  # noqa: ANN001, ANN202
    """Writes the lowest bits of codes ``[entries, count]`` to ``path [entries, 2 + count]``; its first two columns are given."""
    for n in range(entries):
        at, to = n * count, n * (count + np.uint64(2)) + np.uint64(2)
        for d in range(count):
            path[to + d] = code[at + d] & np.uint16(1)


@compiled()
def _indices(code, path, entries, count):  # noqa: ANN001, ANN202
    """Replaces codes ``[entries, count]`` by indices of levels, in place; three bits of the path name the subset."""
    for n in range(entries):
        at, by = n * count, n * (count + np.uint64(2))
        for d in range(count):
            code[at + d] = np.uint16(2) * (code[at + d] ^ path[by + d]) + path[by + d + np.uint64(1)]


@compiled()
def _levels(index, entries, count, table, first, size, level):  # noqa: ANN001, ANN202
    """Writes the levels of a chunk to columns from ``first`` on of ``[entries, size]``."""
    for n in range(entries):
        at, to = n * count, n * size + first
        for d in range(count):
            level[to + d] = table[np.uint64(index[at + d])]


@compiled()
def _carry(path, entries, before, count):  # noqa: ANN001, ANN202
    """At the start of a chunk the path continues from the end of the chunk before, of ``before`` codes; 0: it starts with 0.

    Paths of a chunk overwrite those of the chunk before, so the loop starts at the end that is not overwritten yet.
    """
    old, new = before + np.uint64(2), count + np.uint64(2)
    for step in range(entries):
        n = step if new <= old else entries - np.uint64(1) - step
        first, second = path[n * old + before], path[n * old + before + np.uint64(1)]
        path[n * new], path[n * new + np.uint64(1)] = first, second


@compiled()
def _trellis_by_values(codes, page, size, table, lines, code, path, level):  # noqa: ANN001, ANN202
    """`trellis`, one value at a time."""
    entries, line, last = np.uint64(page), 0, np.uint64(0)
    path[: 2 * page] = np.uint16(0)
    while line < len(lines):
        first, count, offset = lines[line, 0], lines[line, 1], lines[line, 5]
        total = page * count
        code[:total] = 0
        while line < len(lines) and lines[line, 0] == first:
            width, length = lines[line, 2], (total * lines[line, 2] + 7) // 8
            mask, shift = np.uint16((1 << width) - 1), np.uint16(lines[line, 3])
            plane = codes[lines[line, 4] : lines[line, 4] + length]
            for stream in range((total + length - 1) // length):
                begin, end = stream * length, min(total, (stream + 1) * length)
                _unpack(plane, np.uint16(stream * width), mask, shift, code[begin:end])
            line += 1
        _carry(path, entries, last, np.uint64(count))
        _paths(code, entries, np.uint64(count), path)
        _indices(code, path, entries, np.uint64(count))
        _levels(code, entries, np.uint64(count), table[offset:], np.uint64(first), np.uint64(size), level)
        last = np.uint64(count)


@compiled()
def _wide(page, lines):  # noqa: ANN001, ANN202
    """True if vector registers can hold the levels, and rows of codes are whole groups of 16."""
    takes, bits = WIDE and page % 8 == 0, 0
    for line in range(len(lines)):
        bits = lines[line, 2] + (bits if lines[line, 3] else 0)
        takes = takes and bits <= MOST and lines[line, 1] % 16 == 0
    return takes


@compiled()
def trellis(codes, page, size, table, lines, code, path, last_bits, level):  # noqa: ANN001, ANN201
    """Writes the levels of a page ``[page * size]`` to ``level``.

    Args:
        codes: the page's bytes and the bytes behind them.
        page, size: N, D.
        table, lines: as in `dmc.kernels.decode.cpu`.
        code, path: uint16 ``[N D]`` and ``[N (D + 2)]``, to be overwritten.
        last_bits: int32 ``[N, 16]``, to be overwritten.
        level: fp32.
    """
    if _wide(page, lines):
        line, begins = 0, True
        while line < len(lines):
            width, planes = lines[line, 2], 1
            if line + 1 < len(lines) and lines[line + 1, 0] == lines[line, 0]:
                width, planes = width + lines[line + 1, 2], 2
            low, high, first, count = lines[line, 4], lines[line + planes - 1, 4], lines[line, 0], lines[line, 1]
            chunk(codes, page, size, low, high, width, first, count, begins, last_bits, table[lines[line, 5] :], level)
            line, begins = line + planes, False
    else:
        _trellis_by_values(codes, page, size, table, lines, code, path, level)
