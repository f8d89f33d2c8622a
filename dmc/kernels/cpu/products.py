"""Matmuls of a group of queries with the entries of a page, shared by the CPU kernels of decode attention."""

from __future__ import annotations

import numpy as np

from dmc.kernels.cpu.compiled import compiled, dot

# The queries of a group use an entry together, so that it is read once. Two or three at a time: with more the compiler runs out
# of registers.


@compiled()
def _dots(entry, first, second):  # noqa: ANN001, ANN202
    a = b = np.float32(0)
    for d in range(len(entry)):
        x = entry[d]
        a += x * first[d]
        b += x * second[d]
    return a, b


@compiled()
def score(query, entries, out):  # noqa: ANN001, ANN201
    """Scores of queries ``[G, D]`` and entries ``[N, D]``: ``[G, N]``."""
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
def add(weights, entries, out):  # noqa: ANN001, ANN201
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
def times(scores, scale):  # noqa: ANN001, ANN201
    """``scores *= scale``: ``[G, N]``, ``[N]``."""
    for g in range(len(scores)):
        mine = scores[g]
        for n in range(len(mine)):
            mine[n] *= scale[n]
