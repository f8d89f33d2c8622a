"""Pages of TCQ: rotated, trellis-coded entries, ``x = (levels * scale + mean) Rᵀ`` (docs/kernels.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dmc.kernels.pages.format import CpuReader, PageFormat, check_fields
from dmc.kernels.pages.layout import NO_SCALE, PLANES, SCALE_STEPS, unpacked
from dmc.kernels.pages.paged import Growing, Paged

Chunks = tuple[tuple[int, int], ...]
_CODES, _SCALE, _TOP = ((torch.uint8,), None), ((torch.uint8,), None), ((torch.bfloat16,), (1,))


@dataclass(frozen=True, eq=False)
class TrellisFormat(PageFormat):
    """See the head of this file.

    Fields of a side: codes uint8 (packed), scale uint8 ``[P]`` below top bf16 ``[1]``; with a mean int8 ``[D]`` in units of
    unit bf16 ``[1]``.

    Attributes:
        key, value: ``(values, bits)`` of each chunk of a vector, one or two that add up to D.
        levels: by bits, fp32 ``[2 ** (bits + 1)]``, the levels of codes of so many bits.
        turn: R, fp32 ``[D, D]``.

    Raises:
        ValueError: if ``fields`` have other names or dtypes; the kernels read a mean of the keys alone.
    """

    key: Chunks
    value: Chunks
    levels: dict[int, Tensor]
    turn: Tensor

    def __post_init__(self) -> None:  # noqa: D105
        read = {f"{part}_{name}": one for part in "kv" for name, one in (("codes", _CODES), ("scale", _SCALE), ("top", _TOP))}
        if "k_mean" in self.fields or "k_unit" in self.fields:
            read |= {"k_mean": ((torch.int8,), (self.head_size,)), "k_unit": ((torch.bfloat16,), (1,))}
        check_fields(self.name, self.fields, read)

    def chunks(self, part: str) -> Chunks:
        """Chunks of "k" or "v"."""
        return self.key if part == "k" else self.value

    @property
    def rotation(self) -> Tensor:
        """See `PageFormat.rotation`."""
        return self.turn

    def reference(self, fields: dict[str, Tensor], part: str, work: torch.dtype) -> Tensor:
        """See `PageFormat.reference`: levels, found by the path of the codes' lowest bits, are scaled and rotated back."""
        fields, codes, start = self.side(fields, part), [], 0
        for count, bits in self.chunks(part):
            some, start = unpacked(fields["codes"], start, self.page * count, bits)
            codes.append(some.unflatten(-1, (self.page, count)))
        code = torch.cat(codes, dim=-1)
        once, twice = (torch.nn.functional.pad(code, (by, 0))[..., : self.head_size] & 1 for by in (1, 2))
        index = 2 * ((code & 1) ^ twice) + once + 2 * (code & ~1)
        counts, widths = zip(*self.chunks(part), strict=True)
        levels = [self.levels[bits].to(work)[some] for bits, some in zip(widths, index.split(counts, -1), strict=True)]
        scale = torch.exp2(fields["scale"].to(work) / -SCALE_STEPS) * fields["top"].to(work)
        x = torch.cat(levels, dim=-1) * scale.masked_fill(fields["scale"] == NO_SCALE, 0.0)[..., None]
        if "mean" in fields:
            x = x + (fields["mean"].to(work) * fields["unit"].to(work))[..., None, :]
        return x @ self.turn.to(work).T

    @property
    def cpu_reads(self) -> bool:
        """True for any number of entries."""
        return True

    def cpu_reader(self, offsets: Mapping[str, int]) -> CpuReader:
        """See `PageFormat.cpu_reader`."""
        from dmc.kernels.formats.trellis import read_loop

        table, lines, starts = self.tables()
        sides = [[offsets.get(f"{part}_{name}", -1) for name in read_loop.FIELDS] for part in "kv"]
        facts = np.concatenate([[self.page, self.head_size, len(lines), len(table)], *sides, starts, lines.ravel()])
        room = read_loop.room(self.page, self.head_size)
        return CpuReader(read_loop.keys, read_loop.values, facts.astype(np.int64), table, room)

    def tables(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Levels and layout of the codes.

        Returns:
            table: fp32, the scale of each code of a scale, then the levels.
            lines: int64 ``[l, 6]``, for each plane of each chunk its first value, values, bits, shift in a code, first byte,
                first level.
            line_starts: int64 ``[3]``, of keys' lines, of values' and the end.
        """
        falls = np.exp2(np.arange(256) / -SCALE_STEPS).astype(np.float32)
        falls[NO_SCALE] = 0.0
        tables, lines, line_starts = [falls], [], [0]
        for part in "kv":
            start, first = 0, 0
            for count, bits in self.chunks(part):
                table, shift = sum(len(known) for known in tables), 0
                for width in PLANES[bits]:
                    lines.append((first, count, width, shift, start, table))
                    start, shift = start + -(-self.page * count * width // 8), shift + width
                tables.append(self.levels[bits].numpy())
                first += count
            line_starts.append(len(lines))
        tables.append(np.zeros(16, np.float32))  # the last levels may be read as a whole vector
        return np.concatenate(tables).astype(np.float32), np.array(lines, np.int64), np.array(line_starts, np.int64)

    @property
    def triton_reads(self) -> bool:
        """True if the kernels read these pages: a power of two of at least 16 entries, and codes in whole words."""
        words = not any(count % 4 for part in "kv" for count, _ in self.chunks(part))
        return self.page >= 16 and not self.page & (self.page - 1) and words

    def triton_read(self, grid: tuple[int, int], arguments: dict, paged: Paged, constants: dict) -> None:
        """See `PageFormat.triton_read`."""
        from dmc.kernels.formats.trellis.decode import launch

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
        from dmc.kernels.formats.trellis.encode import launch

        launch(table, full_precision, state)
