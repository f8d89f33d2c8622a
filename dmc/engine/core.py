"""The engine's loop: who waits, who runs, who makes room, who is done."""

from __future__ import annotations

import time
from collections import deque

import torch

from dmc.cache import KVCache, PoolExhausted
from dmc.engine.predict import Predictor
from dmc.engine.prefix import Read, donor
from dmc.engine.runner import Chunk, Runner
from dmc.engine.sequence import Sequence
from dmc.engine.stats import measure

KEPT_PROMPTS = 4  # slots of the cache beyond those of running sequences, for prompts that others wait with


class Engine:
    """Continuous batching: each step feeds one token of every running sequence and a chunk of prompts together.

    Order is that of arrival, always. A sequence is admitted when the pages that it and all running ones are predicted
    to end with fit into the pool; where the policy bounds the entries of a head, the pages that they can need at most. Where
    the prediction was wrong and pages run out, the latest arrival goes to host
    memory, and nothing is admitted until it is back. So the oldest sequence always goes on.

    Args:
        runner: model and cache; the cache has `KEPT_PROMPTS` slots more than ``max_batch``.
        max_batch: sequences at a time, in the cache or with their prompt being read.
        prefill_tokens: of prompts in a step, at most.
    """

    def __init__(self, runner: Runner, *, max_batch: int, prefill_tokens: int) -> None:
        self.runner, self.max_batch, self.prefill_tokens = runner, max_batch, prefill_tokens
        config = runner.model.config
        own = config.method == runner.cache.policy.name
        cr = runner.cache.policy.likely_cr or (config.measured_cr if own else None) or 1.0
        self.predictor = Predictor(runner.cache, cr)
        self.waiting: deque[Sequence] = deque()
        self.reading: list[Sequence] = []
        self.running: list[Sequence] = []
        self.away: list[Sequence] = []
        self.kept: list[Read] = []
        self.preemptions = 0
        self._arrivals = 0

    @property
    def cache(self) -> KVCache:
        """Of all sequences."""
        return self.runner.cache

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.waiting or self.reading or self.running or self.away)

    def check(self, sequence: Sequence) -> None:
        """Refuses what could never run.

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
        sequence.arrival = self._arrivals
        self._arrivals += 1
        self.waiting.append(sequence)

    def step(self) -> list[Sequence]:
        """Feeds every running sequence one token and prompts a chunk → those that got a token or ended.

        Ended ones have a `finish_reason`, and their pages are back in the pool.
        """
        self._come_back()
        advanced = self._admit()
        fed = [sequence for sequence in self.running if sequence not in advanced]
        self._finish_ended(advanced)
        ended = self._make_room()
        fed = [sequence for sequence in fed if sequence.slot is not None]  # not preempted
        chunks, readers = self._chunks()
        if fed or chunks:
            hidden, parts = self.runner.step(
                [sequence.slot for sequence in fed], [sequence.tokens[-1] for sequence in fed],
                [sequence.position for sequence in fed], chunks, trace=self._traced(fed, readers),
            )
            self._trace(fed, readers, chunks)
            done = [n for n, sequence in enumerate(readers) if sequence.partial.done == len(sequence.prompt)]
            logits = self.runner.logits(torch.cat([hidden, *(parts[n][-1:] for n in done)]))
            for sequence, row in zip([*fed, *(readers[n] for n in done)], logits, strict=True):
                if sequence.slot is None:
                    sequence.first = row.clone()
                else:
                    sequence.advance(row)
        advanced += fed + self._load(ended)
        self._finish_ended(advanced)
        return advanced + ended

    def cancel(self, sequence: Sequence) -> None:
        """Ends a sequence at once, whatever it is doing; one that has ended stays as it is."""
        if sequence.finish_reason is None:
            sequence.finish_reason = "cancelled"
            self._finish(sequence)

    def abort(self) -> None:
        """Drops everything that waits or runs."""
        for sequence in [*self.waiting, *self.reading, *self.running, *self.away]:
            self.cancel(sequence)

    # ------------------------------------------------------------------------------------ before the model runs

    def _come_back(self) -> None:
        """Sequences in host memory return, in order, as soon as their pages and one more for each row are free."""
        for sequence in sorted(self.away, key=lambda each: each.arrival):
            if any(other.first is not None and other.arrival < sequence.arrival for other in self.reading):
                return  # an older one needs pages to begin
            while not (fits := self.cache.can_return(sequence.away, beside=bool(self.running))) and self.kept:
                self._drop_kept()
            if not fits and self.running:
                return
            sequence.slot, sequence.away = self.cache.swap_in(sequence.away), None
            self.away.remove(sequence)
            self.running.append(sequence)

    def _admit(self) -> list[Sequence]:
        """Takes from the queue what fits → those whose prompt was read already, which have their first token now."""
        admitted, limit = [], self.cache.page_limit
        active = [*self.running, *self.reading]
        promised = sum(self.predictor.final_pages(sequence) for sequence in active) if limit is not None else 0
        while self.waiting and not self.away and len(active) < self.max_batch:
            sequence = self.waiting[0]
            promised += self.predictor.final_pages(sequence) if limit is not None else 0
            if active and limit is not None and promised > limit:
                break
            alone = sequence.trace is not None  # its prompt's decisions are asked for
            read = None if alone else next((read for read in self.kept if read.prompt == sequence.prompt), None)
            if read is None and not alone and any(other.prompt == sequence.prompt for other in self.reading):
                break  # the prompt is being read: a step later it can be taken over
            if read is not None and not self._take_over(sequence, read):
                break
            self.waiting.popleft()
            sequence.times["admitted"] = time.perf_counter()
            active.append(sequence)
            if read is None:
                sequence.partial = self.cache.prompt()
                self.reading.append(sequence)
            else:
                admitted.append(sequence)
        self._drop_unwanted()
        return admitted

    def _take_over(self, sequence: Sequence, read: Read) -> bool:
        try:
            sequence.slot = self.cache.fork(read.slot)
        except PoolExhausted:
            return False
        self.running.append(sequence)
        sequence.advance(read.logits)
        return True

    def _make_room(self) -> list[Sequence]:
        """Preempts until every running sequence can take one more token → one that cannot though it is alone."""
        while self.running:
            slots = torch.tensor([sequence.slot for sequence in self.running], device=self.runner.model.device)
            if self.cache.can_append(slots):
                break
            if self.kept:
                self._drop_kept()
            elif len(self.running) > 1:
                self._preempt(max(self.running, key=lambda each: each.arrival))
            else:
                return [self._out_of_memory(self.running[0])]
        return []

    def _chunks(self) -> tuple[list[Chunk], list[Sequence]]:
        """The next tokens of prompts, oldest first; none while a prompt that is read waits for pages."""
        chunks, readers, left = [], [], self.prefill_tokens
        if any(sequence.first is not None for sequence in self.reading):
            return chunks, readers
        for sequence in self.reading:
            done = sequence.partial.done
            count = min(left, len(sequence.prompt) - done)
            if count:
                chunks.append(Chunk(sequence.partial, sequence.prompt[done : done + count]))
                readers.append(sequence)
                left -= count
        return chunks, readers

    # ------------------------------------------------------------------------------------ after it

    @staticmethod
    def _traced(fed: list[Sequence], readers: list[Sequence]) -> bool:
        return any(sequence.trace is not None for sequence in (*fed, *readers))

    def _trace(self, fed: list[Sequence], readers: list[Sequence], chunks: list[Chunk]) -> None:
        """Hands the merging decisions of a step to the sequences that ask for them."""
        if not self._traced(fed, readers):
            return
        sizes = [*(1 for _ in fed), *(len(chunk.tokens) for chunk in chunks)]
        for sequence, merges in zip((*fed, *readers), self.runner.merges.split(sizes), strict=True):
            if sequence.trace is not None:
                sequence.trace += merges.unbind()

    def _load(self, ended: list[Sequence]) -> list[Sequence]:
        """Prompts that are read become pages, and their sequences run → those that could, with their first token."""
        loaded = []
        for sequence in [each for each in self.reading if each.first is not None]:
            if not self._load_one(sequence):
                if not self.running and all(other.arrival > sequence.arrival for other in self.away):
                    ended.append(self._out_of_memory(sequence))
                break
            loaded.append(sequence)
        return loaded

    def _load_one(self, sequence: Sequence) -> bool:
        while True:
            slot, common = donor(sequence.prompt, self.running, self.kept)
            try:
                sequence.slot = self.cache.load(sequence.partial, donor=slot, common=common)
                break
            except PoolExhausted:
                later = [other for other in self.running if other.arrival > sequence.arrival]
                if self.kept:
                    self._drop_kept()
                elif later:
                    self._preempt(max(later, key=lambda each: each.arrival))
                else:
                    return False
        logits, sequence.first, sequence.partial = sequence.first, None, None
        self.reading.remove(sequence)
        self.running.append(sequence)
        self.predictor.learn(sequence.slot, len(sequence.prompt))
        self._keep(sequence, logits)
        sequence.advance(logits)
        return True

    def _keep(self, sequence: Sequence, logits: torch.Tensor) -> None:
        """Keeps a prompt that has just been read if others wait with the same one and there is room."""
        room = len(self.kept) < KEPT_PROMPTS and self.cache.free_slots > self.max_batch - len(self.running)
        if room and any(other.prompt == sequence.prompt for other in self.waiting):
            try:
                self.kept.append(Read(sequence.prompt, self.cache.fork(sequence.slot), logits))
            except PoolExhausted:
                pass  # the others read it themselves

    def _preempt(self, sequence: Sequence) -> None:
        sequence.away, sequence.slot = self.cache.swap_out(sequence.slot), None
        sequence.preemptions += 1
        self.preemptions += 1
        self.running.remove(sequence)
        self.away.append(sequence)

    def _drop_kept(self) -> None:
        self.cache.close(self.kept.pop(0).slot)

    def _drop_unwanted(self) -> None:
        for read in [read for read in self.kept if all(other.prompt != read.prompt for other in self.waiting)]:
            self.kept.remove(read)
            self.cache.close(read.slot)

    def _out_of_memory(self, sequence: Sequence) -> Sequence:
        sequence.finish_reason = "memory"
        self._finish(sequence)
        return sequence

    def _finish_ended(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            if sequence.finish_reason and "finished" not in sequence.times:
                self._finish(sequence)

    def _finish(self, sequence: Sequence) -> None:
        sequence.end_text()
        sequence.times["finished"] = time.perf_counter()
        if sequence.slot is not None:
            sequence.stats = measure(
                self.cache, sequence.slot, prompt_tokens=len(sequence.prompt), generated=len(sequence.tokens),
                cached_tokens=sequence.position, seconds=sequence.times["finished"] - sequence.times["added"],
                preemptions=sequence.preemptions,
            )
            self.predictor.learn(sequence.slot, sequence.position)
            self.cache.close(sequence.slot)
            self.running.remove(sequence)
        for queue in (self.waiting, self.reading, self.away):
            if sequence in queue:
                queue.remove(sequence)
        if sequence.tokens and sequence.finish_reason != "cancelled":
            self.predictor.learn_end(sequence)
        sequence.slot = sequence.away = sequence.partial = sequence.first = None
        self._drop_unwanted()
