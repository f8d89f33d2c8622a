"""Decode attention over pages: one query of each head over what its row of the block tables holds.

`decode_reference` is the naive twin, `dmc.kernels.decode_triton` the kernels for GPUs and `dmc.kernels.decode_cpu` the loops
for CPUs; `decode_attention` chooses.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from dmc.kernels.backend import choose
from dmc.kernels.layout import NO_SCALE, PLANES, SCALE_STEPS
from dmc.kernels.loops import runs_on_cpu

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
    """How GEAR pages with the rotated backbone are laid out: ``x = (levels * scale + mean) Rᵀ`` (docs/kernels.md).

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
        gear: layout of the pages of kind "gear" or "trellis", whose fields are those of `dmc.cache.codecs.gear`.
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


def decode_attention(
    query: Tensor, own_key: Tensor, own_value: Tensor, index: Tensor, paged: Paged, *, scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """One query of each head over its row's encoded pages, exact entries and its own state.

    With Triton nothing waits for the device: shapes alone say what is launched, so it can be captured in a CUDA graph
    while the tables keep their width.

    Args:
        query: ``[R, G, D]``, rotated; on a GPU products are in its dtype, sums always in fp32.
        own_key, own_value: ``[R, D]``, the open entry, rotated.
        index: ``[R]``, rows of ``paged``'s tables.
        paged: the cache.
        scale: of the scores, ``1 / sqrt(D)`` if None.
        backend: see `dmc.kernels.backend`; what is not "triton" is the twin. None: the default, which on a CPU is loops that
            numba compiles (`dmc.kernels.decode_cpu`), where it is installed and they know the pages.

    Returns:
        ``[R, G, D]`` in the dtype of ``query``.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if backend is None and runs_on_cpu(query) and paged.in_reach_of_loops:
        from dmc.kernels import decode_cpu

        return decode_cpu.decode(query, own_key, own_value, index, paged, scale)
    if choose(query, backend) == "triton":
        from dmc.kernels.decode_triton import decode

        return decode(query, own_key, own_value, index, paged, scale)
    return decode_reference(query, own_key, own_value, index, paged, scale=scale)


def decode_watched(
    query: Tensor, own_key: Tensor, own_value: Tensor, index: Tensor, paged: Paged, *, watch: str,
) -> tuple[Tensor, Tensor]:
    """`decode_attention` by the loops for CPUs, which also add each entry's softmax weight, summed over G, to its score.

    Args:
        query, own_key, own_value, index: fp32, see `decode_attention`.
        paged: with scores of entries.
        watch: "sum" adds, "last" replaces.

    Returns:
        ``(out [R, G, D], own [R])``: own is the weight of the own state.
    """
    from dmc.kernels import decode_cpu

    return decode_cpu.watched(query, own_key, own_value, index, paged, query.shape[-1] ** -0.5, watch)


def cpu_reads(kind: str, exact: torch.dtype, encoded: torch.dtype | None) -> bool:
    """Whether these loops know pages of a kind, with exact entries of a dtype; ``encoded`` is that of dense pages."""
    dtypes = (torch.float32, torch.bfloat16)
    return kind in ("dense", "int8", "fp8", "trellis") and exact in dtypes and (kind != "dense" or encoded in dtypes)


def _encoded_dtype(paged: Paged) -> torch.dtype | None:
    return paged.encoded["k"].dtype if paged.kind == "dense" else None


def decode_reference(
    query: Tensor, own_key: Tensor, own_value: Tensor, index: Tensor, paged: Paged, *, scale: float,
) -> Tensor:
    """The naive twin: gathers every page of every row, padded to the widest, in fp32 (fp64 for fp64 queries)."""
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    sides = []
    for part, own in (("k", own_key), ("v", own_value)):
        pages = paged.encoded_table[index].long()
        encoded = _decoded(paged, part, pages, work).flatten(1, 2)
        exact = paged.opened[part][paged.open_table[index].long()].to(work).flatten(1, 2)
        sides.append(torch.cat([encoded, exact, own[:, None].to(work)], dim=1))
    entries = paged.page * paged.encoded_table.shape[1]
    place = torch.arange(sides[0].shape[1], device=query.device)
    seen = (place < (paged.encoded_count[index] * paged.page)[:, None]) & (place < entries)
    seen = seen | ((place >= entries) & (place - entries < paged.exact_count[index][:, None]))
    seen[:, -1] = True
    scores = (query.to(work) @ sides[0].transpose(-1, -2)) * scale
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    return (weights @ sides[1].masked_fill(~seen[..., None], 0.0)).to(query.dtype)


def _decoded(paged: Paged, part: str, pages: Tensor, work: torch.dtype) -> Tensor:
    if paged.kind == "dense":
        return paged.encoded[part][pages].to(work)
    if paged.kind == "gear":
        return _gear_page(_fields(paged, part, pages), paged.gear, part, work)
    if paged.kind == "trellis":
        return _trellis_page(_fields(paged, part, pages), paged.gear, part, work)
    if paged.kind == "int8":
        codes = paged.encoded[f"{part}_codes"][pages].to(work)
    else:
        codes = paged.encoded[f"{part}_numbers"][pages].view(torch.float8_e4m3fn).to(work)
    return codes * paged.encoded[f"{part}_scale"][pages].to(work)[..., None]


def _fields(paged: Paged, part: str, pages: Tensor) -> dict[str, Tensor]:
    return {name[2:]: field[pages] for name, field in paged.encoded.items() if name[0] == part}


def _unpacked(packed: Tensor, start: int, total: int, bits: int) -> tuple[Tensor, int]:
    """``total`` codes from byte ``start`` on, int32, and the byte behind them."""
    index = torch.arange(total, device=packed.device)
    codes, shift = 0, 0
    for width in PLANES[bits]:
        stretch = -(-total * width // 8)
        plane = packed[..., start + index % stretch].int() >> (index // stretch * width)
        codes = codes + ((plane & ((1 << width) - 1)) << shift)
        start, shift = start + stretch, shift + width
    return codes, start


def _gear_page(fields: dict[str, Tensor], gear: Gear, part: str, work: torch.dtype) -> Tensor:
    """``[..., P, D]``: backbone, outliers and low-rank part added up."""
    total, (groups, size) = gear.page * gear.head_size, gear.groups(part)
    index = torch.arange(total, device=fields["codes"].device)
    codes, _ = _unpacked(fields["codes"], 0, total, gear.bits)
    vectors, length = (gear.head_size, gear.page) if gear.channel(part) else (gear.page, gear.head_size)
    at = index // length * groups + index % length // size
    x = codes.to(work) * fields["scale"].to(work)[..., at] + fields["zero"].to(work)[..., at]
    x = x.unflatten(-1, (vectors, length))
    x = x.transpose(-1, -2) if gear.channel(part) else x  # [..., P, D]
    if "outliers" in fields:
        side = x.transpose(-1, -2).clone() if part == "k" else x.clone()
        side.scatter_add_(-1, fields["places"].long(), fields["outliers"].to(work))
        x = side.transpose(-1, -2) if part == "k" else side
    if "left" in fields:
        x = x + fields["left"].to(work) @ fields["right"].to(work).transpose(-1, -2)
    return x


def _trellis_page(fields: dict[str, Tensor], layout: Trellis, part: str, work: torch.dtype) -> Tensor:
    """``[..., P, D]``: levels, found by the path that each code's lowest bit is part of, scaled, shifted, rotated back."""
    codes, start = [], 0
    for count, bits in layout.stretches(part):
        some, start = _unpacked(fields["codes"], start, layout.page * count, bits)
        codes.append(some.unflatten(-1, (layout.page, count)))
    code = torch.cat(codes, dim=-1)
    once, twice = (torch.nn.functional.pad(code, (by, 0))[..., : layout.head_size] & 1 for by in (1, 2))
    index = 2 * ((code & 1) ^ twice) + once + 2 * (code & ~1)
    counts, widths = zip(*layout.stretches(part), strict=True)
    levels = [layout.levels[bits].to(work)[some] for bits, some in zip(widths, index.split(counts, -1), strict=True)]
    scale = torch.exp2(fields["scale"].to(work) / -SCALE_STEPS) * fields["top"].to(work)
    x = torch.cat(levels, dim=-1) * scale.masked_fill(fields["scale"] == NO_SCALE, 0.0)[..., None]
    if "mean" in fields:
        x = x + (fields["mean"].to(work) * fields["unit"].to(work))[..., None, :]
    return x @ layout.rotation.to(work).T
