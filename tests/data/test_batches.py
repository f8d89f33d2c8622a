"""Which tokens a step reads: every sequence once an epoch, the same order for any number of ranks."""

import numpy as np
import pytest
import torch

from data.batches import Sequences, Source
from data.corpus import Corpus
from data.mixture import Mixture
from dmc.training.config import LogConfig, OptimConfig

END, LENGTH = 0, 8


def corpus(count=300, ends=()):
    """Token i is i + 1, so that a sequence tells where it was cut; documents end at ``ends``."""
    stream = np.arange(1, count + 1, dtype=np.uint16)
    stream[list(ends)] = END
    starts = np.array([0, *(end + 1 for end in ends if end + 1 < count)], dtype=np.int64)
    return Mixture((Corpus("a.txt", stream, starts * stream.itemsize, "hash", 5 * count),))


def source(training, held_out=None, *, length=LENGTH, seed=0, micro=2, batch=8, evaluated=4):
    held_out = corpus(200) if held_out is None else held_out
    optim, log = OptimConfig(micro_batch=micro, global_batch=batch), LogConfig(eval_sequences=evaluated)
    return Source(training, held_out, length, optim, log, seed)


def cuts(batch):
    """Where in the corpus of `corpus` each sequence was cut."""
    return ((batch.tokens[:, 0] - 1) / LENGTH).tolist()


# ------------------------------------------------------------------------------------------- sequences


def test_sequences_and_labels_are_pieces_of_the_stream():
    text = corpus(41)
    sequences = Sequences(text, LENGTH)
    assert sequences.counts == [5]
    batch = sequences.batch(list(range(5)))
    assert batch.tokens.shape == batch.labels.shape == batch.starts.shape == (5, LENGTH)
    assert (batch.tokens.dtype, batch.labels.dtype, batch.starts.dtype) == (torch.int64, torch.int64, torch.bool)
    assert torch.equal(batch.labels, batch.tokens + 1)
    assert torch.equal(batch.tokens, batch.tokens[:, :1] + torch.arange(LENGTH))
    assert batch.samples.tolist() == [0, 1, 2, 3, 4] and batch.samples.dtype == torch.int64
    assert sorted(cuts(batch)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("tokens", "count"), [(9, 1), (16, 1), (17, 2), (300, 37)])
def test_the_last_label_needs_one_token_more(tokens, count):
    assert Sequences(corpus(tokens), LENGTH).counts == [count]


@pytest.mark.parametrize("tokens", [1, 8])
def test_a_text_shorter_than_a_sequence_is_refused(tokens):
    with pytest.raises(ValueError, match=f"the text a.txt has {tokens} tokens, fewer than one sequence of 8") as caught:
        Sequences(corpus(tokens), LENGTH)
    assert "data.sequence_length" in str(caught.value)
    with pytest.raises(ValueError, match="fewer than one sequence"):
        source(corpus(tokens))


def test_starts_follow_the_ends_of_documents():
    sequences = Sequences(corpus(33, ends=[2, 7, 12, 13]), LENGTH)
    batch = sequences.batch(list(range(sequences.counts[0])))
    starts = dict(zip(cuts(batch), batch.starts.tolist(), strict=True))
    first = [True] + [False] * 7
    assert starts[0] == [True, False, False, True, False, False, False, False]  # the end at 7 starts the next sequence
    assert starts[1] == [True, False, False, False, False, True, True, False]  # an empty document is one of its own
    assert starts[2] == starts[3] == first


# ------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("batch", [1, 5, 8])
def test_every_sequence_comes_once_an_epoch_in_a_new_order(batch):
    sequences = Sequences(corpus(300), LENGTH, seed=3)
    assert sequences.counts == [37]
    order = [c for i in range(0, 3 * 37 + batch, batch) for c in cuts(sequences.batch(list(range(i, i + batch))))]
    epochs = [order[37 * e : 37 * (e + 1)] for e in range(3)]
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != sorted(epochs[0])


def test_the_order_is_a_function_of_the_seed():
    def order(seed):
        return cuts(Sequences(corpus(300), LENGTH, seed=seed).batch(list(range(37))))

    torch.manual_seed(1)
    first = order(5)
    torch.manual_seed(2)
    assert order(5) == first != order(6)


