"""What a codec hands out of its encoded pages: a page format, with the operations that read and write such pages.

A folder of `dmc.kernels.formats` has a subclass of `PageFormat` beside its kernels. Everything that dispatches asks the format
and nobody asks for its name, so a format may also come from outside of this package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Field = tuple[torch.dtype, tuple[int, ...]]
"""dtype and shape of one page's part."""


@dataclass(frozen=True)
class CpuReader:
    """How the CPU kernels read the pages of a format: two functions that `dmc.kernels.cpu.callback.callback` compiled.

    Both get addresses: of the page, ``facts``, ``constants``, their input, and scratch memory of one thread. The keys' function
    writes scores ``[G, P]`` of queries ``[G, D]``; the values' function adds to sums ``[G, D]``, by weights ``[G, P]`` that
    it may overwrite. All numbers are fp32.

    Attributes:
        keys, values: the functions.
        facts: int64, what they need to know: sizes, and where in a page fields begin.
        constants: fp32, for example what codes stand for.
        room: bytes of scratch memory.
    """

    keys: Any
    values: Any
    facts: np.ndarray
    constants: np.ndarray
    room: int


@dataclass(frozen=True, eq=False)
class PageFormat:
    """How the encoded pages of one codec, page size and head size are stored, and what reads and writes them.

    This class has no kernels: its pages are gathered, and the codec reads them. A subclass that sets `cpu_reads`, `triton_reads`
    or `triton_writes` implements what is named there. Every one of these is tested against `reference`.

    Attributes:
        name: of the format, for messages.
        page: entries of a page, P.
        head_size: D.
        fields: name → (dtype, shape of one page's part). Names begin with the side: "k" for keys, "v" for values.
        encode: full-precision keys and values ``[n, P, D]`` → fields of n pages: what the kernels that write must equal.
    """

    name: str
    page: int
    head_size: int
    fields: Mapping[str, Field]
    encode: Callable[[Tensor, Tensor], dict[str, Tensor]]

    def side(self, fields: Mapping[str, Any], part: str) -> dict[str, Any]:
        """Of some fields those of keys ("k") or values ("v"), named without the side."""
        return {name[2:]: field for name, field in fields.items() if name[:2] == f"{part}_"}

    @property
    def rotation(self) -> Tensor | None:
        """R, fp32 ``[D, D]``, if kernels read entries as ``x R``: queries are rotated before, sums of values back after."""
        return None

    def reference(self, fields: dict[str, Tensor], part: str, work: torch.dtype) -> Tensor:
        """The reference implementation: fields of pages ``[..., shape]`` → keys ("k") or values ("v") ``[..., P, D]``."""
        raise ValueError(f"{self.name} pages have no kernels: the codec reads them")

    @property
    def cpu_reads(self) -> bool:
        """Whether `cpu_reader` works."""
        return False

    def cpu_reader(self, offsets: Mapping[str, int]) -> CpuReader:
        """The functions that the CPU kernels call for each page.

        Args:
            offsets: bytes from the beginning of a page to each field.
        """
        raise ValueError(f"the CPU kernels do not read {self.name} pages of {self.page} entries; choose kernels=torch")

    @property
    def triton_reads(self) -> bool:
        """Whether `triton_read` works."""
        return False

    def triton_read(self, grid: tuple[int, int], arguments: dict, paged: Any, constants: dict) -> None:
        """Launches the Triton kernel that attends to segments of rows (`dmc.kernels.decode.gpu.decode`).

        Args:
            grid: programs.
            arguments, constants: of the kernel.
            paged: `dmc.kernels.pages.paged.Paged`, the rows.
        """
        raise ValueError(f"the Triton kernels do not read {self.name} pages of {self.page} entries; choose kernels=torch")

    @property
    def triton_adds(self) -> bool:
        """Whether `triton_read` adds ``shifts`` of its arguments, fp32 ``[R, G, shifts_per_query]``, to the products of queries
        and encoded keys before these are scaled; both are there only with a bias of keys (`dmc.kernels.decode.key_bias_gpu`)."""
        return False

    @property
    def triton_writes(self) -> bool:
        """Whether `triton_write` works."""
        return False

    def triton_write(self, table: dict, full_precision: dict, state: Any) -> None:
        """Launches the Triton kernel that encodes pages of full rows (`dmc.kernels.encode.gpu.encode`).

        Args:
            table, full_precision: arguments of the kernel: the table of encoded pages, and the full-precision entries.
            state: `dmc.kernels.pages.paged.Growing`, the rows.
        """
        raise ValueError(f"the Triton kernels do not write {self.name} pages; choose kernels=torch")
