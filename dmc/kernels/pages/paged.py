"""Rows of a cache as arguments of kernels: block tables, and views of the page pool, without copies."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dmc.kernels.pages.format import PageFormat
from dmc.kernels.pages.key_bias import KeyBias

NO_PAGE, NO_COLUMN, NOT_ENCODED = 1, 2, 4
"""Bits of `Growing.failed`: no page was free; the table of encoded pages is full; a full row was appended to."""

CPU_DTYPES = (torch.float32, torch.bfloat16, torch.int8)
"""Dtypes of full-precision entries that the CPU kernels read."""


@dataclass(frozen=True)
class Paged:
    """The cache as decode attention reads it. A row has encoded pages, then full-precision entries on separate pages.

    Attributes:
        format: of the encoded pages.
        encoded: their fields ``[pages, shape]``, as `PageFormat.fields` names them. Of policies that evict and with a bias of
            keys also ``position`` int32 ``[pages, P]``, below 0 where an entry was evicted. Of policies that evict also ``score``
            fp32 ``[pages, P]``, for the CPU kernels alone.
        full_precision: ``k`` and ``v`` of full-precision pages ``[pages, E, D]``, any float dtype, or int8 codes with ``k_scale``
            and ``v_scale`` bf16 ``[pages, E]``; and ``score`` ``[pages, E]``.
        encoded_table, full_table: int32 ``[rows, columns]``, pages of each row in order; 0, the null page, where there is none.
        encoded_count: int32 ``[rows]``, encoded pages of each row.
        full_count: int32 ``[rows]``, full-precision entries of each row.
        key_bias: bias of keys, which encoded pages are stored without; None: no bias.
        heads: with ``key_bias``, int64 ``[rows]``, key/value head of each row, counted over all layers.
    """

    format: PageFormat
    encoded: dict[str, Tensor]
    full_precision: dict[str, Tensor]
    encoded_table: Tensor
    full_table: Tensor
    encoded_count: Tensor
    full_count: Tensor
    key_bias: KeyBias | None = field(default=None, kw_only=True)
    heads: Tensor | None = field(default=None, kw_only=True)

    @property
    def page(self) -> int:
        """Entries of an encoded page, P."""
        return self.format.page

    @property
    def per_full_page(self) -> int:
        """Full-precision entries of a page, E."""
        return self.full_precision["k"].shape[1]

    @property
    def head_size(self) -> int:
        """D."""
        return self.full_precision["k"].shape[2]

    def full(self, part: str, pages: Tensor, work: torch.dtype) -> Tensor:
        """Keys ("k") or values ("v") of full-precision pages, of any shape → ``[..., E, D]`` in ``work``; a copy."""
        x = self.full_precision[part][pages].to(work)
        return x * self.full_precision[f"{part}_scale"][pages].to(work)[..., None] if self.full_scaled else x

    @property
    def full_scaled(self) -> bool:
        """True if full-precision entries are codes with a scale."""
        return "k_scale" in self.full_precision

    @functools.cached_property
    def cpu_reads(self) -> bool:
        """True if the CPU kernels read these pages: their format, full precision in `CPU_DTYPES`, all fields in one storage."""
        fields = [x for part in (self.encoded, self.full_precision) for x in part.values()]
        one = len({x.untyped_storage().data_ptr() for x in fields}) == 1
        strides = {x.stride(0) * x.element_size() for x in self.encoded.values()}
        return one and len(strides) == 1 and self.full_precision["k"].dtype in CPU_DTYPES and self.format.cpu_reads

    def __post_init__(self) -> None:  # noqa: D105
        missing = [name for name in self.format.fields if name not in self.encoded]
        if missing:
            raise ValueError(
                f"{self.format.name} pages have the fields {', '.join(self.format.fields)}; missing: {', '.join(missing)}"
            )


@dataclass(frozen=True)
class Growing(Paged):
    """The cache as `dmc.kernels.append` and `dmc.kernels.encode` change it. They write to all its tensors.

    A row's full-precision entries are its first ``sinks``, then those that wait to be encoded. With ``most`` of them it is full:
    the oldest page after the sinks must be encoded before another entry becomes final.

    Attributes:
        sinks, window: entries at the start and at the end of a row that stay in full precision.
        numerators: fp32 (the reference implementation also fp64) ``[rows, 2 D]``: keys, before their rotation, and values of the
            accumulating entry, summed with their weights.
        z: as numerators ``[rows]``, the sum of these weights; 0 where a row has no accumulating entry, its numerators too.
        memory: uint8 ``[pages, bytes]``, the pool.
        stack: int64 ``[pages - 1]``, the free pages first; the last of them is taken next.
        free: int32 ``[1]``, their number.
        owners: int32 ``[pages]``, owner count of each page; 0: free.
        failed: int32 ``[1]``; a failure sets its bit (`NO_PAGE`, `NO_COLUMN`, `NOT_ENCODED`), which kernels never clear.
            The affected rows are unchanged.
    """

    sinks: int
    window: int
    numerators: Tensor
    z: Tensor
    memory: Tensor
    stack: Tensor
    free: Tensor
    owners: Tensor
    failed: Tensor

    @property
    def most(self) -> int:
        """Full-precision entries of a full row."""
        return self.sinks + self.window + self.page

    def __post_init__(self) -> None:  # noqa: D105
        super().__post_init__()
        for name in ("full_count", "encoded_count", "full_table", "encoded_table", "free", "owners", "failed"):
            if getattr(self, name).dtype != torch.int32:
                raise ValueError(f"{name} must be int32 on the device, got {getattr(self, name).dtype}")
        if self.full_scaled:
            raise ValueError("kernels write full-precision entries as floats, not as codes")
        if self.full_table.shape[1] * self.per_full_page < self.most:
            raise ValueError(
                f"a row has up to {self.most} full-precision entries, but its {self.full_table.shape[1]} full-precision pages "
                f"hold {self.per_full_page} each; give full_table more columns"
            )
        if self.numerators.shape[1] != 2 * self.head_size or self.numerators.dtype != self.z.dtype:
            raise ValueError(
                f"numerators {tuple(self.numerators.shape)} {self.numerators.dtype} must be [rows, {2 * self.head_size}] "
                f"in the dtype of z, {self.z.dtype}"
            )


def take(state: Growing, wanting: Tensor) -> tuple[Tensor, Tensor]:
    """Takes a free page for each true element of ``[n]``, while there are any → (pages int64 ``[given]``, given bool ``[n]``)."""
    free = int(state.free)
    order = wanting.cumsum(0)
    given = wanting & (order <= free)
    if not torch.equal(given, wanting):
        state.failed.bitwise_or_(NO_PAGE)
    pages = state.stack[free - order[given]].long()
    state.free.sub_(len(pages))
    state.owners[pages] = 1
    return pages, given
