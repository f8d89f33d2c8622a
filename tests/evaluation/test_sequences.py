"""Sequences of a text: where they lie, several documents, and bad files."""

import json
import lzma
from hashlib import sha256

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dmc.evaluation.sequences import read_sequences
from tests.model import tiny


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """One token per character: codes 33 to 126 → 3 to 96; everything else is <pad>, 0; EOS 2."""
    fields = tiny.config()
    return tiny.write(tmp_path_factory.mktemp("model"), fields, tiny.weights(fields))


def read(directory, file, **settings):
    return read_sequences(str(file), directory, **{"length": 10, "count": None} | settings)


def words(tokens):
    return "".join({0: "\n", 2: "|"}.get(int(t), chr(int(t) + 30)) for t in tokens)


def test_even_distances_and_starts_of_lines(directory, tmp_path):
    lines = [f"line{i:03}" for i in range(100)]
    (tmp_path / "t").write_text("\n".join(lines))
    found = read(directory, tmp_path / "t", count=4)
    assert found.tokens.shape == (4, 10) and found.tokens.dtype == torch.int64 and found.name == "t"
    starts = [words(row) for row in found.tokens]
    assert starts[0] == "line000\nli"
    assert [row[:7] for row in starts] == ["line000", "line025", "line050", "line075"]


def test_no_overlap_when_the_text_is_just_long_enough(directory, tmp_path):
    content = "".join("\n" if i == 12 else chr(33 + i % 90) for i in range(41))
    (tmp_path / "t").write_text(content)
    found = read(directory, tmp_path / "t", count=4)  # starts of lines would leave room for 3
    assert [words(row) for row in found.tokens] == [content[i : i + 10] for i in range(0, 40, 10)]
    assert torch.equal(read(directory, tmp_path / "t").tokens, found.tokens)
    assert [words(row) for row in read(directory, tmp_path / "t", count=3).tokens] == [content[i : i + 10] for i in (0, 13, 27)]
    with pytest.raises(ValueError, match="t gives 4 sequences of 10 tokens, and 5 are needed: give a longer text"):
        read(directory, tmp_path / "t", count=5)


@pytest.mark.parametrize("packed", [False, True])
def test_short_documents_follow_one_another(directory, tmp_path, packed):
    lines = "\n".join(json.dumps({"text": part}) for part in ("abcd", " ", "efg", "hijklmnopqrstuv"))
    path = tmp_path / ("t.jsonl.xz" if packed else "t.jsonl")
    path.write_bytes(lzma.compress(lines.encode()) if packed else lines.encode())
    assert [words(row) for row in read(directory, path).tokens] == ["abcd|efg|h", "ijklmnopqr"]


def test_only_what_is_used_is_tokenised(directory, tmp_path, monkeypatch):
    (tmp_path / "t").write_text("abcdefghij\n" * 200_000)
    seen, call = [], PreTrainedTokenizerFast.__call__

    def counting(self, text, **settings):
        seen.append(len(text))
        return call(self, text, **settings)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", counting)
    assert len(read(directory, tmp_path / "t", count=20).tokens) == 20
    assert sum(seen) < 20 * 400


def test_long_tokens_are_not_cut(tmp_path):
    """Words of 40 characters: a slice of the text ends within one, and the sequence goes on where the last whole one ended."""
    fields = tiny.config()
    directory = tiny.write(tmp_path / "model", fields, tiny.weights(fields))
    names = ["<pad>", "<s>", "</s>", *(chr(97 + i) * 40 for i in range(20))]
    made = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.save(str(directory / "tokenizer.json"))
    (tmp_path / "t").write_text(" ".join(chr(97 + i % 20) * 40 for i in range(60)))
    found = read(directory, tmp_path / "t", length=19)
    expected = [3 + i % 20 for i in range(60)]
    assert [row.tolist() for row in found.tokens] == [[1, *expected[i : i + 18]] for i in (0, 18, 36)]


def test_hash_is_of_the_whole_text(directory, tmp_path):
    for name, end in (("a", "x"), ("b", "y"), ("c", "x")):
        (tmp_path / name).write_text("0123456789" * 30 + end)
    a, b, c = (read(directory, tmp_path / name, count=1).text_hash for name in "abc")
    assert a == c != b and len(a) == 16


def test_the_standard_library(directory, monkeypatch):
    from data import stdlib

    pages = stdlib.documents(("topic",))  # the guides take half a minute
    training, held_out = stdlib.split(pages)
    monkeypatch.setattr(stdlib, "documents", lambda: pages)
    found = read(directory, "stdlib", length=200, count=3)
    assert found.name == "stdlib" and found.tokens.shape == (3, 200)
    start = words(found.tokens[0])[:80]
    opened = training[0].text[:80]
    assert [a for a, b in zip(start, opened, strict=True) if b not in " \n"] == [b for b in opened if b not in " \n"]
    assert held_out and found.text_hash == sha256("\0".join(page.text for page in training).encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("t", b"ab\xff", "is not UTF-8 text \\(byte 2\\)"),
        ("t.xz", b"nothing packed", "is not a valid .xz file"),
        ("t.jsonl", b'{"text": "a"}\n{"txt": "b"}', 'line 2 of .* is not {"text": "..."} \\(KeyError'),
        ("t.jsonl", b'{"text": "\\ud800"}', "line 1 of .*\\(UnicodeEncodeError"),
        ("t.jsonl", b'{"text": 3}', "line 1 of .*\\(AttributeError"),
        ("t", b" \n", "holds no text"),
        ("t", b"short", "t gives 0 sequences of 10 tokens, and 1 is needed"),
    ],
)
def test_bad_files(directory, tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read(directory, tmp_path / name)


def test_bad_sizes(directory, tmp_path):
    (tmp_path / "t").write_text("abc" * 100)
    with pytest.raises(ValueError, match="t.no cannot be read: No such file"):
        read(directory, tmp_path / "t.no")
    with pytest.raises(ValueError, match="number of sequences must be at least 1, got 0"):
        read(directory, tmp_path / "t", count=0)
    with pytest.raises(ValueError, match="a sequence of 0 tokens has no room for text"):
        read(directory, tmp_path / "t", length=0)
