"""Texts of a run: prepared corpora and blends, from the setting to the batches of a step."""

import shutil
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import tokens
from data.batches import Sequences, Source
from data.corpus import Corpus
from data.mixture import Mixture, describe
from dmc.training.config import LogConfig, OptimConfig, load
from tests.data.prepared import make, texts, write_jsonl
from tests.training.helpers import TOKENIZER, metrics, tiny_model, tiny_text, train

LENGTH = 8


@pytest.fixture(scope="module")
def tokenizer():
    return tokens.load_tokenizer(TOKENIZER)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two prepared corpora, one without a held-out part, and a file."""
    directory = tmp_path_factory.mktemp("made")
    make(directory, texts(40), name="a")
    make(directory, texts(50, mark="v"), name="b")
    make(directory, texts(30, mark="u"), name="whole", held_out="0")
    write_jsonl(directory / "c.jsonl", texts(40, mark="c"))
    return directory


def numbered(corpora, length=LENGTH):
    """A mixture of equal shares; token i of corpus c is 1000 * c + i // length, the number of its sequence."""
    parts = [
        Corpus(f"c{c}", (np.arange(count * length + 1) // length + 1000 * c).astype(np.int32), np.array([0]), f"h{c}", 0)
        for c, count in enumerate(corpora)
    ]
    return Mixture(tuple(parts), (Fraction(1, len(parts)),) * len(parts))


# ------------------------------------------------------------------------------------------- which corpora


def test_a_prepared_corpus_brings_its_held_out_part(made, tokenizer, tmp_path):
    for text in (made / "a", made / "a" / "train"):
        training, held_out = tokens.corpora(str(text), "", tokenizer, tmp_path / "cache")
        about = tokens.corpus.read_meta(made / "a")["parts"]
        assert (training.hash, held_out.hash) == (about["train"]["hash"], about["held_out"]["hash"])
        assert (training.tokens, held_out.tokens) == (about["train"]["tokens"], about["held_out"]["tokens"])
    assert not (tmp_path / "cache").exists()  # nothing is tokenised again


@pytest.mark.parametrize(("held_out", "part"), [("b", "held_out"), ("b/train", "train"), ("b/held_out", "held_out")])
def test_another_corpus_for_evaluation(made, tokenizer, tmp_path, held_out, part):
    training, tested = tokens.corpora(str(made / "whole"), str(made / held_out), tokenizer, tmp_path)
    assert tested.hash == tokens.corpus.read_meta(made / "b")["parts"][part]["hash"]
    assert training.tokens == tokens.corpus.read_meta(made / "whole")["parts"]["train"]["tokens"]


def test_a_blend_of_everything(made, tokenizer, tmp_path):
    written = f"0.5:{made / 'a'},0.3:{made / 'c.jsonl'},0.2:{made / 'b'}"
    listed = [{"path": str(made / n), "weight": w} for n, w in (("a", 5), ("c.jsonl", 3), ("b", 2))]
    mixtures = [tokens.corpora(text, "", tokenizer, tmp_path) for text in (written, listed)]
    for training, held_out in mixtures:
        assert training.shares == held_out.shares == (Fraction(1, 2), Fraction(3, 10), Fraction(1, 5))
        assert [about["name"] for about in describe(training)] == [str(made / n) for n in ("a", "c.jsonl", "b")]
        assert training.tokens == sum(len(c) for c in training.corpora)
    assert mixtures[0][0].hash == mixtures[1][0].hash != mixtures[0][1].hash


def test_the_configuration_takes_both_forms():
    assert load(overrides=["data.text=0.7:A,0.3:B"]).data.text == "0.7:A,0.3:B"
    listed = load(overrides=["data.text=[{path: A, weight: 0.7}, {path: B, weight: 0.3}]"]).data.text
    assert listed == [{"path": "A", "weight": 0.7}, {"path": "B", "weight": 0.3}]
    for wrong in ("data.text={a: 1}", "data.held_out=true"):
        with pytest.raises(ValueError, match="it must be of type str"):
            load(overrides=[wrong])


def test_the_hash_of_a_blend_tells_shares_order_and_corpora_apart():
    a, b = numbered([3, 4]).corpora
    half, rest = (Fraction(1, 2),) * 2, (Fraction(1, 3), Fraction(2, 3))
    hashes = [Mixture((a, b), half).hash, Mixture((b, a), half).hash, Mixture((a, b), rest).hash, Mixture((a, a), half).hash]
    assert len(set(hashes)) == 4 and Mixture((a,)).hash == "h0" and Mixture((a, b), half).hash == hashes[0]


@pytest.mark.parametrize(
    ("text", "held_out", "words"),
    [
        ("0:{}/a,0:{}/b", "", "the weights of data.text sum to 0"),
        ("{}/a", "0:{}/b", "the weights of data.held_out sum to 0"),
        ("{}/whole", "", "whole has no held-out part of its own: give data.held_out, or prepare it with --held-out"),
        ("{}/a/held_out", "", "held_out has no held-out part of its own"),
        ("{}/none", "", "no text file or prepared corpus at"),
        ("{}/a", "{}/whole", "whole has no part 'held_out', only train"),
        ("{}/a/test", "{}/b", "no text file or prepared corpus at"),
        ("1:{}/a,1:{}/none", "", "no text file or prepared corpus at .*none"),
        ("{}", "", "is not a prepared corpus: it has no meta.json"),
        ("{}/a,{}/b", "", "a is a directory: several prepared corpora are given with weights, as in 0.5:A,0.5:B"),
    ],
)
def test_what_cannot_be_read_is_named(made, tokenizer, tmp_path, text, held_out, words):
    with pytest.raises(ValueError, match=words):
        tokens.corpora(text.replace("{}", str(made)), held_out.replace("{}", str(made)), tokenizer, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_corpus_of_another_tokenizer_is_refused_with_both_hashes(made, tmp_path):
    other = shutil.copytree(TOKENIZER, tmp_path / "other")
    body = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(body.replace('"individual_digits": true', '"individual_digits": false'))
    theirs, ours = tokens.load_tokenizer(other), tokens.load_tokenizer(TOKENIZER)
    hashes = f"hash {tokens.tokenizer_hash(ours)}, the model's {tokens.tokenizer_hash(theirs)}"
    for text in (str(made / "a"), f"1:{made / 'c.jsonl'},1:{made / 'a'}"):
        with pytest.raises(ValueError, match=f"a was made with another tokenizer .{hashes}.: prepare it again"):
            tokens.corpora(text, "", theirs, tmp_path / "cache")


def test_a_cut_corpus_is_refused_before_the_run(made, tokenizer, tmp_path):
    copy = shutil.copytree(made / "a", tmp_path / "a")
    size = (copy / "train.bin").stat().st_size
    (copy / "train.bin").write_bytes((copy / "train.bin").read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"train.bin has {size - 100} bytes, it must have {size}: it was cut or replaced"):
        tokens.corpora(str(copy), "", tokenizer, tmp_path)


# ------------------------------------------------------------------------------------------- which sequences


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30)), min_size=1, max_size=5),
    st.integers(0, 200),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2]),
)
def test_a_step_is_the_same_for_any_ranks_and_start(corpora, step, ranks, micro):
    """Resume and data parallelism: the sequences of a step, computed from nothing, are those of the endless order."""
    sizes, weights = zip(*corpora, strict=True)
    text = Mixture(numbered(sizes).corpora, tuple(Fraction(w, sum(weights)) for w in weights))
    source = Source(text, numbered([4]), LENGTH, OptimConfig(micro_batch=micro, global_batch=8), LogConfig(eval_sequences=2), 5)
    parts = [list(source.micro_batches(step, rank=rank, ranks=ranks)) for rank in range(ranks)]
    found = [b.tokens[:, 0].tolist() for m in range(len(parts[0])) for part in parts for b in [part[m]]]
    walked = Sequences(text, LENGTH, seed=5)
    expected = walked.batch(list(range(8 * (step + 1)))).tokens[-8:, 0].tolist()
    assert sum(found, []) == expected


