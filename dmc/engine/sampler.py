"""Choosing a token from logits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dmc.engine.params import SamplingParams

_SEED_STEP = 0x9E3779B97F4A7C15  # between the seeds of a request's completions
_LIKELIEST = 512  # sorted before all tokens are


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a generated token under the model (before penalties, temperature and cuts), and of the most likely.

    Attributes:
        token_id, logprob: of the token that was generated.
        top: (token id, log-probability) of the most likely tokens, the most likely first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """The settings of one completion, and what its choices depend on: its random source and the tokens so far.

    Args:
        params: of its request.
        index: of the completion, from 0 to n - 1.
        prompt: its tokens, for the repetition penalty.
    """

    def __init__(self, params: SamplingParams, *, index: int = 0, prompt: list[int] | tuple[int, ...] = ()) -> None:
        self.params = params
        self.source = torch.Generator()
        if params.seed is None:
            self.source.seed()
        else:
            self.source.manual_seed((params.seed + index * _SEED_STEP) % 2**63)
        self._prompt = set(prompt) if params.repetition_penalty != 1 else set()
        self._counts: dict[int, int] = {}  # of the output's tokens
        self._penal = params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0

    @property
    def adjusts(self) -> bool:
        """True if it changes logits before a token is chosen."""
        return bool(self.params.logit_bias) or self._penal

    def adjusted(self, logits: Tensor) -> Tensor:
        """Logits ``[V]`` with biases and penalties."""
        params = self.params
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

    def count(self, token: int) -> None:
        """Takes a token of the output, for the penalties."""
        if self._penal:
            self._counts[token] = self._counts.get(token, 0) + 1


def choose(samplers: Sequence[Sampler], logits: Tensor) -> list[int]:
    """The next token of every completion: logits fp32 ``[S, V]``, one row per sampler.

    A token depends on its own row and completion alone, not on the batch. Completions with the same settings are drawn
    together.
    """
    if any(sampler.adjusts for sampler in samplers):
        rows = zip(samplers, logits, strict=True)
        logits = torch.stack([sampler.adjusted(row) if sampler.adjusts else row for sampler, row in rows])
    groups: dict[tuple, list[int]] = defaultdict(list)
    for place, sampler in enumerate(samplers):
        params = sampler.params
        groups[() if params.temperature == 0 else (params.temperature, params.top_k, params.top_p, params.min_p)].append(place)
    chosen = [0] * len(samplers)
    for settings, places in groups.items():
        rows = logits if len(places) == len(samplers) else logits[places]
        some = [samplers[place] for place in places]
        tokens = draw(rows, some[0].params, [each.source for each in some]) if settings else rows.argmax(-1)
        for sampler, place, token in zip(some, places, tokens.tolist(), strict=True):
            sampler.count(token)
            chosen[place] = token
    return chosen


def draw(logits: Tensor, params: SamplingParams, sources: Sequence[torch.Generator]) -> Tensor:
    """Random tokens, int64 ``[S]``: logits ``[S, V]`` → by temperature, top_k, top_p and min_p, in fp64.

    Args:
        logits: one row per token to draw.
        params: the settings of all rows.
        sources: one per row; each gives one number.
    """
    logits, order = logits.double() / params.temperature, None
    if params.top_k and params.top_k < logits.shape[-1]:
        logits, order = logits.topk(params.top_k)
    probabilities = logits.softmax(-1)
    at = torch.stack([torch.rand((), generator=source, dtype=torch.float64) for source in sources]).to(logits.device)
    if params.top_p < 1:
        places = torch.empty(len(at), dtype=torch.int64, device=logits.device)
        left = torch.ones_like(places, dtype=torch.bool)
        for count in (min(_LIKELIEST, logits.shape[-1]), logits.shape[-1]):  # most rows need few tokens
            likely, where, reaches = _nucleus(probabilities[left], params.top_p, count)
            found = where.gather(-1, _at(likely, params.min_p, at[left])[:, None])[:, 0]
            reaches |= count == logits.shape[-1]
            rows = left.nonzero()[:, 0][reaches]
            places[rows], left[rows] = found[reaches], False
            if not left.any():
                break
    else:
        places = _at(probabilities, params.min_p, at)
    return places if order is None else order.gather(-1, places[:, None])[:, 0]


def logprobs(logits: Tensor, tokens: Sequence[int], counts: Sequence[int | None]) -> list[TokenLogprob | None]:
    """What `SamplingParams.logprobs` asks for: logits fp32 ``[S, V]``; a row's number of most likely tokens, or None."""
    found: list[TokenLogprob | None] = [None] * len(tokens)
    rows = [row for row, count in enumerate(counts) if count is not None]
    for row, logs in zip(rows, logits[rows].log_softmax(-1), strict=True):
        values, ids = logs.topk(min(counts[row], len(logs)))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        found[row] = TokenLogprob(tokens[row], float(logs[tokens[row]]), top)
    return found


def _at(probabilities: Tensor, min_p: float, at: Tensor) -> Tensor:
    """Places ``[S]`` in rows ``[S, N]`` at which a share ``at [S]`` of their sums is reached."""
    if min_p > 0:
        low = min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < low, 0.0)
    summed = probabilities.cumsum(-1)
    places = (summed <= at[:, None] * summed[:, -1:]).sum(-1)
    numbers = torch.arange(probabilities.shape[-1], device=probabilities.device)
    return places.minimum(torch.where(probabilities > 0, numbers, 0).amax(-1))


def _nucleus(probabilities: Tensor, top_p: float, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``count`` most likely of rows ``[S, N]``, in order, 0 behind the one that reaches ``top_p``.

    Returns:
        ``(probabilities [S, count], their places, bool [S]: top_p is reached)``.
    """
    likely, where = probabilities.topk(count)
    before = likely.cumsum(-1) - likely
    return likely.masked_fill(before >= top_p, 0.0), where, before[:, -1] >= top_p


def _columns(values: Mapping[int, float], like: Tensor) -> tuple[Tensor, Tensor]:
    tokens = torch.tensor(list(values), dtype=torch.int64, device=like.device)
    return tokens, torch.tensor(list(values.values()), dtype=like.dtype, device=like.device)
