"""The CPU kernels of `dmc.kernels.formats.trellis.viterbi_cpu`: Viterbi's algorithm for many vectors in parallel.

`LANES` vectors go through the trellis together, so that each inner loop runs over contiguous numbers. Nothing is reordered or
fused: the costs round as in PyTorch, so the same path is the cheapest.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from dmc.kernels.cpu.compiled import compiled
from dmc.kernels.cpu.lookup import BYTES, SINGLES, WIDE, WORDS, look_up

LANES = 64
_SUBSETS = 4
_ADDRESS = ir.IntType(64)


@compiled(exact=True)
def _nearest(x, levels, middles, level, cell):  # noqa: ANN001, ANN202
    """The nearest of some rising levels and its index; of two equally near ones the lower."""
    for w in range(len(x)):
        level[w] = levels[0]
        cell[w] = np.uint8(0)
    for j in range(len(middles)):
        middle, above, number = middles[j], levels[j + 1], np.uint8(j + 1)
        for w in range(len(x)):
            beyond = x[w] > middle
            level[w] = above if beyond else level[w]
            cell[w] = number if beyond else cell[w]


@compiled(exact=True)
def _square(x, level, cost):  # noqa: ANN001, ANN202
    for w in range(len(x)):
        apart = x[w] - level[w]
        cost[w] = apart * apart


@intrinsic
def _near_address(context, x, count, middles, levels, cost, cell):  # noqa: ANN001, ANN202, PLR0913
    """`_nearest` and `_square` for vectors of 16 and up to 16 levels, by four steps of bisection in registers."""
    def generate(context, builder, signature, arguments):  # noqa: ANN001, ANN202
        if WIDE:
            _write_near(builder, *arguments)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


def _write_near(builder, x, count, middles, levels, cost, cell) -> None:  # noqa: ANN001, PLR0913
    def at(address, by, kind):  # noqa: ANN001, ANN202
        return builder.inttoptr(builder.add(address, builder.mul(i, _ADDRESS(by))), kind.as_pointer())

    tables = []
    for address in (middles, levels):
        tables.append(builder.load(builder.inttoptr(address, SINGLES.as_pointer())))
        tables[-1].align = 4
    before, loop, done = builder.block, builder.append_basic_block("values"), builder.append_basic_block("done")
    builder.branch(loop)
    builder.position_at_end(loop)
    i = builder.phi(_ADDRESS)
    i.add_incoming(_ADDRESS(0), before)
    value = builder.load(at(x, 4, SINGLES))
    value.align = 4
    index = WORDS([0] * 16)
    for step in (8, 4, 2, 1):
        middle = look_up(builder, tables[:1], builder.add(index, WORDS([step - 1] * 16)))
        beyond = builder.fcmp_ordered(">", value, middle)
        index = builder.select(beyond, builder.add(index, WORDS([step] * 16)), index)
    apart = builder.fsub(value, look_up(builder, tables[1:], index))
    builder.store(builder.fmul(apart, apart), at(cost, 4, SINGLES)).align = 4
    builder.store(builder.trunc(index, BYTES), at(cell, 1, BYTES)).align = 1
    following = builder.add(i, _ADDRESS(16))
    i.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, done)
    builder.position_at_end(done)


@compiled(exact=True)
def _near(x, middles, levels, cost, cell):  # noqa: ANN001, ANN202
    _near_address(np.int64(x.ctypes.data), len(x), np.int64(middles.ctypes.data), np.int64(levels.ctypes.data),
                  np.int64(cost.ctypes.data), np.int64(cell.ctypes.data))


@compiled(exact=True)
def _step(zero, zero_cost, one, one_cost, total, came, bit):  # noqa: ANN001, ANN202
    """The cheaper of two ways into a state: by u_{t-2} = 0 or 1, 0 at equal cost; a bit of ``came`` stores the choice."""
    for w in range(len(total)):
        first, second = zero[w] + zero_cost[w], one[w] + one_cost[w]
        total[w] = second if second < first else first
        came[w] |= bit if second < first else np.uint8(0)


@compiled(exact=True)
def _last(total, state):  # noqa: ANN001, ANN202
    """The cheapest of the four states, the first of equals."""
    for w in range(len(state)):
        best = total[0, w]
        state[w] = np.uint8(0)
        for s in range(1, 4):
            less = total[s, w] < best
            best = total[s, w] if less else best
            state[w] = np.uint8(s) if less else state[w]


@compiled(exact=True)
def _back(came, first, second, third, fourth, state, out):  # noqa: ANN001, ANN202
    """One value's codes along the path; the state becomes that of the value before."""
    for w in range(len(state)):
        old, u = (came[w] >> state[w]) & np.uint8(1), state[w] & np.uint8(1)
        middle = state[w] >> np.uint8(1)
        low = second[w] if middle else first[w]  # subset 2 (old xor u) + middle
        high = fourth[w] if middle else third[w]
        out[w] = ((high if old ^ u else low) << np.uint8(1)) | u
        state[w] = np.uint8(2) * old + middle


