"""The texts of one file, whatever its kind. Training on files and scripts/prepare_data.py both read through here.

One column is read and no other is looked at, so no schema is guessed and another column may hold anything. A text is what
the file says: "NA", "None" and "" are texts of two, four and no characters, and only JSON's null and a table's null are
null. Files are UTF-8, with or without a byte order mark.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import BinaryIO

from data.column import Column, Unreadable
from data.packed import PACKED, is_packed, unpacked

# Suffix → kind; a compressed file has one of PACKED after it.
KINDS = {
    ".txt": "text",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".tsv": "tsv",
}
STRUCTURED = ("json", "parquet", "arrow")  # kinds whose columns may hold lists and objects
TXT_DOCUMENTS = ("file", "paragraph", "line")
_CHUNK = 2**20  # characters of a .txt that are split at once
_ROWS = 256  # of a table that are in memory at once
# Of a column of texts numbers are not converted: int() rejects more than 4,300 digits.
_DECODER = json.JSONDecoder(parse_int=lambda _: 0, parse_float=lambda _: 0.0)
_FULL_DECODER = json.JSONDecoder()  # of a structured column, whose values may hold numbers

csv.field_size_limit(sys.maxsize)  # of the whole process; its default ends a file at the first text of 128 KiB


@dataclass(frozen=True)
class File:
    """A file to read: its name, which says how it is compressed, its kind, and how its bytes are opened."""

    name: str
    kind: str
    open: Callable[[], BinaryIO]


def kind_of(name: str | Path) -> str | None:
    """The kind of a file by its name; None if it is none that is read."""
    suffixes = PurePath(name).suffixes
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return KINDS.get(suffixes[-1]) if suffixes else None


def local(path: Path) -> File:
    """A file on this machine.

    Raises:
        ValueError: if it is of no kind that is read.
    """
    kind = kind_of(path)
    if kind is None:
        raise ValueError(
            f"{path} is of no kind that is read: {', '.join(KINDS)}, or one of them with {', '.join(PACKED)} "
            "(rename plain text to .txt)"
        )
    return File(str(path), kind, lambda: open(path, "rb"))


def texts(file: File, column: Column, txt_documents: str = "file") -> Iterator[str | None]:
    """The texts of a file in order; None for a null one. A file of 0 bytes has none.

    Args:
        file: to read.
        column: that holds the texts, where the kind has columns.
        txt_documents: what one document of a ``.txt`` is, one of `TXT_DOCUMENTS`.

    Raises:
        ValueError: one sentence naming the file, and the line or record where there is one.
    """
    if column.structured and file.kind not in STRUCTURED:
        raise Unreadable(f"{file.name} cannot hold conversations: use .jsonl, .json, .parquet or .arrow")
    try:
        with file.open() as raw:
            if not raw.read(1):
                return
            raw.seek(0)
            yield from _READERS[file.kind](file, unpacked(raw, file.name), column, txt_documents)
    except Unreadable:
        raise
    except UnicodeDecodeError as error:
        raise Unreadable(f"{file.name} is not readable as UTF-8 ({_said(error)}): convert it, for instance with iconv") from None
    except Exception as error:  # compressors and Arrow raise types of their own
        raise Unreadable(f"{file.name} is not readable ({_said(error)})") from None


# ------------------------------------------------------------------------------------------- one function per kind


def _text(file: File, stream: BinaryIO, column: Column, txt_documents: str) -> Iterator[str]:
    lines = io.TextIOWrapper(stream, encoding="utf-8-sig")  # \r\n and \r become \n
    if txt_documents == "file":
        yield lines.read()
    elif txt_documents == "line":
        for line in lines:
            yield line.removesuffix("\n")
    else:
        rest = ""
        while chunk := lines.read(max(_CHUNK, len(rest))):  # in pieces that grow: a paragraph may be as long as the file
            *whole, rest = (rest + chunk).split("\n\n")
            yield from filter(None, whole)
        if rest:
            yield rest


def _json(file: File, stream: BinaryIO, column: Column, txt_documents: str) -> Iterator[str | None]:
    """An object per line; or one array, or one object over several lines, which are read as a whole."""
    first = True
    for number, line in enumerate(stream, 1):
        line = line.removeprefix(codecs.BOM_UTF8)  # on any line: files that were joined keep theirs
        if not line.strip():
            continue
        if first and _goes_on(line):
            yield from _json_whole(file, line + stream.read(), column)
            return
        first = False
        where = f"line {number} of {file.name}"
        yield column.of(_parsed(line, where, column), where)


def _json_whole(file: File, data: bytes, column: Column) -> Iterator[str | None]:
    value = _parsed(data, file.name, column)
    for number, record in enumerate(value if isinstance(value, list) else [value]):
        where = f"record {number} of {file.name}"
        yield column.text(record, where) if isinstance(record, str) else column.of(record, where)


def _csv(file: File, stream: BinaryIO, column: Column, txt_documents: str) -> Iterator[str | None]:
    lines = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    rows = csv.reader(lines, delimiter="\t" if file.kind == "tsv" else ",", strict=True)
    filled = filter(None, rows)  # lines between rows are []
    try:
        header, place = next(filled, []), None
        for row in filled:
            if place is None:  # now: a table without rows may have any columns
                column.in_table(header, file.name)
                place = header.index(column.name)
            if len(row) > len(header):
                raise Unreadable(
                    f"line {rows.line_num} of {file.name} has {len(row)} fields, the header {len(header)}: put texts that "
                    f"hold {rows.dialect.delimiter!r} in quotes"
                )
            yield row[place] if place < len(row) else None
    except csv.Error as error:
        raise Unreadable(f"line {rows.line_num} of {file.name} is not CSV ({error}): fix its quotes") from None


def _parquet(file: File, stream: BinaryIO, column: Column, txt_documents: str) -> Iterator[str | None]:
    from pyarrow import parquet

    stream = _seekable(file, stream)
    table = stream and parquet.ParquetFile(stream)
    if table and table.metadata.num_rows:
        schema = table.schema_arrow
        column.in_table(schema.names, file.name)
        column.of_type(schema.field(column.name).type, file.name)
        batches = table.iter_batches(_ROWS, columns=[column.name])
        yield from _cells((value for batch in batches for value in batch[column.name].to_pylist()), file, column)


def _arrow(file: File, stream: BinaryIO, column: Column, txt_documents: str) -> Iterator[str | None]:
    """Arrow's file format (which Feather is too) or its stream format."""
    stream = _seekable(file, stream)
    if stream is None:
        return
    schema = _batches(stream)[0]
    place = schema.get_field_index(column.name)

    def values() -> Iterator[object]:
        for batch in _batches(stream, None if place < 0 else place)[1]:
            if batch.num_rows:
                column.in_table(schema.names, file.name)
                column.of_type(schema.field(place).type, file.name)
                batch.validate(full=True)
                yield from batch.column(0).to_pylist()

    yield from _cells(values(), file, column)


