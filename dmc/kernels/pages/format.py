"""`PageFormat`: a codec's description of its encoded pages, with the operations that read and write them.

A folder of `dmc.kernels.formats` has a subclass of `PageFormat` next to its kernels. Dispatchers use the methods of the format
and never its name, so a format can also be defined outside of this package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Field = tuple[torch.dtype, tuple[int, ...]]
"""dtype and shape of a field of one page."""

Read = tuple[Sequence[torch.dtype], tuple[int, ...] | None]
"""dtypes of a field that kernels read, and its shape in one page; None: any shape."""


def check_fields(name: str, fields: Mapping[str, Field], read: Mapping[str, Read]) -> None:
    """Checks that pages are stored as kernels read them. Kernels get addresses: other dtypes would give wrong numbers silently.

    Args:
        name: of the format.
        fields: of a page, as the codec stores them.
        read: what the kernels read, by field name.

    Raises:
        ValueError: for a field that is missing, that the kernels do not read, or that has another dtype or shape.
    """
    rest = "without make_page_format in the codec, PyTorch reads the pages"
    for field in fields:
        if field not in read:
            raise ValueError(f"{name} pages: the kernels do not read the field {field}; {rest}")
    for field, (dtypes, shape) in read.items():
        stored = fields.get(field)
        if stored is None or stored[0] not in dtypes or shape is not None and tuple(stored[1]) != shape:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            wanted += "" if shape is None else f" {list(shape)}"
            found = "does not store it" if stored is None else f"stores {str(stored[0])[6:]} {list(stored[1])}"
            raise ValueError(f"{name} pages: the kernels read {field} as {wanted}, and the codec {found}; {rest}")


@dataclass(frozen=True)
class CpuReader:
    """Two functions, compiled by `dmc.kernels.cpu.callback.callback`, with which the CPU kernels read the pages of a format.

    Both get addresses: of the page, ``facts``, ``constants``, their input, and scratch memory of one thread. The keys' function
    writes scores ``[G, P]`` of queries ``[G, D]``; the values' function adds to sums ``[G, D]``, by weights ``[G, P]`` that
    it may overwrite. All numbers are fp32.

    Attributes:
        keys, values: the functions.
        facts: int64, their parameters: sizes, and offsets of fields in a page.
        constants: fp32, for example the levels of codes.
        room: bytes of scratch memory.
    """

    keys: Any
    values: Any
    facts: np.ndarray
    constants: np.ndarray
    room: int


@dataclass(frozen=True, eq=False)
class PageFormat:
    """Storage of the encoded pages of one codec, page size and head size, with the kernels that read and write them.

    This class has no kernels: its pages are gathered, and the codec reads them. A subclass that sets `cpu_reads`, `triton_reads`
    or `triton_writes` implements the methods named there. Each of them is tested against `reference`.

    Attributes:
        name: of the format, for messages.
        page: entries of a page, P.
        head_size: D.
        fields: name → (dtype, shape of one page's part). Names begin with the side: "k" for keys, "v" for values.
        encode: full-precision keys and values ``[n, P, D]`` → fields of n pages; writing kernels must give the same.
    """

    name: str
    page: int
    head_size: int
    fields: Mapping[str, Field]
    encode: Callable[[Tensor, Tensor], dict[str, Tensor]]

    def side(self, fields: Mapping[str, Any], part: str) -> dict[str, Any]:
        """The fields of keys ("k") or values ("v"), named without the side."""
        return {name[2:]: field for name, field in fields.items() if name[:2] == f"{part}_"}

    @property
    def rotation(self) -> Tensor | None:
        """R, fp32 ``[D, D]``, if kernels read entries as ``x R``: queries are rotated first, sums of values rotated back."""
        return None

    def reference(self, fields: dict[str, Tensor], part: str, work: torch.dtype) -> Tensor:
        """The reference implementation: fields of pages ``[..., shape]`` → keys ("k") or values ("v") ``[..., P, D]``."""
        raise ValueError(f"{self.name} pages have no kernels: the codec reads them")

    @property
    def cpu_reads(self) -> bool:
        """True if the format has a `cpu_reader`."""
        return False

    def cpu_reader(self, offsets: Mapping[str, int]) -> CpuReader:
        """The functions that the CPU kernels call for each page.

        Args:
            offsets: bytes from the beginning of a page to each field.
        """
        raise ValueError(f"the CPU kernels do not read {self.name} pages of {self.page} entries; choose kernels=torch")

    @property
    def triton_reads(self) -> bool:
        """True if the format has `triton_read`."""
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
        """True if `triton_read` adds ``shifts`` of its arguments, fp32 ``[R, G, shifts_per_query]``, to the products of queries
        and encoded keys before these are scaled; both exist only with a bias of keys (`dmc.kernels.decode.key_bias_gpu`)."""
        return False

    @property
    def triton_scales(self) -> bool:
        """True if `triton_read` also reads full-precision entries that are codes.

        Their scales ``full_key_scale`` and ``full_value_scale`` and the distance ``fsp`` from page to page are then among
        its arguments, and ``FULL_SCALED`` among its constants, as `dmc.kernels.pages.segments.full_segment` takes them. All four
        exist only with such entries. If False, PyTorch gathers them.
        """
        return False

    @property
    def triton_writes(self) -> bool:
        """True if the format has `triton_write`."""
        return False

    def triton_write(self, table: dict, full_precision: dict, state: Any) -> None:
        """Launches the Triton kernel that encodes pages of full rows (`dmc.kernels.encode.gpu.encode`).

        Args:
            table, full_precision: arguments of the kernel: the table of encoded pages, and the full-precision entries.
            state: `dmc.kernels.pages.paged.Growing`, the rows.
        """
        raise ValueError(f"the Triton kernels do not write {self.name} pages; choose kernels=torch")
