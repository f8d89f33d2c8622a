"""The trellis codec's encoder in Triton: one program per page of keys or values (`dmc.cache.codecs.rotated`, `.trellis`).

Entries are rotated and lose their channels' mean, then each is divided by its own root mean square and coded by Viterbi's
algorithm: the entries of the page in parallel, one per lane, the channels one after the other. All steps are the codec's, but
in fp32 instead of fp64: a value in the middle between two codes, or two paths of equal cost, may be decided differently, so
some codes differ, and the error does not.

Between its steps a program keeps its data in its own scratch memory, channel after channel, with contiguous entries:
values, the nearest level of each subset, the survivors, and the codes in the order of packing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmc.kernels.backend import interpreted
from dmc.kernels.pages.floats import bf16_bits, load_float
from dmc.kernels.pages.full_rows import ROUND, first_of, full_at, new_pages
from dmc.kernels.pages.layout import NO_SCALE, PLANES, SCALE_STEPS
from dmc.kernels.pages.paged import Growing

_NONE, _STEPS = tl.constexpr(NO_SCALE), tl.constexpr(float(SCALE_STEPS))
_LARGEST = tl.constexpr(torch.finfo(torch.bfloat16).max)
_TILE = 16  # entries rotated at a time
CHANNELS = tl.constexpr(16)  # at a time, of up to `SIDE` entries


def launch(table: dict, full_precision: dict, state: Growing) -> None:
    """Encodes into the pages that were taken; ``table`` and ``full_precision`` as in `dmc.kernels.encode.gpu.encode`."""
    layout, page, size, rows, device = state.format, state.page, state.head_size, table["R"], table["full_count"].device
    each = triton.next_power_of_2(triton.cdiv(rows, _programs(device)))
    programs = triton.cdiv(rows, each)
    lanes, sides = max(_TILE, triton.next_power_of_2(page)), {}
    for part, upper in (("k", "K"), ("v", "V")):
        (count, bits), *rest = layout.chunks(part)
        below = rest[0][1] if rest else 0
        sides |= {
            f"{upper}_FIRST": count, f"{upper}_BITS": bits, f"{upper}_REST": below,
            f"{upper}_MEAN": f"{part}_mean" in layout.fields,
            f"{part}_levels": layout.levels[bits], f"{part}_below": layout.levels[below or bits],
        }
    _trellis[(programs, 2)](
        **table, **full_precision, **_fields(state.encoded), **sides, rotation=layout.rotation.contiguous(), sinks=state.sinks,
        **_scratch(programs, size, lanes, page, device), PAGE=page, ROWS=each, D=size,
        BLOCK=max(16, triton.next_power_of_2(size)), LANES=lanes, TILE=_TILE, SIDE=min(64, lanes),
        UNROLL=4 if size % 4 == 0 else 2, num_warps=4,
    )


def _programs(device: torch.device) -> int:
    """Largest number of programs for keys, and the same for values: one each per multiprocessor, which bounds the scratch."""
    if interpreted():
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _fields(fields: dict[str, Tensor]) -> dict[str, Tensor | int]:
    """Pointers to a page's fields, bf16 as bits, and a page's stride in elements of one and of two bytes."""
    stride = {x.stride(0) * x.element_size() for x in fields.values()}
    if len(stride) > 1:
        raise ValueError(f"trellis pages must be in one pool, not {sorted(stride)} bytes apart")
    out = {"page8": stride.pop()}
    for part in "kv":
        for name in ("codes", "scale", "top", "mean", "unit"):
            field = fields.get(f"{part}_{name}", fields[f"{part}_top"])
            out[f"{part}_{name}"] = field.view(torch.int16) if field.dtype == torch.bfloat16 else field
    return out | {"page16": out["page8"] // 2}


def _scratch(programs: int, size: int, lanes: int, page: int, device: torch.device) -> dict[str, Tensor]:
    def some(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(programs, 2, *shape, dtype=dtype, device=device)

    return dict(
        ys=some(torch.float32, size, lanes), nears=some(torch.int32, size, lanes), paths=some(torch.uint8, 2, size, lanes),
        gains=some(torch.float32, lanes), ordered=some(torch.uint8, page * size),
    )


@triton.jit
def _trellis(
    index, full_count, encoded_count, encoded_table, R, most, columns, et, full_table, keys, values, ft, kp, vp,
    page8, page16, k_codes, k_scale, k_top, k_mean, k_unit, k_levels, k_below, v_codes, v_scale, v_top, v_mean, v_unit,
    v_levels, v_below, rotation, sinks, ys, nears, paths, gains, ordered,
    K_FIRST: tl.constexpr, K_BITS: tl.constexpr, K_REST: tl.constexpr, K_MEAN: tl.constexpr, V_FIRST: tl.constexpr,
    V_BITS: tl.constexpr, V_REST: tl.constexpr, V_MEAN: tl.constexpr, PER_FULL: tl.constexpr, PAGE: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr, SIDE: tl.constexpr,
    UNROLL: tl.constexpr,
):
    row, _, page = new_pages(index, full_count, encoded_count, encoded_table, R, most, columns, et, ROWS)
    own = tl.program_id(0).to(tl.int64) * 2 + tl.program_id(1)
    y, near, path = ys + own * D * LANES, nears + own * D * LANES, paths + own * 2 * D * LANES
    gain, order = gains + own * LANES, ordered + own * PAGE * D
    left = page > 0
    while tl.max(left.to(tl.int32), 0) > 0:
        here = first_of(left, ROWS)
        table = full_table + tl.sum(tl.where(here, row, 0), 0) * ft
        to = tl.sum(tl.where(here, page, 0), 0).to(tl.int64)
        at8, at16 = to * page8, to * page16
        if tl.program_id(1) == 0:
            _page(
                table, keys, kp, k_codes + at8, k_scale + at8, k_top + at16, k_mean + at8, k_unit + at16, k_levels, k_below,
                rotation, sinks, y, near, path, gain, order, K_FIRST, K_BITS, K_REST, K_MEAN, PER_FULL, PAGE, D, BLOCK,
                LANES, TILE, SIDE, UNROLL,
            )
        else:
            _page(
                table, values, vp, v_codes + at8, v_scale + at8, v_top + at16, v_mean + at8, v_unit + at16, v_levels, v_below,
                rotation, sinks, y, near, path, gain, order, V_FIRST, V_BITS, V_REST, V_MEAN, PER_FULL, PAGE, D, BLOCK,
                LANES, TILE, SIDE, UNROLL,
            )
        left = left & ~here


@triton.jit
def _page(
    table, source, stride, codes, scale, top, mean, unit, levels, below, rotation, sinks, y, near, path, gain, order,
    FIRST: tl.constexpr, BITS: tl.constexpr, REST: tl.constexpr, MEAN: tl.constexpr, PER_FULL: tl.constexpr,
    PAGE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr, SIDE: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Encodes keys or values of one page."""
    tl.debug_barrier()  # the page before used the same scratch
    size = _size(table, source, stride, sinks, PER_FULL, PAGE, D, BLOCK, TILE)
    total = _rotate(table, source, stride, rotation, sinks, size, y, PER_FULL, PAGE, D, BLOCK, LANES, TILE)
    if MEAN:
        _store_mean(mean, unit, total / PAGE, size, D, BLOCK)
    tl.debug_barrier()
    _center(y, gain, mean, unit, size, MEAN, PAGE, D, LANES, SIDE)
    tl.debug_barrier()
    _, largest, code = _encoded_scales(gain, tl.full((), 1.0, tl.float32), PAGE, LANES)
    scales = tl.where(code == _NONE, 0.0, tl.exp2(code.to(tl.float32) / -_STEPS) * largest)
    tl.debug_barrier()
    tl.store(gain + tl.arange(0, LANES), tl.where(scales > 0, scales, 1.0))
    tl.debug_barrier()
    _find_nearest(y, near, gain, levels, below, FIRST, BITS, REST, D, LANES, 512)
    tl.debug_barrier()
    _viterbi(y, near, path, levels, below, FIRST, BITS, REST, D, LANES, UNROLL)
    tl.debug_barrier()
    _read_path(y, near, path, gain, order, levels, below, FIRST, REST, PAGE, D, LANES, SIDE)
    tl.debug_barrier()
    bits, _, code = _encoded_scales(gain, size, PAGE, LANES)
    tl.store(top, bits)
    tl.store(scale + tl.arange(0, LANES), code.to(tl.uint8), tl.arange(0, LANES) < PAGE)
    _pack(codes, order, PAGE * FIRST, BITS)
    if REST > 0:
        _pack(codes + _bytes(PAGE * FIRST, BITS), order + PAGE * FIRST, PAGE * (D - FIRST), REST)