def test_a_step_reads_the_same_whatever_was_read_before():
    """A resumed run, over the border of an epoch too."""
    walked = source(corpus(300))
    steps = [[b.tokens for b in walked.micro_batches(step, rank=0, ranks=1)] for step in range(12)]
    for step in (11, 4, 5, 0):
        fresh = [b.tokens for b in source(corpus(300)).micro_batches(step, rank=0, ranks=1)]
        assert all(torch.equal(a, b) for a, b in zip(fresh, steps[step], strict=True))


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2])
def test_a_step_holds_the_same_sequences_for_any_number_of_ranks(ranks, micro):
    run = source(corpus(300), micro=micro)
    for step in (0, 3, 9):  # 9 lies beyond the first epoch
        parts = [list(run.micro_batches(step, rank=rank, ranks=ranks)) for rank in range(ranks)]
        assert all(len(part) == 8 // (micro * ranks) and len(b.samples) == micro for part in parts for b in part)
        batches = [parts[r][m] for m in range(len(parts[0])) for r in range(ranks)]  # the order of the data
        assert torch.cat([b.samples for b in batches]).tolist() == list(range(8 * step, 8 * step + 8))
        whole = Sequences(corpus(300), LENGTH).batch(list(range(8 * step, 8 * step + 8)))
        for field in ("tokens", "labels", "starts"):
            assert torch.equal(torch.cat([getattr(b, field) for b in batches]), getattr(whole, field))


# ------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_the_evaluation_set_is_shared_out_and_fixed(ranks):
    run = source(corpus(300), micro=2, evaluated=6)
    parts = [run.evaluation(rank=rank, ranks=ranks) for rank in range(ranks)]
    batches = [batch for part in parts for batch in part]
    assert sorted(torch.cat([b.samples for b in batches]).tolist()) == list(range(6))
    assert len({b.tokens.shape for b in batches}) == 1 and len({len(part) for part in parts}) == 1
    assert sorted(c for b in batches for c in cuts(b)) == [0, 4, 8, 12, 16, 20]  # of 24, spread evenly
    again = source(corpus(50), micro=2, evaluated=6, seed=9).evaluation(rank=0, ranks=ranks)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(again, parts[0], strict=True))


def test_micro_batches_of_the_evaluation_divide_its_share():
    run = source(corpus(300), micro=4, evaluated=6)
    assert [len(b.samples) for b in run.evaluation(rank=0, ranks=1)] == [2, 2, 2]
    assert [len(b.samples) for b in run.evaluation(rank=1, ranks=2)] == [1, 1, 1]


def test_the_evaluation_set_lies_within_documents():
    held_out = corpus(81, ends=[3, 15, 24, 38, 55])  # sequences 0, 3 and 4 hold an end before their last token
    run = source(corpus(300), held_out, evaluated=7)
    (*batches,) = run.evaluation(rank=0, ranks=1)
    assert sorted(torch.cat([b.tokens for b in batches])[:, 1].sub(2).div(LENGTH).tolist()) == [1, 2, 5, 6, 7, 8, 9]
    assert all(b.starts[:, 0].all() and not b.starts[:, 1:].any() for b in batches)


def test_too_few_held_out_sequences_are_refused_before_the_run():
    with pytest.raises(ValueError, match="has 7 sequences of 8 tokens within one document, log.eval_sequences asks for 8"):
        source(corpus(300), corpus(81, ends=[3, 24, 38]), evaluated=8)
    with pytest.raises(ValueError, match="the text a.txt has 6 tokens"):
        source(corpus(300), corpus(6))


def test_ranks_that_do_not_divide_the_evaluation_set_are_refused():
    with pytest.raises(ValueError, match="log.eval_sequences 4 is not a multiple of the 3 data-parallel ranks"):
        source(corpus(300)).evaluation(rank=0, ranks=3)


def test_a_batch_moves_as_a_whole():
    batch = Sequences(corpus(41), LENGTH).batch([0, 1]).to(torch.device("meta"))
    assert {t.device.type for t in (batch.tokens, batch.labels, batch.starts, batch.samples)} == {"meta"}
