"""The engine's step: the scheduler says who runs, the model runs, the sampler chooses the next tokens."""

from __future__ import annotations

import torch

from dmc.cache import KVCache
from dmc.engine.predict import Predictor
from dmc.engine.runner import Chunk, Runner
from dmc.engine.sampler import choose, logprobs
from dmc.engine.scheduler import Batch, Scheduler
from dmc.engine.sequence import Sequence, State


class Engine:
    """Continuous batching: each step feeds one token of every running sequence and a chunk of prompts together.

    Args:
        runner: model and cache.
        max_batch, prefill_tokens: see `Scheduler`.
    """

    def __init__(self, runner: Runner, *, max_batch: int, prefill_tokens: int) -> None:
        self.runner, self.max_batch, self.prefill_tokens = runner, max_batch, prefill_tokens
        config = runner.model.config
        own = config.method == runner.cache.policy.name
        cr = runner.cache.policy.likely_cr or (config.measured_cr if own else None) or 1.0
        self.predictor = Predictor(runner.cache, cr)
        self.scheduler = Scheduler(
            runner.cache, self.predictor, runner.model.device, max_batch=max_batch, prefill_tokens=prefill_tokens
        )

    @property
    def cache(self) -> KVCache:
        """Of all sequences."""
        return self.runner.cache

    @property
    def preemptions(self) -> int:
        """How many sequences were swapped out so far."""
        return self.scheduler.preemptions

    @property
    def busy(self) -> bool:
        """True if a step would do anything."""
        return bool(self.scheduler.all)

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
            about, at, lower = ("about", f"a compression ratio of {self.predictor.cr:.2f}", "max_tokens") if bound is None else (
                "up to", f"max_entries={bound}", "max_entries or max_tokens"
            )
            raise ValueError(
                f"{prompt} prompt tokens + max_tokens {new} need {about} {pages} pages of {self.cache.page_bytes} bytes at "
                f"{at}, but kv_memory holds {limit}; give it more, or lower {lower}"
            )

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence that `check` let pass."""
        self.scheduler.add(sequence)

    def step(self) -> list[Sequence]:
        """Feeds every running sequence one token and prompts a chunk → those that got a token or ended.

        Ended ones have a `finish_reason`, and their pages are back in the pool.
        """
        begun = self._sample(self.scheduler.admit())
        batch = self.scheduler.batch(begun)
        self._run(batch)
        return begun + self._sample(batch.fed + self.scheduler.load()) + self.scheduler.ended()

    def cancel(self, sequence: Sequence) -> None:
        """Ends a sequence at once, whatever it is doing; one that has ended stays as it is."""
        if sequence.finish_reason is None:
            sequence.finish_reason = "cancelled"
            self.scheduler.finish([sequence])

    def abort(self) -> None:
        """Drops everything that waits or runs."""
        for sequence in self.scheduler.all:
            self.cancel(sequence)

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
            [sequence.slot for sequence in fed], [sequence.tokens[-1] for sequence in fed],
            [sequence.position for sequence in fed], chunks, trace=traced,
        )
        if traced:
            sizes = [*(1 for _ in fed), *(len(chunk.tokens) for chunk in chunks)]
            for sequence, merges in zip((*fed, *readers), self.runner.merges.split(sizes), strict=True):
                if sequence.trace is not None:
                    sequence.trace += merges.unbind()
        done = [n for n, sequence in enumerate(readers) if sequence.partial.done == len(sequence.prompt)]
        logits = self.runner.logits(torch.cat([hidden, *(parts[n][-1:] for n in done)]))
        for sequence, row in zip([*fed, *(readers[n] for n in done)], logits, strict=True):
            sequence.logits = row
            if sequence.state is State.PREFILLING:
                sequence.logits = row.clone()  # they may have to wait for pages
                sequence.become(State.PREFILLED)

    def _sample(self, sequences: list[Sequence]) -> list[Sequence]:
        """Gives every sequence its next token, all chosen at once, and ends those for which it is the last."""
        if sequences:
            logits = torch.stack([sequence.logits for sequence in sequences])
            tokens = choose([sequence.sampler for sequence in sequences], logits)
            found = logprobs(logits, tokens, [sequence.params.logprobs for sequence in sequences])
            for sequence, token, own in zip(sequences, tokens, found, strict=True):
                sequence.advance(token, own)
            self.scheduler.finish(sequences)
        return sequences
