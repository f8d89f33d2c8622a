"""Pages and block tables as decode attention reads them, and the layouts of packed pages."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = {
    # kind of encoded page: its fields beside the exact ones
    "dense": ("k", "v"),
    "int8": ("k_codes", "k_scale", "v_codes", "v_scale"),
    "fp8": ("k_numbers", "k_scale", "v_numbers", "v_scale"),
    "gear": ("k_codes", "k_scale", "k_zero", "v_codes", "v_scale", "v_zero"),  # and outliers, places, left, right
    "trellis": ("k_codes", "k_scale", "k_top", "v_codes", "v_scale", "v_top"),  # and mean, unit
}


@dataclass(frozen=True)
class Gear:
    """How GEAR pages with a backbone of min/max groups are laid out (docs/kernels.md).

    Attributes:
        bits: 2, 3, 4 or 8, of a code.
        page: entries of a page, P.
        head_size: D.
        key_channel, value_channel: whether a vector that shares scales is a channel over the entries, or an entry.
        group: values at most that share a scale; None: the whole vector.
    """

    bits: int
    page: int
    head_size: int
    key_channel: bool
    value_channel: bool
    group: int | None

    def channel(self, part: str) -> bool:
        """Whether the vectors of "k" or "v" are channels."""
        return self.key_channel if part == "k" else self.value_channel

    def groups(self, part: str) -> tuple[int, int]:
        """(groups of a vector, values of a group) for "k" or "v"."""
        length = self.page if self.channel(part) else self.head_size
        count = 1 if self.group is None else -(-length // self.group)
        return count, -(-length // count)


@dataclass(frozen=True)
class Trellis:
    """How TCQ's pages are laid out: ``x = (levels * scale + mean) Rᵀ`` (docs/kernels.md).

    Attributes:
        page: entries of a page, P.
        head_size: D.
        key, value: ``(values, bits)`` of each stretch of a vector, one or two that add up to D.
        levels: by bits, fp32 ``[2 ** (bits + 1)]``, what codes of so many bits stand for.
        rotation: R, fp32 ``[D, D]``.
    """

    page: int
    head_size: int
    key: tuple[tuple[int, int], ...]
    value: tuple[tuple[int, int], ...]
    levels: dict[int, Tensor]
    rotation: Tensor

    def stretches(self, part: str) -> tuple[tuple[int, int], ...]:
        """Those of "k" or "v"."""
        return self.key if part == "k" else self.value


@dataclass(frozen=True)
class Paged:
    """What decode reads, as the page pool holds it: views of its memory, and tables of int32. Nothing is copied.

    Entries of a row: ``closed`` whole encoded pages, then ``exact`` entries on open pages. All of them are seen.

    Attributes:
        kind: a name of `KINDS`, how encoded pages are stored.
        encoded: fields of encoded pages: keys and values ``[pages, P, D]`` (``k``, ``v`` in any float dtype; ``k_codes``,
            ``v_codes`` int8; ``k_numbers``, ``v_numbers`` uint8 holding E4M3), scales ``[pages, P]``. The loops for CPUs alone
            know ``place`` int32 ``[pages, P]``, below 0 where an entry was evicted, and ``score`` fp32 ``[pages, P]``.
        opened: ``k`` and ``v`` of exact pages ``[pages, E, D]``, any float dtype; and ``score`` ``[pages, E]``.
        encoded_table, open_table: ``[rows, columns]``, pages of each row in order.
        encoded_count: ``[rows]``, encoded pages of each row.
        exact_count: ``[rows]``, exact entries of each row.
        gear: layout of the pages of kind "gear" or "trellis", whose fields are those of `dmc.cache.codecs.gear` and `tcq`.
    """

    kind: str
    encoded: dict[str, Tensor]
    opened: dict[str, Tensor]
    encoded_table: Tensor
    open_table: Tensor
    encoded_count: Tensor
    exact_count: Tensor
    gear: Gear | Trellis | None = None

    @property
    def page(self) -> int:
        """Entries of an encoded page."""
        return self.gear.page if self.gear else self.encoded[KINDS[self.kind][0]].shape[1]

    @functools.cached_property
    def in_reach_of_loops(self) -> bool:
        """Whether the loops for CPUs know these pages: see `cpu_reads`; and all must lie in one storage, as a pool's do."""
        storages = {x.untyped_storage().data_ptr() for part in (self.encoded, self.opened) for x in part.values()}
        return len(storages) == 1 and cpu_reads(self.kind, self.opened["k"].dtype, _encoded_dtype(self))

    def __post_init__(self) -> None:  # noqa: D105
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind of pages {self.kind!r}; known: {', '.join(KINDS)}")
        if type(self.gear) is not {"gear": Gear, "trellis": Trellis}.get(self.kind, type(None)):
            raise ValueError(
                f"{self.kind} pages and gear={self.gear}: a Gear goes with pages of kind gear, a Trellis with those of "
                "kind trellis, and nothing with others"
            )
        missing = [name for name in KINDS[self.kind] if name not in self.encoded]
        if missing:
            raise ValueError(f"{self.kind} pages have the fields {', '.join(KINDS[self.kind])}; missing: {', '.join(missing)}")


def cpu_reads(kind: str, exact: torch.dtype, encoded: torch.dtype | None) -> bool:
    """Whether these loops know pages of a kind, with exact entries of a dtype; ``encoded`` is that of dense pages."""
    dtypes = (torch.float32, torch.bfloat16)
    return kind in ("dense", "int8", "fp8", "trellis") and exact in dtypes and (kind != "dense" or encoded in dtypes)


def _encoded_dtype(paged: Paged) -> torch.dtype | None:
    return paged.encoded["k"].dtype if paged.kind == "dense" else None
