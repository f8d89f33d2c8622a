"""Text to tokens and back, the cache, and what is refused of files and tokenizers."""

import json
import lzma
import shutil

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer

from data import tokens
from data.files import read_files
from data.mixture import Mixture
from data.skipped import Skipped
from data.stdlib import Document, corpus_hash
from tests.training.helpers import TOKENIZER

END = 0  # <|endoftext|> of the base model's tokenizer
TEXTS = [
    "def f(x):\n    return x + 1\n",
    "naïve café — 日本語 🙂\n\n\ttabs and  spaces  ",
    "a",
    "0123456789" * 50,
    "\n\n\n",
    "x = '''" + "word " * 300 + "'''",
]
DOCUMENTS = [Document(f"d{i}", text) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def tokenizer():
    return tokens.load_tokenizer(TOKENIZER, 2048)


def spoken(corpus, tokenizer):
    """The documents of a corpus as text."""
    ((starts, stops),) = corpus.document_spans()
    assert set(corpus.tokens[stops - 1].tolist()) == {tokenizer.eos_token_id}
    parts = [corpus.tokens[a : b - 1].tolist() for a, b in zip(starts, stops, strict=True)]
    return [tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in parts]


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ------------------------------------------------------------------------------------------- tokens


def test_texts_come_back_from_their_tokens(tmp_path, tokenizer):
    corpus = tokens.tokenize(DOCUMENTS, tokenizer, tmp_path)
    assert spoken(corpus, tokenizer) == TEXTS
    assert (corpus.hash, corpus.tokens.dtype, tokenizer.eos_token_id) == (corpus_hash(DOCUMENTS), np.uint16, END)
    assert corpus.characters == sum(map(len, TEXTS))
    assert Mixture((corpus,)).characters_per_token == pytest.approx(corpus.characters / len(corpus.tokens))


def test_the_tokens_are_the_tokenizers_own(tmp_path, tokenizer):
    """Against the library itself, document by document, without special tokens but the end."""
    plain = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    expected = [i for text in TEXTS for i in [*plain.encode(text, add_special_tokens=False).ids, END]]
    assert tokens.tokenize(DOCUMENTS, tokenizer, tmp_path).tokens.tolist() == expected


def test_the_files_are_megatrons(tmp_path, tokenizer):
    """The .bin holds nothing but the tokens, two bytes each for a vocabulary of this size; the .idx its magic."""
    corpus = tokens.tokenize(DOCUMENTS, tokenizer, tmp_path)
    (directory,) = tmp_path.iterdir()
    assert np.fromfile(directory / "tokens.bin", dtype=np.uint16).tolist() == corpus.tokens.tolist()
    assert (directory / "tokens.idx").read_bytes().startswith(b"MMIDIDX\x00\x00")
    part = json.loads((directory / "meta.json").read_text())["parts"]["tokens"]
    assert (part["hash"], part["documents"], part["characters"]) == (corpus.hash, len(TEXTS), corpus.characters)
    read = IndexedDataset(str(directory / "tokens"))
    assert [read[i].tolist() for i in range(len(read))] == [
        corpus.tokens[a:b].tolist() for a, b in zip(*next(corpus.document_spans()), strict=True)
    ]
    assert read.document_indices.tolist() == list(range(len(TEXTS) + 1))


def test_the_cache_is_used_again(tmp_path, tokenizer, monkeypatch):
    first = tokens.tokenize(DOCUMENTS, tokenizer, tmp_path)
    monkeypatch.setattr(tokens, "_write", lambda *_: pytest.fail("tokenised again"))
    second = tokens.tokenize(DOCUMENTS, tokenizer, tmp_path)
    assert np.array_equal(first.tokens, second.tokens) and second.hash == first.hash


@pytest.mark.parametrize("left", [[], ["tokens.bin"], ["tokens.bin", "tokens.idx"]])
def test_an_unfinished_cache_is_made_again(tmp_path, tokenizer, left):
    whole = tokens.tokenize(DOCUMENTS, tokenizer, tmp_path).tokens.tolist()
    (directory,) = tmp_path.iterdir()
    for path in list(directory.iterdir()):
        path.unlink() if path.name not in left else path.write_bytes(b"cut")
    assert np.array_equal(tokens.tokenize(DOCUMENTS, tokenizer, tmp_path).tokens, whole)
    assert list(tmp_path.iterdir()) == [directory]


def test_two_that_write_at_once_both_get_it(tmp_path, tokenizer, monkeypatch):
    """Between the look at the cache and the rename another process puts its own there."""
    real = tokens.os.rename

    def rename(source, target):
        monkeypatch.setattr(tokens.os, "rename", real)
        tokens.tokenize(DOCUMENTS, tokenizer, tmp_path)
        real(source, target)

    monkeypatch.setattr(tokens.os, "rename", rename)
    assert spoken(tokens.tokenize(DOCUMENTS, tokenizer, tmp_path), tokenizer) == TEXTS
    assert len(list(tmp_path.iterdir())) == 1


def test_other_texts_and_other_tokenizers_have_other_caches(tmp_path, tokenizer):
    tokens.tokenize(DOCUMENTS, tokenizer, tmp_path)
    tokens.tokenize(DOCUMENTS[1:], tokenizer, tmp_path)
    other = shutil.copytree(TOKENIZER, tmp_path / "tokenizer")
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|pad|>"}))
    marked = tokens.tokenize(DOCUMENTS, tokens.load_tokenizer(other, 2048), tmp_path)
    assert (marked.tokens == 1).sum() == len(TEXTS) and not (marked.tokens == 0).any()
    assert len(list(tmp_path.iterdir())) == 3 + 1


# ------------------------------------------------------------------------------------------- files


def test_files_of_every_kind(tmp_path):
    (tmp_path / "a.txt").write_text("first\nfile", encoding="utf-8")
    write_lines(tmp_path / "b.jsonl", {"text": "one"}, {"text": " ", "id": 1}, {"text": "two\nlines é", "id": 2})
    for name in ("a.txt", "b.jsonl"):
        (tmp_path / f"{name}.xz").write_bytes(lzma.compress((tmp_path / name).read_bytes()))
    expected = {"a.txt": ["first\nfile"], "b.jsonl": ["one", "two\nlines é"]}
    for name, texts in expected.items():
        for suffix in ("", ".xz"):
            assert [d.text for d in read_files(str(tmp_path / (name + suffix)))[0]] == texts
    both, skipped = read_files(f" {tmp_path / 'b.jsonl'} , {tmp_path / 'a.txt'},")
    assert [d.text for d in both] == ["one", "two\nlines é", "first\nfile"] and skipped == Skipped(blank=1)


def test_blank_lines_between_documents_are_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"text": "one"}\n\n  \n{"text": "two"}')
    assert [d.text for d in read_files(str(tmp_path / "a.jsonl"))[0]] == ["one", "two"]


