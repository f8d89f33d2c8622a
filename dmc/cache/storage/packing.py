"""Layout of a layer's encoded pages; layers may have different codecs.

All pages of the pool have the same size, so any free page serves any layer. The size is what the average layer needs for
the codec's own number of entries, or the number that the user gave; each layer then stores as many entries per page as fit.
If all layers have equal storage, that is the requested number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dmc.cache.codecs import Codec
from dmc.cache.storage.pages import Layout
from dmc.kernels.pages.format import PageFormat


@dataclass(frozen=True)
class Storage:
    """Settings common to all rows; see `dmc.cache.storage.rows`.

    Attributes:
        sink_tokens: s.
        window: w.
        exact_dtype: of full-precision entries; torch.int8: codes with a scale (`dmc.cache.storage.full`).
        with_positions: whether entries carry their position, an int32.
        scored: whether entries carry a score, an fp32.
        evicted_slots: whether entries can be evicted from encoded pages; their slots then hold position -1.
        ring: newest tokens that stay as they are (`dmc.cache.reading.late`); None: a token enters the accumulating entry at once.
        noted: numbers stored with each token of the ring: its logit, and if tokens merge its weight.
        most: largest number of entries of a row behind the ring, the accumulating one included; None: no bound.
    """

    sink_tokens: int
    window: int
    exact_dtype: torch.dtype
    with_positions: bool = False
    scored: bool = False
    evicted_slots: bool = False
    ring: int | None = None
    noted: int = 1
    most: int | None = None

    @property
    def first(self) -> int:
        """Full-precision entries of a row that are never encoded: ring, accumulating entry behind it, and sinks."""
        return self.sink_tokens + (0 if self.ring is None else self.ring + 1)

    @property
    def metadata(self) -> dict[str, torch.dtype]:
        """Per-entry metadata: what is stored with each entry in addition to key and value."""
        known = (("position", torch.int32, self.with_positions), ("score", torch.float32, self.scored))
        return {name: dtype for name, dtype, there in known if there}

    @property
    def scale_dtype(self) -> torch.dtype | None:
        """Dtype of the scales of full-precision entries: bf16, which has the range of fp32; None: the entries are floats."""
        return None if self.exact_dtype.is_floating_point else torch.bfloat16

    def entry_bytes(self, head_size: int) -> int:
        """Bytes of a full-precision entry."""
        scale = 0 if self.scale_dtype is None else self.scale_dtype.itemsize
        return 2 * (head_size * self.exact_dtype.itemsize + scale) + sum(kind.itemsize for kind in self.metadata.values())


class Packing:
    """The encoded pages of some layers.

    Args:
        codec: of these layers.
        page_size: P, entries of each.
        head_size: D.
        storage: see `Storage`.

    Attributes:
        entry_dtype: of the entries that are encoded.
        layout: of a page.
        fields: those of the codec; a page also holds the metadata, ``e_...``.
    """

    def __init__(self, codec: Codec, page_size: int, head_size: int, storage: Storage) -> None:
        self.codec, self.page_size = codec, page_size
        self.entry_dtype = torch.float32 if storage.scale_dtype is not None else storage.exact_dtype
        fields = codec.layout(page_size, head_size, self.entry_dtype)
        self.head_size, self.fields = head_size, frozenset(fields)
        self.layout = Layout(fields | {f"e_{name}": (kind, (page_size,)) for name, kind in storage.metadata.items()})

    def format(self, device: torch.device) -> PageFormat:
        """See `Codec.page_format`."""
        return self.codec.page_format(self.page_size, self.head_size, self.entry_dtype, device)


def packings(codecs: Sequence[Codec], page_size: int | None, head_size: int, storage: Storage) -> tuple[tuple[Packing, ...], int]:
    """The layout of each layer's pages, and the bytes of a page; see the head of this file.

    Args:
        codecs: of each layer; one object for layers with equal storage.
        page_size: entries of the average layer's page; None: each codec's own.
        head_size: D.
        storage: see `Storage`.
    """
    asked = {id(codec): Packing(codec, page_size or codec.page_size, head_size, storage) for codec in codecs}
    least = -(-storage.entry_bytes(head_size) // 8) * 8
    mean = sum(asked[id(codec)].layout.nbytes for codec in codecs) // len(codecs)
    page_bytes = max(least, -(-mean // 8) * 8)
    if len(asked) > 1:
        page_bytes = max(page_bytes, *(Packing(codec, 1, head_size, storage).layout.nbytes for codec in codecs))
        asked = {key: _filled(packing, page_bytes, head_size, storage) for key, packing in asked.items()}
    return tuple(asked[id(codec)] for codec in codecs), page_bytes


def _filled(packing: Packing, page_bytes: int, head_size: int, storage: Storage) -> Packing:
    """The layout with the most entries that fit into a page."""
    low, high = 1, 2 * max(1, packing.page_size * page_bytes // packing.layout.nbytes)
    while low < high:  # low fits
        middle = (low + high + 1) // 2
        fits = Packing(packing.codec, middle, head_size, storage).layout.nbytes <= page_bytes
        low, high = (middle, high) if fits else (low, middle - 1)
    return Packing(packing.codec, low, head_size, storage)
