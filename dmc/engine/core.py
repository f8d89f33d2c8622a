"""The engine's step: the scheduler says who runs, the model runs, the sampler chooses the next tokens."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as List
from typing import Any, cast

import torch

from dmc.cache import KVCache
from dmc.engine.detokenizer import Detokenizer
from dmc.engine.predict import Predictor
from dmc.engine.ranks import Ranks
from dmc.engine.runner import Chunk, Runner
from dmc.engine.sampler import choose, logprobs
from dmc.engine.scheduler import Batch, Scheduler
from dmc.engine.sequence import Sequence, State
from dmc.engine.sharded_cache import ShardedCache

_REASONS = (None, "length", "eos", "stop")  # why a token was the last, as they are broadcast


class Engine:
    """Continuous batching: each step feeds one token of every running sequence and a chunk of prompts together.

    Args:
        runner: model and cache.
        max_batch, prefill_tokens: see `Scheduler`.
        ranks: of a tensor-parallel engine. Then all ranks have such an engine, and `everywhere` runs the same code on all.
    """

    def __init__(self, runner: Runner, *, max_batch: int, prefill_tokens: int, ranks: Ranks | None = None) -> None:
        self.runner, self.max_batch, self.prefill_tokens, self.ranks = runner, max_batch, prefill_tokens, ranks
        config = runner.model.config
        own = config.method == runner.cache.policy.name
        cr = runner.cache.policy.likely_cr or (config.measured_cr if own else None) or 1.0
        self.predictor = Predictor(runner.cache, cr)
        self.scheduler = Scheduler(
            runner.cache, self.predictor, runner.model.device, max_batch=max_batch, prefill_tokens=prefill_tokens
        )
        self._arrived: list[Sequence] = []  # since the other ranks were told

    @property
    def cache(self) -> KVCache:
        """Cache of all sequences."""
        return self.runner.cache

    @property
    def preemptions(self) -> int:
        """How many sequences were swapped out so far."""
        return self.scheduler.preemptions

    @property
    def busy(self) -> bool:
        """True if a step would do anything."""
        return bool(self.scheduler.all)

    @property
    def prompt_bytes(self) -> int:
        """Bytes of full-precision entries of prompts that are prefilling, outside of the page pool; any thread may ask."""
        return self._own_prompt_bytes() if self.ranks is None else cast(ShardedCache, self.cache).prompt_bytes

    def check(self, sequence: Sequence) -> None:
        """Rejects what could never run.

        Raises:
            ValueError: with the arithmetic, if the request needs more positions or memory than there are.
        """
        config, limit = self.runner.model.config, self.cache.page_limit
        prompt, new = len(sequence.prompt), sequence.params.max_tokens
        if prompt + new > config.positions:
            raise ValueError(
                f"{prompt} prompt tokens + max_tokens {new} = {prompt + new} are more than the "
                f"{config.positions} positions of the model{config.rope.why_limited}; shorten the prompt or lower max_tokens"
            )
        pages = self.predictor.pages(sequence.most_tokens)
        if limit is not None and pages > limit:
            bound = self.cache.policy.max_entries
            about, at, lower = (
                ("about", f"a compression ratio of {self.predictor.cr:.2f}", "max_tokens")
                if bound is None
                else ("up to", f"max_entries={bound}", "max_entries or max_tokens")
            )
            raise ValueError(
                f"{prompt} prompt tokens + max_tokens {new} need {about} {pages} pages of {self.cache.page_bytes} bytes at "
                f"{at}, but kv_memory holds {limit}; give it more, or lower {lower}"
            )

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence that `check` let pass."""
        self.scheduler.add(sequence)
        self._arrived.append(sequence)

    def step(self) -> list[Sequence]:
        """Feeds every running sequence one token and prompts a chunk → those that got a token or ended.

        Ended ones have a `finish_reason`, and their pages are back in the pool.
        """
        return self.everywhere(_step)

    def cancel(self, *sequences: Sequence) -> None:
        """Ends sequences at once, whatever they are doing; those that have ended stay as they are."""
        arrivals = [sequence.arrival for sequence in sequences if sequence.finish_reason is None]
        if arrivals:
            self.everywhere(_cancel, arrivals)

    def abort(self) -> None:
        """Drops everything that waits or runs."""
        if self.ranks is None or not self.ranks.failure:
            self.cancel(*self.scheduler.all)

    # ------------------------------------------------------------------------------------ the ranks

    def everywhere(self, function: Callable, *arguments: object, own: object = None) -> Any:
        """Runs ``function(engine, *arguments, own)`` on every rank, each with its own engine → what it returns here.

        Args:
            function: of a module. It must make the same calls of model and cache on all ranks; only rank 0 has logits.
            arguments: are sent to the other ranks.
            own: of rank 0 alone, such as a function to call; None on the others.

        Raises:
            RankFailed: if a rank fails; see `dmc.engine.ranks`.
        """
        arrived, self._arrived = self._arrived, []
        if self.ranks is None:
            return function(self, *arguments, own)
        sent = [(one.prompt, one.params, one.ends, one.index, one.trace is not None) for one in arrived]
        return self.ranks.run(self, function, arguments, own, sent)

    def receive(self, arrived: list[tuple]) -> None:
        """Queues sequences that rank 0 has queued. Texts, and the choice of tokens, are rank 0's."""
        for prompt, params, ends, index, traced in arrived:
            sequence = Sequence(prompt, params, ends, Detokenizer(None), index)
            sequence.trace = [] if traced else None
            self.scheduler.add(sequence)

    def settle(self) -> None:
        """Ends a command on all ranks: their figures are exchanged, and their schedules compared."""
        if self.ranks is not None:
            cast(ShardedCache, self.cache).refresh(self.scheduler.fingerprint(), self._own_prompt_bytes())

    # ------------------------------------------------------------------------------------ a step, on every rank

    def _step(self) -> list[Sequence]:
        begun = self._sample(self.scheduler.admit())
        batch = self.scheduler.batch(begun)
        self._run(batch)
        advanced = begun + self._sample(batch.fed + self.scheduler.load()) + self.scheduler.ended()
        for sequence in self.scheduler.all:
            if sequence.trace is not None:
                sequence.held_bytes = 0 if sequence.slot is None else sum(self.cache.held(sequence.slot).values())
        return advanced

    def _run(self, batch: Batch) -> None:
        """One pass of the model: gives logits to sequences that are fed, and to those whose prompt is read now."""
        fed, readers = batch.fed, [sequence for sequence, _ in batch.prompts]
        if not fed and not readers:
            return
        chunks = [
            Chunk(sequence.partial, sequence.prompt[sequence.partial.done : sequence.partial.done + count])
            for sequence, count in batch.prompts
        ]
        traced = any(sequence.trace is not None for sequence in (*fed, *readers))
        hidden, parts = self.runner.step(
            [sequence.slot for sequence in fed],
            [sequence.tokens[-1] for sequence in fed],
            [sequence.position for sequence in fed],
            chunks,
            trace=traced,
        )
        if traced:
            sizes = [*(1 for _ in fed), *(len(chunk.tokens) for chunk in chunks)]
            for sequence, merges in zip((*fed, *readers), self.runner.merges.split(sizes), strict=True):
                if sequence.trace is not None:
                    sequence.trace += merges.unbind()
        done = [n for n, sequence in enumerate(readers) if sequence.partial.done == len(sequence.prompt)]
        logits = self.runner.logits(torch.cat([hidden, *(parts[n][-1:] for n in done)]))
        for row, sequence in enumerate([*fed, *(readers[n] for n in done)]):
            sequence.logits = None if logits is None else logits[row]
            if sequence.state is State.PREFILLING:
                sequence.logits = None if logits is None else logits[row].clone()  # they may have to wait for pages
                sequence.become(State.PREFILLED)

    def _sample(self, sequences: list[Sequence]) -> list[Sequence]:
        """Gives every sequence its next token, all chosen at once by rank 0, and ends those for which it is the last."""
        if not sequences:
            return sequences
        if self.ranks is None or self.ranks.rank == 0:
            self._choose(sequences)
        if self.ranks is not None:
            self._agree(sequences)
        self.scheduler.finish(sequences)
        return sequences

    def _choose(self, sequences: List[Sequence]) -> None:
        logits = torch.stack([sequence.logits for sequence in sequences])
        tokens = choose([sequence.sampler for sequence in sequences], logits)
        found = logprobs(logits, tokens, [sequence.params.logprobs for sequence in sequences])
        for sequence, token, own in zip(sequences, tokens, found, strict=True):
            sequence.advance(token, own)

    def _agree(self, sequences: List[Sequence]) -> None:
        """The other ranks take rank 0's tokens, and its word on which of them is the last: stop texts are known there."""
        first = self.ranks.rank == 0
        chosen = [(one.tokens[-1], _REASONS.index(one.finish_reason)) if first else (0, 0) for one in sequences]
        agreed = self.ranks.group.broadcast(torch.tensor(chosen)).tolist()
        if not first:
            for sequence, (token, reason) in zip(sequences, agreed, strict=True):
                sequence.advance(token, None)
                sequence.finish_reason = _REASONS[reason]

    def _own_prompt_bytes(self) -> int:
        return sum(sequence.partial.nbytes for sequence in list(self.scheduler.prefilling) if sequence.partial)


def _step(engine: Engine, own: None) -> list[Sequence]:
    return engine._step()


def _cancel(engine: Engine, arrivals: List[int], own: None) -> None:
    for sequence in engine.scheduler.all:
        if sequence.arrival in arrivals:
            sequence.finish_reason = "cancelled"
            engine.scheduler.finish([sequence])
