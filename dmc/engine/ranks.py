"""The ranks of one tensor-parallel engine: all have the same engine, each on its own heads, and run the same code (SPMD).

Rank 0 receives requests. It announces what is run next: the sequences that have arrived, and a function of the engine with its
arguments, for instance a step. Then all ranks run this function, rank 0 included. The schedulers make the same decisions on
all ranks, since they have the same sequences, and since the caches answer all questions about pages together
(`dmc.engine.sharded_cache`). Tokens are chosen by rank 0 and broadcast.

If a rank ends or hangs, the collectives of the others fail. Every rank counts up a number in the store twice per second, in a
thread of its own. From these the others find out which rank it was, and all name the same one.
"""

from __future__ import annotations

import hmac
import logging
import os
import pickle
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch.distributed as dist

from dmc.cache import PoolExhausted
from dmc.model.group import Group, PeerLost

START_SECONDS = 1800.0  # for reading a large model from a slow disk
_BEAT = 0.5  # seconds
_ROLL_CALL = 2.0  # seconds in which a rank that is alive counts up
_GRACE = 5.0  # seconds that a rank has to end on its own after a failure
_LAST_STEP = 30.0  # seconds for a rank to end after its last command
_FAILED = "failed"  # key of the store: the sentence that says which rank has failed
_DIGEST = 32  # bytes of a signature
_AGREED = (ValueError, PoolExhausted)  # errors that follow from arguments or from a common decision: on all ranks, or on none

_log = logging.getLogger(__name__)


class Runs(Protocol):
    """What `Ranks` needs of an engine (`dmc.engine.core.Engine`)."""

    def receive(self, arrived: list) -> None: ...  # noqa: D102

    def settle(self) -> None: ...  # noqa: D102


class RankFailed(RuntimeError):
    """A rank has ended, failed or not answered in time; nothing can be computed any more."""


@dataclass
class _Ending:
    """What the end of the ranks needs, when `Ranks` itself is gone."""

    key: bytes
    children: Sequence[subprocess.Popen]
    group: Group | None = None
    failed: bool = False
    stop: threading.Event = field(default_factory=threading.Event)


