"""Entries outside encoded pages: sinks, window and ring. Each is stored on its own, so that it can be read and written alone.

They are floats, or with `Storage.exact_dtype` int8 codes with a scale for each key and each value, ``x ≈ codes * scale``. The
error of a code is at most half of ``max |x| / 127``, far below that of a lossy codec. An entry that is read and written again
stays as it is, so entries can be moved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmc.cache.storage.packing import Storage
from dmc.cache.storage.pages import Layout

_LEVELS = 127


def full_layout(storage: Storage, entries: int, head_size: int) -> Layout:
    """Layout of a page of so many entries: ``k`` and ``v``, of int8 codes also ``k_scale`` and ``v_scale``; and metadata."""
    fields: dict[str, Any] = {part: (storage.exact_dtype, (entries, head_size)) for part in "kv"}
    if storage.scale_dtype is not None:
        fields |= {f"{part}_scale": (storage.scale_dtype, (entries,)) for part in "kv"}
    return Layout(fields | {f"e_{name}": (kind, (entries,)) for name, kind in storage.metadata.items()})


def stored(part: str, x: Tensor, storage: Storage) -> dict[str, Tensor]:
    """Fields of keys (``part`` "k") or values ("v"), ``[..., D]``.

    Scales are rounded to the nearest, and the code of the largest number is 127 also if that clips it by a quarter of a step:
    so the codes of what was read are the same codes.
    """
    if storage.scale_dtype is None:
        return {part: x.to(storage.exact_dtype)}
    x = x.float()
    scale = (x.abs().amax(-1) / _LEVELS).to(storage.scale_dtype)
    step = torch.where(scale > 0, scale, 1.0).float()[..., None]
    return {part: (x / step).round_().clamp_(-_LEVELS, _LEVELS).to(torch.int8), f"{part}_scale": scale}


def read(part: str, fields: dict[str, Tensor], which: Any = ...) -> Tensor:
    """The inverse of `stored`, of some of the entries: a copy, in the stored dtype; of codes fp32."""
    x = fields[part][which]
    return x if x.is_floating_point() else x.float() * fields[f"{part}_scale"][which].float()[..., None]


def rounded(x: Tensor, storage: Storage) -> Tensor:
    """Keys or values ``[..., D]`` as they are read once they are stored."""
    return read("x", stored("x", x, storage))
