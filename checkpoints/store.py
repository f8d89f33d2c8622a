"""The checkpoint store: a checkpoint is complete or it does not exist.

A checkpoint is a directory of megatron-core's sharded format (loadable under another parallel layout) with

- ``meta.json``: step, measured numbers, configuration and the hashes of model, text and tokenizer;
- ``COMPLETE``: the names, sizes and SHA-256 of all other files, written last.

It is written under a staging name, marker last, flushed to the disk and renamed; then the pointer ``newest``
beside it. Reading starts from the marker: a file that is missing, cut or changed is named.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

MARKER = "COMPLETE"
POINTER = "newest"


class CheckpointStore:
    """The checkpoints of one run, under one directory; every rank constructs it and calls it together."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)

    def save(self, name: str, state: dict, meta: dict) -> None:
        """Write checkpoint ``name`` (replacing one of that name) and point ``newest`` at it.

        Args:
            name: of its directory.
            state: megatron-core sharded state dict.
            meta: JSON values, the same on every rank.

        Raises:
            OSError: on any rank, if one of them cannot write; the store is as before.
        """
        final, staging = self.directory / name, self.directory / f".{name}.staging"
        _on_rank_0(lambda: _fresh(staging))
        try:
            dist_checkpointing.save(state, str(staging))
        except (CheckpointException, CheckpointingException, RuntimeError, OSError) as error:
            shutil.rmtree(staging, ignore_errors=True)  # a full disk is not left full
            raise OSError(f"the checkpoint was not written: {_reason(error)}") from error
        _barrier()
        _on_rank_0(lambda: self._finish(staging, final, meta))

    def load(self, path: str | Path, build: Callable[[], dict]) -> tuple[dict, dict]:
        """``(state, meta)`` of a complete checkpoint, in this rank's layout.

        Args:
            path: the checkpoint's directory.
            build: returns the sharded state dict to fill; called after the check.

        Raises:
            ValueError: if the checkpoint is incomplete, damaged or does not fit the model.
        """
        meta = verify(path)
        try:
            return dist_checkpointing.load(build(), str(path), strict=StrictHandling.RAISE_ALL), meta
        except (CheckpointException, CheckpointingException, RuntimeError, KeyError) as error:
            raise ValueError(f"checkpoint {path} does not fit this model: {_reason(error)}") from None

    def newest(self) -> Path | None:
        """The newest complete checkpoint, or None if there is none.

        Follows the pointer; if that names a damaged one, the newest other that is whole.
        """
        if not self.directory.is_dir():
            return None
        candidates = [p for p in self.directory.iterdir() if (p / MARKER).is_file() and not p.name.startswith(".")]
        candidates.sort(key=lambda p: (p / MARKER).stat().st_mtime_ns, reverse=True)
        pointer = self.directory / POINTER
        if pointer.is_file():
            pointed = pointer.read_text().strip()
            candidates.sort(key=lambda p: p.name != pointed)
        for path in candidates:
            try:
                verify(path)
            except ValueError as damage:
                print(f"warning: {damage}; trying an older checkpoint", flush=True)
                continue
            return path
        return None

    def _finish(self, staging: Path, final: Path, meta: dict) -> None:
        (staging / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        files = {str(p.relative_to(staging)): _seal(p) for p in sorted(staging.rglob("*")) if p.is_file()}
        _write_atomically(staging / MARKER, json.dumps(files, indent=1) + "\n")
        retired = final.with_name(f".{final.name}.old")  # one of that name goes only once its successor is whole
        shutil.rmtree(retired, ignore_errors=True)
        if final.exists():
            os.rename(final, retired)
        os.rename(staging, final)
        _write_atomically(self.directory / POINTER, final.name + "\n")
        shutil.rmtree(retired, ignore_errors=True)


def verify(path: str | Path) -> dict:
    """The meta data of a checkpoint whose every file is as it was written.

    Raises:
        ValueError: naming what is wrong.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"no checkpoint at {path}")
    if not (path / MARKER).is_file():
        raise ValueError(f"checkpoint {path} is incomplete (it has no {MARKER} marker): use an earlier one")
    try:
        for name, size, digest in _listed(path / MARKER):
            file = path / name
            if not file.is_file():
                raise ValueError(f"checkpoint {path} lacks its file {name}: use an earlier one")
            if file.stat().st_size != size or _digest(file) != digest:
                raise ValueError(f"checkpoint {path} is damaged: {name} is not as it was written; use an earlier one")
        return json.loads((path / "meta.json").read_text())
    except (json.JSONDecodeError, UnicodeDecodeError, OSError, TypeError) as error:
        raise ValueError(f"checkpoint {path} is damaged ({error}): use an earlier one") from None


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


def _reason(error: BaseException) -> str:
    """What went wrong, in one line; torch wraps the errors of all ranks in one."""
    while isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines) or type(error).__name__


def _on_rank_0(work: Callable[[], None]) -> None:
    """Run on rank 0; its failure is raised on every rank."""
    failure: list[str | None] = [None]
    if _rank() == 0:
        try:
            work()
        except OSError as error:
            failure[0] = f"{type(error).__name__}: {error}"
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise OSError(f"the checkpoint was not written: {failure[0]}")


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _barrier() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def _fresh(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)


def _seal(path: Path) -> tuple[int, str]:
    """Flush a file to the disk; its size and digest."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path.stat().st_size, _digest(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync(path.parent)
