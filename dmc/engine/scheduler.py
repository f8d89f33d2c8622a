"""Who runs: sequences from their arrival to their end, in the order of arrival, and the pages of the cache that they hold."""

from __future__ import annotations

import time
import zlib
from collections import deque
from dataclasses import dataclass, field

import torch

from dmc.cache import KVCache, PoolExhausted
from dmc.engine.predict import Predictor
from dmc.engine.prefix import Read, donor
from dmc.engine.sequence import Sequence, State
from dmc.engine.stats import measure

KEPT_PROMPTS = 4  # slots of the cache beyond those of running sequences, for prompts that others wait with


@dataclass
class Batch:
    """What goes through the model in a step.

    Attributes:
        fed: running sequences that are fed their newest token.
        prompts: prefilling sequences, and how many of their next tokens are fed.
    """

    fed: list[Sequence] = field(default_factory=list)
    prompts: list[tuple[Sequence, int]] = field(default_factory=list)


class Scheduler:
    """Decides who waits, who runs and who makes room; `State` has the transitions.

    A sequence is admitted when the pages that it and all running ones are predicted to end with fit into the pool; where the
    policy bounds the entries of a head, the pages that they can need at most. Where the prediction was wrong and pages run
    out, the latest arrival is swapped out to host memory, and nothing is admitted until it is back. So the oldest sequence
    always goes on.

    Args:
        cache: of all sequences; it has `KEPT_PROMPTS` slots more than ``max_batch``.
        predictor: of pages.
        device: of the cache.
        max_batch: sequences at a time, in the cache or prefilling.
        prefill_tokens: of prompts in a step, at most.

    Attributes:
        waiting, prefilling, running, swapped: sequences by their state; those that are prefilled are among ``prefilling``.
        kept: prompts that were read, for others that wait with the same one.
        preemptions: how many sequences were swapped out so far.
    """

    def __init__(
        self, cache: KVCache, predictor: Predictor, device: torch.device, *, max_batch: int, prefill_tokens: int
    ) -> None:
        self.cache, self.predictor, self.device = cache, predictor, device
        self.max_batch, self.prefill_tokens = max_batch, prefill_tokens
        self.waiting: deque[Sequence] = deque()
        self.prefilling: list[Sequence] = []
        self.running: list[Sequence] = []
        self.swapped: list[Sequence] = []
        self.kept: list[Read] = []
        self.preemptions = 0
        self._arrivals = 0
        self._ended: list[Sequence] = []

    @property
    def all(self) -> list[Sequence]:
        """Sequences that have not ended."""
        return [*self.waiting, *self.prefilling, *self.running, *self.swapped]

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence that waits."""
        sequence.arrival = self._arrivals
        self._arrivals += 1
        self.waiting.append(sequence)

    def fingerprint(self) -> int:
        """32 bits of who is where: the same on all ranks of an engine, or they are out of step."""
        states = [(one.arrival, one.state.value, one.slot, len(one.tokens), one.partial and one.partial.done) for one in self.all]
        return zlib.crc32(repr((states, [read.slot for read in self.kept], self.preemptions)).encode())

    # ------------------------------------------------------------------------------------ before the model runs

    def admit(self) -> list[Sequence]:
        """Brings back who was swapped out and takes from the queue what fits.

        Returns:
            Those that took over a prompt which was read already: they have logits, and are to get their first token now.
        """
        self._swap_in()
        taken, limit = [], self.cache.page_limit
        active = [*self.running, *self.prefilling]
        promised = sum(self.predictor.final_pages(sequence) for sequence in active) if limit is not None else 0
        while self.waiting and not self.swapped and len(active) < self.max_batch:
            sequence = self.waiting[0]
            promised += self.predictor.final_pages(sequence) if limit is not None else 0
            if active and limit is not None and promised > limit:
                break
            alone = sequence.trace is not None  # its prompt's decisions are asked for
            read = None if alone else next((read for read in self.kept if read.prompt == sequence.prompt), None)
            if read is None and not alone and any(other.prompt == sequence.prompt for other in self.prefilling):
                break  # the prompt is being read: a step later it can be taken over
            if read is not None and not self._take_over(sequence, read):
                break
            self.waiting.popleft()
            sequence.times["admitted"] = time.perf_counter()
            active.append(sequence)
            if read is None:
                sequence.become(State.PREFILLING)
                sequence.partial = self.cache.prompt()
                self.prefilling.append(sequence)
            else:
                taken.append(sequence)
        self._drop_unwanted()
        return taken

    def batch(self, begun: list[Sequence]) -> Batch:
        """Makes room for one more token of every running sequence, and says what goes through the model.

        Args:
            begun: sequences that got a token in this step already.
        """
        self._make_room()
        fed = [sequence for sequence in self.running if sequence not in begun]
        return Batch(fed, self._prompts())

    def _swap_in(self) -> None:
        """Sequences in host memory return, in order, as soon as their pages and one more for each row are free."""
        for sequence in sorted(self.swapped, key=lambda each: each.arrival):
            if any(other.state is State.PREFILLED and other.arrival < sequence.arrival for other in self.prefilling):
                return  # an older one needs pages to begin
            while not (fits := self.cache.can_return(sequence.swapped, beside=bool(self.running))) and self.kept:
                self._drop_kept()
            if not fits and self.running:
                return
            sequence.slot, sequence.swapped = self.cache.swap_in(sequence.swapped), None
            sequence.become(State.RUNNING)
            self.swapped.remove(sequence)
            self.running.append(sequence)

    def _take_over(self, sequence: Sequence, read: Read) -> bool:
        try:
            sequence.slot = self.cache.fork(read.slot)
        except PoolExhausted:
            return False
        sequence.logits = read.logits
        sequence.become(State.RUNNING)
        self.running.append(sequence)
        return True

    def _make_room(self) -> None:
        """Swaps out until every running sequence can take one more token; one that cannot though it is alone ends."""
        while self.running:
            slots = torch.tensor([sequence.slot for sequence in self.running], device=self.device)
            if self.cache.can_append(slots):
                return
            if self.kept:
                self._drop_kept()
            elif len(self.running) > 1:
                self.preempt(max(self.running, key=lambda each: each.arrival))
            else:
                self._out_of_memory(self.running[0])

    def _prompts(self) -> list[tuple[Sequence, int]]:
        """The next tokens of prompts, oldest first; none while a prompt that is read waits for pages."""
        if any(sequence.state is State.PREFILLED for sequence in self.prefilling):
            return []
        prompts, left = [], self.prefill_tokens
        for sequence in self.prefilling:
            count = min(left, len(sequence.prompt) - sequence.partial.done)
            if count:
                prompts.append((sequence, count))
                left -= count
        return prompts

    # ------------------------------------------------------------------------------------ after it

    def load(self) -> list[Sequence]:
        """Prompts that are read become pages, and their sequences run → those that could, which have logits."""
        loaded = []
        for sequence in [each for each in self.prefilling if each.state is State.PREFILLED]:
            if not self._load(sequence):
                if not self.running and all(other.arrival > sequence.arrival for other in self.swapped):
                    self._out_of_memory(sequence)
                break
            loaded.append(sequence)
        return loaded

    def finish(self, sequences: list[Sequence]) -> None:
        """Ends sequences that have a `finish_reason`: their pages are back in the pool, and they have their figures."""
        for sequence in sequences:
            if sequence.finish_reason and sequence.state is not State.FINISHED:
                self._finish(sequence)

    def ended(self) -> list[Sequence]:
        """Sequences that ended since the last call because the pool cannot hold one more token of them."""
        ended, self._ended = self._ended, []
        return ended

    def preempt(self, sequence: Sequence) -> None:
        """Swaps a running sequence out to host memory."""
        sequence.swapped, sequence.slot = self.cache.swap_out(sequence.slot), None
        sequence.become(State.SWAPPED)
        sequence.preemptions += 1
        self.preemptions += 1
        self.running.remove(sequence)
        self.swapped.append(sequence)

    def _load(self, sequence: Sequence) -> bool:
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
                    self.preempt(max(later, key=lambda each: each.arrival))
                else:
                    return False
        sequence.partial = None
        sequence.become(State.RUNNING)
        self.prefilling.remove(sequence)
        self.running.append(sequence)
        self.predictor.learn(sequence.slot, len(sequence.prompt))
        self._keep(sequence)
        return True

    def _keep(self, sequence: Sequence) -> None:
        """Keeps a prompt that has just been read if others wait with the same one and there is room."""
        room = len(self.kept) < KEPT_PROMPTS and self.cache.free_slots > self.max_batch - len(self.running)
        if room and any(other.prompt == sequence.prompt for other in self.waiting):
            try:
                self.kept.append(Read(sequence.prompt, self.cache.fork(sequence.slot), sequence.logits))
            except PoolExhausted:
                pass  # the others read it themselves

    def _drop_kept(self) -> None:
        self.cache.close(self.kept.pop(0).slot)

    def _drop_unwanted(self) -> None:
        for read in [read for read in self.kept if all(other.prompt != read.prompt for other in self.waiting)]:
            self.kept.remove(read)
            self.cache.close(read.slot)

    def _out_of_memory(self, sequence: Sequence) -> None:
        sequence.finish_reason = "memory"
        self._finish(sequence)
        self._ended.append(sequence)

    def _finish(self, sequence: Sequence) -> None:
        sequence.end_text()
        sequence.become(State.FINISHED)
        sequence.times["finished"] = time.perf_counter()
        if sequence.slot is not None:
            sequence.stats = measure(
                self.cache,
                sequence.slot,
                prompt_tokens=len(sequence.prompt),
                generated=len(sequence.tokens),
                cached_tokens=sequence.position,
                seconds=sequence.times["finished"] - sequence.times["added"],
                preemptions=sequence.preemptions,
            )
            self.predictor.learn(sequence.slot, sequence.position)
            self.cache.close(sequence.slot)
        for queue in (self.waiting, self.prefilling, self.running, self.swapped):
            if sequence in queue:
                queue.remove(sequence)
        if sequence.tokens and sequence.finish_reason != "cancelled":
            self.predictor.learn_end(sequence)
        sequence.slot = sequence.swapped = sequence.partial = sequence.logits = None
        self._drop_unwanted()
