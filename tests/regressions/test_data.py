"""Reading corpora: columns that are not asked for, and files at the edge of their formats."""

import json
import sys

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from data import sources, tokens
from data.files import read_files
from dmc.commands import common
from dmc.evaluation import sequences, windows
from tests.data.prepared import bos_tokenizer


def read(*paths, **settings):
    """The texts that scripts/prepare_data.py and, with a column called text, training on files read."""
    found = list(sources.documents(sources.Request([str(p) for p in paths], **settings), sources.Progress()))
    if all(path.is_file() for path in paths) and not settings:
        assert [doc.text for doc in read_files(",".join(map(str, paths)))[0]] == found
    return found


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ------------------------------------------------------------------------------------------- other columns


# https://github.com/huggingface/datasets/issues/7222: a column was null in the first chunk of a long file and text in a
# later one, which ended the run.
def test_a_column_that_is_null_first_and_text_later(tmp_path):
    rows = [{"text": "x " * 500_000, "meta": None} for _ in range(11)] + [{"text": "last", "meta": "later"}]
    assert [len(text) for text in read(write(tmp_path / "a.jsonl", *rows))] == 11 * [1_000_000] + [4]


# https://github.com/huggingface/course/issues/692: a column of dates that was null at first could not be cast.
def test_a_column_of_dates_that_begins_late(tmp_path):
    rows = [{"text": "x " * 500_000, "closed": None} for _ in range(11)]
    assert len(read(write(tmp_path / "a.jsonl", *rows, {"text": "last", "closed": "2023-09-01T00:00:00Z"}))) == 12


# https://github.com/huggingface/datasets/issues/6162: one record far into a file had a field that the others had not.
def test_a_field_that_first_appears_late(tmp_path):
    rows = [{"text": "x " * 500_000} for _ in range(11)]
    assert len(read(write(tmp_path / "a.jsonl", *rows, {"text": "last", "symlink_target": {"to": "x"}}))) == 12


# https://github.com/huggingface/datasets/issues/6106: a number that elsewhere is text could not be converted.
def test_a_number_that_becomes_text(tmp_path):
    rows = [{"text": f"text {i}", "score": 0.5 if i < 7 else "-0.2253"} for i in range(8)]
    lines = "".join(f"{row['text']},{row['score'] if row['score'] != 0.5 else 1}\n" for row in rows * 30_000)
    (tmp_path / "b.csv").write_text("text,score\n" + lines)
    assert read(write(tmp_path / "a.jsonl", *rows)) == [row["text"] for row in rows]
    assert len(read(tmp_path / "b.csv")) == 240_000


# https://github.com/stanford-crfm/helm/issues/1381: an integer of more than 4,300 digits could not be read.
def test_a_column_of_very_large_integers(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one", "answer": ' + "9" * 9131 + "}\n")
    assert read(tmp_path / "a.jsonl") == ["one"]


# ------------------------------------------------------------------------------------------- the text itself


# https://github.com/huggingface/datasets/issues/4467: a text that reads "null" became a missing one.
def test_the_word_null_in_a_table(tmp_path):
    (tmp_path / "a.csv").write_text("text,id\nnull,0\nNA,1\nNone,2\nnan,3\n")
    assert read(tmp_path / "a.csv") == ["null", "NA", "None", "nan"]


# https://github.com/huggingface/datasets/issues/8241: a byte order mark changed what was read of a file.
@pytest.mark.parametrize(("name", "data"), [("a.jsonl", '{"text": "one"}\n'), ("a.csv", "text,id\none,1\n"), ("a.txt", "one")])
def test_a_byte_order_mark(tmp_path, name, data):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + data.encode())
    assert read(tmp_path / name) == ["one"]


# https://github.com/Meaningful-Data/vtlengine/pull/654: each way to load a file had to be taught to skip a byte order mark.
def test_a_byte_order_mark_of_prompts_and_of_texts_to_score(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n")
    assert common.read(str(tmp_path / "a.txt")) == "one\n" and windows._read(tmp_path / "a.txt") == "one\r\n"
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n{"text": null}\n')
    assert sequences._read(tmp_path / "a.jsonl") == ["one"] and sequences._read(tmp_path / "a.txt") == ["one\r\n"]


# https://github.com/epfLLM/Megatron-LLM/issues/54: a served prompt began with a BOS token, the documents of pretraining did not.
def test_documents_begin_as_prompts_do(tmp_path):
    tokenizer = tokens.load_tokenizer(bos_tokenizer(tmp_path / "model"))
    path = write(tmp_path / "a.jsonl", *({"text": f"document {i}"} for i in range(40)))
    for mixture in tokens.corpora(str(path), "", tokenizer, tmp_path / "cache"):
        (found,) = mixture.corpora
        ((starts, _),) = found.document_spans()
        assert {int(found.tokens[start]) for start in starts} == {tokenizer.encode("document 0")[0]} == {1}


# ------------------------------------------------------------------------------------------- files without a text


# https://github.com/deepseek-ai/DeepSpec/pull/79: an empty shard kept the others from being read.
def test_an_empty_shard_among_others(tmp_path):
    (tmp_path / "b.jsonl").write_bytes(b"")
    (tmp_path / "c.jsonl").write_text("\n")
    write(tmp_path / "a.jsonl", {"text": "one"})
    write(tmp_path / "d.jsonl", {"text": "two"})
    assert read(tmp_path) == ["one", "two"] == read(*sorted(tmp_path.iterdir()))


# https://github.com/apache/doris/issues/1594: a directory that a cluster wrote had a table with a header and no rows.
def test_tables_without_rows_among_others(tmp_path):
    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    parquet.write_table(pa.table({}), tmp_path / "b.parquet")
    parquet.write_table(pa.table({"text": ["one"]}), tmp_path / "c.parquet")
    (tmp_path / "d.csv").write_text("text,id\n")
    (tmp_path / "e.csv").write_text("")
    assert read(tmp_path) == ["one"]


# https://github.com/huggingface/datasets/pull/8385: a saved dataset of no rows could not be loaded again.
def test_a_saved_dataset_of_no_rows(tmp_path):
    whole = datasets.Dataset.from_dict({"text": ["one"]})
    datasets.DatasetDict({"train": whole.select([]), "test": whole}).save_to_disk(str(tmp_path / "saved"))
    assert read(tmp_path / "saved") == [] and read(tmp_path / "saved", split="test") == ["one"]


# ------------------------------------------------------------------------------------------- compressed files


# https://github.com/huggingface/datasets/issues/5388: without the package for it, the error about a .zst file did not name
# the package.
def test_zst_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(ValueError, match="a.jsonl.zst is compressed with Zstandard: install the package zstandard"):
        read(tmp_path / "a.jsonl.zst")


# https://github.com/indygreg/python-zstandard/issues/59: of a file of several frames only the first was read.
def test_zst_of_several_frames(tmp_path):
    pack = pytest.importorskip("zstandard").ZstdCompressor().compress
    (tmp_path / "a.jsonl.zst").write_bytes(pack(b'{"text": "one"}\n') + pack(b'{"text": "two"}\n'))
    assert read(tmp_path / "a.jsonl.zst") == ["one", "two"]


# https://github.com/indygreg/python-zstandard/issues/157: a file made with `zstd --long=31` was refused.
def test_zst_of_a_large_window(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    settings = zstandard.ZstdCompressionParameters.from_level(1, window_log=31, enable_ldm=True, write_content_size=False)
    writer = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(writer.compress(b'{"text": "one"}\n') + writer.flush())
    assert read(tmp_path / "a.jsonl.zst") == ["one"]
