"""Entries outside encoded pages: sinks, window and ring. Each is stored on its own, so that it can be read and written alone.

They are floats, or with `Storage.exact_dtype` int8 codes with a scale for each key and each value, ``x ≈ codes * scale``. A
number's error is at most half of ``max |x| / 127``, but for the rounding of the scale: far below that of a lossy codec. An entry
that is read and written again stays as it is, so entries can be moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dmc.cache.codecs import Codec
from dmc.cache.codecs.int8 import LEVELS, codes
from dmc.cache.storage.packing import Storage
from dmc.cache.storage.pages import Layout

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}


def dtype_named(name: str | None, codecs: Sequence[Codec], model: torch.dtype, *, biased: bool) -> torch.dtype:
    """`Storage.exact_dtype` by its name, see ``exact_dtype`` of `dmc.cache.KVCache`.

    Args:
        name: of the dtype; None: the one that fits the codecs and the model.
        codecs: of the layers.
        model: dtype of the model.
        biased: whether its keys have a bias.

    Raises:
        ValueError: if the name is unknown, or int8 does not fit the codecs or the keys.
    """
    if name is not None:
        if name not in _DTYPES:
            raise ValueError(f"exact_dtype must be one of {', '.join(_DTYPES)}, got {name!r}")
        if name == "int8" and not all(codec.lossy for codec in codecs):
            raise ValueError("exact_dtype int8 is for lossy codecs: with codec dense give bf16, or take codec int8")
        if name == "int8" and biased:
            raise ValueError("exact_dtype int8 is not for keys with a bias, which would take most of the 8 bits: give bf16")
        return _DTYPES[name]
    if any(codec.lossy for codec in codecs):
        return torch.bfloat16 if model.itemsize > 2 and not biased else model
    return getattr(codecs[0], "dtype", None) or model


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
    scale = (x.abs().amax(-1) / LEVELS).to(storage.scale_dtype)
    return {part: codes(x, scale), f"{part}_scale": scale}


def read(part: str, fields: dict[str, Tensor], which: Any = ...) -> Tensor:
    """The inverse of `stored`, of some of the entries: a copy, in the stored dtype; of codes fp32."""
    x = fields[part][which]
    return x if x.is_floating_point() else x.float() * fields[f"{part}_scale"][which].float()[..., None]


def rounded(x: Tensor, storage: Storage) -> Tensor:
    """Keys or values ``[..., D]`` as they are read once they are stored."""
    return read("x", stored("x", x, storage))
