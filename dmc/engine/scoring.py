"""Teacher-forced passes through the compressed cache: prefill, then one given token per sequence and step.

With tensor parallelism all ranks run these functions (`Engine.everywhere`), and rank 0 alone has logits.
`prefill` and `feed` are the one loop of `LLM.score`, of continuations (`dmc.evaluation.continuations`) and of the frontier
(`dmc.evaluation.measure`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dmc.cache import LatePrompt, Prompt
from dmc.engine.core import Engine
from dmc.engine.runner import Chunk, Runner
from dmc.engine.stats import Stats, measure

_LOGITS = 1 << 24  # logits of prompt tokens held at once


@dataclass(frozen=True)
class Score:
    """Scores of one sequence of n tokens.

    Attributes:
        logprobs: fp32 ``[n - 1]``: that of token i + 1 after tokens 0 .. i.
        stats: what it cost; its generated tokens are those that went through the decode step.
    """

    logprobs: Tensor
    stats: Stats


@dataclass
class Fed:
    """A sequence in the cache whose next tokens are given.

    Attributes:
        slot: of the cache.
        tokens: token ids, at least those up to the next that is fed.
        fed: how many are in the cache.
        until: how many are to be.
    """

    slot: int
    tokens: list[int]
    fed: int
    until: int


def prefill(
    runner: Runner, tokens: Sequence[int], chunk: int, take: Callable[[int, Tensor], None] | None = None
) -> Prompt | LatePrompt:
    """Feeds tokens as a prompt, ``chunk`` at a time; its pages are not encoded yet.

    Args:
        runner: of the model.
        tokens: at least one.
        chunk: tokens per pass of the model.
        take: is called with the position of each chunk's first token and its hidden states ``[T, hidden]``.
    """
    prompt = runner.cache.prompt()
    for start in range(0, len(tokens), chunk):
        _, (hidden,) = runner.step([], [], [], [Chunk(prompt, list(tokens[start : start + chunk]))])
        if take:
            take(start, hidden)
    return prompt


def feed(
    runner: Runner, sequences: Sequence[Fed], take: Callable[[list[Fed], Tensor], None], after: Callable[[], None] | None = None
) -> None:
    """Feeds one token to each sequence per step, until all are fed; called on all ranks.

    Args:
        runner: of the model.
        sequences: in the cache; their ``fed`` counts up.
        take: see `predict`.
        after: called after each step, before ``take``, on all ranks.
    """
    while alive := [each for each in sequences if each.fed < each.until]:
        hidden, _ = runner.step(
            [each.slot for each in alive], [each.tokens[each.fed] for each in alive], [each.fed for each in alive]
        )
        for each in alive:
            each.fed += 1
        if after:
            after()
        predict(runner, alive, hidden, take)


def predict(runner: Runner, sequences: list[Fed], hidden: Tensor, take: Callable[[list[Fed], Tensor], None]) -> None:
    """What follows the tokens that were fed last; called on all ranks.

    Args:
        runner: of the model.
        sequences: whose last tokens have the hidden states.
        hidden: ``[S, hidden]``.
        take: is called, on rank 0 alone, with the sequences and the log-probabilities ``[S, V]`` of their next tokens. It
            appends the next token of each sequence that has none; other ranks get these tokens here.
    """
    chosen = [each for each in sequences if each.fed == len(each.tokens)]
    logits = runner.logits(hidden)
    if logits is not None:
        take(sequences, logits.log_softmax(-1))
    tokens = runner.agree([0 if logits is None else each.tokens[each.fed] for each in chosen])
    for each, token in zip(chosen, tokens, strict=True):
        each.tokens[each.fed :] = [token]


def score_batch(engine: Engine, sequences: Sequence[list[int]], prompt_tokens: int, own: None) -> list[Score]:
    """Scores sequences together, run by `Engine.everywhere`; as many slots must be free, and every length at least 2.

    The first ``prompt_tokens`` of each (all but the last, if it is shorter) are prefilled; every later one goes through the
    decode step. Log-probabilities are rank 0's; on other ranks they are 0.
    """
    runner, started = engine.runner, time.perf_counter()
    running: list[Fed] = []
    logprobs: dict[int, Tensor] = {}  # by slot
    try:
        for tokens in sequences:
            first, logs = min(prompt_tokens, len(tokens) - 1), torch.zeros(len(tokens) - 1)

            def put(start: int, hidden: Tensor, tokens: list[int] = tokens, logs: Tensor = logs) -> None:
                logs[start : start + len(hidden)] = _prompt_logprobs(runner, hidden, tokens[start + 1 : start + 1 + len(hidden)])

            prompt = prefill(runner, tokens[:first], engine.prefill_tokens, put)
            running.append(Fed(runner.cache.load(prompt), tokens, first, len(tokens) - 1))
            logprobs[running[-1].slot] = logs

        def pick(alive: list[Fed], predicted: Tensor) -> None:
            following = torch.tensor([each.tokens[each.fed] for each in alive], device=predicted.device)
            for each, value in zip(alive, _picked(predicted, following).tolist(), strict=True):
                logprobs[each.slot][each.fed - 1] = value

        feed(runner, running, pick)
        seconds = time.perf_counter() - started
        scores = []
        for each in running:
            first = min(prompt_tokens, each.until)
            stats = measure(
                runner.cache,
                each.slot,
                prompt_tokens=first,
                cached_tokens=each.until,
                generated=each.until - first,
                seconds=seconds,
            )
            scores.append(Score(logprobs[each.slot], stats))
        return scores
    finally:
        for each in running:
            runner.cache.close(each.slot)


def _prompt_logprobs(runner: Runner, hidden: Tensor, following: list[int]) -> Tensor:
    """Log-probability of the token that follows each of a prompt's: hidden ``[T, hidden]``; 0 on ranks other than 0."""
    rows = max(1, _LOGITS // runner.model.config.vocab_size)
    parts = []
    for states, tokens in zip(hidden.split(rows), torch.tensor(following).split(rows), strict=True):
        logits = runner.logits(states)
        parts.append(torch.zeros(len(states)) if logits is None else _picked(logits.log_softmax(-1), tokens.to(states.device)))
    return torch.cat(parts)


def _picked(predicted: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of one token a row: ``[N, V], [N] → [N]`` on the CPU."""
    return predicted.gather(-1, tokens[:, None])[:, 0].cpu()
