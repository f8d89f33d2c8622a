"""Pages of the published GEAR and of KIVI: codes of min/max groups, with optional outliers and low-rank part.

``x = code * scale + zero``, plus the outliers of each vector, plus ``A Bᵀ`` (docs/kernels.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dmc.kernels.pages.format import CpuReader, PageFormat, check_fields
from dmc.kernels.pages.layout import unpacked
from dmc.kernels.pages.paged import Paged

_READ = {
    "codes": (torch.uint8,), "scale": (torch.bfloat16,), "zero": (torch.bfloat16,), "outliers": (torch.bfloat16,),
    "indices": (torch.uint8, torch.int16, torch.int32), "left": (torch.bfloat16,), "right": (torch.bfloat16,),
}
_ALWAYS = ("codes", "scale", "zero")


@dataclass(frozen=True, eq=False)
class MinMaxFormat(PageFormat):
    """See the head of this file.

    Fields of a side: codes uint8 (packed), scale and zero bf16; with outliers ``outliers`` bf16 and ``indices`` uint8, each
    ``[vectors, count]``; with a low rank ``left`` bf16 ``[P, r]`` and ``right`` bf16 ``[D, r]``.

    Attributes:
        bits: 2, 3, 4 or 8, of a code.
        key_channel, value_channel: whether a vector that shares scales is a channel over the entries, or an entry.
        group: largest number of values that share a scale; None: the whole vector.

    Raises:
        ValueError: if ``fields`` have other names or dtypes.
    """

    bits: int
    key_channel: bool
    value_channel: bool
    group: int | None

    def __post_init__(self) -> None:  # noqa: D105
        names = [f"{part}_{name}" for part in "kv" for name in _READ if name in _ALWAYS or f"{part}_{name}" in self.fields]
        check_fields(self.name, self.fields, {name: (_READ[name[2:]], None) for name in names})

    def channel(self, part: str) -> bool:
        """True if the vectors of "k" or "v" are channels."""
        return self.key_channel if part == "k" else self.value_channel

    def groups(self, part: str) -> tuple[int, int]:
        """(groups of a vector, values of a group) for "k" or "v"."""
        length = self.page if self.channel(part) else self.head_size
        count = 1 if self.group is None else -(-length // self.group)
        return count, -(-length // count)

    def count(self, name: str) -> int:
        """Outliers per vector ("k_outliers", "v_outliers") or the rank ("k_left"): the last size of a field, or 0."""
        return self.fields[name][1][-1] if name in self.fields else 0

    def reference(self, fields: dict[str, Tensor], part: str, work: torch.dtype) -> Tensor:
        """See `PageFormat.reference`: base, outliers and low rank added up."""
        fields = self.side(fields, part)
        total, (groups, size) = self.page * self.head_size, self.groups(part)
        index = torch.arange(total, device=fields["codes"].device)
        codes, _ = unpacked(fields["codes"], 0, total, self.bits)
        vectors, length = (self.head_size, self.page) if self.channel(part) else (self.page, self.head_size)
        at = index // length * groups + index % length // size
        x = codes.to(work) * fields["scale"].to(work)[..., at] + fields["zero"].to(work)[..., at]
        x = x.unflatten(-1, (vectors, length))
        x = x.transpose(-1, -2) if self.channel(part) else x  # [..., P, D]
        if "outliers" in fields:
            side = x.transpose(-1, -2).clone() if part == "k" else x.clone()
            side.scatter_add_(-1, fields["indices"].long(), fields["outliers"].to(work))
            x = side.transpose(-1, -2) if part == "k" else side
        if "left" in fields:
            x = x + fields["left"].to(work) @ fields["right"].to(work).transpose(-1, -2)
        return x

    @property
    def cpu_reads(self) -> bool:
        """True if the CPU kernels read these pages: the indices of outliers must be bytes."""
        return all(self.fields[name][0] == torch.uint8 for name in ("k_indices", "v_indices") if name in self.fields)

    def cpu_reader(self, offsets: Mapping[str, int]) -> CpuReader:
        """See `PageFormat.cpu_reader`."""
        from dmc.kernels.formats.minmax import loop

        facts = [self.page, self.head_size, self.bits, self.count("k_left")]
        for part in "kv":
            facts += [self.channel(part), *self.groups(part), self.count(f"{part}_outliers")]
            facts += [offsets.get(f"{part}_{name}", 0) for name in loop.FIELDS]
        scales, outliers = (
            max(math.prod(self.fields[name][1]) for name in names if name in self.fields) if names[0] in self.fields else 0
            for names in (("k_scale", "v_scale"), ("k_outliers", "v_outliers"))
        )
        room = loop.room(self.page, self.head_size, scales, outliers, self.count("k_left"))
        return CpuReader(loop.keys, loop.values, np.array(facts, np.int64), np.zeros(1, np.float32), room)

    @property
    def triton_scales(self) -> bool:
        """True: see `PageFormat.triton_scales`."""
        return True

    @property
    def triton_adds(self) -> bool:
        """True: see `PageFormat.triton_adds`."""
        return True

    @property
    def triton_reads(self) -> bool:
        """True if the kernel reads these pages: the number of entries must be a power of two of at least 16."""
        return self.page >= 16 and not self.page & (self.page - 1)

    def triton_read(self, grid: tuple[int, int], arguments: dict, paged: Paged, constants: dict) -> None:
        """See `PageFormat.triton_read`."""
        from dmc.kernels.formats.minmax.decode import launch

        launch(grid, arguments, paged, constants)
