"""The relaxed decisions of a layer, from their logits: noise, alpha, log(1 - alpha), omega and the kept share, in one pass.

Each is a few numbers per token, and PyTorch takes about eighty operations per layer for them. `soft_reference` is the
reference implementation, `dmc.kernels.decisions.gpu` has the kernels, and `soft_decisions` chooses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dmc import functional as fn
from dmc.kernels.backend import choose
from dmc.kernels.decisions import noise


@dataclass(frozen=True)
class Drawn:
    """Coordinates of the noise, see `dmc.kernels.decisions.noise.logistic`.

    Attributes:
        seed, step, layer: of the run, counted from 0.
        samples: int64 ``[B]``.
        first_head: global index of the first of the key/value heads.
        tokens: int64 ``[T]``, positions.
    """

    seed: int
    step: int
    layer: int
    samples: Tensor
    first_head: int
    tokens: Tensor


@dataclass(frozen=True)
class Decisions:
    """Decisions about tokens, ``[B, H, T]`` fp32 each.

    Attributes:
        alpha: of eq. 8; 0 where a token is kept for any logit.
        log_keep: ``log(1 - alpha)`` computed from the logits, accurate where 1 - alpha would round to 0.
        omega: importance; None without logits of it.
        soft_kept, hard_kept: ``[H]``, sums of ``1 - alpha`` and of tokens that hard decisions keep; without gradients.
    """

    alpha: Tensor
    log_keep: Tensor
    omega: Tensor | None
    soft_kept: Tensor
    hard_kept: Tensor


def soft_decisions(
    logits: Tensor, weights: Tensor | None, kept: Tensor, drawn: Drawn, *, offset: float, temperature: float,
    backend: str | None = None,
) -> Decisions:
    """`dmc.functional.sample_alpha`, `sample_log_keep` and `importance` of one draw; differentiable in both logits.

    Args:
        logits: of alpha, fp32 ``[B, H, T]``.
        weights: logits of omega, as logits; None: no omega.
        kept: bool ``[B, 1, T]``, tokens without a decision.
        drawn: the noise.
        offset, temperature: see `dmc.functional.sample_alpha`.
        backend: see `dmc.kernels.backend`; every other name runs the reference implementation.
    """
    if choose(logits.new_empty(0, 2), backend) == "triton":
        from dmc.kernels.decisions.gpu import Soft

        found = Soft.apply(logits, weights, kept, drawn, offset, temperature)
        return Decisions(*found[:3], *found[3].sum(-1).unbind())
    return soft_reference(logits, weights, kept, drawn, offset=offset, temperature=temperature)


def soft_reference(
    logits: Tensor, weights: Tensor | None, kept: Tensor, drawn: Drawn, *, offset: float, temperature: float,
) -> Decisions:
    """The reference implementation of `soft_decisions`."""
    heads = torch.arange(logits.shape[1], device=logits.device) + drawn.first_head
    sample = noise.logistic(drawn.seed, drawn.step, drawn.layer, samples=drawn.samples, heads=heads, tokens=drawn.tokens)
    options = dict(offset=offset, temperature=temperature, noise=sample)
    alpha = fn.sample_alpha(logits, **options).masked_fill(kept, 0.0)
    hard = fn.round_alpha(logits, offset=offset).masked_fill(kept, 0.0)
    omega = None if weights is None else fn.importance(weights, offset=offset)
    return Decisions(
        alpha, fn.sample_log_keep(logits, **options), omega, (1 - alpha.detach()).sum((0, 2)), (1 - hard.detach()).sum((0, 2)),
    )
