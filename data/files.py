"""Small texts that a run reads whole: files named in ``data.text``, through the readers of scripts/prepare_data.py."""

from __future__ import annotations

from pathlib import Path

from data import readers, sources
from data.column import Column
from data.skipped import Skipped
from data.stdlib import Document


def read_files(names: str, column: Column | None = None) -> tuple[list[Document], Skipped]:
    """Documents of comma-separated files of any kind of `data.readers.KINDS`, and what was left out.

    Args:
        names: the files.
        column: that is read, such as one of conversations (`data.chat.Messages`); by default texts in the column ``text``.

    Documents are named without their directory: a corpus has the same hash wherever its files are.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    paths = [part.strip() for part in names.split(",") if part.strip()]
    for name in paths:
        if Path(name).is_dir():
            raise ValueError(f"{name} is a directory: several prepared corpora are given with weights, as in 0.5:A,0.5:B")
        if not Path(name).is_file():
            raise ValueError(f"no text file or prepared corpus at {name}")
    progress = sources.Progress()
    docs = [
        Document(_name(Path(record.source), record.number), record.text)
        for record in sources.records(sources.Request(paths), progress, column)
    ]
    return docs, progress.skipped


def _name(path: Path, number: int) -> str:
    return path.name if readers.kind_of(path) == "text" else f"{path.name}:{number}"
