"""Quantiles of the scores of a model that evicts by them.

What is evicted in one layer changes the hidden states of the next ones, and with them the scores: a threshold that keeps a
quarter of the tokens of the full model keeps more of them once it is in use. So the share that a threshold drops is
measured with eviction on, and the quantiles are those of the measured shares.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dmc.evaluation.blocks import attend_in_blocks
from dmc.fitted import FittedDecisions, interpolate, levels
from dmc.functional import rotate
from dmc.model import Decoder

LEVELS = (0.3, 0.5, 0.65, 0.75, 0.85, 0.92, 0.97)  # dropped shares of the full model's scores at which the real ones are measured
MEASURED = 4  # sequences on which they are measured


class NotFiniteError(ValueError):
    """A forward pass gave NaN or infinity."""


@torch.no_grad()
def dropped_share(
    model: Decoder,
    fitted: FittedDecisions,
    tokens: Tensor,
    threshold: float,
    *,
    block: int,
    tick: Callable[[], None] = lambda: None,
    see: Callable[[Tensor], object] | None = None,
) -> float:
    """Share of the tokens outside sinks and window that eviction at a threshold drops, over all layers and heads.

    Args:
        tokens: int64 ``[N, T]``, sequences.
        threshold: smallest score that is kept.
        block: queries whose attention is computed together.
        tick: called after each sequence.
        see: called with the scores outside sinks and window of each sequence and layer, ``[n]``.

    Raises:
        NotFiniteError: if a forward pass gives NaN or infinity.
    """
    dropped = free = 0
    rope = model.rope(torch.arange(tokens.shape[1], device=model.device))
    for row in tokens:
        x = model.embedding[row.to(model.device)]
        for index in range(len(model.layers)):
            scores = fitted.scores(index, model.normed(x, index)).T
            gone, inside = scores < threshold, scores.isfinite()
            dropped, free = dropped + int(gone.sum()), free + int(inside.sum())
            if see is not None:
                see(scores[inside].cpu())

            def attend(_: int, query: Tensor, key: Tensor, value: Tensor, *__: Tensor, gone: Tensor = gone) -> Tensor:
                query, key, value = (part.float().transpose(0, 1) for part in (query, key, value))
                query = rotate(query, rope).unflatten(0, (len(key), -1))
                out = attend_in_blocks(query, rotate(key, rope), value, block=block, gone=gone, window=fitted.window)
                return out.flatten(0, 1).transpose(0, 1).to(model.dtype)

            x = model.block(x, index, attend)
        if not x.isfinite().all():
            raise NotFiniteError("the model gives NaN or infinity with evicted tokens: check its weights, or use fp32")
        tick()
    return dropped / free


def with_eviction(quantiles: Tensor, measured: list[float]) -> Tensor:
    """Quantiles of measured shares.

    Args:
        quantiles: fp32 ``[Q]``, of the full model's scores.
        measured: share that is dropped at the quantile of each of `LEVELS`.

    Returns:
        fp32 ``[Q]``: at each level the score at which that share is dropped, linear between the measured ones.
    """
    points = torch.tensor([0.0, *measured, 1.0], dtype=torch.float64).cummax(0).values
    points = points + torch.arange(len(points)) * 1e-12  # rising, so that the inverse is defined
    full = torch.tensor([0.0, *LEVELS, 1.0], dtype=torch.float64)
    wanted = levels(len(quantiles))
    upper = torch.searchsorted(points, wanted).clamp(1, len(points) - 1)
    weight = ((wanted - points[upper - 1]) / (points[upper] - points[upper - 1])).clamp(0, 1)
    at = torch.lerp(full[upper - 1], full[upper], weight)
    return torch.tensor([interpolate(float(level), quantiles) for level in at]).cummax(0).values
