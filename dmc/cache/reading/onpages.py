"""The rows of a layer as the attention kernels read them where they lie (`dmc.kernels`)."""

from __future__ import annotations

import torch
from torch import Tensor

from dmc.cache.storage.packing import Packing
from dmc.cache.storage.rows import Rows
from dmc.kernels.backend import choose, chosen_name
from dmc.kernels.cpu.runs import runs_on_cpu
from dmc.kernels.pages.paged import CPU_DTYPES, Paged
from dmc.kernels.ready import compiles


def runs(like: Tensor) -> bool:
    """Whether the serving kernels are to be used on tensors like this: on a GPU that can, or where Triton is asked for.

    Raises:
        ValueError: if Triton is asked for by name and cannot run.
    """
    if like.device.type != "cuda" and chosen_name() != "triton":
        return False
    return like.dtype != torch.float64 and choose(like) == "triton"


def paged(rows: Rows, packing: Packing) -> Paged | None:
    """Tables and pages of all rows, for layers of one packing; None where the kernels do not read such pages.

    Kept until the pool grows or a table is widened.
    """
    parts = rows.pool.memory, rows.closed_table, rows.open_table, rows.closed, rows.exact
    known = rows.pool.kept.get(id(packing))
    if known is None or any(a is not b for a, b in zip(known[0], parts, strict=True)):
        rows.pool.kept[id(packing)] = known = parts, _paged(rows, packing)
    return known[1]


def _paged(rows: Rows, packing: Packing) -> Paged | None:
    if rows.storage.holes and not runs_on_cpu(rows.z):
        return None
    views, open_views = rows.pool.views(packing.layout), rows.pool.views(rows.open_layout)
    encoded = {name: view for name, view in views.items() if name in packing.fields}
    opened = {part: open_views[part] for part in "kv"}
    if rows.storage.holes:
        encoded["place"] = views["e_place"]
    if rows.storage.scored:
        encoded["score"], opened["score"] = views["e_score"], open_views["e_score"]
    made = packing.format(rows.z.device)
    return Paged(made, encoded, opened, rows.closed_table, rows.open_table, rows.closed, rows.exact)


def reads(rows: Rows, packing: Packing, *, watch: str | None = None) -> bool:
    """Whether the decode kernels run on the rows of a layer: Triton's in the model's dtype, or the loops for CPUs in fp32.

    The loops alone take pages with holes, and tell what entries weigh (``watch``).
    """
    like = torch.empty(0, rows.shape.head_size, dtype=rows.shape.dtype, device=rows.z.device)
    if not runs_on_cpu(rows.z) and (rows.storage.holes or watch is not None or not runs(like)):
        return False
    made = packing.format(like.device)
    if not runs_on_cpu(rows.z):
        return made.triton_reads
    return made.cpu_reads and rows.storage.exact_dtype in CPU_DTYPES


def prepare(rows: Rows) -> None:
    """What takes long the first time, before any request waits for it."""
    if not runs_on_cpu(rows.z.float()):
        return
    needed = []
    if runs_on_cpu(rows.z) and any(reads(rows, packing) for packing in rows.packings):
        needed.append("decode")
    if runs_on_cpu(rows.z) and not rows.storage.holes:  # what evicting policies read of a prompt is PyTorch's
        needed.append("prefill")
    needed += [name for packing in rows.packings for name in packing.codec.compiles]
    compiles(*dict.fromkeys(needed), formats={packing.format(rows.z.device) for packing in rows.packings if reads(rows, packing)})
