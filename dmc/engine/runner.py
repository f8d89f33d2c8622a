"""The model over the cache: one step of running sequences and of prompts, together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dmc.cache import KVCache, LatePrompt, Prompt
from dmc.model import Decoder
from dmc.model.group import Group


@dataclass(frozen=True)
class Chunk:
    """Tokens of a prompt that come next, at least one."""

    prompt: Prompt | LatePrompt
    tokens: Sequence[int]


class Runner:
    """Runs the model for sequences that are named by their slots of the cache.

    Args:
        model: the model, or a rank's part of it.
        cache: of its heads.
        group: of the ranks; all of them then make the same calls.
    """

    def __init__(self, model: Decoder, cache: KVCache, group: Group | None = None) -> None:
        self.model, self.cache, self.group = model, cache, group
        self.merges: Tensor | None = None

    @torch.no_grad()
    def step(
        self,
        slots: Sequence[int],
        tokens: Sequence[int],
        positions: Sequence[int],
        chunks: Sequence[Chunk] = (),
        *,
        trace: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """Feeds one token to each running sequence, and a chunk to each of some prompts, in one pass of the model.

        Returns:
            Hidden states: ``[S, hidden]`` of the running sequences, and ``[T, hidden]`` of each chunk. With ``trace``,
            `merges` then says for all tokens, bool ``[N, L, H]``, where they were merged.
        """
        sizes = [len(slots), *(len(chunk.tokens) for chunk in chunks)]
        flat = [*tokens, *(token for chunk in chunks for token in chunk.tokens)]
        parts = [(chunk.prompt, len(chunk.tokens)) for chunk in chunks]
        attend = self.cache.step(
            self._ints(slots),
            self._ints(positions),
            parts,
            self.model.rope,
            merges=self.model.config.decision is not None,
            trace=trace,
        )
        hidden = self.model.hidden(self._ints(flat), attend)
        if trace:
            self.merges = torch.stack(attend.merges, dim=1).cpu()
            if self.group:
                self.merges = torch.cat(self.group.all(self.merges.byte()), dim=2).bool()
        first, *rest = hidden.split(sizes)
        return first, rest

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor | None:
        """``[N, hidden]`` → logits ``[N, V]``, fp32 at least; None on ranks other than 0."""
        return self.model.logits(hidden)

    def agree(self, tokens: list[int]) -> list[int]:
        """Rank 0's tokens, on all ranks; elsewhere ``tokens`` says how many."""
        return self.group.broadcast(torch.tensor(tokens)).tolist() if self.group and tokens else tokens

    def _ints(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.model.device)
