"""vLLM's requests and their sequences in the cache.

vLLM names a request by its id, and in a batch by its blocks. A worker sees which requests are scheduled (`Requests.follow`), and
attention sees the rows of the batch (`Requests.batch`). The tokens of a request up to its `Request.prefill` are a prompt of the
cache; its entries are put into pages when the first generated token comes, as in `dmc.engine`. A preempted request starts again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dmc.cache import KVCache, Prompt, Step, Swapped
from dmc.rope import Rope
from dmc_vllm.prompt import fitted
from dmc_vllm.reservation import Reservation

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

_log = logging.getLogger("vllm.dmc")  # below vLLM's own, which has the handlers


@dataclass
class Request:
    """A request that has blocks.

    Attributes:
        blocks: ids of its blocks.
        prefill: tokens that it has when it is scheduled first: those of the prompt and, after a preemption, generated ones.
        done: tokens in the cache.
        prompt: its state until the prompt is in pages; None: no token has come yet, or it is in pages.
        slot: of the cache, once it is in pages.
        swapped: its state if it had to give up its slot.
        used: number of the step in which it ran last.
    """

    blocks: list[int]
    prefill: int
    done: int = 0
    prompt: Prompt | None = None
    slot: int | None = None
    swapped: Swapped | None = None
    used: int = 0


@dataclass(frozen=True)
class Batch:
    """A step of the cache over a batch of vLLM.

    Attributes:
        step: of the cache.
        order: int64 ``[N]``, the batch's tokens in the order of the step; None: as they are.
    """

    step: Step
    order: Tensor | None


class Requests:
    """See the head of this file.

    Args:
        cache: placed in vLLM's KV memory.
        rope: of the model.
        reservation: of a request.

    Attributes:
        forced: number of times that a head could not open an entry in a generated token's step, since its request had no page.
        forced_in_prompts: number of entries of prompts that were merged or dropped for that reason.
    """

    def __init__(self, cache: KVCache, rope: Rope, reservation: Reservation) -> None:
        self.cache, self.rope, self.reservation = cache, rope, reservation
        self.forced = self.forced_in_prompts = self.tokens = 0
        self._requests: dict[str, Request] = {}
        self._prompts: dict[str, int] = {}  # tokens of each request's prompt, also while it is preempted
        self._owners: dict[int, str] = {}  # of blocks
        self._step, self._warned = 0, 0

    # ------------------------------------------------------------------------------------ vLLM's scheduler

    def follow(self, scheduled: SchedulerOutput) -> None:
        """Takes notice of a step of vLLM's scheduler, before it runs."""
        for name in (*scheduled.finished_req_ids, *(scheduled.preempted_req_ids or ())):
            self._drop(name)
        for name in scheduled.finished_req_ids:
            self._prompts.pop(name, None)
        for new in scheduled.scheduled_new_reqs:
            self._prompts[new.req_id] = new.prompt_len
            self._begin(new.req_id, new.block_ids[0], len(new.prefill_token_ids or ()) or new.prompt_len)
        cached = scheduled.scheduled_cached_reqs
        for name, blocks, generated in zip(cached.req_ids, cached.new_block_ids, cached.num_output_tokens, strict=True):
            if name in cached.resumed_req_ids:
                self._begin(name, blocks[0], self._prompts[name] + generated)
            elif blocks is not None:
                self._give(name, blocks[0])

    def _begin(self, name: str, blocks: Sequence[int], prefill: int) -> None:
        self._drop(name)
        self._requests[name] = Request([], prefill)
        self._give(name, blocks)

    def _give(self, name: str, blocks: Sequence[int]) -> None:
        """Blocks go to a request. A request that had one of them was preempted: vLLM does not say so in every version of its
        model runner."""
        for block in blocks:
            if self._owners.get(block, name) != name:
                self._drop(self._owners[block])
            self._owners[block] = name
        self._requests[name].blocks += blocks

    def _drop(self, name: str) -> None:
        """Ends a sequence, if the request has one."""
        request = self._requests.pop(name, None)
        if request is None:
            return
        for block in request.blocks:
            if self._owners.get(block) == name:
                del self._owners[block]
        if request.slot is not None:
            self.cache.close(request.slot)

    # ------------------------------------------------------------------------------------ a batch

    def batch(self, rows: Sequence[tuple[int, int, int, int]]) -> Batch | None:
        """The step of the cache over a batch.

        Args:
            rows: of each request its first block, its tokens in the batch from ... up to, and its tokens including these.

        Returns:
            None if the batch is vLLM's trial of the model, without requests.
        """
        self._step += 1
        found = [(self._requests[self._owners[row[0]]], *row[1:]) for row in rows if row[0] in self._owners]
        if not found:
            return None
        assert len(found) == len(rows), "a batch has rows of unknown requests"
        for request, *_ in found:
            request.used = self._step
        running, chunks, order = [], [], []
        for request, start, end, length in found:
            first = length - (end - start)
            assert first == request.done, f"a request continues at token {first}, but {request.done} are cached"
            request.done = length
            if first >= request.prefill:
                assert end - start == 1, "a generated token comes alone"
                self._make_ready(request, first)
                running.append((request, start, first))
            else:
                request.prompt = request.prompt or self.cache.prompt()
                chunks.append((request.prompt, start, end))
        order = [start for _, start, _ in running] + [at for _, start, end in chunks for at in range(start, end)]
        self.tokens += len(order)
        device = self.rope.frequencies.device
        slots, positions = (
            torch.tensor(part, dtype=torch.int64, device=device)
            for part in ([request.slot for request, *_ in running], [first for *_, first in running])
        )
        closed = None
        if running:
            limits = torch.tensor([self.reservation.pages(first + 1) for *_, first in running], device=device)
            closed = self.cache.crowded(slots, limits)
        if closed is not None:
            self.forced += int(closed.sum())
        self._warn()
        step = self.cache.step(
            slots, positions, [(prompt, end - start) for prompt, start, end in chunks], self.rope, closed=closed
        )
        same = order == list(range(len(order)))
        return Batch(step, None if same else torch.tensor(order, dtype=torch.int64, device=device))

    def _make_ready(self, request: Request, tokens: int) -> None:
        """Gives a request a slot of the cache."""
        if request.slot is not None:
            return
        if not self.cache.free_slots:
            self._free_slot()
        if request.swapped is not None:
            request.slot, request.swapped = self.cache.swap_in(request.swapped), None
            return
        prompt, merged = fitted(request.prompt, self.cache, self.rope, self.reservation.pages(tokens))
        self.forced_in_prompts += merged
        request.slot, request.prompt = self.cache.load(prompt), None

    def _free_slot(self) -> None:
        """Swaps out the sequence that has not run for longest: one that was preempted, as far as is known here."""
        held = [request for request in self._requests.values() if request.slot is not None]
        oldest = min(held, key=lambda request: request.used)
        assert oldest.used < self._step, "more sequences run than max_num_seqs"
        oldest.swapped, oldest.slot = self.cache.swap_out(oldest.slot), None

    def _warn(self) -> None:
        """Says that merges were forced, the first time and whenever their number has doubled."""
        if self.forced + self.forced_in_prompts < max(1, 2 * self._warned):
            return
        self._warned = self.forced + self.forced_in_prompts
        _log.warning(
            "requests compress less than the cap assumes: %d times a head could not start an entry, %d entries of prompts were "
            "merged, in %d tokens; set a lower cap",
            self.forced,
            self.forced_in_prompts,
            self.tokens,
        )

    # ------------------------------------------------------------------------------------ figures

    def stats(self) -> dict[str, int | float]:
        """Figures of now: requests with blocks, pages and entries of those in pages, their tokens; and since the start: tokens,
        and `forced`, `forced_in_prompts`."""
        paged = [request for request in self._requests.values() if request.slot is not None]
        return {
            "requests": len(self._requests),
            "pages": self.cache.used_pages,
            "entries": sum(int(self.cache.entries(request.slot).sum()) for request in paged),
            "head_tokens": sum(request.done for request in paged) * self.cache.shape.layers * self.cache.shape.heads,
            "tokens": self.tokens,
            "forced": self.forced,
            "forced_in_prompts": self.forced_in_prompts,
        }
