"""Prepared corpora as they are read: against megatron's own reader, memory-mapped, and every way to damage one."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from data import corpus
from data.batches import Sequences
from data.corpus import Corpus
from data.mixture import Mixture
from tests.data.prepared import make, texts

END = 0


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("made"), texts(40))


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


def in_memory(lengths, dtype=np.uint16):
    """A corpus of documents of these lengths; token i is i + 1, ends are 0."""
    stream = np.arange(1, sum(lengths) + 1).astype(dtype)
    bounds = np.cumsum([0, *lengths])
    stream[bounds[1:] - 1] = END
    return Corpus("memory", stream, bounds[:-1] * stream.itemsize, "hash", 0)


# ------------------------------------------------------------------------------------------- reading


def test_megatron_reads_the_same_documents(made):
    for part in ("train", "held_out"):
        ours, theirs = corpus.open_part(made, part), IndexedDataset(str(made / part))
        ((starts, stops),) = ours.document_spans()
        assert [ours.tokens[a:b].tolist() for a, b in zip(starts, stops, strict=True)] == [d.tolist() for d in theirs]
        assert ours.offsets.tolist() == theirs.index.sequence_pointers.tolist()
        assert theirs.document_indices.tolist() == list(range(len(theirs) + 1))


def test_the_tokens_are_mapped_not_loaded(made):
    found = corpus.open_part(made, "train")
    assert isinstance(found.tokens, np.memmap) and not found.tokens.flags.writeable
    assert not found.offsets.flags.owndata and not found.offsets.flags.writeable


def test_wide_vocabularies_are_read_too(made, copy):
    """Four bytes a token from 65,500 entries on."""
    builder = IndexedDatasetBuilder(str(copy / "train.bin"), dtype=np.int32)
    for document in ([70_000, 1, 0], [2, 0]):
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(copy / "train.idx"))
    meta = json.loads((copy / "meta.json").read_text())
    meta["parts"]["train"] |= {"documents": 2, "tokens": 5, "files": {}}
    (copy / "meta.json").write_text(json.dumps(meta))
    found = corpus.open_part(copy, "train")
    assert found.tokens.tolist() == [70_000, 1, 0, 2, 0]
    tokens, starts = found.cut([1], 4)
    assert tokens.tolist() == [[1, 0, 2, 0]] and starts.tolist() == [[False, False, True, False]]


@settings(deadline=None, max_examples=80)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.data())
def test_pieces_and_document_starts_are_those_of_the_stream(lengths, data):
    text = in_memory(lengths)
    length = data.draw(st.integers(1, len(text)))
    first = data.draw(st.lists(st.integers(0, len(text) - length), min_size=1, max_size=5))
    tokens, starts = text.cut(first, length)
    whole = np.zeros(len(text), dtype=bool)
    whole[np.cumsum([0, *lengths[:-1]])] = True
    assert tokens.tolist() == [text.tokens[a : a + length].tolist() for a in first] and tokens.dtype == torch.int64
    assert starts.tolist() == [whole[a : a + length].tolist() for a in first]


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 9), st.data())
def test_sequences_within_documents_are_those_that_a_scan_of_the_tokens_finds(lengths, length, data):
    text = in_memory(lengths)
    count = (len(text) - 1) // length
    if not count:
        return
    rows = text.tokens[: count * length].reshape(count, length)[:, :-1]
    whole = [p for p in range(count) if (rows[p] != END).all()]
    wanted = data.draw(st.integers(1, max(1, len(whole))))
    sequences = Sequences(Mixture((text,)), length)
    if wanted > len(whole):
        with pytest.raises(ValueError, match="has 0 sequences"):
            sequences.within_documents(wanted)
        return
    expected = [whole[i * len(whole) // wanted] for i in range(wanted)]
    batch = sequences.within_documents(wanted)
    assert batch.tokens.tolist() == [text.tokens[p * length : (p + 1) * length].tolist() for p in expected]
    assert batch.starts[:, 0].all() and not batch.starts[:, 1:].any()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 12))
def test_document_spans_come_whole_in_chunks_of_any_size(lengths, chunk):
    bounds = np.cumsum([0, *lengths]).tolist()
    found = [pair for a, b in in_memory(lengths).document_spans(chunk) for pair in zip(a.tolist(), b.tolist(), strict=True)]
    assert found == list(zip(bounds[:-1], bounds[1:], strict=True))


def test_an_end_token_inside_a_document_ends_none():
    """Text written by a chat template: documents are what the index says, not what a token says."""
    stream = np.array([5, END, 6, 7, END, 8, END], dtype=np.uint16)
    _, starts = Corpus("chat", stream, np.array([0, 10]), "hash", 0).cut([0], 7)
    assert starts.tolist() == [[True, False, False, False, False, True, False]]


# ------------------------------------------------------------------------------------------- damage


def test_verify_reads_a_whole_corpus(made):
    assert corpus.verify(made)["parts"]["train"]["documents"] > 20


@pytest.mark.parametrize(("name", "part"), [("train.bin", "train"), ("train.idx", "train"), ("held_out.bin", "held_out")])
@pytest.mark.parametrize("change", ["cut", "grown", "gone"])
def test_a_file_of_another_size_is_named_at_once(copy, name, part, change):
    path = copy / name
    size = path.stat().st_size
    path.unlink() if change == "gone" else path.write_bytes((path.read_bytes() + b"xx")[: size - 7 if change == "cut" else None])
    words = {"cut": f"has {size - 7} bytes", "grown": f"has {size + 2} bytes", "gone": "is missing"}[change]
    with pytest.raises(ValueError, match=f"{name} {words}, it must have {size}: it was cut or replaced"):
        corpus.open_part(copy, part)


@pytest.mark.parametrize("name", ["train.bin", "train.idx", "held_out.bin", "held_out.idx"])
def test_verify_finds_a_changed_byte_of_any_file(copy, name):
    data = bytearray((copy / name).read_bytes())
    data[-3] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{name} has SHA-256 .* meta.json says .*: the file was changed or damaged"):
        corpus.verify(copy)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("tokens", 5, "train.bin has .* it must have 10"),
        ("documents", 5, "lists .* documents, meta.json 5"),
        ("hash", "0" * 16, "gives train the hash 0000000000000000, its files have"),
        ("tokens", 0, "has no tokens in its part train"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(copy, key, value, words):
    meta = json.loads((copy / "meta.json").read_text())
    meta["parts"]["train"][key] = value
    (copy / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=words):
        corpus.verify(copy)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not readable .JSONDecodeError"),
        ("[]", "is not readable .TypeError"),
        ("{}", "is not readable .KeyError: 'format'"),
        ('{"format": 1, "parts": {}}', "is not readable .KeyError"),
        ('{"format": 2, "parts": {"train": {}}}', "is of format 2 with parts"),
        ('{"format": 1, "tokenizer": {"hash": "", "vocabulary": 1, "end": 0}, "parts": {}}', "with parts "),
        ('{"format": 1, "tokenizer": {"hash": "", "vocabulary": 1, "end": 0}, "parts": {"train": {}}}', "KeyError: 'hash'"),
    ],
)
def test_a_broken_description_is_named(copy, text, words):
    (copy / "meta.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        corpus.open_part(copy, "train")


def test_an_unfinished_corpus_is_none(copy):
    (copy / "meta.json").unlink()
    with pytest.raises(ValueError, match="copy is not a prepared corpus: it has no meta.json; make one with scripts/"):
        corpus.open_part(copy, "train")


def test_an_index_of_something_else_is_named(copy):
    path = copy / "train.idx"
    path.write_bytes(b"NOTANIDX\x00" + path.read_bytes()[9:])
    with pytest.raises(ValueError, match="train.idx is not a Megatron index .magic b'NOTANIDX"):
        corpus.open_part(copy, "train")
    path.write_bytes(b"MMIDIDX\x00\x00" + b"\x01" + 7 * b"\x00" + b"\x63" + path.read_bytes()[18:])
    with pytest.raises(ValueError, match="train.idx is not a Megatron index .99 is not a valid DType"):
        corpus.open_part(copy, "train")


def test_an_unknown_part_is_named(made):
    with pytest.raises(ValueError, match="has no part 'test', only train, held_out"):
        corpus.open_part(made, "test")
