"""Decode attention over trellis-coded pages (TCQ), read in registers and not rotated back entry by entry.

The level of a code depends on its own bits and on the lowest bits of the two codes before it (docs/kernels.md). Queries are
rotated first (``q·k = qR·kR``), sums of values are rotated, and `dmc.kernels.decode.gpu.decode` rotates them back at the
end.

`launch` chooses among three kernels: `dmc.kernels.formats.trellis.single` and `dmc.kernels.formats.trellis.grouped` need half of
the instructions and read most pages; `dmc.kernels.formats.trellis.general` reads the rest (6 to 8 bits, long pages, small heads
in groups).
"""

from __future__ import annotations

import torch

from dmc.kernels.formats.trellis import general, grouped, single
from dmc.kernels.pages.paged import Paged


def launch(grid: tuple[int, int], arguments: dict, paged: Paged, constants: dict) -> None:
    """Fills the segments of `dmc.kernels.decode.gpu.decode` for a `dmc.kernels.formats.trellis.format.TrellisFormat`."""
    pages, sides = paged.format, {}
    fields = {name: paged.encoded[name] for name in pages.fields}
    stride = _check(fields, pages)
    for part, upper in (("k", "K"), ("v", "V")):
        (count, bits), *rest = pages.chunks(part)
        sides |= {
            f"{upper}_FIRST": count, f"{upper}_BITS": bits, f"{upper}_REST": rest[0][1] if rest else 0,
            f"{part}_codes": fields[f"{part}_codes"].view(torch.int32),
            f"{part}_levels": pages.levels[bits], f"{part}_rest": pages.levels[rest[0][1]] if rest else pages.levels[bits],
        }
        sides |= {f"{part}_{name}": fields[f"{part}_{name}"] for name in ("scale", "top")}
    sides |= {f"k_{name}": fields.get(f"k_{name}", fields["k_top"]) for name in ("mean", "unit")}
    rotated = (arguments["query"].float() @ pages.rotation).to(arguments["query"].dtype).contiguous()
    shared = dict(
        **arguments, rotated=rotated, **sides, K_MEAN="k_mean" in fields, page8=stride, page16=stride // 2, page32=stride // 4,
        PAGE=pages.page,
    )
    constants = constants | {"GROUPS": max(16, constants["GROUPS"])}
    if single.takes(constants["G"], pages.key + pages.value):
        single.launch(grid, shared, constants)
        return
    if grouped.takes(constants["G"], pages.page, pages.key, pages.value):
        grouped.launch(grid, shared, constants)
        return
    general.launch(grid, shared, constants, pages.key, pages.value)


def _check(fields: dict[str, torch.Tensor], pages) -> int:  # noqa: ANN001
    """Bytes from page to page of the fields.

    Raises:
        ValueError: if the kernel cannot read such pages.
    """
    bytes_of = {x.stride(0) * x.element_size() for x in fields.values()}
    counts = [count for part in "kv" for count, _ in pages.chunks(part)]
    offsets = [fields[f"{part}_codes"].storage_offset() % 4 for part in "kv"]
    if "v_mean" in fields:
        raise ValueError("the kernel takes trellis pages with a mean of the keys alone, not of the values; choose kernels=torch")
    unaligned = any(x % 4 for x in (*bytes_of, *counts, *offsets))
    if len(bytes_of) > 1 or pages.page & (pages.page - 1) or pages.page < 16 or unaligned:
        raise ValueError(
            f"the kernel takes trellis pages of one pool with a power of two of at least 16 entries, and codes in whole "
            f"words, not {pages.page} entries, strides {sorted(bytes_of)} and chunks of {counts} codes; choose kernels=torch"
        )
    return bytes_of.pop()
