"""The engine's loop: who waits, who runs, who is done."""

from __future__ import annotations

import time
from collections import deque

from dmc.cache import KVCache
from dmc.engine.runner import Runner
from dmc.engine.sequence import Output, Sequence
from dmc.engine.stats import measure


class Engine:
    """Continuous batching: a sequence joins as soon as there is a slot and memory, and leaves as soon as it ends.

    Admission in order of arrival. A sequence is admitted when the pool can hold it to its last token even if
    nothing merges, so a running sequence never waits for pages.

    Args:
        runner: model and cache.
        prefill_tokens: of several prompts run through the model at once, padding counted; a longer prompt goes
            alone.
    """

    def __init__(self, runner: Runner, *, prefill_tokens: int) -> None:
        self.runner, self.prefill_tokens = runner, prefill_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def cache(self) -> KVCache:
        """Of all sequences."""
        return self.runner.cache

    def check(self, sequence: Sequence) -> None:
        """Refuses what could never run.

        Raises:
            ValueError: with the arithmetic, if the request needs more positions or memory than there are.
        """
        config, limit = self.runner.model.config, self.cache.rows.pool.limit
        prompt, new = len(sequence.prompt), sequence.params.max_tokens
        if prompt + new > config.max_position_embeddings:
            raise ValueError(
                f"{prompt} prompt tokens + max_tokens {new} = {prompt + new} are more than the "
                f"{config.max_position_embeddings} positions of the model; shorten the prompt or lower max_tokens"
            )
        pages = self.cache.worst_pages(sequence.most_tokens)
        if limit is not None and pages > limit:
            raise ValueError(
                f"{prompt} prompt tokens + max_tokens {new} can need {pages} pages of "
                f"{self.cache.rows.pool.page_bytes} bytes, but kv_memory holds {limit}; give it more, or lower max_tokens"
            )

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence that `check` let pass."""
        self.waiting.append(sequence)

    def step(self) -> list[tuple[Sequence, Output]]:
        """Prefills new sequences if any can be admitted, else decodes one token of every running one → the finished."""
        admitted = self._admit()
        if admitted:
            prompts = [sequence.prompt for sequence in admitted]
            hidden = self.runner.prefill([sequence.slot for sequence in admitted], prompts)
            logits = self.runner.last_logits(hidden, [len(prompt) for prompt in prompts])
        else:
            admitted = self.running
            logits = self.runner.decode(
                [sequence.slot for sequence in admitted],
                [sequence.tokens[-1] for sequence in admitted],
                [sequence.position for sequence in admitted],
            )
        for sequence, row in zip(admitted, logits, strict=True):
            sequence.advance(row)
        return [self._finish(sequence) for sequence in list(admitted) if sequence.finish_reason]

    def abort(self) -> None:
        """Drops everything that waits or runs."""
        self.waiting.clear()
        for sequence in self.running:
            self.cache.close(sequence.slot)
        self.running.clear()

    def _admit(self) -> list[Sequence]:
        admitted, limit = [], self.cache.rows.pool.limit
        promised = sum(self.cache.worst_pages(sequence.most_tokens) for sequence in self.running)
        longest = 0
        while self.waiting and self.cache.free_slots:
            sequence = self.waiting[0]
            promised += self.cache.worst_pages(sequence.most_tokens)
            longest = max(longest, len(sequence.prompt))
            too_long = admitted and longest * (len(admitted) + 1) > self.prefill_tokens
            if too_long or (limit is not None and promised > limit):
                break
            sequence.slot = self.cache.open()
            self.running.append(sequence)
            admitted.append(self.waiting.popleft())
        return admitted

    def _finish(self, sequence: Sequence) -> tuple[Sequence, Output]:
        stats = measure(
            self.cache, sequence.slot,
            prompt_tokens=len(sequence.prompt),
            generated=len(sequence.tokens),
            cached_tokens=sequence.position,
            seconds=time.perf_counter() - sequence.started,
        )
        self.running.remove(sequence)
        self.cache.close(sequence.slot)
        sequence.slot = None
        return sequence, sequence.output(stats)
