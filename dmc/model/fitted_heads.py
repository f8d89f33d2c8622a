"""Fitted decisions (`dmc.fitted`) as a served model computes them: logits of tokens that leave the window."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dmc.fitted import FittedDecisions


@dataclass(frozen=True)
class FittedHeads:
    """Logits, threshold - score, of this process's H key/value heads: above 0 for a token that is dropped or merged.

    Attributes:
        weights: of each layer ``[H, hidden]``, or with a look-ahead ``[2 H, hidden]``: arrival, then late.
        biases: of each layer ``[H]`` or ``[2 H]``.
        heads: H.
    """

    weights: list[Tensor]
    biases: list[Tensor]
    heads: int

    @classmethod
    def of(
        cls,
        fitted: FittedDecisions,
        threshold: float,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        rank: int = 0,
        ranks: int = 1,
    ) -> FittedHeads:
        """Heads of one of several ranks, each with consecutive key/value heads.

        Args:
            fitted: decisions of the whole model.
            threshold: smallest score that is kept; see `FittedDecisions.threshold`.
            dtype: torch.float32, or torch.float64 for an fp64 model; logits are computed in it.
            device: of the weights.
            rank, ranks: which part of how many.
        """
        heads = fitted.arrival.shape[1] // ranks
        own = slice(rank * heads, (rank + 1) * heads)
        weight, bias = -fitted.arrival[:, own].double(), threshold - fitted.bias[:, own].double()
        if fitted.looks_ahead:
            weight = torch.cat([weight, -fitted.late[:, own].double()], dim=1)
            bias = torch.cat([bias, torch.zeros_like(bias)], dim=1)
        place = {"dtype": dtype, "device": device}
        return cls([w.to(**place) for w in weight], [b.to(**place) for b in bias], heads)

    def decide(self, layer: int, x: Tensor) -> tuple[Tensor, ...]:
        """Decisions of N tokens as `dmc.model.decisions.decide` gives them: logits, omega 1 and with a look-ahead the late part,
        ``[N, H]`` each, of the input of the attention projections ``[N, hidden]``."""
        logits, late = self(layer, x)
        return (logits, torch.ones_like(logits)) if late is None else (logits, torch.ones_like(logits), late)

    def __call__(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Input of the attention projections ``[N, hidden]`` → logits ``[N, H]`` at arrival, and what each token adds to the
        logit of the token one window before it, ``[N, H]``, or None without a look-ahead."""
        weight = self.weights[layer]
        logits, *late = F.linear(x.to(weight.dtype), weight, self.biases[layer]).split(self.heads, dim=1)
        return logits, late[0] if late else None
