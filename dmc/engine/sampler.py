"""Choosing a token from logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dmc.engine.params import SamplingParams

_SEED_STEP = 0x9E3779B97F4A7C15  # between the seeds of a request's completions
_LIKELIEST = 512  # sorted before all tokens are


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a generated token under the model (before penalties, temperature and cuts), and of the likeliest.

    Attributes:
        token_id, logprob: of the token that was generated.
        top: (token id, log-probability) of the likeliest tokens, likeliest first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Chooses the tokens of one completion.

    Args:
        params: of its request.
        index: of the completion, from 0 to n - 1.
        prompt: its tokens, for the repetition penalty.
    """

    def __init__(self, params: SamplingParams, *, index: int = 0, prompt: list[int] | tuple[int, ...] = ()) -> None:
        self.params = params
        self._source = torch.Generator()
        if params.seed is None:
            self._source.seed()
        else:
            self._source.manual_seed((params.seed + index * _SEED_STEP) % 2**63)
        self._prompt = set(prompt) if params.repetition_penalty != 1 else set()
        self._counts: dict[int, int] = {}  # of the output's tokens
        self._penal = params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0

    def choose(self, logits: Tensor) -> int:
        """The next token: logits fp32 ``[V]``. Depends on these and the completion so far alone, not on the batch."""
        adjusted = self._adjusted(logits)
        token = int(adjusted.argmax()) if self.params.temperature == 0 else draw(adjusted, self.params, self._source)
        if self._penal:
            self._counts[token] = self._counts.get(token, 0) + 1
        return token

    def _adjusted(self, logits: Tensor) -> Tensor:
        params = self.params
        if not params.logit_bias and not self._penal:
            return logits
        logits = logits.clone()
        if params.logit_bias:
            tokens, values = _columns(params.logit_bias, logits)
            logits[tokens] += values
        if params.repetition_penalty != 1:
            seen = torch.tensor(sorted(self._prompt | self._counts.keys()), dtype=torch.int64, device=logits.device)
            at = logits[seen]
            logits[seen] = torch.where(at > 0, at / params.repetition_penalty, at * params.repetition_penalty)
        if self._counts:
            tokens, counts = _columns(self._counts, logits)
            logits[tokens] -= params.presence_penalty + params.frequency_penalty * counts
        return logits


def draw(logits: Tensor, params: SamplingParams, source: torch.Generator) -> int:
    """One random token: logits ``[V]`` → by temperature, top_k, top_p and min_p, in fp64."""
    logits = logits.double() / params.temperature
    order = None
    if params.top_k and params.top_k < len(logits):
        logits, order = logits.topk(params.top_k)
    probabilities = logits.softmax(-1)
    if params.top_p < 1:
        probabilities, order = _nucleus(probabilities, order, params.top_p)
    if params.min_p > 0:
        probabilities = probabilities.masked_fill(probabilities < params.min_p * probabilities.max(), 0.0)
    summed = probabilities.cumsum(-1)
    at = torch.rand((), generator=source, dtype=torch.float64).to(summed.device) * summed[-1]
    place = int((summed <= at).sum().clamp(max=int(probabilities.nonzero()[-1])))
    return place if order is None else int(order[place])


def logprob(logits: Tensor, token: int, count: int) -> TokenLogprob:
    """What `SamplingParams.logprobs` asks for: logits fp32 ``[V]``, ``count`` likeliest tokens."""
    logs = logits.log_softmax(-1)
    values, ids = logs.topk(min(count, logs.shape[0]))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, float(logs[token]), top)


def _nucleus(probabilities: Tensor, order: Tensor | None, top_p: float) -> tuple[Tensor, Tensor]:
    """The likeliest, likeliest first, up to and with the one that reaches ``top_p``; and where they were."""
    for count in (min(_LIKELIEST, len(probabilities)), len(probabilities)):
        likely, places = probabilities.topk(count)
        before = likely.cumsum(-1) - likely
        if count == len(probabilities) or before[-1] >= top_p:
            break
    likely = likely.masked_fill(before >= top_p, 0.0)
    return likely, places if order is None else order[places]


def _columns(values: dict[int, float], like: Tensor) -> tuple[Tensor, Tensor]:
    tokens = torch.tensor(list(values), dtype=torch.int64, device=like.device)
    return tokens, torch.tensor(list(values.values()), dtype=like.dtype, device=like.device)
