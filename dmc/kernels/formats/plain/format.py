"""Dense, int8 and fp8 pages: one number per value, and in int8 and fp8 a scale per entry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dmc.kernels.pages.format import CpuReader, PageFormat, check_fields
from dmc.kernels.pages.paged import Growing, Paged

MAIN = {"dense": "{}", "int8": "{}_codes", "fp8": "{}_numbers"}
"""Name → the field of a side that holds its values: any float dtype; int8; uint8 that holds E4M3 numbers."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_READ = {"dense": _FLOATS, "int8": (torch.int8,), "fp8": (torch.uint8,)}


@dataclass(frozen=True, eq=False)
class PlainFormat(PageFormat):
    """See the head of this file.

    Fields: keys and values ``[P, D]`` as `MAIN` names them, and ``k_scale``, ``v_scale`` bf16 ``[P]`` of int8 and fp8.

    Raises:
        ValueError: if ``name`` is not in `MAIN`, or if ``fields`` are others.
    """

    def __post_init__(self) -> None:  # noqa: D105
        if self.name not in MAIN:
            raise ValueError(f"plain pages are {', '.join(MAIN)}, not {self.name!r}")
        dtypes = _READ[self.name]
        if self.name == "dense" and self.fields.get("k", (None,))[0] in dtypes:
            dtypes = (self.fields["k"][0],)  # values are read as keys are
        read = {self.main(part): (dtypes, (self.page, self.head_size)) for part in "kv"}
        if self.scaled:
            read |= {f"{part}_scale": ((torch.bfloat16,), (self.page,)) for part in "kv"}
        check_fields(self.name, self.fields, read)

    @property
    def scaled(self) -> bool:
        """True if entries have a scale."""
        return self.name != "dense"

    def main(self, part: str) -> str:
        """Name of the field with the numbers of a side."""
        return MAIN[self.name].format(part)

    def reference(self, fields: dict[str, Tensor], part: str, work: torch.dtype) -> Tensor:
        """See `PageFormat.reference`."""
        numbers = fields[self.main(part)]
        numbers = numbers.view(torch.float8_e4m3fn) if self.name == "fp8" else numbers
        return numbers.to(work) * fields[f"{part}_scale"].to(work)[..., None] if self.scaled else numbers.to(work)

    @property
    def cpu_reads(self) -> bool:
        """True if the CPU kernels read these pages: int8, fp8, and dense ones in fp32 and bf16."""
        return self.scaled or self.fields["k"][0] in (torch.float32, torch.bfloat16)

    def cpu_reader(self, offsets: Mapping[str, int]) -> CpuReader:
        """See `PageFormat.cpu_reader`."""
        from dmc.kernels.formats.plain import loop

        stored = {"dense": loop.FULL, "int8": loop.INT8, "fp8": loop.FP8}[self.name]
        if self.name == "dense" and self.fields["k"][0] == torch.bfloat16:
            stored = loop.HALF
        begins = [(offsets[self.main(part)], offsets.get(f"{part}_scale", 0)) for part in "kv"]
        facts = np.array([stored, self.page, self.head_size, *begins[0], *begins[1]], np.int64)
        return CpuReader(loop.keys, loop.values, facts, np.zeros(1, np.float32), 4 * self.page * self.head_size)

    @property
    def triton_reads(self) -> bool:
        """True for any number of entries."""
        return True

    def triton_read(self, grid: tuple[int, int], arguments: dict, paged: Paged, constants: dict) -> None:
        """See `PageFormat.triton_read`."""
        from dmc.kernels.formats.plain.decode import launch

        launch(grid, arguments, paged, constants)

    @property
    def triton_scales(self) -> bool:
        """True: see `PageFormat.triton_scales`."""
        return True

    @property
    def triton_adds(self) -> bool:
        """True: see `PageFormat.triton_adds`."""
        return True

    @property
    def triton_writes(self) -> bool:
        """True for any number of entries."""
        return True

    def triton_write(self, table: dict, full_precision: dict, state: Growing) -> None:
        """See `PageFormat.triton_write`."""
        from dmc.kernels.formats.plain.encode import launch

        launch(table, full_precision, state)
