"""Eigen Attention (Saxena et al., arXiv 2408.05646): keys and values as coefficients of bases found by calibration.

The bases of keys apply before RoPE, where keys have low rank. The cache passes rotated keys, so the codec rotates each one
back by its entry's position before it computes the coefficients; the page stores the positions (4 bytes per entry).
Attention reconstructs the keys from their coefficients and rotates each to its position. Values are not reconstructed: the
weighted sum of coefficients is multiplied by the basis once per query.

An entry that DMC merged is a mean of unrotated keys, rotated to the entry's position. Rotated back it is in the space of
the basis, so merged entries need no special case.

Bytes per entry and head: ``2 (r_k + r_v) + 4``, and 1 per page for the head's number; with coefficients in 8 bits
``r_k + r_v + 4 + 4``. The bases are parameters of the model, ``2 D (r_k + r_v)`` bytes per head, and not part of the cache.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dmc.cache.codecs.base import POSITION, Blocks, Codec, Field
from dmc.cache.codecs.eigenfile import Bases, read
from dmc.cache.codecs.int8 import round_up
from dmc.functional import rotate
from dmc.rope import Rope

_COEFFICIENTS = ("bf16", "int8")
_CODES = 127


class EigenCodec(Codec):
    """Eigen Attention with the bases of a file of `dmc calibrate`; each layer has its own rank.

    Args:
        file: made by ``dmc calibrate`` from the model that is served; a file of another model is rejected.
        coefficients: "bf16", or "int8" with one bf16 scale for keys and one for values of each entry.

    Raises:
        ValueError: if the file is missing, or was not made by ``dmc calibrate``.
    """

    name = "eigen"
    lossy = True
    needs_positions = True
    page_size = 16

    def __init__(self, file: str | Path | None = None, *, coefficients: str = "bf16") -> None:
        if file is None:
            raise ValueError("eigen codec: it needs file=FILE, which `dmc calibrate DIR --text TEXT --out FILE` makes")
        if coefficients not in _COEFFICIENTS:
            raise ValueError(f"eigen codec: coefficients must be one of {', '.join(_COEFFICIENTS)}, got {coefficients!r}")
        self.file, self.coefficients = str(file), coefficients
        self._read = read(Path(file))
        self.made_for = self._read.model_hash

    def of_layer(self, layer: int, layers: int, heads: int, head_size: int) -> Codec:
        """See `Codec.of_layer`."""
        have = len(self._read.layers), *self._read.layers[0].keys.shape[:2]
        if have != (layers, heads, head_size):
            raise ValueError(
                f"{self.file} is for {have[0]} layers, {have[1]} heads of size {have[2]}, and here are {layers} layers, "
                f"{heads} heads of size {head_size}"
            )
        return EigenLayer(self, self._read.layers[layer], self._read.frequencies, self._read.scaling)

    def encode(self, keys: Tensor, values: Tensor) -> Blocks:
        """Raises ValueError: each layer has its own bases, see `of_layer`."""
        raise ValueError("eigen codec: every layer has bases of its own; take `of_layer`")

    def decode(self, blocks: Blocks) -> tuple[Tensor, Tensor]:
        """Raises ValueError: each layer has its own bases, see `of_layer`."""
        raise ValueError("eigen codec: every layer has bases of its own; take `of_layer`")


class EigenLayer(Codec):
    """`EigenCodec` of one layer.

    Args:
        whole: the codec of all layers.
        bases: of the layer.
        frequencies: fp32 ``[D / 2]``, of RoPE.
        scaling: attention factor of RoPE: rotation multiplies a key by it, and rotating back divides by it.
    """

    name = "eigen"
    lossy = True
    needs_positions = True
    page_size = 16

    def __init__(self, whole: EigenCodec, bases: Bases, frequencies: Tensor, scaling: float) -> None:
        self.coefficients = whole.coefficients
        self._bases = {"k": bases.keys, "v": bases.values}  # [H, D, r]
        self._rope = Rope(frequencies, scaling)

    def layout(self, entries: int, head_size: int, dtype: torch.dtype) -> dict[str, Field]:
        """See `Codec.layout`."""
        blank = torch.zeros(1, entries, head_size, dtype=dtype)
        blocks = self.encode_at(blank, blank, torch.zeros(1, dtype=torch.int64), torch.zeros(1, entries, dtype=torch.int32))
        return {name: (tensor.dtype, tuple(tensor.shape[1:])) for name, tensor in blocks.tensors.items()}

    def encode(self, keys: Tensor, values: Tensor) -> Blocks:
        """Raises ValueError: encoding needs heads and positions, see `encode_at`."""
        raise ValueError("eigen codec: keys are rotated back by their positions; call `encode_at`")

    def encode_at(self, keys: Tensor, values: Tensor, heads: Tensor, positions: Tensor) -> Blocks:
        """See `Codec.encode_at`; arithmetic in fp32."""
        heads = heads % len(self._bases["k"])  # they are counted over all layers
        plain = rotate(keys.float(), self._rope.inverse(_held(positions)))
        tensors = {POSITION: positions.int(), "head": heads[..., None].to(torch.uint8)}
        for part, x in (("k", plain), ("v", values.float())):
            tensors |= {f"{part}_{name}": field for name, field in self._stored(x @ self._basis(part, heads, x)).items()}
        return Blocks(tensors, *keys.shape[-2:])

    def decode(self, blocks: Blocks) -> tuple[Tensor, Tensor]:
        """See `Codec.decode`."""
        heads = blocks.tensors["head"][..., 0].long()
        values = self._read(blocks, "v", torch.float32)
        return self._keys(blocks, torch.float32), values @ self._basis("v", heads, values).transpose(-1, -2)

    def scores(self, blocks: Blocks, query: Tensor) -> Tensor:
        """See `Codec.scores`; keys are reconstructed and rotated to their positions."""
        return query @ self._keys(blocks, query.dtype).transpose(-1, -2)

    def combine(self, blocks: Blocks, weights: Tensor) -> Tensor:
        """See `Codec.combine`: ``(w c) Bᵀ``."""
        heads = blocks.tensors["head"][..., 0].long()
        return (weights @ self._read(blocks, "v", weights.dtype)) @ self._basis("v", heads, weights).transpose(-1, -2)

    def _keys(self, blocks: Blocks, dtype: torch.dtype) -> Tensor:
        heads = blocks.tensors["head"][..., 0].long()
        coefficients = self._read(blocks, "k", dtype)
        plain = coefficients @ self._basis("k", heads, coefficients).transpose(-1, -2)
        return rotate(plain, self._rope(_held(blocks.tensors[POSITION])))

    def _basis(self, part: str, heads: Tensor, like: Tensor) -> Tensor:
        """``[..., D, r]`` of each page's head."""
        return self._bases[part].to(like)[heads]

    def _stored(self, coefficients: Tensor) -> dict[str, Tensor]:
        if self.coefficients == "bf16":
            return {"coefficients": coefficients.bfloat16()}
        scale = round_up(coefficients.abs().amax(-1) / _CODES)
        step = torch.where(scale > 0, scale, 1.0).float()[..., None]
        return {"coefficients": (coefficients / step).round_().clamp_(-_CODES, _CODES).to(torch.int8), "scale": scale}

    def _read(self, blocks: Blocks, part: str, dtype: torch.dtype) -> Tensor:
        coefficients = blocks.tensors[f"{part}_coefficients"].to(dtype)
        if self.coefficients == "bf16":
            return coefficients
        return coefficients * blocks.tensors[f"{part}_scale"].to(dtype)[..., None]


def _held(positions: Tensor) -> Tensor:
    """Positions of entries as indices. Evicted entries have position -1; they get 0, and their result is not used."""
    return positions.long().clamp(min=0)
