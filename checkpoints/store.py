"""The checkpoint store: a checkpoint is complete or it does not exist.

A checkpoint is a directory of megatron-core's sharded format (loadable under another parallel layout) with

- ``meta.json``: step, measured numbers, configuration and the hashes of model, text and tokenizer;
- ``COMPLETE``: the names, sizes and SHA-256 of all other files, written last.

It is written under a staging name, marker last, every file and directory flushed to the disk, and renamed. The
file ``newest`` next to it names it and its predecessor, in this order and before the rename: whenever the run is
killed, the first of them that is there is the newest complete one. Reading starts from the marker: a file that
is missing, cut or changed is named.
"""

from __future__ import annotations

import atexit
import json
import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from checkpoints import retention, together
from checkpoints.integrity import MARKER, Entry, seal, verify
from checkpoints.shards import Shards

__all__ = ["MARKER", "POINTER", "CheckpointStore", "verify"]

POINTER = "newest"


class CheckpointStore:
    """The checkpoints of one run, under one directory; every rank constructs it and calls it together.

    Args:
        directory: of the checkpoints; shared by all nodes.
        keep_last: how many checkpoints (``stepN``) stay; 0 keeps all.
    """

    def __init__(self, directory: str | Path, *, keep_last: int = 0) -> None:
        self.directory = Path(directory)
        self._keep_last = keep_last
        self._pending: _Pending | None = None
        self._checked: tuple[str, list] | None = None  # the checkpoint last verified; size and time of its files
        atexit.register(self.abandon)

    # ------------------------------------------------------------------------------------------ writing

    def save(self, name: str, state: dict, meta: dict, *, background: bool = False) -> None:
        """Write checkpoint ``name`` (replacing one of that name) and point ``newest`` at it.

        Args:
            name: of its directory.
            state: megatron-core sharded state dict.
            meta: JSON values, the same on every rank.
            background: return as soon as the tensors are copied; `poll` or `wait` completes it.

        Raises:
            OSError: on every rank, if one of them cannot write; the store is as before.
        """
        self.wait()
        final = self.directory / name
        staging = self.directory / together.broadcast(f".{name}.{secrets.token_hex(4)}.staging")
        self._pending = _Pending(final, staging, meta)
        try:
            together.on_rank_0(lambda: _make(staging))
            self._pending.shards = Shards(state, staging)
        except BaseException as error:
            self._give_up(error)
            raise
        if not background:
            self.wait()

    def poll(self) -> None:
        """Complete the save in the background if every rank has written its part; else return at once.

        Raises:
            OSError: on every rank, if one of them could not write; the store is as before.
        """
        if self._pending is not None and together.all_true(self._pending.shards.done()):
            self.wait()

    def wait(self) -> None:
        """Complete the save in the background, if there is one.

        Raises:
            OSError: as `poll`.
        """
        if self._pending is None:
            return
        try:
            files = self._pending.shards.finish()
            together.on_rank_0(lambda: self._publish(self._pending, files))
        except BaseException as error:
            self._give_up(error)
            raise
        self._pending = None

    def abandon(self) -> None:
        """Stop this rank's writer, if one is at work; what it wrote is removed at the next start."""
        if self._pending is not None and self._pending.shards is not None:
            self._pending.shards.abandon()
        self._pending = None

    def clean(self) -> None:
        """Clear up after saves that were killed; at the start of a run, before anything is saved."""
        together.on_rank_0(lambda: retention.clean(self.directory))

    def _publish(self, pending: _Pending, files: dict[str, Entry]) -> None:
        """From a staging directory with the files of all ranks to the newest checkpoint; on rank 0."""
        staging, final = pending.staging, pending.final
        (staging / "meta.json").write_text(json.dumps(pending.meta, indent=2) + "\n")
        files = files | {"meta.json": seal(staging / "meta.json")}
        _write_atomically(staging / MARKER, json.dumps(files, indent=1) + "\n")
        previous = [name for name in _pointed(self.directory) if name != final.name and (self.directory / name).is_dir()]
        _write_atomically(self.directory / POINTER, "".join(f"{name}\n" for name in [final.name, *previous[:1]]))
        replaced = retention.retired(final)
        if final.exists():  # one of that name goes only once its successor is in its place
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(final, replaced)
        os.rename(staging, final)
        _sync(self.directory)
        shutil.rmtree(replaced, ignore_errors=True)
        try:
            retention.remove_outdated(self.directory, final.name, self._keep_last)
        except OSError as error:
            print(f"warning: an outdated checkpoint was not removed: {error}", flush=True)

    def _give_up(self, error: BaseException) -> None:
        """A full disk is not left full. Other errors than OSError are not known to every rank: no meeting then."""
        staging = self._pending.staging
        self.abandon()
        if isinstance(error, OSError):
            together.gather(None)  # no rank writes any more
        if together.rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)

    # ------------------------------------------------------------------------------------------ reading

    def load(self, path: str | Path, build: Callable[[], dict]) -> tuple[dict, dict]:
        """``(state, meta)`` of a complete checkpoint, in this rank's layout.

        Args:
            path: the checkpoint's directory.
            build: returns the sharded state dict to fill; called after the check.

        Raises:
            ValueError: if the checkpoint is incomplete, damaged or does not fit the model.
        """
        meta = self.check(path)
        try:
            return dist_checkpointing.load(build(), str(path), strict=StrictHandling.RAISE_ALL), meta
        except (CheckpointException, CheckpointingException, RuntimeError, KeyError) as error:
            raise ValueError(f"checkpoint {path} does not fit this model: {together.reason(error)}") from None

    def check(self, path: str | Path) -> dict:
        """`verify`, its reading divided among the ranks; not repeated for the checkpoint last verified.

        Raises:
            ValueError: on every rank, naming what is wrong.
        """
        path = Path(path)
        now = str(path), sorted((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in path.rglob("*"))
        if together.all_true(now == self._checked):
            return json.loads((path / "meta.json").read_text())
        meta, failure = {}, None
        try:
            meta = verify(path, part=together.rank(), parts=together.ranks())
        except ValueError as error:
            failure = str(error)
        failures = [text for text in together.gather(failure) if text is not None]
        if failures:
            raise ValueError(failures[0])
        self._checked = now
        return meta

    def newest(self) -> Path | None:
        """The newest complete checkpoint, or None if there is none.

        Follows the pointer; if that names damaged ones, the newest other that is whole.
        """
        for name in together.broadcast(self._candidates() if together.rank() == 0 else []):
            try:
                self.check(self.directory / name)
            except ValueError as damage:
                if together.rank() == 0:
                    print(f"warning: {damage}; trying an older checkpoint", flush=True)
                continue
            return self.directory / name
        return None

    def _candidates(self) -> list[str]:
        """Names of directories with a marker, the newest first."""
        if not self.directory.is_dir():
            return []
        found = {p.name: (p / MARKER).stat().st_mtime_ns for p in self.directory.iterdir() if (p / MARKER).is_file()}
        usable = {}
        for name, time in found.items():  # a retired one counts where a killed save left nothing in its place
            shown = name.removeprefix(".").removesuffix(".old") if name.startswith(".") else name
            if shown == name or (name == f".{shown}.old" and shown not in found):
                usable[name] = time
        order = [name for pointed in _pointed(self.directory) for name in (pointed, f".{pointed}.old")]
        pointed = [name for name in order if name in usable]
        return pointed + sorted(usable.keys() - set(pointed), key=usable.__getitem__, reverse=True)


@dataclass
class _Pending:
    """A save under way."""

    final: Path
    staging: Path
    meta: dict
    shards: Shards | None = None


def _pointed(directory: Path) -> list[str]:
    """The names in the pointer, the newest first."""
    try:
        return (directory / POINTER).read_text().split("\n")[:-1]
    except (OSError, UnicodeDecodeError):
        return []


def _make(directory: Path) -> None:
    directory.mkdir(parents=True)
    _sync(directory.parent)


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)