@triton.constexpr_function
def _bytes(count, bits):
    """Bytes of ``count`` codes; every plane is rounded up."""
    return sum((count * width + 7) // 8 for width in PLANES[bits])


@triton.jit
def _size(
    table, source, stride, sinks, PER_FULL: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """The largest value of the page, the unit of all later steps, so that nothing overflows; 1 if all are 0."""
    d = tl.arange(0, BLOCK)
    largest = tl.zeros((TILE,), tl.float32)
    for first in range(0, PAGE, TILE):
        n = first + tl.arange(0, TILE)
        at = full_at(table, sinks + n, n < PAGE, stride, PER_FULL, D)
        x = load_float(source + at[:, None] + d[None, :], (n < PAGE)[:, None] & (d < D)[None, :])
        largest = tl.maximum(largest, tl.max(tl.abs(x), 1))
    size = tl.max(largest, 0)
    return tl.where(size > 0, size, 1.0)


@triton.jit
def _rotate(
    table, source, stride, rotation, sinks, size, y, PER_FULL: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):
    """Writes the rotated entries ``[D, LANES]``, in units of ``size``, and sums up each channel ``[BLOCK]``."""
    c = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, PAGE, TILE):
        n = first + tl.arange(0, TILE)
        at = full_at(table, sinks + n, n < PAGE, stride, PER_FULL, D)
        turned = tl.zeros((BLOCK, TILE), tl.float32)
        for channel in range(0, D, 16):
            d = channel + tl.arange(0, 16)
            x = load_float(source + at[None, :] + d[:, None], (n < PAGE)[None, :] & (d < D)[:, None]) / size
            r = tl.load(rotation + d[None, :] * D + c[:, None], (d < D)[None, :] & (c < D)[:, None], 0.0)
            turned = tl.dot(r, x, turned, input_precision="tf32x3")
        tl.store(y + c[:, None] * LANES + n[None, :], turned, (c < D)[:, None] & (n < LANES)[None, :])
        total += tl.sum(turned, 1)
    return total


@triton.jit
def _store_mean(mean, unit, value, size, D: tl.constexpr, BLOCK: tl.constexpr):
    """Stores the channels' mean in 8 bits."""
    c = tl.arange(0, BLOCK)
    bits = bf16_bits(tl.max(tl.abs(value), 0) / 127.0 * size)
    tl.store(unit, bits)
    step = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True) / size
    code = (value / tl.where(step > 0, step, 1.0) + ROUND) - ROUND
    tl.store(mean + c, tl.minimum(tl.maximum(code, -127.0), 127.0).to(tl.int8), c < D)


