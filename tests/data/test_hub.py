"""Datasets of the Hub, which no test can reach: what is asked of `datasets`, and files that it finds on this machine."""

import gzip
import json

import datasets
import pytest
from datasets import load_dataset_builder

from data import hub, sources
from data.skipped import Skipped
from data.sources import Progress, Request


def read(name, **settings):
    progress = Progress()
    return list(sources.documents(Request([name], **settings), progress)), progress


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Write a file of the dataset "owner/name"; `datasets` finds it in a directory. Keeps what was asked for."""
    folder = tmp_path / "repository"
    folder.mkdir()
    asked = []

    def found(*positional, **named):
        asked.append((positional, named))
        return load_dataset_builder(str(folder), *positional[1:], **(named | {"revision": None}))

    monkeypatch.setattr(datasets, "load_dataset_builder", found)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(name, data):
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
        return asked

    return write


@pytest.mark.parametrize("streaming", [True, False])
def test_files_of_a_dataset_are_read_as_local_ones(published, streaming):
    rows = [json.dumps({"text": f"text {i}", "meta": value}) for i, value in enumerate((None, 1, "x", {"a": 1}))]
    published("train-0.jsonl", "\n".join([*rows, '{"text": null}', '{"text": "None"}']))
    published("train-1.jsonl.gz", gzip.compress(rows[0].encode()))
    found, progress = read("owner/name", streaming=streaming)
    assert found == ["text 0", "text 1", "text 2", "text 3", "None", "text 0"] and progress.skipped == Skipped(null=1)


def test_what_is_asked_for_is_as_configured(published):
    asked = published("a.csv", "text,meta\nNA,1\nNone,x\n")
    assert read("owner/name", revision="r")[0] == ["NA", "None"]
    assert asked == [(("owner/name", None), {"revision": "r"})]


def test_tables_of_tabs_and_lines_of_text(published):
    published("a.tsv", "text\tmeta\none\t1\n")
    assert read("owner/name")[0] == ["one"]


def test_a_line_is_a_document_of_a_text_file(published):
    published("a.txt", "one\ntwo\n")
    assert read("owner/name")[0] == ["one", "two"]


def test_a_loader_with_settings_of_its_own_is_left_to_the_library(published, monkeypatch):
    asked = []

    def load(*positional, **named):
        asked.append((positional, named))
        return datasets.Dataset.from_dict({"text": ["one", None], "meta": [1, 2]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    published("a.csv", "one;two\n")
    published("README.md", "---\nconfigs:\n- config_name: c\n  data_files: a.csv\n  sep: ';'\n---\n")
    assert read("owner/name", config="c", revision="r")[0] == ["one"]
    assert asked == [(("owner/name", "c"), {"split": "train", "revision": "r", "streaming": True})]
    with pytest.raises(ValueError, match="owner/name has no column 'body', it has text, meta"):
        read("owner/name", config="c", column="body")


def test_the_number_of_documents_is_known_where_the_card_tells(published):
    published("train.jsonl", '{"text": "one"}\n')
    features = "dataset_info:\n  features:\n  - name: text\n    dtype: string\n  splits:\n  - name: train\n    num_examples: 1\n"
    published("README.md", f"---\n{features}---\n")
    assert read("owner/name")[1].documents == 1


def test_a_split_that_is_not_there_is_one_sentence(published):
    published("train.jsonl", '{"text": "one"}\n')
    with pytest.raises(ValueError, match="no dataset of that name was found") as caught:
        read("owner/name", split="dev")
    assert "\n" not in str(caught.value)


def test_a_damaged_file_of_a_dataset_is_named(published):
    published("train.jsonl", '{"text": "one"}\n{"te')
    with pytest.raises(ValueError, match="line 2 of .*train.jsonl is not JSON"):
        read("owner/name")


def test_what_the_library_fails_to_read_is_one_sentence():
    def rows():
        yield {"text": "one"}
        raise RuntimeError("lost\nconnection")

    found = datasets.IterableDataset.from_generator(rows)
    with pytest.raises(ValueError, match="name is not readable .RuntimeError: lost connection") as caught:
        list(hub._rows(found, hub.Column("text"), "name"))
    assert "\n" not in str(caught.value)
