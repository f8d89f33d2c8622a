"""Online SVD: each page of a head as the product of two thin factors, found when the page fills."""

from __future__ import annotations

import torch
from torch import Tensor

from dmc.cache.codecs.base import Blocks, Codec

_STORED = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
_CODES = 127


class SvdCodec(Codec):
    """``X ≈ A diag(s) Bᵀ``: the truncated SVD of keys and of values, the best approximation of rank r in least squares.

    Only the factors are stored, never a product: A ``[N, r]`` and B ``[D, r]``, each column scaled to a largest value
    of 1, and s in fp32. Bits per element: ``r (1/N + 1/D) b + 32 r / (N D)`` with b bits per number of the factors.

    Args:
        rank: r, at most min(N, D): a larger one is reduced to that.
        factors: "bf16", "fp16", "fp32" or "int8" (127 steps per column): how the factors are stored.

    Raises:
        ValueError: if a setting is out of range.
    """

    name = "svd"
    lossy = True
    page_size = 64

    def __init__(self, rank: int = 16, *, factors: str = "bf16") -> None:
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"svd codec: rank must be a whole number of at least 1, got {rank!r}")
        if factors not in _STORED:
            raise ValueError(f"svd codec: factors must be one of {', '.join(_STORED)}, got {factors!r}")
        self.rank, self.factors = rank, factors

    def encode(self, keys: Tensor, values: Tensor) -> Blocks:
        """See `Codec.encode`; the SVD is taken in fp64."""
        tensors = {}
        for part, x in (("k", keys), ("v", values)):
            left, scale, right = torch.linalg.svd(x.double(), full_matrices=False)
            rank = min(self.rank, scale.shape[-1])
            left, scale, right = left[..., :rank], scale[..., :rank], right[..., :rank, :].transpose(-1, -2)
            for name, factor in (("left", left), ("right", right)):
                most = factor.abs().amax(-2)
                tensors[f"{part}_{name}"] = self._stored(factor / torch.where(most > 0, most, 1.0)[..., None, :])
                scale = scale * most
            tensors[f"{part}_scale"] = scale.float()
        return Blocks(tensors, *keys.shape[-2:])

    def decode(self, blocks: Blocks) -> tuple[Tensor, Tensor]:
        """See `Codec.decode`; attention does not use it."""
        (k_left, k_right), (v_left, v_right) = (self._factors(blocks, part, torch.float32) for part in "kv")
        return k_left @ k_right.transpose(-1, -2), v_left @ v_right.transpose(-1, -2)

    def scores(self, blocks: Blocks, query: Tensor) -> Tensor:
        """See `Codec.scores`: ``(q B) Aᵀ``."""
        left, right = self._factors(blocks, "k", query.dtype)
        return (query @ right) @ left.transpose(-1, -2)

    def combine(self, blocks: Blocks, weights: Tensor) -> Tensor:
        """See `Codec.combine`: ``(w A) Bᵀ``."""
        left, right = self._factors(blocks, "v", weights.dtype)
        return (weights @ left) @ right.transpose(-1, -2)

    def _stored(self, factor: Tensor) -> Tensor:
        kind = _STORED[self.factors]
        return (factor * _CODES).round().to(kind) if kind == torch.int8 else factor.to(kind)

    def _factors(self, blocks: Blocks, part: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A diag(s) ``[..., N, r]`` and B ``[..., D, r]``."""
        left, right = (blocks.tensors[f"{part}_{name}"].to(dtype) for name in ("left", "right"))
        scale = blocks.tensors[f"{part}_scale"].to(dtype)
        if self.factors == "int8":
            scale = scale / _CODES**2
        return left * scale[..., None, :], right
