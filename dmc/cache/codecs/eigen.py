"""Eigen Attention (Saxena et al., arXiv 2408.05646): keys and values as coefficients of bases found by calibration.

Keys have their basis before RoPE, where they have low rank. The cache hands over rotated keys, so each is turned back
by its entry's place, which the page therefore keeps (4 bytes an entry), and the coefficients are taken of that. At use
keys are formed from their coefficients and rotated, each at its own place; values are never formed: the weighted sum
of coefficients goes through the basis once a query.

An entry that DMC merged is a mean of unrotated keys, rotated at the entry's place: turned back it is in the basis'
space again, so nothing is different with it.

Bytes of an entry of one head: ``2 (r_k + r_v) + 4``, and 1 a page for the head's number; with coefficients in 8 bits
``r_k + r_v + 4 + 4``. The bases themselves are parameters of the model, ``2 D (r_k + r_v)`` bytes a head, not cache.
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
    """Eigen Attention with the bases of a file of `dmc calibrate`; each layer has a rank of its own.

    Args:
        file: made by ``dmc calibrate`` from the model that is served; for another one it is refused.
        coefficients: "bf16", or "int8" with one bf16 scale for keys and one for values of each entry.

    Raises:
        ValueError: if there is no file, or it is no such file.
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
        """Not without a layer: see `of_layer`."""
        raise ValueError("eigen codec: every layer has bases of its own; take `of_layer`")

    def decode(self, blocks: Blocks) -> tuple[Tensor, Tensor]:
        """Not without a layer: see `of_layer`."""
        raise ValueError("eigen codec: every layer has bases of its own; take `of_layer`")


class EigenLayer(Codec):
    """`EigenCodec` of one layer.

    Args:
        whole: what it is a part of.
        bases: of the layer.
        frequencies: fp32 ``[D / 2]``, of RoPE.
        scaling: attention factor of RoPE: a rotated key is longer by it, and is divided by it when it is rotated back.
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
        """Not without heads and places: see `encode_at`."""
        raise ValueError("eigen codec: keys are turned back by their places; take `encode_at`")

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
        """See `Codec.scores`; keys are formed, and rotated at their own places."""
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
    """Positions of entries as indices; an evicted entry's place is -1, and 0 is taken instead, which nobody reads."""
    return positions.long().clamp(min=0)