_READERS = {"text": _text, "json": _json, "csv": _csv, "tsv": _csv, "parquet": _parquet, "arrow": _arrow}


# ------------------------------------------------------------------------------------------- parts of them


def _cells(values: Iterable[object], file: File, column: Column) -> Iterator[str | None]:
    """The texts of a table's column."""
    for number, value in enumerate(values):
        yield column.text(value, f"record {number} of {file.name}")


def _goes_on(line: bytes) -> bool:
    """True if a first line of JSON is the beginning of an array or of an object that goes on in the next line."""
    text = line.decode(errors="replace").strip()
    try:
        return isinstance(_DECODER.decode(text), list)
    except json.JSONDecodeError as error:
        return text.startswith("[") or error.pos >= len(text)
    except RecursionError:
        return False


def _parsed(data: bytes, where: str, column: Column) -> object:
    try:
        return (_FULL_DECODER if column.structured else _DECODER).decode(data.decode())
    except UnicodeDecodeError as error:
        raise Unreadable(f"{where} is not UTF-8 ({error}): convert the file, for instance with iconv") from None
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"{where} is not JSON ({_said(error)}): fix or remove it") from None


def _batches(stream: BinaryIO, place: int | None = None) -> tuple:
    """``(schema, batches)`` of Arrow data; of one column if ``place`` gives one."""
    from pyarrow import ipc

    stream.seek(0)
    whole_file = stream.read(6) == b"ARROW1"
    stream.seek(0)
    options = ipc.IpcReadOptions(included_fields=[] if place is None else [place])
    if not whole_file:
        reader = ipc.open_stream(stream, options=options)
        return reader.schema, reader
    reader = ipc.open_file(stream, options=options)
    return reader.schema, (reader.get_batch(i) for i in range(reader.num_record_batches))


def _seekable(file: File, stream: BinaryIO) -> BinaryIO | None:
    """The stream, or a temporary file of its content if it is decompressed while it is read; None if that is 0 bytes."""
    if not is_packed(file.name):
        return stream
    whole = tempfile.TemporaryFile()
    shutil.copyfileobj(stream, whole, 2**20)
    size = whole.tell()
    whole.seek(0)
    return whole if size else None


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
