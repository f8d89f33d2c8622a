"""Triton kernel of `dmc.kernels.append.append`.

One program per row. A program takes a page from the stack by an atomic decrement of the count of free pages. No page is
given back in the same launch, so a positive count names a page that only this program gets.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmc.kernels.pages.floats import as_bits, store_float
from dmc.kernels.pages.paged import NO_PAGE, NOT_ENCODED, Growing

_NO_PAGE, _NOT_ENCODED = tl.constexpr(NO_PAGE), tl.constexpr(NOT_ENCODED)
_WORDS = 512  # of 8 bytes, zeroed at a time


def append(
    state: Growing, index: Tensor, key: Tensor, value: Tensor, alpha: Tensor, omega: Tensor, positions: Tensor,
    rope: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """`dmc.kernels.append.append.append_tokens`."""
    rows, size = key.shape
    index, key, value, alpha, omega = (x.contiguous() for x in (index, key, value, alpha, omega))
    cos, sin = (table.contiguous() for table in rope)
    own_key, own_value = (torch.empty(rows, size, dtype=torch.float32, device=key.device) for _ in "kv")
    keys, values = (as_bits(state.full_precision[part]) for part in "kv")
    words = state.memory.view(torch.int64)
    _append[(rows,)](
        index, key, value, alpha, omega, positions, cos, sin, state.numerators, state.z, state.full_count, state.full_table,
        words, keys, values, state.stack, state.free, state.owners, state.failed, own_key, own_value,
        len(index) // len(positions), state.most, state.full_table.stride(0), words.stride(0), keys.stride(0),
        values.stride(0), WORDS=words.shape[1], STEP=min(_WORDS, triton.next_power_of_2(words.shape[1])),
        PER_FULL=state.per_full_page, D=size, HALF=triton.next_power_of_2(size // 2), num_warps=1,
    )
    return own_key, own_value


@triton.jit
def _append(
    index, key, value, alpha, omega, positions, cos, sin, numerators, z, full_count, full_table, words, keys, values, stack, free,
    owners, failed, own_key, own_value, heads, most, ft, wp, kp, vp,
    WORDS: tl.constexpr, STEP: tl.constexpr, PER_FULL: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, HALF)
    inside = d < D // 2
    own = r * D + d
    row = tl.load(index + r)
    if row < 0:
        zero = tl.zeros((HALF,), tl.float32)
        _put(own_key + own, zero, zero, inside, D)
        _put(own_value + own, zero, zero, inside, D)
        return
    row = row.to(tl.int64)
    at = numerators + row * (2 * D) + d
    position = tl.load(positions + r // heads).to(tl.int64)
    rate = tl.load(alpha + r).to(tl.float32)
    weight = tl.load(omega + r).to(tl.float32)
    total = tl.load(z + row)
    k1, k2 = _get(at, inside, D)
    v1, v2 = _get(at + D, inside, D)

    written = True
    if (rate == 0) & (total > 0):
        count = tl.load(full_count + row)
        page = _page(full_table + row * ft, words, stack, free, owners, failed, count, most, wp, WORDS, STEP, PER_FULL)
        written = page > 0
        if written:
            c1, c2 = _turned(tl.div_rn(k1, total), tl.div_rn(k2, total), cos, sin, position - 1, inside, D, HALF)
            to = page * kp + (count % PER_FULL) * D + d
            _put(keys + to, c1, c2, inside, D)
            to = page * vp + (count % PER_FULL) * D + d
            _put(values + to, tl.div_rn(v1, total), tl.div_rn(v2, total), inside, D)
            tl.store(full_count + row, count + 1)

    new1, new2 = _get(key + own, inside, D)
    k1, k2 = rate * k1 + weight * new1, rate * k2 + weight * new2
    new1, new2 = _get(value + own, inside, D)
    v1, v2 = rate * v1 + weight * new1, rate * v2 + weight * new2
    total = rate * total + weight
    if written:
        _put(at, k1, k2, inside, D)
        _put(at + D, v1, v2, inside, D)
        tl.store(z + row, total)
    c1, c2 = _turned(tl.div_rn(k1, total), tl.div_rn(k2, total), cos, sin, position, inside, D, HALF)
    _put(own_key + own, c1, c2, inside, D)
    _put(own_value + own, tl.div_rn(v1, total), tl.div_rn(v2, total), inside, D)


@triton.jit
def _get(pointer, inside, D: tl.constexpr):
    """Both halves of a vector, fp32."""
    return tl.load(pointer, inside, 0.0).to(tl.float32), tl.load(pointer + D // 2, inside, 0.0).to(tl.float32)


@triton.jit
def _put(pointer, x1, x2, inside, D: tl.constexpr):
    store_float(pointer, x1, inside)
    store_float(pointer + D // 2, x2, inside)


@triton.jit
def _turned(x1, x2, cos, sin, position, inside, D: tl.constexpr, HALF: tl.constexpr):
    """`dmc.functional.rotate`."""
    at = position * D + tl.arange(0, HALF)
    c1, c2 = _get(cos + at, inside, D)
    s1, s2 = _get(sin + at, inside, D)
    return x1 * c1 - x2 * s1, x2 * c2 + x1 * s2


@triton.jit
def _page(
    table, words, stack, free, owners, failed, count, most, wp,
    WORDS: tl.constexpr, STEP: tl.constexpr, PER_FULL: tl.constexpr,
):
    """The page of a row's next full-precision entry, int64, zeroed if it is new; 0 if there is none."""
    page = tl.full((), 0, tl.int64)
    if count >= most:
        tl.atomic_or(failed, _NOT_ENCODED)
    elif count % PER_FULL == 0:
        left = tl.atomic_add(free, -1)
        if left > 0:
            page = tl.load(stack + left - 1).to(tl.int64)
            tl.store(owners + page, 1)
            tl.store(table + count // PER_FULL, page.to(tl.int32))
            for first in range(0, WORDS, STEP):
                w = first + tl.arange(0, STEP)
                tl.store(words + page * wp + w, tl.zeros((STEP,), tl.int64), w < WORDS)
            tl.debug_barrier()  # other threads write the entry next
        else:
            tl.atomic_add(free, 1)
            tl.atomic_or(failed, _NO_PAGE)
    else:
        page = tl.load(table + count // PER_FULL).to(tl.int64)
    return page
