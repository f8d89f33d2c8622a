"""Chooses the readers of a cache once, when the cache is made, by its device, dtypes, codecs and policy."""

from __future__ import annotations

import torch

from dmc.cache.reading.gathered import Gathered
from dmc.cache.reading.onpages import OnPages
from dmc.cache.reading.pagewise import PageByPage
from dmc.cache.reading.reader import Reader
from dmc.cache.storage.packing import Packing
from dmc.cache.storage.rows import Rows
from dmc.kernels.backend import Backend, choose
from dmc.kernels.cpu.runs import runs_on_cpu
from dmc.kernels.pages.paged import CPU_DTYPES
from dmc.kernels.prefill.prefill import CPU_DTYPES as MODEL_DTYPES
from dmc.kernels.ready import compiles


def choose_readers(rows: Rows, statistics: str | None) -> tuple[Backend, list[Reader]]:
    """The backend, and the reader of each layer. Layers with equal storage share a reader.

    The needed CPU kernels are compiled here, before any request waits for them. If that fails, PyTorch replaces them.

    Args:
        rows: of a new cache.
        statistics: `Policy.statistics`.

    Raises:
        ValueError: if Triton or the CPU kernels are asked for by name and cannot run.
    """
    backend, readers = _choose(rows, statistics)
    return (backend, readers) if _compiled(rows, backend, readers) else _choose(rows, statistics)


def _choose(rows: Rows, statistics: str | None) -> tuple[Backend, list[Reader]]:
    backend = _backend(rows)
    known = {id(packing): _reader(rows, packing, backend, statistics) for packing in rows.packings}
    return backend, [known[id(packing)] for packing in rows.packings]


def _backend(rows: Rows) -> Backend:
    if rows.z.dtype == torch.float64:
        return Backend.TORCH
    return choose(torch.empty(0, rows.shape.head_size, dtype=rows.shape.dtype, device=rows.z.device), cpu=MODEL_DTYPES)


def _reader(rows: Rows, packing: Packing, backend: Backend, statistics: str | None) -> Reader:
    """A reader with kernels if they support the format: Triton in the model's dtype, the CPU kernels in fp32.

    Only the CPU kernels read pages with evicted slots and compute attention statistics. The Triton kernels also write rows,
    except rows whose entries carry metadata (policies that evict, the eigen codec), or whose full-precision entries are codes.
    """
    made, store = packing.format(rows.z.device), rows.storage
    biased = getattr(packing.codec, "key_bias", None) is not None
    if backend is Backend.CPU and made.cpu_reads and store.exact_dtype in CPU_DTYPES:
        return OnPages(packing, backend, statistics=statistics)
    plain = statistics is None and not store.evicted_slots
    coded = store.scale_dtype is not None
    fits = (made.triton_adds or not biased) and (made.triton_scales or not coded)
    if backend is Backend.TRITON and made.triton_reads and plain and fits:
        return OnPages(packing, backend, writes=made.triton_writes and not store.metadata and not coded)
    return Gathered(packing) if plain else PageByPage(packing, statistics)


def _compiled(rows: Rows, backend: Backend, readers: list[Reader]) -> bool:
    """Compiles the CPU kernels; returns False if that fails."""
    if not runs_on_cpu(rows.z.float()):
        return True
    on_pages = [reader for reader in readers if reader.on_pages and backend is Backend.CPU]
    needed = ["decode"] if on_pages else []
    if backend is Backend.CPU and not rows.storage.evicted_slots:  # policies that evict prefill with PyTorch
        needed.append("prefill")
    needed += [name for packing in rows.packings for name in packing.codec.compiles]
    return compiles(*dict.fromkeys(needed), formats={reader.packing.format(rows.z.device) for reader in on_pages})
