"""Heartbeats between ranks: the death of one rank stops every rank in bounded time, with a sentence that names it.

A collective call waits for a dead peer until its timeout, half an hour by default, and torchrun stops only the ranks of its own
node. So a thread of every rank writes a heartbeat to the rendezvous store. It also reads there whether another rank has failed:
a failing rank writes its reason, and a stale heartbeat shows a dead rank.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator

import torch

_FAILED = "dmc/failed"
_CONNECTION = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
_watch: _Watch | None = None


def watch(timeout: float) -> None:
    """Start to watch the other ranks. Call it on every rank after the process group is created.

    Args:
        timeout: seconds without a heartbeat after which a rank counts as dead; 0 disables the watch.
    """
    global _watch
    if timeout and torch.distributed.get_world_size() > 1:
        _watch = _Watch(timeout)


class Lost(RuntimeError):
    """A collective call failed because another rank died."""


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Report an exception inside the block to every other rank, which then stops with this rank's reason.

    Raises:
        Lost: instead of the exception of torch.distributed when another rank died.
    """
    try:
        yield
    except Exception as error:
        lost = isinstance(error, RuntimeError) and any(word in str(error) for word in _CONNECTION)
        reason = " ".join(str(error).split())
        if _watch is not None:
            reason = _watch.fail(f"{type(error).__name__}: {reason}", lost=lost) or reason
        if lost:
            raise Lost(f"another rank ended or cannot be reached ({reason[:300]})") from None
        raise


def close() -> None:
    """Stop the watch, on all ranks together, before the process group is destroyed."""
    global _watch
    if _watch is not None:
        _watch.close()
        _watch = None


class _Watch:
    def __init__(self, timeout: float) -> None:
        self._timeout, self._interval = timeout, min(5.0, timeout / 8)
        self._rank, self._ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        # A separate connection: calls of the main thread would hold the lock of a shared one.
        self._store = torch.distributed.distributed_c10d._get_default_store().clone()
        self._store.add(self._key(self._rank), 1)
        torch.distributed.barrier()  # every key exists
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="peers", daemon=True)
        self._thread.start()

    def fail(self, reason: str, *, lost: bool) -> str | None:
        """Write this rank's failure for the others; return the earlier failure if another rank was first."""
        self._ending.set()
        try:
            for _ in range(10 if lost else 1):  # the dead rank may have written its reason
                if self._store.check([_FAILED]):
                    return self._store.get(_FAILED).decode()
                time.sleep(0.1 * lost)
            self._store.set(_FAILED, f"rank {self._rank} failed: {reason}")
        except RuntimeError:  # the store died with rank 0: the other ranks notice it themselves
            pass
        return None

    def close(self) -> None:
        """Stop, after all ranks have stopped using the store."""
        self._ending.set()
        torch.distributed.barrier()
        self._thread.join()

    def _run(self) -> None:
        seen: dict[int, tuple[int, float]] = {}
        while not self._ending.wait(self._interval):
            try:
                self._store.add(self._key(self._rank), 1)
                self._look(seen)
                failure = self._store.get(_FAILED).decode() if self._store.check([_FAILED]) else None
            except RuntimeError as error:
                failure = f"rank 0 or its node ended: {str(error).splitlines()[0]}"
            if failure is not None and not self._ending.is_set():
                self._end(failure)

    def _look(self, seen: dict[int, tuple[int, float]]) -> None:
        """Report a rank with a stale heartbeat; ``seen`` holds each rank's last value and the time of its last change.

        Rank 0 checks all others, and they check rank 0.
        """
        others, now = range(1, self._ranks) if self._rank == 0 else [0], time.monotonic()
        counts = self._store.multi_get([self._key(rank) for rank in others])
        for rank, count in zip(others, map(int, counts), strict=True):
            value, since = seen.setdefault(rank, (count, now))
            if value != count:
                seen[rank] = (count, now)
            elif now - since > self._timeout:
                self._store.set(_FAILED, f"rank {rank} gave no sign of life for {self._timeout:g} s (run.peer_timeout)")
                return

    def _end(self, failure: str) -> None:
        """Exit the process; the main thread may be inside a collective call that never returns."""
        print(f"error: rank {self._rank} ends: {failure}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)

    @staticmethod
    def _key(rank: int) -> str:
        return f"dmc/alive/{rank}"