@triton.jit
def _center(
    y, gain, mean, unit, size, MEAN: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, LANES: tl.constexpr, SIDE: tl.constexpr,
):
    """Subtracts the stored mean; writes each entry's root mean square to ``gain``."""
    for first in range(0, LANES, SIDE):
        n = first + tl.arange(0, SIDE)
        square = tl.zeros((SIDE,), tl.float32)
        for channel in range(0, D, CHANNELS):
            c = (channel + tl.arange(0, CHANNELS))[:, None]
            mask = (c < D) & (n < PAGE)[None, :]
            x = tl.load(y + c * LANES + n[None, :], mask, 0.0)
            if MEAN:
                x -= tl.load(mean + c, mask, 0).to(tl.float32) * _unit(unit, size)
            tl.store(y + c * LANES + n[None, :], x, c < D)
            square += tl.sum(x * x, 0)
        tl.store(gain + n, tl.sqrt(square / D))


@triton.jit
def _unit(unit, size):
    """A step of the stored mean, in units of ``size``."""
    return (tl.load(unit).to(tl.int32) << 16).to(tl.float32, bitcast=True) / size


@triton.jit
def _encoded_scales(gain, size, PAGE: tl.constexpr, LANES: tl.constexpr):
    """Scales on a logarithmic grid below the largest: the largest as bf16 bits and as a number, and the codes ``[LANES]``.

    ``gain`` is in units of ``size``, the first result is not; see `dmc.kernels.pages.layout`.
    """
    n = tl.arange(0, LANES)
    value = tl.load(gain + n, n < PAGE, 0.0)
    bits = bf16_bits(tl.minimum(tl.max(value, 0) * size, _LARGEST))
    largest = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True) / size
    ratio = largest / tl.where(value > 0, value, 1.0)
    code = tl.log2(tl.where(ratio > 0, ratio, 1.0)) * _STEPS
    code = (tl.minimum(tl.maximum(code, 0.0), 255.0) + ROUND) - ROUND
    return bits, largest, tl.where(value > 0, code.to(tl.int32), _NONE)


