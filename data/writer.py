"""Writing a part of a corpus: megatron-core's builder, with a hash of what it writes and bounded memory.

Sixteen bytes per document are kept while documents come in; writing the index at the end takes some 60 bytes per
document for a moment. The tokens themselves go straight to the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from pathlib import Path
from typing import BinaryIO

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

FORMAT = 1


class PartWriter:
    """Writes ``PART.bin`` and ``PART.idx`` into a directory, document by document.

    With ``scores`` also ``PART.scored``: one byte per token, 1 where the loss counts its prediction.
    """

    def __init__(self, directory: Path, part: str, dtype: type, *, scores: bool = False) -> None:
        self._directory, self.part = directory, part
        self._builder = IndexedDatasetBuilder(str(directory / f"{part}.bin"), dtype=dtype)
        self._file = self._builder.data_file = _Hashed(self._builder.data_file)
        # The builder's lists of Python integers would take several times as much.
        self._builder.sequence_lengths, self._builder.document_indices = array("i"), array("q", [0])
        self._texts = hashlib.sha256()
        self._scores = _Hashed(open(directory / f"{part}.scored", "wb")) if scores else None
        self.documents = self.tokens = self.characters = self.scored = 0

    def add(self, ids: np.ndarray, *, characters: int, digest: bytes, scored: np.ndarray | None = None) -> None:
        """One document.

        Args:
            ids: [n] its tokens, the end-of-text token included.
            characters: of its text.
            digest: SHA-256 of its text.
            scored: [n] uint8, 1 where the loss counts the prediction of the token; of a writer with ``scores``.
        """
        self._builder.add_document(ids, [len(ids)])
        if self._scores is not None:
            self._scores.write(scored.tobytes())
            self.scored += int(scored.sum())
        self._texts.update(digest)
        self.documents += 1
        self.tokens += len(ids)
        self.characters += characters

    def finish(self) -> dict:
        """Write the index, flush all files to the disk; returns the part's entry of ``meta.json``."""
        index = self._directory / f"{self.part}.idx"
        self._builder.finalize(str(index))
        with open(index, "rb") as file:
            os.fsync(file.fileno())
        files: dict[str, dict] = {
            f"{self.part}.bin": {"bytes": self._file.size, "sha256": self._file.digest.hexdigest()},
            f"{self.part}.idx": {"bytes": index.stat().st_size, "sha256": sha256_of(index)},
        }
        scored = {}
        if self._scores is not None:
            self._scores.close()
            scored = {"scored": self.scored}
            files[f"{self.part}.scored"] = {"bytes": self._scores.size, "sha256": self._scores.digest.hexdigest()}
        return {
            "hash": combined_hash({name: about["sha256"] for name, about in files.items()}, self.part),
            "text_hash": self._texts.hexdigest()[:16],
            "documents": self.documents,
            "tokens": self.tokens,
            "characters": self.characters,
            "files": files,
        } | scored

    def abandon(self) -> None:
        """Close what is open, whatever state the disk is in."""
        for file in filter(None, (self._file, self._scores)):
            try:
                file.close()
            except OSError:  # what could not be written when it was due cannot be written now
                pass


def write_meta(directory: Path, meta: dict) -> None:
    """``meta.json``, which makes a directory a corpus: written last, flushed together with the directory."""
    with open(directory / "meta.json", "w") as file:
        file.write(json.dumps({"format": FORMAT} | meta, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    sync_directory(directory)


def sync_directory(directory: Path) -> None:
    """Flush the names in a directory to the disk."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def combined_hash(files: dict[str, str], part: str) -> str:
    """16 hex digits for a part: from the SHA-256 of its ``.bin``, ``.idx`` and, where there is one, ``.scored``."""
    found = [files[name] for name in (f"{part}.bin", f"{part}.idx", f"{part}.scored") if name in files]
    return hashlib.sha256(" ".join(found).encode()).hexdigest()[:16]


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Hashed:
    """A binary file that hashes and counts what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self._file.write(data)
        self.digest.update(data)
        self.size += len(data)
        return len(data)

    def close(self) -> None:
        if not self._file.closed:
            try:
                self._file.flush()
                os.fsync(self._file.fileno())
            finally:
                self._file.close()
