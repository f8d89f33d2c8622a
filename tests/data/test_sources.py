"""Documents from whatever `datasets` loads, against that library, and what is said of what it does not load."""

import gzip
import json
import lzma

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from data import sources
from data.skipped import Skipped
from data.sources import Progress, Request

ROWS = ["one", "two\nlines é", "日本語 🙂", "x" * 5000]


def read(*names, **settings):
    progress = Progress()
    return list(sources.documents(Request([str(n) for n in names], **settings), progress)), progress


@pytest.fixture
def kinds(tmp_path):
    """The same documents in every form."""
    lines = "".join(json.dumps({"text": row, "id": i}) + "\n" for i, row in enumerate(ROWS))
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "d.json").write_text(json.dumps([{"text": row} for row in ROWS]))
    parquet.write_table(pa.table({"text": ROWS}), tmp_path / "e.parquet")
    whole = datasets.Dataset.from_dict({"text": ROWS})
    whole.to_csv(tmp_path / "f.csv")
    whole.to_csv(tmp_path / "g.tsv", sep="\t")
    whole.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": whole, "test": whole.select([1])}).save_to_disk(str(tmp_path / "splits"))
    return tmp_path


@pytest.mark.parametrize(
    "name", ["a.jsonl", "b.jsonl.xz", "c.jsonl.gz", "d.json", "e.parquet", "f.csv", "g.tsv", "saved", "splits"]
)
def test_every_kind_gives_its_documents(kinds, name):
    assert read(kinds / name)[0] == ROWS


def test_splits_of_saved_datasets(kinds):
    assert read(kinds / "splits", split="test")[0] == ROWS[1:2]
    with pytest.raises(ValueError, match="no split 'dev', it has train, test: choose with --split"):
        read(kinds / "splits", split="dev")


def test_text_files_by_file_paragraph_or_line(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(b"four\n"))
    expected = {
        "file": ["one\ntwo\n\nthree\n", "four\n"],
        "line": ["one", "two", "three", "four"],
        "paragraph": ["one\ntwo", "three\n", "four\n"],
    }
    for what, documents in expected.items():
        assert read(tmp_path / "a.txt", tmp_path / "b.txt.xz", txt_documents=what)[0] == documents


def test_patterns_and_directories_are_read_in_sorted_order(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.txt", "deep/c.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "notes.pdf").write_bytes(b"no text")
    (tmp_path / "[1].txt").write_text("brackets")
    assert read(tmp_path)[0] == ["brackets", "a.txt", "b.txt", "deep/c.txt"]
    assert read(tmp_path / "*.txt")[0] == ["brackets", "a.txt", "b.txt"]
    assert read(tmp_path / "**/c.txt", tmp_path / "a.txt")[0] == ["deep/c.txt", "a.txt"]
    assert read(tmp_path / "[1].txt")[0] == ["brackets"]


def test_a_large_document_is_one_document(tmp_path):
    """Longer than the blocks in which the library reads JSON."""
    big = "word " * 3_000_000
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": big}) + "\n" + json.dumps({"text": "small"}) + "\n")
    assert [len(text) for text in read(tmp_path / "a.jsonl")[0]] == [len(big), 5]


def test_blank_and_null_documents_are_counted_and_left_out(tmp_path):
    rows = ["one", None, " \n", "", "two"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    found, progress = read(tmp_path / "a.jsonl")
    assert (found, progress.skipped, progress.read_documents) == (["one", "two"], Skipped(blank=2, null=1), 5)


def test_another_column(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "one", "id": 1}\n')
    assert read(tmp_path / "a.jsonl", column="body")[0] == ["one"]
    with pytest.raises(ValueError, match="a.jsonl has no column 'text', it has body, id: choose one with --text-column"):
        read(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="line 1 of .*a.jsonl has a int in column 'id': it must be text"):
        read(tmp_path / "a.jsonl", column="id")


# ------------------------------------------------------------------------------------------- how much there is


@pytest.mark.parametrize("name", ["e.parquet", "saved", "splits"])
def test_the_number_of_documents_is_known_where_the_form_tells(kinds, name):
    assert read(kinds / name)[1].documents == 4


@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl.xz", "c.jsonl.gz"])
def test_elsewhere_it_is_estimated_from_the_bytes(tmp_path, name):
    lines = "".join(json.dumps({"text": f"{i} " * 200}) + "\n" for i in range(1000)).encode()
    pack = {".xz": lzma.compress, ".gz": gzip.compress}.get(name[-3:], bytes)
    (tmp_path / name).write_bytes(pack(lines))
    progress = Progress()
    for number, _ in enumerate(sources.documents(Request([str(tmp_path / name)]), progress), 1):
        if number > 100:
            assert 900 < progress.expected < 1500
    assert progress.bytes == len(lines)


def test_nothing_is_promised_before_anything_was_read():
    assert Progress().expected is None and Progress(bytes=100).expected is None


# ------------------------------------------------------------------------------------------- what is not there


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere.jsonl", "no file, directory or dataset at nowhere.jsonl: check the path"),
        ("./data", "at ./data: check"),
        ("*.jsonl", "at .*jsonl: check the path"),
        ("a/b/c", "at a/b/c: check the path"),
    ],
)
def test_missing_files_are_named(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words):
        read(name)


def test_a_directory_without_text_and_a_file_of_another_kind(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"")
    with pytest.raises(ValueError, match="holds no file that is read: .txt, .jsonl"):
        read(tmp_path)
    with pytest.raises(ValueError, match="a.pdf is of no kind that is read: .txt, .jsonl"):
        read(tmp_path / "a.pdf")


@pytest.mark.parametrize("name", ["nobody-has/this-dataset", "nodatasetofthisname"])
def test_a_dataset_that_is_not_there_is_one_sentence(monkeypatch, name):
    """No network here, so the Hub is as unreachable as on a compute node."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=f"no file or directory {name} that is read, and no dataset of that name") as caught:
        read(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"text": "tw'),
        ("a.jsonl.xz", b"no xz"),
        ("a.jsonl.gz", b"no gz"),
        ("a.parquet", b"no parquet"),
        ("a.txt.xz", lzma.compress(b"words" * 10_000)[:-20]),
        ("a.txt", b"caf\xe9 \xff"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{name} is not (readable|JSON)") as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_saved_dataset_of_no_rows_is_empty(tmp_path):
    whole = datasets.Dataset.from_dict({"text": ROWS})
    datasets.DatasetDict({"train": whole, "none": whole.select([])}).save_to_disk(str(tmp_path / "saved"))
    found, progress = read(tmp_path / "saved", split="none")
    assert (found, progress.skipped) == ([], Skipped(files=1)) and read(tmp_path / "saved")[0] == ROWS


def test_a_saved_dataset_is_read_by_its_column_alone(tmp_path):
    rows = {"text": ["one", None, "NA"], "id": [1, 2, 3], "tags": [["a"], [], ["b"]]}
    datasets.Dataset.from_dict(rows).with_format("numpy").save_to_disk(str(tmp_path / "saved"))
    assert read(tmp_path / "saved")[0] == ["one", "NA"]
    with pytest.raises(ValueError, match="saved has no column 'body', it has text, id, tags: choose one with --text-column"):
        read(tmp_path / "saved", column="body")
    with pytest.raises(ValueError, match="saved has values of type int64 in column 'id': they must be text"):
        read(tmp_path / "saved", column="id")
    (tmp_path / "saved" / "state.json").write_text("{")
    with pytest.raises(ValueError, match="saved is not readable .JSONDecodeError"):
        read(tmp_path / "saved")