def test_the_hash_does_not_depend_on_where_the_files_lie(tmp_path):
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        write_lines(tmp_path / place / "a.jsonl", {"text": "one"}, {"text": "two"})
        (tmp_path / place / "b.txt").write_text("three")
    hashes = {
        corpus_hash(read_files(f"{tmp_path / place / 'a.jsonl'},{tmp_path / place / 'b.txt'}")[0]) for place in ("here", "there")
    }
    assert len(hashes) == 1
    write_lines(tmp_path / "there" / "a.jsonl", {"text": "one"}, {"text": "too"})
    changed, _ = read_files(f"{tmp_path / 'there' / 'a.jsonl'},{tmp_path / 'there' / 'b.txt'}")
    assert corpus_hash(changed) not in hashes


def test_missing_files_are_named(tmp_path):
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(ValueError, match="no text file or prepared corpus at .*b.txt"):
        read_files(f"{tmp_path / 'a.txt'},{tmp_path / 'b.txt'}")
    with pytest.raises(ValueError, match="is a directory: several prepared corpora are given with weights"):
        read_files(str(tmp_path))


# ------------------------------------------------------------------------------------------- splits


def test_every_twentieth_document_is_held_out(tmp_path, tokenizer):
    path = write_lines(tmp_path / "a.jsonl", *({"text": f"document {i}"} for i in range(45)))
    training, held_out = tokens.corpora(path, "", tokenizer, tmp_path / "cache")
    assert spoken(held_out.corpora[0], tokenizer) == ["document 19", "document 39"]
    assert spoken(training.corpora[0], tokenizer) == [f"document {i}" for i in range(45) if i not in (19, 39)]
    assert training.hash != held_out.hash