def test_every_corpus_gives_its_share_and_each_sequence_once_an_epoch():
    text = Mixture(numbered([10, 20, 50]).corpora, (Fraction(1, 2), Fraction(3, 10), Fraction(1, 5)))
    sequences = Sequences(text, LENGTH, seed=1)
    firsts = sequences.batch(list(range(200))).tokens[:, 0].tolist()
    given_by = [[f % 1000 for f in firsts if f // 1000 == c] for c in range(3)]
    assert [len(g) for g in given_by] == [100, 60, 40]
    for g, count in zip(given_by, (10, 20, 50), strict=True):
        epochs = [g[i : i + count] for i in range(0, len(g) - count + 1, count)]
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert sequences.epochs(200) == [10.0, 3.0, 0.8] and sequences.epochs(0) == [0, 0, 0]


def test_corpora_of_one_size_are_not_shuffled_alike():
    firsts = Sequences(numbered([30, 30]), LENGTH).batch(list(range(60))).tokens[:, 0].tolist()
    assert [f for f in firsts if f < 1000] != [f - 1000 for f in firsts if f >= 1000]


def test_the_evaluation_set_has_the_shares_of_the_blend():
    text = Mixture(numbered([10, 40]).corpora, (Fraction(1, 4), Fraction(3, 4)))
    firsts = Sequences(text, LENGTH).within_documents(12).tokens[:, 0].tolist()
    assert [f for f in firsts if f < 1000] == [0, 3, 6] and [f - 1000 for f in firsts if f >= 1000] == [
        i * 40 // 9 for i in range(9)
    ]
    with pytest.raises(ValueError, match="held-out text c0 has 10 sequences .* asks for 11: lower it"):
        Sequences(text, LENGTH).within_documents(44)


def test_a_corpus_of_many_gigabytes_is_read_without_loading_it(tmp_path):
    """Forty thousand million tokens in a sparse file: batches and evaluation touch only what they read."""
    count = 40_000_000_000
    with open(tmp_path / "big.bin", "wb") as file:
        file.truncate(2 * count)
    stream = np.memmap(tmp_path / "big.bin", dtype=np.uint16, mode="r")
    text = Mixture((Corpus("big", stream, np.arange(0, 2 * count, 2 * count // 1000), "hash", 0),))
    sequences = Sequences(text, 4096)
    assert torch.equal(sequences.batch([0, 10**8]).tokens, torch.zeros(2, 4096, dtype=torch.int64))
    assert len(sequences.within_documents(16).samples) == 16


# ------------------------------------------------------------------------------------------- a run


@pytest.mark.slow
def test_a_run_on_a_blend_resumes_exactly_and_refuses_another_blend(made, tmp_path):
    model, file = tiny_model(tmp_path / "model"), tiny_text(tmp_path / "text.jsonl")

    def blend(a, b, output, *more, check=True):
        return train(
            "--model",
            model,
            "--output",
            tmp_path / output,
            f"data.text={a}:{made / 'a'},{b}:{file}",
            f"data.cache={tmp_path / 'cache'}",
            f"data.held_out={file}",
            "data.sequence_length=64",
            "dmc.method=none",
            "optim.decay_steps=0",
            "optim.global_batch=4",
            "log.eval_sequences=4",
            "run.threads=1",
            *more,
            check=check,
        )

    blend(0.7, 0.3, "whole", "run.steps=4")
    blend(0.7, 0.3, "parts", "run.steps=2")
    other = blend(0.6, 0.4, "parts", "run.steps=4", "--resume", "auto", check=False)
    assert other.returncode == 2 and "was trained from another text" in other.stderr and "Traceback" not in other.stderr
    blend(0.7, 0.3, "parts", "run.steps=4", "--resume", "auto")
    losses = [[m["loss"] for m in metrics(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    nothing = blend(0, 0, "never", check=False)
    assert nothing.returncode == 2 and "the weights of data.text sum to 0" in nothing.stderr
