"""Resumable batches: which tokens a step reads is a function of (seed, step) alone.

The token stream is cut into sequences of T tokens (plus the next one as the last label). Each pass over them
is a new permutation. Sequence ``i`` of the run is the ``i``-th of that order whatever the parallel layout, so
a resumed run, or one on more ranks, reads the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from data.tokens import Corpus
from dmc.training.config import LogConfig, OptimConfig


@dataclass(frozen=True)
class Batch:
    """``tokens``, ``labels`` [B, T] int64; ``starts`` [B, T] bool, first tokens of documents; ``samples`` [B]
    int64, global indices of the sequences in the order of the run."""

    tokens: Tensor
    labels: Tensor
    starts: Tensor
    samples: Tensor

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        return Batch(*(t.to(device) for t in (self.tokens, self.labels, self.starts, self.samples)))


class Sequences:
    """A corpus cut into sequences."""

    def __init__(self, corpus: Corpus, length: int, *, seed: int = 0) -> None:
        self._corpus, self._length, self._seed = corpus, length, seed
        self.count = (len(corpus.tokens) - 1) // length
        if self.count < 1:
            raise ValueError(
                f"the text has {len(corpus.tokens)} tokens, fewer than one sequence of {length} and its last "
                "label: use more text or a smaller data.sequence_length"
            )
        self._order: tuple[int, Tensor] | None = None

    def batch(self, samples: list[int]) -> Batch:
        """The sequences at these places of the shuffled, endless order."""
        return self._cut([self._place(i) for i in samples], samples)

    def within_documents(self, count: int) -> Batch:
        """``count`` sequences that lie within one document each, spread evenly over the corpus: the evaluation set.

        Without document borders inside, every engine and baseline scores the same predictions.

        Raises:
            ValueError: if the corpus has fewer.
        """
        inside = self._corpus.tokens[: self.count * self._length].view(self.count, self._length)[:, :-1]
        whole = (inside != self._corpus.end).all(dim=1).nonzero().flatten().tolist()
        if count > len(whole):
            raise ValueError(
                f"the held-out text has {len(whole)} sequences of {self._length} tokens within one document, "
                f"log.eval_sequences asks for {count}: lower it, or give longer held-out documents"
            )
        return self._cut([whole[i * len(whole) // count] for i in range(count)], list(range(count)))

    def _place(self, sample: int) -> int:
        epoch, within = divmod(sample, self.count)
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._order = (epoch, torch.randperm(self.count, generator=generator))
        return int(self._order[1][within])

    def _cut(self, places: list[int], samples: list[int]) -> Batch:
        stream, length = self._corpus.tokens, self._length
        rows = torch.stack([stream[p * length : (p + 1) * length + 1] for p in places])
        tokens = rows[:, :-1]
        starts = torch.zeros_like(tokens, dtype=torch.bool)
        starts[:, 1:] = tokens[:, :-1] == self._corpus.end
        starts[:, 0] = True
        return Batch(tokens.contiguous(), rows[:, 1:].contiguous(), starts, torch.tensor(samples))


class Source:
    """The batches of a run: the training order and the fixed evaluation set."""

    def __init__(
        self, training: Corpus, held_out: Corpus, length: int, optim: OptimConfig, log: LogConfig, seed: int,
    ) -> None:
        self._training = Sequences(training, length, seed=seed)
        self._held_out = Sequences(held_out, length)
        self._global, self._micro, self._evaluated = optim.global_batch, optim.micro_batch, log.eval_sequences
        self._held_out.within_documents(log.eval_sequences)  # a text that is too short is refused now, not after the first step

    def micro_batches(self, step: int, *, rank: int, ranks: int) -> Iterator[Batch]:
        """The micro-batches of one step for data-parallel rank ``rank`` of ``ranks``, in order.

        Micro-batch m of rank r holds sequences ``step * global + (m * ranks + r) * micro`` and following.
        """
        for m in range(self._global // (self._micro * ranks)):
            first = step * self._global + (m * ranks + rank) * self._micro
            yield self._training.batch(list(range(first, first + self._micro)))

    def evaluation(self, *, rank: int, ranks: int) -> list[Batch]:
        """This rank's share of the evaluation set, as batches of one shape.

        Raises:
            ValueError: if the ranks do not share the sequences out evenly.
        """
        if self._evaluated % ranks:
            raise ValueError(
                f"log.eval_sequences {self._evaluated} is not a multiple of the {ranks} data-parallel ranks: change it"
            )
        whole = self._held_out.within_documents(self._evaluated)
        mine = [t[rank::ranks] for t in (whole.tokens, whole.labels, whole.starts, whole.samples)]
        size = math.gcd(len(mine[0]), self._micro)
        return [Batch(*part) for part in zip(*(t.split(size) for t in mine), strict=True)]