class Ranks:
    """This rank among all.

    Args:
        store: over which the ranks find each other.
        rank, ranks: which of how many.
        key: signs announcements, so that ranks run what rank 0 has announced and nothing else.
        timeout: seconds that a rank may keep the others waiting.
        children: processes of the other ranks, if this is rank 0 and has started them.

    Attributes:
        group: for collectives, once `join` has been called.
        failure: sentence that names the rank that failed; None while all is well.
    """

    def __init__(
        self, store: dist.Store, rank: int, ranks: int, *, key: bytes, timeout: float, children: Sequence[subprocess.Popen] = ()
    ) -> None:
        self.rank, self.ranks, self.children = rank, ranks, children
        self.failure: str | None = None
        self._store, self._timeout = store, timeout
        self._ending = _Ending(key, children)
        self._end = weakref.finalize(self, _end, self._ending)
        store.set(f"beat/{rank}", "0 0")
        threading.Thread(target=_beat, args=(store, rank, self._ending), name="beat", daemon=True).start()

    @property
    def group(self) -> Group:
        """Collectives; usable within `run`."""
        return self._ending.group

    # ------------------------------------------------------------------------------------ the beginning

    def join(self, group: Group) -> None:
        """Takes the group of all ranks. Collectives are allowed until `ready` is called."""
        self._ending.group = group
        group.together = True

    def meet(self, where: str) -> None:
        """Waits until every rank has come here; no rank times out while another one loads a large model.

        Raises:
            RankFailed: if a rank has failed, has ended, or has not come in time.
        """
        end = time.monotonic() + START_SECONDS
        self._store.set(f"{where}/{self.rank}", "")
        while missing := [rank for rank in range(self.ranks) if not self._store.check([f"{where}/{rank}"])]:
            if said := self._said() or self._dead_child():
                raise RankFailed(said)
            if time.monotonic() > end:
                came = self.ranks - len(missing)
                raise RankFailed(f"only {came} of {self.ranks} ranks have come after {START_SECONDS:g} seconds")
            time.sleep(0.02)

    def ready(self, engine: Runs) -> None:
        """All ranks have their engine: from now on rank 0 announces what they run."""
        engine.settle()
        self.group.together = False

    # ------------------------------------------------------------------------------------ the work

    def run(self, engine: Runs, function: Callable, arguments: tuple, own: object, arrived: list) -> object:
        """Runs ``function(engine, *arguments, own)`` on all ranks. Called on rank 0, by one thread at a time, or within such a
        function on all ranks.

        Args:
            engine: of this rank.
            function: of a module, since its name is sent. It makes the same collective calls on all ranks.
            arguments: are sent.
            own: of rank 0; None on other ranks.
            arrived: what `Engine.receive` takes; sent.

        Returns:
            What it returns on rank 0.

        Raises:
            RankFailed: if a rank fails, has ended, or does not answer in time. Every later call raises it too.
            ValueError, PoolExhausted: those of the function; the engine can still be used.
        """
        if self.failure:
            raise RankFailed(self.failure)
        if self.group.together:
            return function(engine, *arguments, own)
        message = pickle.dumps((arrived, function, arguments))
        self.group.together = True
        try:
            self.group.announce(hmac.digest(self._ending.key, message, "sha256") + message)
            return _run(engine, function, arguments, own)
        except _AGREED:
            raise
        except BaseException as error:
            failed = self._fail(error)
            if not isinstance(error, Exception):  # KeyboardInterrupt
                raise
            raise failed from error
        finally:
            self.group.together = False

    def follow(self, engine: Runs) -> int:
        """Runs what rank 0 announces until it ends the ranks → the exit code; called on the other ranks."""
        try:
            self.group.together = True
            while message := self._announced():
                arrived, function, arguments = pickle.loads(message)
                engine.receive(arrived)
                try:
                    _run(engine, function, arguments, None)
                except _AGREED:
                    pass  # rank 0 has raised it too
            return 0
        except BaseException as error:
            self.explain(error)
            return 1
        finally:
            self._ending.stop.set()

    def close(self) -> None:
        """Ends the other ranks; called on rank 0. Idempotent."""
        self.failure = self.failure or "the model was closed"
        self._end()

    def _announced(self) -> bytes:
        """The next announcement; empty: the last one.

        Raises:
            RuntimeError: if it is not signed with the key.
        """
        message = self.group.announce()
        digest, message = message[:_DIGEST], message[_DIGEST:]
        if not hmac.compare_digest(digest, hmac.digest(self._ending.key, message, "sha256")):
            raise RuntimeError("an announcement was not signed by rank 0")
        return message

    # ------------------------------------------------------------------------------------ failures

    def explain(self, error: BaseException) -> str:
        """Says which rank has failed, the same on all ranks, and lets the other ranks know."""
        if isinstance(error, RankFailed):
            return str(error)
        if isinstance(error, PeerLost):
            said = self._blame(error)
            _log.info("%s", said)
            return said
        if not isinstance(error, ValueError):  # else rank 0 says it, in one sentence
            _log.error("rank %d has failed", self.rank, exc_info=error)
        return self._say(f"rank {self.rank} has failed: {type(error).__name__}: {error}")

    def _fail(self, error: BaseException) -> RankFailed:
        """Names the rank that has failed and ends the others, which would only wait."""
        self.failure = self.explain(error)
        self.end_children()
        return RankFailed(self.failure)

    def end_children(self) -> None:
        """Kills the processes that this one has started, after a failure."""
        self._ending.failed = True
        self._end()

    def _blame(self, error: PeerLost) -> str:
        """Names the ranks that have ended or hang.

        That is a child which has ended; or the ranks that have stopped counting up; or, if all count, those that have made the
        fewest collective calls, for which the others wait.
        """
        end = time.monotonic() + _ROLL_CALL
        try:
            before = self._beats()
            while time.monotonic() < end:
                if said := self._said():
                    return said
                if said := self._dead_child():
                    return self._say(said)
                time.sleep(0.02)
            after = self._beats()
        except RuntimeError:
            return "rank 0 has ended"  # and the store with it
        others = [rank for rank in range(self.ranks) if rank != self.rank]
        guilty = [rank for rank in others if after[rank][0] == before[rank][0]]
        if not guilty:
            least = min(calls for _, calls in after)
            guilty = [rank for rank in others if after[rank][1] == least < max(calls for _, calls in after)] or others
        names = f"rank {guilty[0]} has" if len(guilty) == 1 else f"ranks {', '.join(map(str, guilty))} have"
        late = "timed out" in str(error).lower()
        return self._say(f"{names} not answered for {self._timeout:g} seconds" if late else f"{names} ended")

    def _beats(self) -> list[tuple[int, ...]]:
        """Heartbeats so far and collective calls of each rank."""
        return [tuple(map(int, value.split())) for value in self._store.multi_get([f"beat/{rank}" for rank in range(self.ranks)])]

    def _said(self) -> str | None:
        """What the first rank that noticed the failure has said."""
        return self._store.get(_FAILED).decode() if self._store.check([_FAILED]) else None

    def _say(self, said: str) -> str:
        try:
            return self._store.compare_set(_FAILED, "", said).decode()
        except RuntimeError:
            return said  # the store has gone

    def _dead_child(self) -> str | None:
        for rank, child in enumerate(self.children, 1):
            if (code := child.poll()) is not None:
                return f"rank {rank} has ended {f'by signal {-code}' if code < 0 else f'with exit code {code}'}"
        return None


def _run(engine: Runs, function: Callable, arguments: tuple, own: object) -> object:
    """One command, on any rank."""
    try:
        value = function(engine, *arguments, own)
    except _AGREED:
        engine.settle()
        raise
    engine.settle()
    return value


def _beat(store: dist.Store, rank: int, ending: _Ending) -> None:
    """Counts up in the store until the ranks end. Ends this process if another rank has failed and it does not end itself."""
    beats = 0
    try:
        while not ending.stop.wait(_BEAT):
            beats += 1
            store.set(f"beat/{rank}", f"{beats} {ending.group.calls if ending.group else 0}")
            if rank and store.check([_FAILED]):
                break
            if ending.group and any(child.poll() is not None for child in ending.children):
                ending.group.abort()  # NCCL does not notice it
    except RuntimeError:  # the store has gone: with rank 0, or with torchrun
        if not rank:
            return
    if not ending.stop.wait(_GRACE):
        os._exit(1)


def _end(ending: _Ending) -> None:
    """Tells the ranks to stop, or kills them after a failure, and waits for those that are child processes."""
    ending.stop.set()
    if ending.failed or ending.group is None or ending.group.together:
        for child in ending.children:
            child.kill()
    elif not ending.group.rank:
        ending.group.together = True
        try:
            ending.group.announce(hmac.digest(ending.key, b"", "sha256"))
        except PeerLost:
            pass  # it has ended already
    for child in ending.children:
        try:
            child.wait(timeout=_LAST_STEP)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
