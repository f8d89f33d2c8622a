"""Model and cache of all ranks, as the engine sees them: the interfaces of `Runner` and `KVCache`.

A page count here is one of a rank: ``limit`` pages are in each rank's pool, ``free`` are free on the scarcest, and what
a sequence needs is what it needs where it needs most. Only bytes and ``used`` are sums.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dmc.cache import KVCache, PoolExhausted, Shape
from dmc.engine.parallel_rank import Reply
from dmc.engine.parallel_team import Team
from dmc.engine.runner import Chunk, Runner
from dmc.model import ModelConfig

_numbers = itertools.count()


class Handle:
    """A prompt or a swapped sequence, whose parts are on the ranks until this object goes.

    Attributes:
        number: under which the ranks know it.
        done: tokens of a prompt that have gone through all layers.
        nbytes: of a prompt, on all ranks.
    """

    def __init__(self, team: Team) -> None:
        self.number, self.done, self.nbytes = next(_numbers), 0, 0
        self._forgotten = team.forgotten

    def __del__(self) -> None:
        """The ranks hear of it with the next command."""
        self._forgotten.append(self.number)


@dataclass(frozen=True)
class WholeModel:
    """What others ask of the model as a whole."""

    config: ModelConfig
    dtype: torch.dtype
    device: torch.device


class TeamRunner:
    """`Runner` over all ranks.

    Args:
        team: of the ranks.
        runner: rank 0's own.
        config: of the whole model.
    """

    def __init__(self, team: Team, runner: Runner, config: ModelConfig) -> None:
        self._team = team
        self.model = WholeModel(config, runner.model.dtype, runner.model.device)
        self.cache = TeamCache(team, runner.cache)
        self.merges: Tensor | None = None

    def step(
        self, slots: Sequence[int], tokens: Sequence[int], positions: Sequence[int], chunks: Sequence[Chunk] = (),
        *, trace: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """See `Runner.step`."""
        parts = [(chunk.prompt.number, list(chunk.tokens)) for chunk in chunks]
        replies = self._team.call("step", list(slots), list(tokens), list(positions), parts, trace)
        sizes = zip(*(reply.value[0] for reply in replies), strict=True)
        for chunk, size in zip(chunks, sizes, strict=True):
            chunk.prompt.done += len(chunk.tokens)
            chunk.prompt.nbytes = sum(size)
        if trace:
            self.merges = torch.cat([reply.value[1] for reply in replies], dim=2)
        first, *rest = self._team.own.hidden.split([len(slots), *(len(chunk.tokens) for chunk in chunks)])
        return first, rest

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Runner.logits`."""
        self._team.own.hidden = hidden
        self._team.call("logits", len(hidden))
        return self._team.own.hidden


