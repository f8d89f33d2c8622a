"""Resumable batches: the tokens that a step reads are a function of (seed, step) alone.

The token stream of each corpus is cut into sequences of T tokens (plus the next one as the last label). Each pass
over them is a new permutation (`data.shuffle`). Sequence ``i`` of the run comes from the corpus that the shares say
(`data.blend`) and is the next one in that corpus's own order, whatever the parallel layout, so a resumed run, or one
on more ranks, reads the same.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from data.blend import Interleave
from data.corpus import Corpus
from data.mixture import Mixture
from data.shuffle import Shuffle
from dmc.training.config import LogConfig, OptimConfig

_ORDERS = 0x9E3779B97F4A7C15  # between the seeds of two corpora of a blend: they are not shuffled alike


@dataclass(frozen=True)
class Batch:
    """``tokens``, ``labels`` [B, T] int64; ``starts`` [B, T] bool, first tokens of documents; ``samples`` [B]
    int64, global indices of the sequences in the order of the run; ``scored`` [B, T] bool, labels that count in the losses,
    None where all do."""

    tokens: Tensor
    labels: Tensor
    starts: Tensor
    samples: Tensor
    scored: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        return self._each(lambda t: t.to(device))

    def every(self, first: int, step: int) -> Batch:
        """The sequences ``first``, ``first + step``, ..."""
        return self._each(lambda t: t[first::step])

    def split(self, size: int) -> list[Batch]:
        """Batches of ``size`` sequences."""
        return [self._each(operator.itemgetter(slice(i, i + size))) for i in range(0, len(self.tokens), size)]

    def _each(self, of: Callable[[Tensor], Tensor]) -> Batch:
        tensors = (getattr(self, item.name) for item in fields(self))
        return Batch(*(t if t is None else of(t) for t in tensors))


class Sequences:
    """A text cut into sequences, in the order of a run."""

    def __init__(self, text: Mixture, length: int, *, seed: int = 0) -> None:
        self._corpora, self._length = text.corpora, length
        self.counts = [_sequences_of(corpus, length) for corpus in text.corpora]
        self._deal = Interleave(list(text.shares))
        self._orders = [Shuffle(n, seed + c * _ORDERS) for c, n in enumerate(self.counts)]

    def batch(self, samples: list[int]) -> Batch:
        """The sequences at these positions of the shuffled, endless order."""
        dealt = [self._deal(i) for i in samples]
        return self._cut([(c, self._orders[c].place(index)) for c, index in dealt], samples)

    def epochs(self, samples: int) -> list[float]:
        """How often the first ``samples`` sequences of the run go through each corpus."""
        return [dealt / count for dealt, count in zip(self._deal.counts(samples), self.counts, strict=True)]

    def within_documents(self, count: int) -> Batch:
        """``count`` sequences that are within one document each, spread evenly over each corpus: the evaluation set.

        Without document boundaries inside, every engine and baseline scores the same predictions. Conversations are shorter than
        a sequence: their sequences hold several, as those of training do. Of a blend each corpus gives its share. Only the
        indices of the corpora are read, and the sequences themselves.

        Raises:
            ValueError: if a corpus has fewer than its share.
        """
        places = [
            iter((_packed if corpus.chat else _whole)(corpus, self._length, total, wanted))
            for corpus, total, wanted in zip(self._corpora, self.counts, self._deal.counts(count), strict=True)
        ]
        chosen = [self._deal(i)[0] for i in range(count)]
        return self._cut([(c, next(places[c])) for c in chosen], list(range(count)))

    def _cut(self, places: list[tuple[int, int]], samples: list[int]) -> Batch:
        length = self._length
        pieces = [self._corpora[c].cut([p * length], length + 1) for c, p in places]
        rows, starts = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        starts[:, 0] = True
        scored = None
        if any(corpus.scored is not None for corpus in self._corpora):
            scored = torch.stack([self._corpora[c].scores(p * length + 1, length) for c, p in places])
        return Batch(
            rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), starts[:, :-1].contiguous(), torch.tensor(samples), scored
        )


class Source:
    """The batches of a run: the training order and the fixed evaluation set."""

    def __init__(self, training: Mixture, held_out: Mixture, length: int, optim: OptimConfig, log: LogConfig, seed: int) -> None:
        self._training = Sequences(training, length, seed=seed)
        self._global, self._micro, self._evaluated = optim.global_batch, optim.micro_batch, log.eval_sequences
        # Cut now: a text that is too short is rejected before the first step, not after it.
        self._held_out = Sequences(held_out, length).within_documents(log.eval_sequences)
        if self._held_out.scored is not None and not self._held_out.scored.any():
            raise ValueError(
                f"the {log.eval_sequences} evaluation sequences hold no token of an assistant turn, whose loss data.loss_on="
                "assistant measures: raise log.eval_sequences, or give data.held_out other conversations"
            )

    def micro_batches(self, step: int, *, rank: int, ranks: int) -> Iterator[Batch]:
        """The micro-batches of one step for data-parallel rank ``rank`` of ``ranks``, in order.

        Micro-batch m of rank r holds sequences ``step * global + (m * ranks + r) * micro`` and following.
        """
        for m in range(self._global // (self._micro * ranks)):
            first = step * self._global + (m * ranks + rank) * self._micro
            yield self._training.batch(list(range(first, first + self._micro)))

    def epochs(self, steps: int) -> list[float]:
        """How often the first ``steps`` steps go through each corpus of the training text."""
        return self._training.epochs(steps * self._global)

    def evaluation(self, *, rank: int, ranks: int) -> list[Batch]:
        """This rank's share of the evaluation set, as batches of one shape.

        Raises:
            ValueError: if the ranks do not share the sequences out evenly.
        """
        if self._evaluated % ranks:
            raise ValueError(
                f"log.eval_sequences {self._evaluated} is not a multiple of the {ranks} data-parallel ranks: change it"
            )
        mine = self._held_out.every(rank, ranks)
        return mine.split(math.gcd(len(mine.tokens), self._micro))


def _sequences_of(corpus: Corpus, length: int) -> int:
    count = (len(corpus) - 1) // length
    if count < 1:
        raise ValueError(
            f"the text {corpus.name} has {len(corpus)} tokens, fewer than one sequence of {length} and its last label: "
            "use more text or a smaller data.sequence_length"
        )
    return count


def _whole(corpus: Corpus, length: int, total: int, wanted: int) -> list[int]:
    """``wanted`` of the sequences of a corpus that are within one document, evenly spread, in order."""
    per_chunk = [int(_inside(spans, length, total)[1].sum()) for spans in corpus.document_spans()]
    found = sum(per_chunk)
    if wanted > found:
        raise ValueError(
            f"the held-out text {corpus.name} has {found} sequences of {length} tokens within one document, "
            f"log.eval_sequences asks for {wanted}: lower it, or give longer held-out documents"
        )
    ranks = np.array([i * found // wanted for i in range(wanted)], dtype=np.int64)
    places: list[int] = []
    before = 0
    for spans, here in zip(corpus.document_spans(), per_chunk, strict=True):
        mine = ranks[(ranks >= before) & (ranks < before + here)] - before
        if len(mine):
            first, counts = _inside(spans, length, total)
            ends = np.cumsum(counts)
            document = np.searchsorted(ends, mine, side="right")
            places += (first[document] + mine - (ends[document] - counts[document])).tolist()
        before += here
    return places


def _packed(corpus: Corpus, length: int, total: int, wanted: int) -> list[int]:
    """``wanted`` of the sequences of a corpus, evenly spread, in order."""
    if wanted > total:
        raise ValueError(
            f"the held-out text {corpus.name} has {total} sequences of {length} tokens, log.eval_sequences asks for {wanted}: "
            "lower it, or hold out more conversations"
        )
    return [i * total // wanted for i in range(wanted)]


def _inside(spans: tuple[np.ndarray, np.ndarray], length: int, total: int) -> tuple[np.ndarray, np.ndarray]:
    """Per document the first sequence that starts in it, and how many are in it as a whole."""
    starts, stops = spans
    first = -(-starts // length)
    last = np.minimum(stops // length, total) - 1
    return first, np.maximum(0, last - first + 1)