@compiled(exact=True)
def room(length, most):  # noqa: ANN001, ANN201
    """Scratch memory of `paths`, for vectors of ``length`` and ``most`` levels per subset."""
    return (
        np.zeros((2, _SUBSETS, max(most, 16)), np.float32), np.empty((length, _SUBSETS, LANES), np.uint8),
        np.empty((length, LANES), np.uint8),
        np.empty((_SUBSETS + 1, LANES), np.float32), np.empty((2, 4, LANES), np.float32), np.empty(LANES, np.uint8),
    )


@compiled(exact=True)
def paths(column, counts, sizes, levels, room, codes):  # noqa: ANN001, ANN201, PLR0913
    """`choose` for `LANES` interleaved vectors: fp32 ``[T, LANES]`` → uint8 ``codes [T, LANES]``."""
    tables, cells, came, costs, totals, state = room
    of_subset, middles, level, cost = tables[0], tables[1], costs[_SUBSETS], costs[:_SUBSETS]
    totals[0] = np.float32(np.inf)
    totals[0, 0] = np.float32(0)
    came[:] = np.uint8(0)
    t = 0
    for chunk in range(len(counts)):
        size = sizes[chunk]
        for s in range(_SUBSETS):
            for j in range(size):
                of_subset[s, j] = levels[chunk, j * _SUBSETS + s]
            middles[s] = np.float32(np.inf)
            for j in range(size - 1):
                middles[s, j] = (of_subset[s, j + 1] + of_subset[s, j]) / np.float32(2)
        for _ in range(counts[chunk]):
            for s in range(_SUBSETS):
                if WIDE and size <= 16:
                    _near(column[t], middles[s], of_subset[s], cost[s], cells[t, s])
                else:
                    _nearest(column[t], of_subset[s, :size], middles[s, : size - 1], level, cells[t, s])
                    _square(column[t], level, cost[s])
            total, following = totals[t % 2], totals[(t + 1) % 2]
            for mid in range(2):
                for new in range(2):
                    # A state is 2 u_{t-1} + u_t; the way by u_{t-2} = old names subset 2 (old xor new) + mid.
                    _step(total[mid], cost[2 * new + mid], total[2 + mid], cost[2 * (1 - new) + mid],
                          following[2 * mid + new], came[t], np.uint8(1 << (2 * mid + new)))
            t += 1
    _last(totals[t % 2], state)
    for t in range(len(column) - 1, -1, -1):
        _back(came[t], cells[t, 0], cells[t, 1], cells[t, 2], cells[t, 3], state, codes[t])


@compiled(exact=True)
def choose(begin, end, x, counts, sizes, levels, out):  # noqa: ANN001, ANN201
    """Writes the codes of vectors ``begin`` to ``end`` whose levels are nearest in least squares.

    Args:
        begin, end: vectors, multiples of `LANES` except at the end.
        x: fp32 ``[R, T]``.
        counts: int64 ``[S]``, values of each chunk, that add up to T.
        sizes: int64 ``[S]``, levels per subset of each.
        levels: fp32 ``[S, most levels]``, rising, of which every fourth belongs to one subset.
        out: uint8 ``[R, T]``, to be filled.
    """
    length = x.shape[1]
    column, codes = np.empty((length, LANES), np.float32), np.empty((length, LANES), np.uint8)
    work = room(length, levels.shape[1] // _SUBSETS)
    for r in range(begin, end, LANES):
        rows = min(LANES, end - r)
        for w in range(rows):
            for t in range(length):
                column[t, w] = x[r + w, t]
        column[:, rows:] = np.float32(0)
        paths(column, counts, sizes, levels, work, codes)
        for w in range(rows):
            for t in range(length):
                out[r + w, t] = codes[t, w]
