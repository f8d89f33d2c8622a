"""What makes a checkpoint whole: a marker, written last, with the size and SHA-256 of every other file."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

MARKER = "COMPLETE"

Entry = tuple[int, str]  # a file's size in bytes and SHA-256


def seal(path: Path) -> Entry:
    """Flush a file to the disk; its size and digest."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path.stat().st_size, digest(path)


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(path: str | Path, *, part: int = 0, parts: int = 1) -> dict:
    """The meta data of a checkpoint whose every file is as it was written.

    Args:
        path: the checkpoint's directory.
        part: which of ``parts`` shares of the files to read; the presence and size of all are checked.
        parts: among how many processes the reading is divided.

    Raises:
        ValueError: naming what is wrong.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"no checkpoint at {path}")
    if not (path / MARKER).is_file():
        raise ValueError(f"checkpoint {path} is incomplete (it has no {MARKER} marker): use an earlier one")
    try:
        for number, (name, size, expected) in enumerate(_listed(path / MARKER)):
            file = path / name
            if not file.is_file():
                raise ValueError(f"checkpoint {path} lacks its file {name}: use an earlier one")
            if file.stat().st_size != size or (number % parts == part and digest(file) != expected):
                raise ValueError(f"checkpoint {path} is damaged: {name} is not as it was written; use an earlier one")
        return json.loads((path / "meta.json").read_text())
    except (json.JSONDecodeError, UnicodeDecodeError, OSError, TypeError) as error:
        raise ValueError(f"checkpoint {path} is damaged ({error}): use an earlier one") from None


def looks_whole(path: Path) -> bool:
    """Whether its marker and every file that it lists are there, in their size; reads no contents."""
    try:
        return all((path / name).stat().st_size == size for name, size, _ in _listed(path / MARKER))
    except (ValueError, TypeError, OSError):
        return False


def _listed(marker: Path) -> list[tuple[str, int, str]]:
    """``(name, size, digest)`` of every file of a checkpoint; TypeError if the marker holds anything else."""
    files = json.loads(marker.read_text())
    if not isinstance(files, dict) or "meta.json" not in files:
        raise TypeError(f"{marker.name} does not list its files")
    listed = []
    for name, entry in files.items():
        if not isinstance(entry, list) or [type(x) for x in entry] != [int, str]:
            raise TypeError(f"{marker.name} has no size and digest of {name}")
        listed.append((name, *entry))
    return listed
