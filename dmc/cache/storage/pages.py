"""One pool of equal pages for every layer, sequence and head.

A page has one owner, or several if sequences share the pages of a common prompt. It is free again when its last owner
gives it back.

The pool is one byte tensor. A `Layout` describes the content of a page: named fields of fixed shape at fixed
offsets, as strided views of the pool with a leading page dimension. Encoded pages and full-precision pages are two layouts
over the same bytes, so any free page serves either, and the memory is not split in two.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

NULL_PAGE = 0  # never handed out and always zero: unused columns of block tables point to it
_FIRST_PAGES = 64  # of a pool that grows
_ALIGNMENT = 8  # bytes; the widest field type
_LINE = 64  # bytes of a cache line, where the memory of a pool begins


class PoolExhausted(RuntimeError):
    """A pool of fixed size has fewer free pages than requested."""


class Layout:
    """The division of a page's bytes into fields.

    Args:
        fields: name → (dtype, shape of one page's part).
    """

    def __init__(self, fields: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        self.fields = {}  # name → (offset, bytes, dtype, shape)
        offset = 0
        sizes = {name: dtype.itemsize * torch.Size(shape).numel() for name, (dtype, shape) in fields.items()}
        # Sizes with the largest power of two as a factor first: each field is aligned to its dtype, large ones for wide loads.
        for name in sorted(fields, key=lambda name: -(sizes[name] & -sizes[name])):
            self.fields[name] = (offset, sizes[name], *fields[name])
            offset += sizes[name]
        self.nbytes = -(-offset // _ALIGNMENT) * _ALIGNMENT

    def views(self, memory: Tensor) -> dict[str, Tensor]:
        """Fields over all pages: memory uint8 ``[pages, bytes]`` → name → ``[pages, *shape]``, no copy."""
        return {
            name: memory[:, offset : offset + size].view(dtype).unflatten(-1, shape)
            for name, (offset, size, dtype, shape) in self.fields.items()
        }


class PagePool:
    """Hands out pages and takes them back.

    Args:
        page_bytes: size of every page, a multiple of 8.
        limit: largest number of pages, without the null page; None: grows as needed, doubling. With a limit a GPU's memory is
            allocated at once. On a CPU the operating system provides the memory when pages are first used.
        device: of the memory.

    Raises:
        ValueError: if the memory of ``limit`` pages cannot be allocated.
    """

    def __init__(self, page_bytes: int, *, limit: int | None, device: torch.device | str = "cpu") -> None:
        self.page_bytes, self._device = page_bytes, torch.device(device)
        self._counts = torch.zeros(2, dtype=torch.int32, device=device)  # `lend`
        self._lent = False
        self._views: dict[int, tuple[Layout, dict[str, Tensor]]] = {}
        self.kept: dict = {}  # readers' views of the memory (`dmc.cache.reading.onpages`), dropped when it grows
        self._allocate(limit)

    def bound(self, limit: int, memory: Tensor | None = None) -> None:
        """Sets the final size of a pool without taken pages: ``limit`` pages.

        Args:
            limit: number of pages, without the null page.
            memory: uint8 ``[limit + 1, page_bytes]`` that belongs to the caller, contiguous and on the pool's device; None: the
                pool allocates its memory.

        Raises:
            ValueError: if the memory cannot be allocated.
        """
        assert not self.used, "a pool in use cannot be replaced"
        self._views.clear()
        self.kept.clear()
        self._lent = False
        del self.memory, self._stack, self.owners  # freed before the new memory is allocated
        self._allocate(limit, memory)

    def _allocate(self, limit: int | None, memory: Tensor | None = None) -> None:
        self.limit = limit
        capacity = _FIRST_PAGES if limit is None else limit
        try:
            self.memory = _zeros(capacity + 1, self.page_bytes, self._device) if memory is None else memory
            self.memory[NULL_PAGE] = 0
            self._stack = torch.arange(capacity, 0, -1, device=self._device)  # free pages, the next one last
            self.owners = torch.zeros(capacity + 1, dtype=torch.int32, device=self._device)  # of each page; 0: free
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise ValueError(
                f"kv_memory of {capacity * self.page_bytes} bytes cannot be allocated on {self._device}: give less"
            ) from error
        self._free = capacity

    @property
    def capacity(self) -> int:
        """Number of pages, free or not."""
        return self.memory.shape[0] - 1

    @property
    def free(self) -> int:
        """Pages that can be taken without growing. The first read after `lend` waits for the device.

        Raises:
            RuntimeError: if kernels that used the lent pool found too few reserved pages; the KV cache is invalid.
        """
        if self._lent:
            self._free, failed = self._counts.tolist()
            self._lent = False
            if failed:
                raise RuntimeError(f"internal error: page reservation too small (flags {failed}); the KV cache is invalid")
        return self._free

    @property
    def used(self) -> int:
        """Pages in use. Pages that kernels took or gave back are counted when `free` is read next. Any thread may read it."""
        return self.capacity - self._free

    def take(self, count: int) -> Tensor:
        """Hands out pages, with the content that their last owner left: int64 ``[count]``.

        Raises:
            PoolExhausted: if the pool may not grow and has fewer left; nothing is taken then.
        """
        self.reserve(count)
        self._free -= count
        pages = self._stack[self._free : self._free + count].flip(0)
        self.owners[pages] = 1
        return pages

    def reserve(self, count: int) -> None:
        """Grows the pool, if needed, until so many pages are free.

        Raises:
            PoolExhausted: if the pool may not grow and has fewer left.
        """
        if count > self.free:
            if self.limit is not None:
                raise PoolExhausted(f"{count} pages were asked for and {self._free} of {self.limit} are free")
            self._grow(max(count - self._free, self.capacity))

    def lend(self) -> tuple[Tensor, Tensor, Tensor]:
        """The stack of free pages, for kernels that take pages and give them back.

        Returns:
            ``(stack int64 [capacity], free int32 [1], failed int32 [1])``: the free pages come first, the last of them is
            taken next; kernels update the count, and report failures as bits. The count belongs to the kernels until the host
            takes, gives back or counts pages.
        """
        if not self._lent:
            self._counts[0] = self._free
            self._lent = True
        return self._stack, self._counts[:1], self._counts[1:]

    def share(self, pages: Tensor) -> None:
        """Adds one owner to each of some pages in use, distinct: int64 ``[n]``."""
        self.owners[pages] += 1

    def give(self, pages: Tensor) -> None:
        """Removes one owner from each of some pages, int64 ``[n]``, distinct; pages without another owner are free again."""
        start = self.free  # first, since it raises if the pool is invalid
        left = self.owners[pages] - 1
        assert (left >= 0).all(), "a page was given back that nobody owns"
        self.owners[pages] = left
        pages = pages[left == 0]
        end = start + len(pages)
        self._stack[start:end] = pages
        self._free = end

    def free_pages(self) -> Tensor:
        """The pages that are free, int64 ``[free]``, in no order."""
        return self._stack[: self.free].clone()

    def read(self, pages: Tensor) -> Tensor:
        """A copy of whole pages, for `Layout.views`: int ``[n]`` → uint8 ``[n, bytes]``."""
        words = self.memory.view(torch.int64)  # several times faster to gather than single bytes
        return words.index_select(0, pages).view(torch.uint8)

    def views(self, layout: Layout) -> dict[str, Tensor]:
        """`Layout.views` of the pool's memory; valid until pages are taken next."""
        if id(layout) not in self._views:
            self._views[id(layout)] = (layout, layout.views(self.memory))
        return self._views[id(layout)][1]

    def _grow(self, more: int) -> None:
        capacity = self.capacity
        self.memory = torch.cat([self.memory, self.memory.new_zeros(more, self.page_bytes)])
        fresh = torch.arange(capacity + more, capacity, -1, device=self.memory.device)
        self._stack = torch.cat([fresh, self._stack[: self._free], self._stack.new_zeros(capacity - self._free)])
        self._free += more
        self.owners = torch.cat([self.owners, self.owners.new_zeros(more)])
        self._views.clear()
        self.kept.clear()


def _zeros(pages: int, page_bytes: int, device: torch.device) -> Tensor:
    """Zeroed memory: uint8 ``[pages, page_bytes]``. On a CPU it takes RAM only where it is written to (torch.zeros writes it)."""
    if device.type != "cpu":
        return torch.zeros(pages, page_bytes, dtype=torch.uint8, device=device)
    flat = np.zeros(pages * page_bytes + _LINE, dtype=np.uint8)
    start = -flat.ctypes.data % _LINE
    return torch.from_numpy(flat[start : start + pages * page_bytes].reshape(pages, page_bytes))
