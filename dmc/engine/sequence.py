"""A request on its way through the engine."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from dmc.engine.params import SamplingParams
from dmc.engine.sampler import TokenLogprob, choose, generator, logprob
from dmc.engine.stats import Stats
from dmc.engine.tokenizer import GrowingText


@dataclass(frozen=True)
class Output:
    """What became of a request.

    Attributes:
        prompt_token_ids: as they were fed.
        token_ids: generated, an end token included.
        text: of them, cut before a stop text.
        logprobs: one for each generated token, if asked for.
        finish_reason: "length" (max_tokens reached), "eos" or "stop".
        stats: what it cost.
    """

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    logprobs: list[TokenLogprob] | None
    finish_reason: str
    stats: Stats


@dataclass(eq=False)
class Sequence:
    """State of a request: waiting (no slot), running, or finished (with a reason).

    Attributes:
        prompt: token ids, at least one.
        ends: token ids that end it.
        slot: of the cache, while it runs.
    """

    prompt: list[int]
    params: SamplingParams
    ends: tuple[int, ...]
    text: GrowingText
    slot: int | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        """Seeds the request's own source of draws."""
        self._source = generator(self.params)

    @property
    def position(self) -> int:
        """Of the newest generated token, which is fed next."""
        return len(self.prompt) + len(self.tokens) - 1

    @property
    def most_tokens(self) -> int:
        """That can come to be cached: the last generated one is not fed back."""
        return len(self.prompt) + self.params.max_tokens - 1

    def advance(self, logits: torch.Tensor) -> None:
        """Chooses the next token from logits ``[V]``, and says in `finish_reason` whether it is the last."""
        token = choose(logits, self.params, self._source)
        self.tokens.append(token)
        if self.params.logprobs is not None:
            self.logprobs.append(logprob(logits, token, self.params.logprobs))
        if token in self.ends and not self.params.ignore_eos:
            self.finish_reason = "eos"
            self.text.finish()
            return
        before = len(self.text.text)
        self.text.add(token)
        if len(self.tokens) == self.params.max_tokens:
            self.finish_reason = "length"
            self.text.finish()
        if self.text.cut(self.params.stop, before):
            self.finish_reason = "stop"

    def output(self, stats: Stats) -> Output:
        """The finished request."""
        logprobs = None if self.params.logprobs is None else self.logprobs
        return Output(self.prompt, self.tokens, self.text.text, logprobs, self.finish_reason, stats)