@triton.jit
def _level(levels, below, c, which, FIRST: tl.constexpr, REST: tl.constexpr, mask):
    """Levels by their index: those of the first chunk of channels, or of the second."""
    if REST > 0:
        return tl.load(tl.where(c < FIRST, levels, below) + which, mask, 0.0)
    else:
        return tl.load(levels + which, mask, 0.0)


@triton.jit
def _find_nearest(
    y, near, gain, levels, below, FIRST: tl.constexpr, BITS: tl.constexpr, REST: tl.constexpr, D: tl.constexpr,
    LANES: tl.constexpr, STEP: tl.constexpr,
):
    """Divides each entry by its ``gain``, and finds the level of each subset that is nearest to a value.

    The cells of the four levels go into the four bytes of an int32.
    """
    for first in range(0, D * LANES, STEP):
        i = first + tl.arange(0, STEP)
        c, mask = i // LANES, i < D * LANES
        x = tl.load(y + i, mask, 0.0) / tl.load(gain + i % LANES)
        tl.store(y + i, x, mask)
        last = tl.where(c < FIRST, 2 << BITS, 2 << REST) - 1  # level
        under = tl.zeros((STEP,), tl.int32)  # levels below the value
        for power in range(BITS + 1):
            step = 1 << (BITS - power)
            probe = _level(levels, below, c, tl.minimum(under + step - 1, last), FIRST, REST, mask)
            under += tl.where((probe < x) & (step <= last), step, 0)
        under += tl.where(_level(levels, below, c, tl.minimum(under, last), FIRST, REST, mask) < x, 1, 0)
        found = tl.zeros((STEP,), tl.int32)
        for subset in tl.static_range(4):
            above = (under - subset + 3) >> 2  # cells of the subset below the value
            lower, upper = tl.maximum(above - 1, 0), tl.minimum(above, last >> 2)
            low = _level(levels, below, c, lower * 4 + subset, FIRST, REST, mask)
            high = _level(levels, below, c, upper * 4 + subset, FIRST, REST, mask)
            found += tl.where(tl.abs(x - low) <= tl.abs(high - x), lower, upper) << (8 * subset)
        tl.store(near + i, found, mask)


@triton.jit
def _viterbi(
    y, near, path, levels, below, FIRST: tl.constexpr, BITS: tl.constexpr, REST: tl.constexpr, D: tl.constexpr,
    LANES: tl.constexpr, UNROLL: tl.constexpr,
):
    """The cheapest path of each lane: writes ``4 u_{t-2} + 2 u_{t-1} + u_t`` of every value t behind the survivors.

    States are (u_{t-1}, u_t); the subset of a step is ``2 (u_t xor u_{t-2}) + u_{t-1}``.
    """
    n = tl.arange(0, LANES)
    s00 = tl.zeros((LANES,), tl.float32)
    s01, s10, s11 = s00 + float("inf"), s00 + float("inf"), s00 + float("inf")
    for start in range(0, D, UNROLL):
        for more in tl.static_range(UNROLL):
            c = start + more
            x = tl.load(y + c * LANES + n)
            cells = tl.load(near + c * LANES + n)
            c0 = _cost(levels, below, c, x, cells, 0, FIRST, REST)
            c1 = _cost(levels, below, c, x, cells, 1, FIRST, REST)
            c2 = _cost(levels, below, c, x, cells, 2, FIRST, REST)
            c3 = _cost(levels, below, c, x, cells, 3, FIRST, REST)
            a00, b00, a01, b01 = s00 + c0, s10 + c2, s00 + c2, s10 + c0
            a10, b10, a11, b11 = s01 + c1, s11 + c3, s01 + c3, s11 + c1
            came = (b00 < a00).to(tl.int32) + 2 * (b01 < a01).to(tl.int32)
            came += 4 * (b10 < a10).to(tl.int32) + 8 * (b11 < a11).to(tl.int32)
            tl.store(path + c * LANES + n, came.to(tl.uint8))
            s00, s01, s10, s11 = tl.minimum(a00, b00), tl.minimum(a01, b01), tl.minimum(a10, b10), tl.minimum(a11, b11)
    tl.debug_barrier()
    state = tl.where(s01 < s00, 1, 0)
    best = tl.minimum(s00, s01)
    state = tl.where(s10 < best, 2, state)
    state = tl.where(s11 < tl.minimum(best, s10), 3, state)
    for start in range(0, D, UNROLL):
        for more in tl.static_range(UNROLL):
            at = path + (D - 1 - start - more) * LANES + n
            came = tl.load(at).to(tl.int32)
            full = 4 * ((came >> state) & 1) + state
            tl.store(at + D * LANES, full.to(tl.uint8))
            state = full >> 1


