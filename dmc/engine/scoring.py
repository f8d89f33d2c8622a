"""Teacher-forced log-probabilities through the compressed cache: how perplexity of a policy and codec is measured."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dmc.engine.runner import Chunk, Runner
from dmc.engine.stats import Stats, measure

_LOGITS = 1 << 24  # logits of prompt tokens held at once


@dataclass(frozen=True)
class Score:
    """Of one sequence of n tokens.

    Attributes:
        logprobs: fp32 ``[n - 1]``: that of token i + 1 after tokens 0 .. i.
        stats: what it cost; its generated tokens are those that went through the decode step.
    """

    logprobs: Tensor
    stats: Stats


def score_batch(runner: Runner, sequences: Sequence[list[int]], prompt_tokens: int, chunk: int) -> list[Score]:
    """Scores sequences together; as many slots must be free, and every length at least 2.

    The first ``prompt_tokens`` of each (all but the last, if it is shorter) are prefilled, ``chunk`` at a time; every
    later one goes through the decode step.
    """
    started = time.perf_counter()
    slots = []
    try:
        prompts = [tokens[: min(prompt_tokens, len(tokens) - 1)] for tokens in sequences]
        logprobs = []  # of each sequence
        for tokens, fed in zip(sequences, prompts, strict=True):
            logs = torch.empty(len(tokens) - 1)
            prompt = runner.cache.prompt()
            for start in range(0, len(fed), chunk):
                end = min(start + chunk, len(fed))
                _, (hidden,) = runner.step([], [], [], [Chunk(prompt, fed[start:end])])
                logs[start:end] = _prompt_logprobs(runner, hidden, tokens[start + 1 : end + 1])
            slots.append(runner.cache.load(prompt))
            logprobs.append(logs)
        _force(runner, slots, sequences, [len(prompt) for prompt in prompts], logprobs)
        seconds = time.perf_counter() - started
        return [
            Score(logs, measure(
                runner.cache, slot, prompt_tokens=len(prompt), cached_tokens=len(tokens) - 1,
                generated=len(tokens) - 1 - len(prompt), seconds=seconds,
            ))
            for logs, slot, tokens, prompt in zip(logprobs, slots, sequences, prompts, strict=True)
        ]
    finally:
        for slot in slots:
            runner.cache.close(slot)


def _prompt_logprobs(runner: Runner, hidden: Tensor, following: list[int]) -> Tensor:
    """Of the token that follows each of a prompt's: hidden ``[T, hidden]``, padding beyond the prompt."""
    rows = max(1, _LOGITS // runner.model.config.vocab_size)
    parts = []
    for states, tokens in zip(hidden[: len(following)].split(rows), torch.tensor(following).split(rows), strict=True):
        parts.append(_picked(runner.logits(states), tokens.to(states.device)))
    return torch.cat(parts)


def _force(
    runner: Runner, slots: list[int], sequences: Sequence[list[int]], done: list[int], logprobs: list[Tensor],
) -> None:
    """Feeds every sequence's tokens from place ``done`` to its last but one, all sequences in step."""
    fed = list(done)
    while alive := [i for i, tokens in enumerate(sequences) if fed[i] < len(tokens) - 1]:
        hidden, _ = runner.step([slots[i] for i in alive], [sequences[i][fed[i]] for i in alive], [fed[i] for i in alive])
        logits = runner.logits(hidden)
        following = torch.tensor([sequences[i][fed[i] + 1] for i in alive], device=logits.device)
        for i, value in zip(alive, _picked(logits, following).tolist(), strict=True):
            logprobs[i][fed[i]] = value
            fed[i] += 1


def _picked(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of one token a row: ``[N, V], [N] → [N]`` on the CPU."""
    return logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0].cpu()
