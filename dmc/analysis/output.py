"""A directory that is written atomically."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REPORT = "inspect.json"  # by which a directory of ours is known


def check_free(directory: str | Path) -> None:
    """Whether a report can be written there.

    Raises:
        ValueError: if something else is there, or its parent is missing or cannot be written to.
    """
    path = Path(directory).absolute()
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path.parent} is not a writable directory: give another --out")
    if path.exists() and not (path.is_dir() and (not any(path.iterdir()) or (path / REPORT).is_file())):
        raise ValueError(f"{path} exists and is not a report of dmc inspect: give another --out, or remove it")


@contextmanager
def replaced(directory: str | Path) -> Iterator[Path]:
    """A new directory to fill; at the end of the block it takes the place of ``directory``, on an error it is removed.

    Raises:
        ValueError: see `check_free`.
    """
    check_free(directory)
    path = Path(directory).absolute()
    fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield fresh
        fresh.chmod(0o755)
        old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
        try:
            if path.exists():
                path.rename(old / path.name)
            try:
                fresh.rename(path)
            except OSError:
                if (old / path.name).exists():
                    (old / path.name).rename(path)
                raise
        finally:
            if path.exists():
                shutil.rmtree(old)
    finally:
        if fresh.exists():
            shutil.rmtree(fresh)
