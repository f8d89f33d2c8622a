"""What a request cost: tokens, time, and the bytes of its cache, everything counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dmc.cache import KVCache

HELD = {"pages": "encoded pages", "exact": "full-precision pages", "tail": "accumulating entries", "tables": "block tables"}
"""Kinds of `KVCache.held`, as people read them."""


@dataclass(frozen=True)
class Stats:
    """Figures of a request, or of several together.

    Attributes:
        prompt_tokens, generated_tokens: of `LLM.score`, generated are those that went through the decode step.
        seconds: of wall time from the request's start to its end; of several, of the whole call.
        cached_tokens: that went into the cache: all but the last, which is never fed back.
        entries: int64 ``[L, H]``, cache lengths at the end (of several requests: summed).
        held: bytes held at the end, by kind; see `KVCache.held`.
        dense_bytes: of an uncompressed bf16 cache of the same tokens.
        shared_bytes: of ``held``, pages that sequences with the same beginning held as well.
        codec_error: relative error (Frobenius) of encoded keys and of values, on a sample of all pages that the engine
            has encoded so far; zeros for a lossless codec.
        preemptions: how often it went to host memory.
    """

    prompt_tokens: int
    generated_tokens: int
    seconds: float
    cached_tokens: int
    entries: Tensor
    held: dict[str, int]
    dense_bytes: int
    shared_bytes: int = 0
    codec_error: tuple[float, float] = (0.0, 0.0)
    preemptions: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over all the time, the prompt's included."""
        return self.generated_tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def cr(self) -> float:
        """Measured compression ratio: tokens / entries, over all layers and heads."""
        return self.cached_tokens * self.entries.numel() / int(self.entries.sum())

    @property
    def cr_per_layer(self) -> list[float]:
        """Measured compression ratio of each layer."""
        return (self.cached_tokens * self.entries.shape[1] / self.entries.sum(1)).tolist()

    @property
    def cr_per_head(self) -> list[list[float]]:
        """Measured compression ratio of each layer and key/value head."""
        return (self.cached_tokens / self.entries).tolist()

    @property
    def held_bytes(self) -> int:
        """Bytes of all tensors that the cache held for this request."""
        return sum(self.held.values())

    @property
    def ratio(self) -> float:
        """Bytes of the dense bf16 cache / bytes held."""
        return self.dense_bytes / self.held_bytes


def measure(
    cache: KVCache, slot: int, *, prompt_tokens: int, cached_tokens: int, generated: int, seconds: float, preemptions: int = 0
) -> Stats:
    """The figures of a sequence that is about to be closed."""
    return Stats(
        prompt_tokens=prompt_tokens,
        generated_tokens=generated,
        seconds=seconds,
        cached_tokens=cached_tokens,
        entries=cache.entries(slot).cpu(),
        held=cache.held(slot),
        dense_bytes=cache.dense_bytes(cached_tokens),
        shared_bytes=cache.shared_bytes(slot),
        codec_error=cache.codec_error,
        preemptions=preemptions,
    )


def total(stats: Sequence[Stats], seconds: float) -> Stats:
    """Several requests together, which took ``seconds`` as a whole."""
    return Stats(
        prompt_tokens=sum(each.prompt_tokens for each in stats),
        generated_tokens=sum(each.generated_tokens for each in stats),
        seconds=seconds,
        cached_tokens=sum(each.cached_tokens for each in stats),
        entries=torch.stack([each.entries for each in stats]).sum(0),
        held={kind: sum(each.held[kind] for each in stats) for kind in stats[0].held},
        dense_bytes=sum(each.dense_bytes for each in stats),
        shared_bytes=sum(each.shared_bytes for each in stats),
        codec_error=stats[-1].codec_error,
        preemptions=sum(each.preemptions for each in stats),
    )
