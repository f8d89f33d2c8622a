"""Choosing a token from logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dmc.engine.params import SamplingParams


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a generated token under the model (before temperature and cuts), and of the likeliest.

    Attributes:
        token_id, logprob: of the token that was generated.
        top: (token id, log-probability) of the likeliest tokens, likeliest first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def generator(params: SamplingParams) -> torch.Generator:
    """The source of a request's draws."""
    source = torch.Generator()
    if params.seed is None:
        source.seed()
    else:
        source.manual_seed(params.seed)
    return source


def choose(logits: Tensor, params: SamplingParams, source: torch.Generator) -> int:
    """One token for one request: logits fp32 ``[V]``. Depends on these alone, not on the batch."""
    if params.temperature == 0:
        return int(logits.argmax())
    order = None
    if params.top_k and params.top_k < logits.shape[0]:
        logits, order = logits.topk(params.top_k)
    elif params.top_p < 1:
        logits, order = logits.sort(descending=True, stable=True)
    probabilities = ((logits - logits.max()).double() / params.temperature).softmax(-1)
    if params.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= params.top_p, 0.0)
    summed = probabilities.cumsum(-1)
    draw = torch.rand((), generator=source, dtype=torch.float64).to(summed.device) * summed[-1]
    place = int((summed <= draw).sum().clamp(max=int(probabilities.nonzero()[-1])))
    return place if order is None else int(order[place])


def logprob(logits: Tensor, token: int, count: int) -> TokenLogprob:
    """What `SamplingParams.logprobs` asks for: logits fp32 ``[V]``, ``count`` likeliest tokens."""
    logs = logits.log_softmax(-1)
    values, ids = logs.topk(min(count, logs.shape[0]))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, float(logs[token]), top)
