"""The rows of a layer as the attention kernels read them where they lie (`dmc.kernels`)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from dmc.cache.codecs import Codec
from dmc.cache.codecs.dense import DenseCodec
from dmc.cache.codecs.fp8 import Fp8Codec
from dmc.cache.codecs.gear import GearCodec
from dmc.cache.codecs.int8 import Int8Codec
from dmc.cache.codecs.kivi import KiviCodec
from dmc.cache.codecs.tcq import TcqCodec
from dmc.cache.storage.packing import Packing
from dmc.cache.storage.rows import Rows
from dmc.kernels.backend import choose, chosen_name
from dmc.kernels.cpu.runs import runs_on_cpu
from dmc.kernels.pages.paged import Gear, Paged, Trellis, cpu_reads
from dmc.kernels.ready import compiles

_PLAIN = {DenseCodec: "dense", Int8Codec: "int8", Fp8Codec: "fp8"}


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
    known = page_layout(packing.codec, packing.page_size, rows.shape.head_size, rows.z.device)
    if known is None or (rows.storage.holes and not runs_on_cpu(rows.z)):
        return None
    kind, layout = known
    views, open_views = rows.pool.views(packing.layout), rows.pool.views(rows.open_layout)
    encoded = {name: view for name, view in views.items() if name in packing.fields}
    opened = {part: open_views[part] for part in "kv"}
    if rows.storage.holes:
        encoded["place"] = views["e_place"]
    if rows.storage.scored:
        encoded["score"], opened["score"] = views["e_score"], open_views["e_score"]
    return Paged(kind, encoded, opened, rows.closed_table, rows.open_table, rows.closed, rows.exact, layout)


def reads(rows: Rows, packing: Packing, *, watch: str | None = None) -> bool:
    """Whether the decode kernels run on the rows of a layer: Triton's in the model's dtype, or the loops for CPUs in fp32.

    The loops alone take pages with holes, and tell what entries weigh (``watch``).
    """
    like = torch.empty(0, rows.shape.head_size, dtype=rows.shape.dtype, device=rows.z.device)
    if not runs_on_cpu(rows.z) and (rows.storage.holes or watch is not None or not runs(like)):
        return False
    known = page_layout(packing.codec, packing.page_size, rows.shape.head_size, like.device)
    if known is None:
        return False
    if not runs_on_cpu(rows.z):
        return _triton_reads(packing.page_size, known[1])
    fields = packing.layout.fields
    return cpu_reads(known[0], rows.storage.exact_dtype, fields["k"][2] if known[0] == "dense" else None)


def prepare(rows: Rows) -> None:
    """What takes long the first time, before any request waits for it."""
    if not runs_on_cpu(rows.z.float()):
        return
    needed = []
    if runs_on_cpu(rows.z) and any(reads(rows, packing) for packing in rows.packings):
        needed.append("decode")
    if runs_on_cpu(rows.z) and not rows.storage.holes:  # what evicting policies read of a prompt is PyTorch's
        needed.append("prefill")
    if any(_codes_trellises(packing.codec) for packing in rows.packings):
        needed.append("trellis")
    compiles(*needed)


@lru_cache(maxsize=64)
def page_layout(codec: Codec, page: int, size: int, device: torch.device) -> tuple[str, Gear | Trellis | None] | None:
    """Kind and layout of a codec's pages, as `dmc.kernels.pages.paged` names them; None if no kernel reads them."""
    if type(codec) in _PLAIN:
        return _PLAIN[type(codec)], None
    if isinstance(codec, KiviCodec):
        return "gear", Gear(codec.bits, page, size, True, False, codec.group)
    if isinstance(codec, TcqCodec):
        return codec.parts.layout(page, size, device)
    if isinstance(codec, GearCodec):
        extra = codec.rank or codec.outliers
        return None if extra and _codes_trellises(codec) else codec.parts.layout(page, size, device)
    return None


def _codes_trellises(codec: Codec) -> bool:
    """True if the codec chooses codes of a trellis."""
    return isinstance(codec, TcqCodec) or (isinstance(codec, GearCodec) and codec.backbone == "trellis")


def _triton_reads(page: int, layout: Gear | Trellis | None) -> bool:
    """Whether the Triton kernels take pages of so many entries: packed codes in whole words, tiles of a power of two."""
    words = not isinstance(layout, Trellis) or not any(count % 4 for side in (layout.key, layout.value) for count, _ in side)
    return layout is None or (page >= 16 and not page & (page - 1) and words)
