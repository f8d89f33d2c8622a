"""A completion on its way through the engine."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum

from torch import Tensor

from dmc.cache import LatePrompt, Prompt, Swapped
from dmc.engine.detokenizer import Detokenizer
from dmc.engine.params import SamplingParams
from dmc.engine.sampler import Sampler, TokenLogprob
from dmc.engine.stats import Stats


@dataclass(frozen=True)
class Output:
    """What became of a completion.

    Attributes:
        prompt_token_ids: as they were fed.
        token_ids: generated, an end token included.
        text: what they add to the text of the prompt, cut before a stop text.
        pieces: what each of them adds to it, not cut; "" for special tokens and for those that only begin a character.
        logprobs: one for each generated token, if asked for.
        finish_reason: "length" (max_tokens reached), "eos" (an end token), "stop" (a stop text), "memory" (the page
            pool cannot hold one more token, though nothing else is in it) or "cancelled".
        stats: what it cost; None if it never had a place in the cache.
        index: of the completion among the n of its prompt.
    """

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    pieces: list[str]
    logprobs: list[TokenLogprob] | None
    finish_reason: str
    stats: Stats | None
    index: int = 0


class State(Enum):
    """What a completion is doing; `TRANSITIONS` says what comes after what."""

    WAITING = "waiting"  # in the queue
    PREFILLING = "prefilling"  # its prompt goes through the model, chunk by chunk
    PREFILLED = "prefilled"  # its prompt has gone through, and waits for pages
    RUNNING = "running"  # in the cache: each step feeds one token
    SWAPPED = "swapped out"  # its part of the cache is in host memory
    FINISHED = "finished"


TRANSITIONS = {
    State.WAITING: {State.PREFILLING, State.RUNNING, State.FINISHED},  # running: another one has read the same prompt
    State.PREFILLING: {State.PREFILLED, State.FINISHED},
    State.PREFILLED: {State.RUNNING, State.FINISHED},
    State.RUNNING: {State.SWAPPED, State.FINISHED},
    State.SWAPPED: {State.RUNNING, State.FINISHED},
    State.FINISHED: set(),
}


@dataclass(eq=False)
class Sequence:
    """A completion on its way through the engine.

    Attributes:
        prompt: token ids, at least one.
        ends: the model's end tokens.
        index: among the n completions of its prompt.
        arrival: its place in the order of arrival; given by the engine.
        state: what it is doing.
        partial: its prompt, while it is prefilling or prefilled.
        logits: ``[V]`` that its next token is chosen from, once they are known.
        slot: of the cache, while it runs.
        swapped: its part of the cache, while it is swapped out.
        preemptions: how often it was swapped out.
        sampler: chooses its tokens.
        held_bytes: of its cache after the last step, if it is traced; 0 while it has none.
        trace: None, or a list that grows by a bool ``[L, H]`` for each token that is fed: where it was merged.
        times: "added", "admitted", "first" (token) and "finished", in seconds of `time.perf_counter`.
    """

    prompt: list[int]
    params: SamplingParams
    ends: tuple[int, ...]
    text: Detokenizer
    index: int = 0
    arrival: int = -1
    state: State = State.WAITING
    partial: Prompt | LatePrompt | None = None
    logits: Tensor | None = None
    slot: int | None = None
    swapped: Swapped | None = None
    preemptions: int = 0
    held_bytes: int = 0
    tokens: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stats: Stats | None = None
    trace: list[Tensor] | None = None
    times: dict[str, float] = field(default_factory=lambda: {"added": time.perf_counter()})

    def __post_init__(self) -> None:
        """Makes the completion's own source of draws."""
        self.sampler = Sampler(self.params, index=self.index, prompt=self.prompt)
        self._ends = set(self.params.stop_token_ids) | (set() if self.params.ignore_eos else set(self.ends))

    @property
    def position(self) -> int:
        """Position of the newest generated token, which is fed next."""
        return len(self.prompt) + len(self.tokens) - 1

    @property
    def most_tokens(self) -> int:
        """That can come to be cached: the last generated one is not fed back."""
        return len(self.prompt) + self.params.max_tokens - 1

    def become(self, state: State) -> None:
        """Changes the state; anything but one of the `TRANSITIONS` is a fault of the engine."""
        assert state in TRANSITIONS[self.state], f"a sequence that is {self.state.value} cannot become {state.value}"
        self.state = state

    def advance(self, token: int, logprob: TokenLogprob | None) -> None:
        """Takes the next token, and says in `finish_reason` whether it is the last."""
        self.logits = None
        self.times.setdefault("first", time.perf_counter())
        self.tokens.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        before = len(self.text.text)
        if token in self._ends:
            self.finish_reason = "eos"
            self.pieces.append(self.text.finish())
            return
        self.pieces.append(self.text.add(token))
        if len(self.tokens) == self.params.max_tokens:
            self.finish_reason = "length"
            self.end_text()
        if self.text.cut(self.params.stop, before):
            self.finish_reason = "stop"

    def end_text(self) -> None:
        """Adds bytes to the text that did not become a character; there are no more tokens."""
        if rest := self.text.finish():
            self.pieces[-1] += rest

    def output(self) -> Output:
        """The finished completion."""
        logprobs = None if self.params.logprobs is None else self.logprobs
        return Output(self.prompt, self.tokens, self.text.text, self.pieces, logprobs, self.finish_reason, self.stats, self.index)
