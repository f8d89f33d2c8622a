"""Documents from whatever Hugging Face `datasets` loads: files, directories, names on the Hub.

Everything is streamed: a record at a time, nothing written to the library's cache unless a Hub dataset is asked to
be downloaded first. Local files are taken one by one in sorted order, so that an error names the file.
"""

from __future__ import annotations

import glob
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

# Suffix → the loader of `datasets`; a compressed file has one of _PACKED after it.
KINDS = {
    ".txt": "text", ".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow",
    ".csv": "csv", ".tsv": "csv",
}
_PACKED = (".xz", ".gz", ".bz2", ".zst")
TXT_DOCUMENTS = {"file": "document", "paragraph": "paragraph", "line": "line"}


@dataclass(frozen=True)
class Request:
    """What to read.

    Attributes:
        names: files, patterns such as ``'part-*.jsonl.xz'``, directories, or names of datasets on the Hub.
        column: that holds the text.
        config: of a Hub dataset that has several.
        split: of a Hub or saved dataset.
        revision: branch, tag or commit of a Hub dataset.
        streaming: read a Hub dataset as it comes; otherwise download it to the library's cache first.
        txt_documents: what one document of a ``.txt`` file is: ``file``, ``paragraph`` or ``line``.
    """

    names: list[str]
    column: str = "text"
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = True
    txt_documents: str = "file"


@dataclass
class Progress:
    """How much there is to read, as far as that is known, and how much was read."""

    documents: int | None = None  # in all
    bytes: int | None = None  # of text, estimated, where the number of documents is unknown
    read_documents: int = 0
    read_bytes: int = 0
    blank: int = 0  # documents of white space alone or null: left out

    @property
    def expected(self) -> int | None:
        """Documents in all, estimated from the bytes if need be."""
        if self.documents is not None or not self.bytes or not self.read_bytes:
            return self.documents
        return max(self.read_documents, round(self.read_documents * self.bytes / self.read_bytes))


@dataclass
class _Piece:
    """One thing to load: what it is called, how, and how large it is."""

    name: str
    load: Callable[[], object] = field(repr=False)
    path: Path | None = None


def documents(request: Request, progress: Progress) -> Iterator[str]:
    """The texts of a request in order; blank ones are counted in ``progress`` and left out.

    Raises:
        ValueError: one sentence naming the source, for whatever cannot be found or read, and for a missing column.
    """
    pieces = _pieces(request)
    _estimate(pieces, progress)
    for piece in pieces:
        for number, record in enumerate(_records(piece, request, progress)):
            text = _text(record, request.column, piece.name, number)
            progress.read_documents += 1
            progress.read_bytes += len(text or "")
            if text and not text.isspace():
                yield text
            else:
                progress.blank += 1


def _pieces(request: Request) -> list[_Piece]:
    return [piece for name in request.names for piece in _of_name(name, request)]


def _of_name(name: str, request: Request) -> list[_Piece]:
    path = Path(name).expanduser()
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return [_Piece(name, lambda: _load_saved(path, request.split))]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and _kind(p))
        if not files:
            raise ValueError(f"the directory {name} holds no file that is read: {', '.join(KINDS)}, or one of them packed")
    elif path.is_file():
        files = [path]
    else:
        files = sorted(Path(p) for p in glob.glob(str(path), recursive=True)) if glob.has_magic(name) else []
        if not files and (glob.has_magic(name) or _kind(path) or name.startswith((".", "/", "~")) or name.count("/") > 1):
            raise ValueError(f"no file, directory or dataset at {name}: check the path")
    if files:
        return [_Piece(str(p), _file_loader(p, request), p) for p in files]
    return [_Piece(name, lambda: _load_hub(name, request))]


def _kind(path: Path) -> str | None:
    suffixes = path.suffixes
    if suffixes and suffixes[-1] in _PACKED:
        suffixes.pop()
    return KINDS.get(suffixes[-1]) if suffixes else None


def _file_loader(path: Path, request: Request) -> Callable[[], object]:
    kind = _kind(path)
    if kind is None:
        raise ValueError(f"{path} is of no kind that is read: {', '.join(KINDS)}, or one of them with {', '.join(_PACKED)}")
    extra: dict = {"sample_by": TXT_DOCUMENTS[request.txt_documents]} if kind == "text" else {}
    if kind == "csv" and ".tsv" in path.suffixes:
        extra["sep"] = "\t"

    def load() -> object:
        import datasets

        return datasets.load_dataset(kind, data_files=[glob.escape(str(path))], split="train", streaming=True, **extra)

    return load


def _load_saved(path: Path, split: str) -> object:
    import datasets

    found = datasets.load_from_disk(str(path))
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise ValueError(f"no split {split!r}, it has {', '.join(found)}: choose with --split")
        return found[split]
    return found


def _load_hub(name: str, request: Request) -> object:
    import datasets

    return datasets.load_dataset(
        name, request.config, split=request.split, revision=request.revision, streaming=request.streaming
    )


def _records(piece: _Piece, request: Request, progress: Progress) -> Iterator[dict]:
    import datasets

    if piece.path is not None:
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what is wrong with a file is in the exception too
    try:
        loaded = piece.load()
        if piece.path is None:
            _count(loaded, request.split, progress)
        yield from loaded
    except Exception as error:  # loaders raise what their formats' libraries raise
        said = " ".join(str(error).split())
        where = (
            f"{piece.name} is not readable" if piece.path is not None
            else f"no file or directory {piece.name} that is read, and no dataset of that name was found"
        )
        raise ValueError(f"{where} ({type(error).__name__}: {said})") from None


def _text(record: dict, column: str, name: str, number: int) -> str | None:
    if column not in record:
        raise ValueError(f"{name} has no column {column!r}, it has {', '.join(record)}: choose one with --text-column")
    text = record[column]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"record {number} of {name} has a {type(text).__name__} in column {column!r}: it must be text")
    return text


def _count(loaded: object, split: str, progress: Progress) -> None:
    """Of saved and Hub datasets the number of documents is often known."""
    splits = loaded.info.splits or {}
    known = len(loaded) if hasattr(loaded, "__len__") else getattr(splits.get(split), "num_examples", None)
    if known and progress.read_documents == 0:
        progress.documents = known


def _estimate(pieces: list[_Piece], progress: Progress) -> None:
    kinds = {_kind(piece.path) if piece.path else "hub" for piece in pieces}
    if kinds == {"parquet"}:
        from pyarrow import ArrowInvalid, parquet

        try:
            progress.documents = sum(parquet.read_metadata(piece.path).num_rows for piece in pieces)
        except (ArrowInvalid, OSError):  # reading it will say so
            pass
    elif not kinds & {"hub", "parquet"}:
        progress.bytes = sum(_unpacked_size(piece.path) for piece in pieces)


def _unpacked_size(path: Path) -> int:
    """Bytes of a file, unpacked; of a packed one estimated from its first MiB."""
    size = path.stat().st_size
    unpack = {".xz": lambda: lzma.LZMADecompressor(), ".gz": lambda: zlib.decompressobj(31)}.get(path.suffix)
    if unpack is None or not size:
        return size
    try:
        with open(path, "rb") as file:
            head = file.read(2**20)
        return len(unpack().decompress(head)) * size // len(head)
    except (lzma.LZMAError, zlib.error, OSError):  # reading it will say so
        return size
