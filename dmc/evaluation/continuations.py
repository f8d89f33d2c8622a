"""Log-probabilities of continuations of contexts, and greedy ones, through the compressed cache.

Of each context all tokens but the last are prefilled: among themselves they attend exactly, as in generation, and then
their full pages are encoded. The context's last token and the continuation go through the decode step one by one, each
into the cache. So every token of a continuation is predicted by a query that reads encoded pages: those of the context,
and those that the continuation itself has filled. What stays exact for every query is what the cache always keeps so:
sinks, window, the page that is filling and the accumulating entry. (A context of one token holds nothing that could be encoded;
the token after it is predicted by its prefill.)

Continuations of one context share its prefill and, unless the policy evicts, its pages.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dmc.engine import LLM
from dmc.engine.core import Engine
from dmc.engine.runner import Runner
from dmc.engine.scoring import Fed, feed, predict, prefill
from dmc.engine.stats import Stats, measure


@dataclass(frozen=True)
class Request:
    """What is to follow a context.

    Attributes:
        context: token ids, at least one.
        continuation: token ids to be scored, at least one; or how many the model is to choose, the most likely each time.
        fed: token ids between the two, which go through the decode step one by one: a reply, and the question of a later turn.
    """

    context: Sequence[int]
    continuation: Sequence[int] | int
    fed: Sequence[int] = ()

    @property
    def length(self) -> int:
        """Tokens of the continuation."""
        return self.continuation if isinstance(self.continuation, int) else len(self.continuation)

    @property
    def before(self) -> int:
        """Tokens before the continuation."""
        return len(self.context) + len(self.fed)


@dataclass(frozen=True)
class Scored:
    """What became of a request of n continuation tokens.

    Attributes:
        tokens: the continuation: given or chosen.
        logprobs: fp32 ``[n]`` on the CPU, each after the context and the tokens before it.
        greedy: whether every token was the most likely in its place; always True for chosen ones.
        stats: of the cache after the last token that was fed (the continuation's last is not).
    """

    tokens: list[int]
    logprobs: Tensor
    greedy: bool
    stats: Stats

    @property
    def logprob(self) -> float:
        """Log-probability of the whole continuation, nats."""
        return self.logprobs.double().sum().item()


def follow(llm: LLM, requests: Sequence[Request], progress: Callable[[int], None] | None = None) -> list[Scored]:
    """Scores or chooses continuations, as many together as ``max_batch`` (and ``kv_memory``) allow.

    Args:
        llm: with an empty cache.
        requests: in any order; those of equal contexts share a prefill where they run together.
        progress: called with a number of requests that are done.

    Returns:
        One result a request, in order. The cache is empty again.

    Raises:
        ValueError: if a request is empty, too long for the model or no token of it, the cache is in use, or
            ``kv_memory`` cannot hold the longest.
    """
    batch = _check(llm, requests)
    order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].context), tuple(requests[i].context), i))
    done: dict[int, Scored] = {}
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        done |= zip(some, llm.everywhere(_together, [requests[i] for i in some]), strict=True)
        if progress:
            progress(len(some))
    return [done[i] for i in range(len(requests))]


@dataclass(kw_only=True)
class _Running(Fed):
    """One request in the cache; its tokens are those of the context and of the continuation."""

    request: Request
    started: float
    logprobs: list[float] = field(default_factory=list)
    greedy: bool = True

    def take(self, predicted: Tensor) -> None:
        """Log-probabilities ``[V]`` of the token after those that were fed; those after the context's last one count."""
        if self.fed < self.request.before:
            return
        likeliest = int(predicted.argmax())
        if self.fed == len(self.tokens):
            self.tokens.append(likeliest)
        token = self.tokens[self.fed]
        self.logprobs.append(predicted[token].item())
        self.greedy &= token == likeliest


def _together(engine: Engine, requests: Sequence[Request], own: None) -> list[Scored]:
    """Requests that fit the cache at once, equal contexts side by side; on all ranks, with log-probabilities on rank 0."""
    runner, running = engine.runner, []
    try:
        for request in requests:
            before = running[-1] if running else None
            if before and list(before.request.context) == list(request.context) and before.fed < len(request.context):
                # Nothing was fed since the load: the context's pages can be shared.
                running.append(_running(request, runner.cache.fork(before.slot), before.fed))
            else:
                running.append(_prefilled(engine, request))
        feed(runner, running, _take)
        return [_scored(runner, each) for each in running]
    finally:
        for each in running:
            runner.cache.close(each.slot)


def _prefilled(engine: Engine, request: Request) -> _Running:
    """A request whose context is in the cache, all but its last token."""
    runner, context, last = engine.runner, list(request.context), []
    first = max(1, len(context) - 1)
    prompt = prefill(runner, context[:first], engine.prefill_tokens, lambda start, hidden: last.append(hidden[-1:]))
    made = _running(request, runner.cache.load(prompt), first)
    if first == len(context):
        predict(runner, [made], last[-1], _take)
    return made


def _running(request: Request, slot: int, fed: int) -> _Running:
    given = [] if isinstance(request.continuation, int) else request.continuation
    until = request.before + request.length - 1
    return _Running(slot, [*request.context, *request.fed, *given], fed, until, request=request, started=time.perf_counter())


def _take(running: list[_Running], predicted: Tensor) -> None:
    for each, row in zip(running, predicted, strict=True):
        each.take(row)


def _scored(runner: Runner, each: _Running) -> Scored:
    prefilled = max(1, len(each.request.context) - 1)
    stats = measure(
        runner.cache,
        each.slot,
        prompt_tokens=prefilled,
        cached_tokens=each.fed,
        generated=each.fed - prefilled,
        seconds=time.perf_counter() - each.started,
    )
    return Scored(each.tokens[each.request.before :], torch.tensor(each.logprobs), each.greedy, stats)


def _check(llm: LLM, requests: Sequence[Request]) -> int:
    """How many requests can run together."""
    config, limit, batch = llm.model.config, llm.cache.page_limit, llm.engine.max_batch
    if llm.engine.busy:
        raise ValueError("scoring needs the cache to itself; wait until the requests that run have ended")
    for request in requests:
        given = [] if isinstance(request.continuation, int) else request.continuation
        if not len(request.context) or request.length < 1:
            raise ValueError("a context and a continuation of at least one token each are needed: is a text empty?")
        wrong = next((token for token in (*request.context, *request.fed, *given) if not 0 <= token < llm.vocabulary), None)
        if wrong is not None:
            raise ValueError(f"token id {wrong} is outside the model's vocabulary of {llm.vocabulary}")
        fed = request.before + request.length - 1
        if fed > config.positions:
            raise ValueError(
                f"a context of {request.before} tokens and a continuation of {request.length} need {fed} positions, and "
                f"the model has {config.positions}"
            )
        if limit is not None:
            batch = min(batch, limit // max(1, llm.cache.worst_pages(fed)))  # one token fills no page
    if batch == 0:
        raise ValueError(f"kv_memory of {limit} pages cannot hold the longest request; give it more")
    return batch