class TeamCache:
    """`KVCache` over all ranks; see the head of this file.

    Args:
        team: of the ranks.
        own: rank 0's part.
    """

    def __init__(self, team: Team, own: KVCache) -> None:
        self._team, self._own, self.policy, self.codec = team, own, own.policy, own.codec
        part = own.shape
        self.shape = Shape(part.layers, part.heads * team.ranks, part.head_size, part.dtype)

    @property
    def codec_name(self) -> str:
        """See `KVCache.codec_name`."""
        return self._own.codec_name

    @property
    def page_size(self) -> int | list[int]:
        """See `KVCache.page_size`."""
        return self._own.page_size

    @property
    def sink_tokens(self) -> int:
        """See `KVCache.sink_tokens`."""
        return self._own.sink_tokens

    @property
    def window(self) -> int:
        """See `KVCache.window`."""
        return self._own.window

    @property
    def exact_dtype(self) -> torch.dtype:
        """See `KVCache.exact_dtype`."""
        return self._own.exact_dtype

    @property
    def page_bytes(self) -> int:
        """See `KVCache.page_bytes`."""
        return self._own.page_bytes

    @property
    def page_limit(self) -> int | None:
        """Pages of a rank's pool at most; None: it grows as needed."""
        return self._own.page_limit

    # Numbers of the last reply, which any thread may read at any time.

    @property
    def pages(self) -> int:
        """Pages of all ranks."""
        return sum(state.capacity for state in self._team.states)

    @property
    def used_pages(self) -> int:
        """Pages that sequences hold on all ranks."""
        return sum(state.used for state in self._team.states)

    @property
    def free_pages(self) -> int:
        """Free pages of the scarcest rank."""
        return min(state.free for state in self._team.states)

    @property
    def codec_error(self) -> tuple[float, float]:
        """See `KVCache.codec_error`; of all ranks together."""
        sums = [(sum(state.lost[i] for state in self._team.states), sum(state.whole[i] for state in self._team.states))
                for i in (0, 1)]
        return tuple((lost / whole) ** 0.5 if whole else 0.0 for lost, whole in sums)

    @property
    def free_slots(self) -> int:
        """See `KVCache.free_slots`."""
        return self._own.free_slots

    def prompt(self) -> Handle:
        """See `KVCache.prompt`."""
        return Handle(self._team)

    def load(self, prompt: Handle, *, donor: int | None = None, common: int = 0) -> int:
        """See `KVCache.load`."""
        return self._take("load", prompt.number, donor, common)

    def close(self, slot: int) -> None:
        """See `KVCache.close`."""
        self._team.call("close", slot)

    def fork(self, slot: int) -> int:
        """See `KVCache.fork`."""
        return self._take("fork", slot)

    def swap_out(self, slot: int) -> Handle:
        """See `KVCache.swap_out`."""
        handle = Handle(self._team)
        self._team.call("swap_out", slot, handle.number)
        return handle

    def swap_in(self, swapped: Handle) -> int:
        """See `KVCache.swap_in`."""
        return self._take("swap_in", swapped.number)

    def can_append(self, slots: Tensor) -> bool:
        """See `KVCache.can_append`."""
        return self.page_limit is None or all(reply.value for reply in self._team.call("can_append", slots.tolist()))

    def can_return(self, swapped: Handle, *, beside: bool) -> bool:
        """See `KVCache.can_return`."""
        return all(reply.value for reply in self._team.call("can_return", swapped.number, beside))

    def worst_pages(self, tokens: int) -> int:
        """See `KVCache.worst_pages`; of one rank."""
        return self._own.worst_pages(tokens)

    def likely_pages(self, entries: Tensor) -> int:
        """See `KVCache.likely_pages`; of the rank that needs most."""
        return max(self._own.likely_pages(part) for part in entries.split(self._own.shape.heads, dim=1))

    def entries(self, slot: int) -> Tensor:
        """See `KVCache.entries`."""
        return torch.cat([reply.value for reply in self._team.call("entries", slot)], dim=1)

    def held(self, slot: int) -> dict[str, int]:
        """See `KVCache.held`."""
        parts = [reply.value[0] for reply in self._team.call("held", slot)]
        return {kind: sum(part[kind] for part in parts) for kind in parts[0]}

    def shared_bytes(self, slot: int) -> int:
        """See `KVCache.shared_bytes`."""
        return sum(reply.value[1] for reply in self._team.call("held", slot))

    def dense_bytes(self, tokens: int) -> int:
        """See `KVCache.dense_bytes`."""
        return self._own.dense_bytes(tokens) * self._team.ranks

    def check_integrity(self) -> None:
        """See `KVCache.check_integrity`."""
        self._team.call("check_integrity")

    def _take(self, name: str, *arguments: object) -> int:
        """A command that needs pages on every rank, or is done on none."""
        replies: list[Reply] = self._team.call(name, *arguments)
        if any(reply.short for reply in replies):
            self._team.call("undo")
            raise PoolExhausted(f"{sum(reply.short for reply in replies)} of {self._team.ranks} ranks have too few free pages")
        assert len({reply.value for reply in replies}) == 1, "ranks have given a sequence different slots"
        return replies[0].value
