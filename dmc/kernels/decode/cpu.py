"""Decode attention over pages on a CPU, where they lie: loops that numba compiles to vector instructions.

PyTorch has no attention over pages, so there each row's pages are copied together first, and codes are unpacked by a dozen
passes over memory. Here a page is read once, unpacked into a buffer that stays in the core's cache, and met by all queries of its
head. A row costs what it holds and comes out the same whatever is beside it. Threads share the rows by what they hold, as many as
PyTorch has.

`decode` takes the same cache as the Triton kernels (`dmc.kernels.pages.paged.Paged`), of the kinds `KINDS`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dmc.kernels.cpu.threads import share
from dmc.kernels.decode import loop as loops
from dmc.kernels.pages.layout import NO_SCALE, PLANES, SCALE_STEPS
from dmc.kernels.pages.paged import Paged, Trellis

KINDS = {"dense": loops.DENSE, "int8": loops.INT8, "fp8": loops.FP8, "trellis": loops.TRELLIS}
_LEAST = 1 << 17  # products of a query and a feature for which another thread is worth waking


def decode(query: Tensor, own_key: Tensor, own_value: Tensor, index: Tensor, paged: Paged, scale: float) -> Tensor:
    """`dmc.kernels.decode.decode.decode_attention` for fp32 on a CPU; no gradients."""
    return watched(query, own_key, own_value, index, paged, scale, None)[0]


def watched(
    query: Tensor, own_key: Tensor, own_value: Tensor, index: Tensor, paged: Paged, scale: float, watch: str | None,
) -> tuple[Tensor, Tensor]:
    """`decode`, and what entries weigh.

    Args:
        paged: also of a policy that evicts, whose encoded pages have "place" and maybe "score".
        watch: each entry's softmax weight, summed over G, is added to its score ("sum") or becomes it ("last"); None: neither.

    Returns:
        ``(out [R, G, D], own [R])``: own is the own state's weight, summed over G; anything without ``watch``.
    """
    rows, groups, size = query.shape
    if watch is not None and not ("score" in paged.encoded and "score" in paged.opened):
        raise ValueError(f"weights are watched ({watch}), but these pages have no scores to take them")
    trellis = paged.gear if isinstance(paged.gear, Trellis) else None
    query, own_key, own_value = (x.detach().float() for x in (query, own_key, own_value))
    own = query.new_zeros(rows)
    if not rows:
        return torch.empty_like(query), own
    places, tables = index.numpy(), _tables(paged)
    entries = tables[2][places].astype(np.int64) * paged.page + tables[3][places] + 1
    starts = np.zeros(rows + 1, np.int64)  # work before each row: queries by entries
    np.cumsum(entries * groups, out=starts[1:])
    scaled = (query * scale).contiguous()
    rotation = trellis.rotation if trellis else scaled.new_empty(0, 0)
    out, coded = scaled.new_empty(scaled.shape), scaled.new_empty(scaled.shape)
    tensors = scaled, rotation.contiguous(), rotation.T.contiguous(), own_key.contiguous(), own_value.contiguous(), out, coded
    how = {None: loops.NONE, "last": loops.REPLACE, "sum": loops.ADD}[watch]
    arguments = *(x.numpy() for x in (*tensors, own)), how, places, *tables, *_pages(paged)
    share(starts, lambda begin, end: loops.attend(begin, end, *arguments), most=int(starts[-1]) * size // _LEAST)
    return out, own


def _tables(paged: Paged) -> tuple[np.ndarray, ...]:
    return tuple(x.numpy() for x in (paged.encoded_table, paged.open_table, paged.encoded_count, paged.exact_count))


# ------------------------------------------------------------------------------------------- where pages lie


def _pages(paged: Paged) -> tuple:
    """The pages as `dmc.kernels.decode.loop` takes them; kept with ``paged``."""
    if "_cpu" not in paged.__dict__:
        paged.__dict__["_cpu"] = _made(paged)
    return paged.__dict__["_cpu"]


def _made(paged: Paged) -> tuple:
    fields, opened, kind = paged.encoded, paged.opened, paged.kind
    assert paged.in_reach_of_loops, "these pages are not for the loops"
    storage = opened["k"].untyped_storage()
    full, halves, codes = (torch.empty(0, dtype=dtype).set_(storage) for dtype in (torch.float32, torch.int16, torch.uint8))
    main = {"dense": "{}", "int8": "{}_codes", "fp8": "{}_numbers", "trellis": "{}_codes"}[kind]
    where = np.zeros((2, len(loops.FIELDS), 2), np.int64)
    for number, part in enumerate("kv"):
        named = {name: fields.get(f"{part}_{name}") for name in loops.FIELDS}
        named |= {"main": fields[main.format(part)], "exact": opened[part], "exact_score": opened.get("score")}
        named |= {name: fields.get(name) for name in ("place", "score")}
        for line, name in zip(where[number], loops.FIELDS, strict=True):
            if named[name] is not None:
                line[:] = named[name].storage_offset(), named[name].stride(0)
    sizes = np.array([
        KINDS[kind], paged.page, opened["k"].shape[1], fields[main.format("k")].dtype == torch.bfloat16,
        opened["k"].dtype == torch.bfloat16, "k_mean" in fields, "place" in fields,
    ], np.int64)
    return full.numpy(), halves.numpy().view(np.uint16), codes.numpy(), where, sizes, *_codes(paged)


def _codes(paged: Paged) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What codes stand for.

    Returns:
        table: fp32, of trellis pages: of each code of a scale, and behind it the levels.
        lines: int64 ``[l, 6]``, of trellis pages: for each plane of each stretch its first value, values, bits, place in a code,
            first byte, first level.
        line_starts: int64 ``[3]``, of keys' lines, of values' and the end.
    """
    if paged.kind != "trellis":
        return np.zeros(1, np.float32), np.zeros((1, 6), np.int64), np.zeros(3, np.int64)
    falls = np.exp2(np.arange(256) / -SCALE_STEPS).astype(np.float32)
    falls[NO_SCALE] = 0.0
    layout, tables, lines, line_starts = paged.gear, [falls], [], [0]
    for part in "kv":
        start, first = 0, 0
        for count, bits in layout.stretches(part):
            table, shift = sum(len(known) for known in tables), 0
            for width in PLANES[bits]:
                lines.append((first, count, width, shift, start, table))
                start, shift = start + -(-layout.page * count * width // 8), shift + width
            tables.append(layout.levels[bits].numpy())
            first += count
        line_starts.append(len(lines))
    tables.append(np.zeros(16, np.float32))  # a whole vector of the last levels may be read
    return np.concatenate(tables).astype(np.float32), np.array(lines, np.int64), np.array(line_starts, np.int64)