def test_what_was_left_out_comes_with_the_text_that_it_was_left_out_of(tmp_path, tokenizer):
    rows = [None, " ", *(f"document {i}" for i in range(40))]
    path, held = (write_lines(tmp_path / name, *({"text": row} for row in rows)) for name in ("a.jsonl", "b.jsonl"))
    (tmp_path / "empty.jsonl").write_text("")
    both, empty = Skipped(blank=1, null=1), f"{path},{tmp_path / 'empty.jsonl'}"
    for text, held_out, left_out in (
        (path, "", (both, Skipped())),
        (empty, held, (both + Skipped(files=1), both)),
        ("stdlib", held, (Skipped(), both)),
    ):
        found = tokens.corpora(text, held_out, tokenizer, tmp_path / "cache")
        assert tuple(mixture.corpora[0].skipped for mixture in found) == left_out
    for count, words in ((Skipped(), ""), (Skipped(1, 2, 3), "1 blank document, 2 null documents, 3 empty files")):
        assert str(count) == words and bool(count) == bool(words)


def test_a_held_out_file_leaves_the_training_text_whole(tmp_path, tokenizer):
    path = write_lines(tmp_path / "a.jsonl", *({"text": f"document {i}"} for i in range(25)))
    (tmp_path / "b.txt").write_text("held out")
    training, held_out = tokens.corpora(path, str(tmp_path / "b.txt"), tokenizer, tmp_path / "cache")
    assert len(spoken(training.corpora[0], tokenizer)) == 25 and spoken(held_out.corpora[0], tokenizer) == ["held out"]


@pytest.mark.parametrize("text", ["stdlib", "stdlib-plain"])
def test_the_standard_library_is_split_by_module_or_kept_whole(tmp_path, tokenizer, monkeypatch, text):
    kinds = {"stdlib": ("guide", "topic", "api"), "stdlib-plain": ("src", "topic", "api")}[text]
    names = ["src/os.py", next(f"src/m{i}.py" for i in range(1000) if Document(f"src/m{i}.py", "").held_out)]
    docs = {kinds: [Document(name, name) for name in names]}
    monkeypatch.setattr(tokens.stdlib, "documents", docs.__getitem__)
    training, held_out = tokens.corpora(text, "", tokenizer, tmp_path / "cache")
    assert (spoken(training.corpora[0], tokenizer), spoken(held_out.corpora[0], tokenizer)) == (names[:1], names[1:])
    (tmp_path / "b.txt").write_text("held out")
    training, held_out = tokens.corpora(text, str(tmp_path / "b.txt"), tokenizer, tmp_path / "cache")
    assert (spoken(training.corpora[0], tokenizer), spoken(held_out.corpora[0], tokenizer)) == (names, ["held out"])


@pytest.mark.parametrize(
    ("documents", "held_out", "words"),
    [
        (19, "", "the held-out text of data.text=.* is empty"),
        (0, "", "the training text of data.text=.* is empty"),
        (5, "   \n", "the held-out text of data.text=.* is empty"),
    ],
)
def test_empty_splits_are_refused(tmp_path, tokenizer, documents, held_out, words):
    path = write_lines(tmp_path / "a.jsonl", *({"text": "words"} for _ in range(documents)))
    if held_out:
        (tmp_path / "b.txt").write_text(held_out)
        held_out = str(tmp_path / "b.txt")
    with pytest.raises(ValueError, match=words):
        tokens.corpora(path, held_out, tokenizer, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


# ------------------------------------------------------------------------------------------- tokenizers


def test_a_tokenizer_larger_than_the_model_is_refused():
    assert len(tokens.load_tokenizer(TOKENIZER, 2048)) == 2048
    with pytest.raises(ValueError, match="has 2048 entries, the model's vocabulary 2047"):
        tokens.load_tokenizer(TOKENIZER, 2047)


def test_no_tokenizer_is_said(tmp_path):
    for directory in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="has no tokenizer.json: copy the tokenizer"):
            tokens.load_tokenizer(directory, 2048)


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    shutil.copy(TOKENIZER / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ValueError, match="has no eos_token"):
        tokens.load_tokenizer(tmp_path, 2048)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_tokenizer_is_named(tmp_path, name, text):
    directory = shutil.copytree(TOKENIZER, tmp_path / "model")
    (directory / name).write_text(text)
    with pytest.raises(ValueError, match=f"the tokenizer in {directory} cannot be read") as caught:
        tokens.load_tokenizer(directory, 2048)
    assert "\n" not in str(caught.value)
