"""The bias of a model's key projection, which encoded pages do not contain.

Some models (Qwen2) add a bias b to keys before RoPE that is many times longer than the token's own part. The quantisation
steps of a codec would grow with b. A mean of keys ``W x + b`` is the mean m of ``W x``, plus b, so an entry at position p, merged
or not, is ``R(p) m + R(p) b``: pages store the first part, and the second is added when they are read.

Scores need no reconstructed keys: ``q · R(p) b`` is the product of two vectors of D numbers, one of the query
(`KeyBias.coefficients`) and one of the position (`KeyBias.features`):

    sum over i < D/2 of  (q_i b_i + q_j b_j) cos(p f_i) + (q_j b_i - q_i b_j) sin(p f_i),    j = i + D/2
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmc.functional import rotate
from dmc.rope import Rope


class KeyBias:
    """Biases of all key/value heads of all layers, and their RoPE.

    Args:
        bias: ``[L, H, D]``, before RoPE.
        rope: of the model, in fp32.

    Attributes:
        bias: fp32 ``[L * H, D]``. The head of a page or row is counted over all layers, ``layer * H + head``.
    """

    def __init__(self, bias: Tensor, rope: Rope) -> None:
        self.bias, self._rope = bias.float().flatten(0, 1), rope
        self._features = torch.empty(0, bias.shape[-1], device=bias.device)

    def keys(self, heads: Tensor, positions: Tensor) -> Tensor:
        """The part of keys that the bias adds.

        Args:
            heads: int64 ``[...]``, counted over all layers.
            positions: int ``[..., N]``; below 0 for entries that are not read.

        Returns:
            fp32 ``[..., N, D]``.
        """
        bias = self.bias[heads][..., None, :].expand(*positions.shape, -1)
        return rotate(bias, self._rope(positions.long().clamp(min=0)))

    def scores(self, query: Tensor, heads: Tensor, positions: Tensor) -> Tensor:
        """The part of scores that the bias adds.

        Args:
            query: ``[..., G, D]``, rotated.
            heads: int64 ``[...]``, counted over all layers.
            positions: int ``[..., N]``; below 0 for entries that are not read.

        Returns:
            ``[..., G, N]`` in the query's dtype.
        """
        features = self.features(positions)[positions.long().clamp(min=0)].to(query.dtype)
        return self.coefficients(query, heads) @ features.transpose(-1, -2)

    def coefficients(self, query: Tensor, heads: Tensor) -> Tensor:
        """The query's part of a score: ``[..., G, D]`` and heads ``[...]`` → ``[..., G, D]``; see the head of this file."""
        first, second = query.chunk(2, dim=-1)
        b_first, b_second = self.bias[heads][..., None, :].to(query.dtype).chunk(2, dim=-1)
        return torch.cat([first * b_first + second * b_second, second * b_first - first * b_second], dim=-1)

    def features(self, positions: Tensor | None = None) -> Tensor:
        """The positions' part of a score: fp32 ``[positions, D]``, including ``positions`` and those of earlier calls."""
        highest = -1 if positions is None or not positions.numel() else int(positions.max())
        if highest >= len(self._features):
            length = max(highest + 1, 2 * len(self._features))
            cos, sin = self._rope(self._positions(length))
            half = cos.shape[-1] // 2
            self._features = torch.cat([cos[:, :half], sin[:, :half]], dim=-1).float().contiguous()
        return self._features

    def _positions(self, length: int) -> Tensor:
        limit = self._rope.limit
        return torch.arange(length if limit is None else min(length, limit), device=self.bias.device)