@triton.jit
def _cost(levels, below, c, x, cells, subset: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr):
    which = ((cells >> (8 * subset)) & 255) * 4 + subset
    if REST > 0:
        level = tl.load(tl.where(c < FIRST, levels, below) + which)
    else:
        level = tl.load(levels + which)
    return (x - level) * (x - level)


@triton.jit
def _read_path(
    y, near, path, gain, order, levels, below, FIRST: tl.constexpr, REST: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr,
    LANES: tl.constexpr, SIDE: tl.constexpr,
):
    """The codes, in the order of packing, and in ``gain`` the least-squares scale of each entry's levels, at least 0."""
    for first in range(0, LANES, SIDE):
        lane = first + tl.arange(0, SIDE)
        n = lane[None, :]
        along, energy = tl.zeros((SIDE,), tl.float32), tl.zeros((SIDE,), tl.float32)
        for channel in range(0, D, CHANNELS):
            c = (channel + tl.arange(0, CHANNELS))[:, None]
            mask = (c < D) & (n < PAGE)
            step = tl.load(path + (D + c) * LANES + n, mask, 0).to(tl.int32)
            subset = 2 * ((step ^ (step >> 2)) & 1) + ((step >> 1) & 1)
            cell = (tl.load(near + c * LANES + n, mask, 0) >> (8 * subset)) & 255
            level = _level(levels, below, c, cell * 4 + subset, FIRST, REST, mask)
            along += tl.sum(tl.load(y + c * LANES + n, mask, 0.0) * level, 0)
            energy += tl.sum(level * level, 0)
            at = n * D + c
            if REST > 0:
                at = tl.where(c < FIRST, n * FIRST + c, PAGE * FIRST + n * (D - FIRST) + c - FIRST)
            tl.store(order + at, (2 * cell + (step & 1)).to(tl.uint8), mask)
        size = tl.load(gain + lane) * tl.maximum(along / tl.where(energy > 0, energy, 1.0), 0.0)
        tl.debug_barrier()  # all threads have read their gain
        tl.store(gain + lane, size)


@triton.jit
def _pack(to, order, TOTAL: tl.constexpr, BITS: tl.constexpr):
    """Packs contiguous codes, plane after plane, in the layout of `dmc.cache.codecs.bits`."""
    LOW: tl.constexpr = 8 if BITS == 8 else (4 if BITS >= 4 else (2 if BITS >= 2 else 1))
    _plane(to, order, TOTAL, LOW, 0)
    if BITS > LOW:
        MIDDLE: tl.constexpr = 2 if BITS - LOW >= 2 else 1
        _plane(to + _bytes(TOTAL, LOW), order, TOTAL, MIDDLE, LOW)
        if BITS > LOW + MIDDLE:
            _plane(to + _bytes(TOTAL, LOW) + _bytes(TOTAL, MIDDLE), order, TOTAL, 1, LOW + MIDDLE)


@triton.jit
def _plane(to, order, TOTAL: tl.constexpr, WIDTH: tl.constexpr, SHIFT: tl.constexpr):
    BYTES: tl.constexpr = (TOTAL * WIDTH + 7) // 8
    for first in range(0, BYTES, 512):
        i = first + tl.arange(0, 512)
        byte = tl.zeros((512,), tl.int32)
        for part in tl.static_range(8 // WIDTH):
            code = tl.load(order + i + part * BYTES, (i < BYTES) & (i + part * BYTES < TOTAL), 0).to(tl.int32)
            byte |= ((code >> SHIFT) & ((1 << WIDTH) - 1)) << (part * WIDTH)
        tl.store(to + i, byte.to(tl.uint8), i < BYTES)
