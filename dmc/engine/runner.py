"""The model over the cache: one prefill of several prompts, one decode step of several sequences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dmc.cache import KVCache
from dmc.model import Llama


class Runner:
    """Runs the model for sequences that are named by their slots of the cache."""

    def __init__(self, model: Llama, cache: KVCache) -> None:
        self.model, self.cache = model, cache

    @torch.no_grad()
    def prefill(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        """Caches whole prompts in empty slots → last hidden states ``[B, T, hidden]``, right-padded."""
        lengths = [len(prompt) for prompt in prompts]
        tokens = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        attend = self.cache.prefill(self._ints(slots), self._ints(lengths), self.model.rope)
        return self.model.hidden(tokens.to(self.model.device), attend)

    @torch.no_grad()
    def decode(self, slots: Sequence[int], tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Caches one more token of each sequence → logits of the next ``[S, V]``, fp32 at least."""
        attend = self.cache.decode(self._ints(slots), self._ints(positions), self.model.rope)
        hidden = self.model.hidden(self._ints(tokens)[:, None], attend)
        return self.model.logits(hidden[:, 0])

    @torch.no_grad()
    def last_logits(self, hidden: Tensor, lengths: Sequence[int]) -> Tensor:
        """Logits after the last token of each prompt: hidden of `prefill` → ``[B, V]``."""
        return self.model.logits(hidden[torch.arange(len(hidden)), self._ints(lengths) - 1])

    def _ints(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.model.device)
