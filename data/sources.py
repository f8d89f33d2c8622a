"""Documents of a request: files, patterns, directories, what `datasets` saved, names on the Hugging Face Hub.

A record is in memory at a time, and nothing is written to the library's cache unless a Hub dataset is asked to be
downloaded first. Files are taken one by one in sorted order, so that an error names the file.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from data import packed, readers
from data.column import Column, Unreadable
from data.request import Request
from data.skipped import Skipped
from dmc.extras import needed_for

_HEAD = 2**20  # bytes of a compressed file from which its size is estimated


@dataclass
class Progress:
    """How much there is to read, as far as that is known, how much was read, and what was left out."""

    documents: int | None = None  # in all
    bytes: int | None = None  # of text, estimated, where the number of documents is unknown
    read_documents: int = 0
    read_bytes: int = 0
    skipped: Skipped = field(default_factory=Skipped)

    @property
    def expected(self) -> int | None:
        """Documents in all, estimated from the bytes if need be."""
        if self.documents is not None or not self.bytes or not self.read_bytes:
            return self.documents
        return max(self.read_documents, round(self.read_documents * self.bytes / self.read_bytes))


class Record(NamedTuple):
    """A text, its source, and its number among the records of the source."""

    source: str
    number: int
    text: str


@dataclass
class _Piece:
    """One thing to read: what it is called, its texts (None for null), and its path if it is a file."""

    name: str
    texts: Callable[[], Iterator[str | None]] = field(repr=False)
    path: Path | None = None


def records(request: Request, progress: Progress, column: Column | None = None) -> Iterator[Record]:
    """The texts of a request in order; what holds no text is counted in ``progress`` and left out.

    Args:
        request: what to read.
        progress: counts it.
        column: that is read, such as one of conversations (`data.chat.Messages`); by default texts in ``request.column``.

    Raises:
        ValueError: one sentence naming the source, for whatever cannot be found or read, and for a missing column.
    """
    column = column or Column(request.column)
    pieces = [piece for name in request.names for piece in _of_name(name, request, column, progress)]
    _estimate(pieces, progress)
    skipped = progress.skipped
    for piece in pieces:
        number = -1
        for number, text in enumerate(piece.texts()):
            progress.read_documents += 1
            progress.read_bytes += len(text or "")
            if text is None:
                skipped.null += 1
            elif not text or text.isspace():
                skipped.blank += 1
            else:
                yield Record(piece.name, number, text)
        skipped.files += number < 0
    column.end()


def documents(request: Request, progress: Progress, column: Column | None = None) -> Iterator[str]:
    """The texts of `records` alone."""
    return (record.text for record in records(request, progress, column))


def _of_name(name: str, request: Request, column: Column, progress: Progress) -> list[_Piece]:
    path = Path(name).expanduser()
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return [_Piece(name, lambda: _saved(path, request.split, column, progress))]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and readers.kind_of(p))
        if not files:
            raise ValueError(
                f"the directory {name} holds no file that is read: {', '.join(readers.KINDS)}, or one of them compressed"
            )
    elif path.is_file():
        files = [path]
    else:
        files = sorted(Path(p) for p in glob.glob(str(path), recursive=True)) if glob.has_magic(name) else []
        is_path = glob.has_magic(name) or readers.kind_of(path) or name.startswith((".", "/", "~")) or name.count("/") > 1
        if not files and is_path:
            raise ValueError(f"no file, directory or dataset at {name}: check the path")
    if files:
        return [_file(p, request, column) for p in files]
    return [_Piece(name, lambda: _hub(name, request, column, progress))]


def _file(path: Path, request: Request, column: Column) -> _Piece:
    packed.check(str(path))  # now, not after hours in which other files were read
    file = readers.local(path)
    return _Piece(file.name, lambda: readers.texts(file, column, request.txt_documents), path)


def _hub(name: str, request: Request, column: Column, progress: Progress) -> Iterator[str | None]:
    with needed_for("a dataset of the Hub"):
        from data import hub  # with `datasets`, which takes seconds to import

    known, found = hub.open_dataset(name, request, column)
    _count(known, progress)
    return found


def _saved(path: Path, split: str, column: Column, progress: Progress) -> Iterator[str | None]:
    """Texts of a dataset that ``save_to_disk`` wrote; of several splits only this one is opened."""
    with needed_for("a saved dataset"):
        import datasets
    try:
        if (path / "dataset_dict.json").is_file():
            splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
            if split not in splits:
                raise Unreadable(f"{path} has no split {split!r}, it has {', '.join(splits)}: choose with --split")
            path = path / split
        if not json.loads((path / "state.json").read_text())["_data_files"]:
            return iter(())  # without rows save_to_disk may write no file, and load_from_disk then fails
        found = datasets.load_from_disk(str(path))
        _count(len(found), progress)
    except Unreadable:
        raise
    except Exception as error:  # `datasets` raises what its parsers raise
        raise ValueError(f"{path} is not readable ({type(error).__name__}: {' '.join(str(error).split())})") from None
    return _rows(found, column, str(path))


def _rows(found: Any, column: Column, where: str) -> Iterator[str | None]:
    """The column of a Dataset."""
    if len(found):
        column.in_table(found.column_names, where)
        column.of_type(found.features.arrow_schema.field(column.name).type, where)
        for number, row in enumerate(found.select_columns([column.name]).with_format(None)):
            yield column.text(row[column.name], f"record {number} of {where}")


def _count(known: int | None, progress: Progress) -> None:
    """Sets the number of documents where it is known, as often for saved and Hub datasets."""
    if known and progress.read_documents == 0:
        progress.documents = known


def _estimate(pieces: list[_Piece], progress: Progress) -> None:
    kinds = {readers.kind_of(piece.path) if piece.path else "dataset" for piece in pieces}
    if kinds == {"parquet"}:
        from pyarrow import ArrowInvalid, parquet

        try:
            progress.documents = sum(parquet.read_metadata(piece.path).num_rows for piece in pieces if piece.path.stat().st_size)
        except (ArrowInvalid, OSError):  # a compressed one; or a damaged one, which reading it will report
            pass
    elif not kinds & {"dataset", "parquet"}:
        progress.bytes = sum(_size(piece.path) for piece in pieces)


def _size(path: Path) -> int:
    """Bytes of a file once decompressed, estimated from its first MiB."""
    with open(path, "rb") as file:
        return packed.unpacked_size(file.read(_HEAD), path.stat().st_size, str(path))
