"""Decode attention over pages in place on a CPU: numba compiles it to vector instructions.

PyTorch has no attention over pages: it needs copies of each row's pages and a dozen passes over memory to unpack codes. Here a
page is read once, unpacked into a buffer that stays in the core's cache, and used by all queries of its head. The cost of a row
depends on its own entries, and its result does not depend on other rows. Rows are divided among as many threads as PyTorch has,
by their number of entries.

`decode` takes the same cache as the Triton kernels (`dmc.kernels.pages.paged.Paged`), of formats that have a
`dmc.kernels.pages.format.CpuReader`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dmc.kernels.cpu.threads import share
from dmc.kernels.decode import loop as loops
from dmc.kernels.pages.format import CpuReader
from dmc.kernels.pages.paged import Paged

_LEAST = 1 << 17  # products of a query and a feature from which another thread pays off


def decode(query: Tensor, own_key: Tensor, own_value: Tensor, index: Tensor, paged: Paged, scale: float) -> Tensor:
    """`dmc.kernels.decode.decode.decode_attention` for fp32 on a CPU; no gradients."""
    return with_statistics(query, own_key, own_value, index, paged, scale, None)[0]


def with_statistics(
    query: Tensor, own_key: Tensor, own_value: Tensor, index: Tensor, paged: Paged, scale: float, statistics: str | None,
) -> tuple[Tensor, Tensor]:
    """`decode`, and attention statistics.

    Args:
        paged: also of a policy that evicts, whose encoded pages have "position" and maybe "score".
        statistics: each entry's softmax weight, summed over G, is added to its score ("sum") or
            replaces it ("last"); None: neither.

    Returns:
        ``(out [R, G, D], own [R])``: own is the own state's weight, summed over G; undefined without
            ``statistics``.
    """
    rows, groups, size = query.shape
    if statistics is not None and not ("score" in paged.encoded and "score" in paged.full_precision):
        raise ValueError(f"attention statistics ({statistics}) are asked for, but these pages have no scores to add them to")
    query, own_key, own_value = (x.detach().float() for x in (query, own_key, own_value))
    own = query.new_zeros(rows)
    if not rows:
        return torch.empty_like(query), own
    chosen, tables = index.numpy(), _tables(paged)
    entries = tables[2][chosen].astype(np.int64) * paged.page + tables[3][chosen] + 1
    starts = np.zeros(rows + 1, np.int64)  # work before each row: queries by entries
    np.cumsum(entries * groups, out=starts[1:])
    scaled = (query * scale).contiguous()
    rotation = scaled.new_empty(0, 0) if paged.format.rotation is None else paged.format.rotation
    bias = _bias(scaled, index, paged)
    out, coded = scaled.new_empty(scaled.shape), scaled.new_empty(scaled.shape)
    own_state = own_key.contiguous(), own_value.contiguous()
    tensors = scaled, rotation.contiguous(), rotation.T.contiguous(), *bias, *own_state, out, coded
    how = {None: loops.NONE, "last": loops.REPLACE, "sum": loops.ADD}[statistics]
    arguments = *(x.numpy() for x in (*tensors, own)), how, chosen, *tables, *_pages(paged)
    share(starts, lambda begin, end: loops.attend(begin, end, *arguments), most=int(starts[-1]) * size // _LEAST)
    return out, own


def _bias(query: Tensor, index: Tensor, paged: Paged) -> tuple[Tensor, Tensor]:
    """Bias of keys: coefficients ``[R, G, D]`` of scaled queries, and features ``[positions, D]``; empty without a bias."""
    if paged.key_bias is None:
        return query.new_empty(0, 0, 0), query.new_empty(0, 0)
    return paged.key_bias.coefficients(query, paged.heads[index]).contiguous(), paged.key_bias.features()


def _tables(paged: Paged) -> tuple[np.ndarray, ...]:
    return tuple(x.numpy() for x in (paged.encoded_table, paged.full_table, paged.encoded_count, paged.full_count))


# ------------------------------------------------------------------------------------------- addresses of pages


def _pages(paged: Paged) -> tuple:
    """The arguments of `dmc.kernels.decode.loop` that describe the pages; cached in ``paged``."""
    if "_cpu" not in paged.__dict__:
        reader, arguments = _made(paged)
        paged.__dict__["_cpu"] = arguments, reader  # the reader's functions are called by address and must live as long
    return paged.__dict__["_cpu"][0]


def _made(paged: Paged) -> tuple[CpuReader, tuple]:
    assert paged.cpu_reads, "these pages are not for the CPU kernels"
    encoded, full_precision = paged.encoded, paged.full_precision
    storage = full_precision["k"].untyped_storage()
    singles, halves, codes = (torch.empty(0, dtype=dtype).set_(storage) for dtype in (torch.float32, torch.int16, torch.uint8))
    where = np.zeros((len(loops.FIELDS), 2), np.int64)
    fields = {name: full_precision.get(name) for name in ("k", "v", "k_scale", "v_scale")}
    fields["full_score"] = full_precision.get("score")
    fields |= {name: encoded.get(name) for name in ("position", "score")}
    for line, name in zip(where, loops.FIELDS, strict=True):
        if fields[name] is not None:
            line[:] = fields[name].storage_offset(), fields[name].stride(0)
    begins = {name: x.storage_offset() * x.element_size() for name, x in encoded.items()}
    first, (stride, *_) = min(begins.values()), [x.stride(0) * x.element_size() for x in encoded.values()]
    reader = paged.format.cpu_reader({name: begin - first for name, begin in begins.items()})
    sizes = np.array([
        paged.page, paged.per_full_page, loops.FULL_DTYPES.index(full_precision["k"].dtype), "position" in encoded, first, stride,
        reader.room,
    ], np.int64)
    arrays = singles.numpy(), halves.numpy().view(np.uint16), codes.numpy(), where, sizes, reader.facts, reader.constants
    return reader, (*arrays, reader.keys.address, reader.values.address)
