"""Datasets of the Hugging Face Hub: their files are read by `data.readers`, as files of this machine are.

`datasets` finds the files of a dataset. Its own loaders would guess a schema for every column and end at the first value
that does not fit. They read only what `data.readers` does not: archives, and loaders with settings of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import PurePath
from typing import Any, BinaryIO

import datasets
from datasets.utils.file_utils import cached_path, xopen

from data import packed, readers
from data.column import Column, Unreadable
from data.readers import File
from data.request import Request

_KINDS = {"text": {"text"}, "json": {"json"}, "csv": {"csv", "tsv"}, "parquet": {"parquet"}, "arrow": {"arrow"}}
_NAMING = {"name", "version", "data_dir", "data_files", "description", "features", "columns"}  # settings that change no text


def open_dataset(name: str, request: Request, column: Column) -> tuple[int | None, Iterator[str | None]]:
    """``(documents if known, texts)`` of a dataset on the Hub; None for a null text.

    Raises:
        ValueError: if there is no such dataset, or it cannot be reached or read.
    """
    try:
        builder = datasets.load_dataset_builder(name, request.config, revision=request.revision)
        known = getattr((builder.info.splits or {}).get(request.split), "num_examples", None)
        files = _plain_files(builder, request)
        rows = (
            None
            if files
            else datasets.load_dataset(
                name, request.config, split=request.split, revision=request.revision, streaming=request.streaming
            )
        )
    except Exception as error:  # the Hub's client and the loaders raise many types
        said = " ".join(str(error).split())
        raise ValueError(
            f"no file or directory {name} that is read, and no dataset of that name was found ({type(error).__name__}: {said})"
        ) from None
    if files:
        # The loader of text files takes a line for a document, and so do those who publish such datasets.
        return known, (text for file in files for text in readers.texts(file, column, "line"))
    return known, _rows(rows, column, name)


def _plain_files(builder: Any, request: Request) -> list[File] | None:
    """The files of the split, if `data.readers` reads them all as the dataset's loader would."""
    kinds = _KINDS.get(type(builder).__module__.rpartition(".")[2], set())
    config = builder.config
    urls = list((config.data_files or {}).get(request.split) or [])
    found = {_kind(url) for url in urls}
    usual = {field.name: _default(field) for field in dataclasses.fields(config) if field.name not in _NAMING}
    if found == {"tsv"}:
        usual["sep"] = "\t"
    if not urls or not found <= kinds or any(getattr(config, name) != value for name, value in usual.items()):
        return None
    for url in urls:
        packed.check(_base(url))
    return [File(_base(url), _kind(url), _opener(url, request.streaming)) for url in urls]


def _opener(url: str, streaming: bool) -> Callable[[], BinaryIO]:
    if streaming:
        return lambda: xopen(url, "rb")
    return lambda: open(cached_path(url, download_config=datasets.DownloadConfig()), "rb")


def _base(url: str) -> str:
    return url.partition("?")[0]


def _kind(url: str) -> str | None:
    return readers.kind_of(PurePath(_base(url)).name)


def _default(field: dataclasses.Field) -> object:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _rows(found: Any, column: Column, where: str) -> Iterator[str | None]:
    """The column of what a loader of `datasets` gives."""
    try:
        if found.features is not None:
            column.in_table(found.features, where)
            found = found.select_columns([column.name])
        for number, row in enumerate(found):
            yield column.of(row, f"record {number} of {where}")
    except Unreadable:
        raise
    except Exception as error:
        raise Unreadable(f"{where} is not readable ({type(error).__name__}: {' '.join(str(error).split())})") from None
