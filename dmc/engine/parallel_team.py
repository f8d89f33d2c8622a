"""Rank-0 controller: sends commands to workers and collects their replies, over one link per worker.

Commands go over plain connections, so that an idle rank waits without a timeout and a closed connection shows that a rank is
dead. Tensors go over torch.distributed (`dmc.model.group`).
"""

from __future__ import annotations

import subprocess
import time
import weakref
from collections import deque
from multiprocessing.connection import Connection

from dmc.engine.parallel_rank import Rank, Reply, receive, send

START_SECONDS = 1800.0  # for reading a large model from a slow disk
_LAST_WORDS = 2.0  # seconds to learn from which rank a failure came
_LAST_STEP = 30.0  # seconds for a rank to end


class RankFailed(RuntimeError):
    """A rank has died, failed or not answered in time; nothing can be computed any more."""


class Team:
    """Controller of all ranks, including rank 0 itself. Only one thread at a time may use it.

    Args:
        own: rank 0's own part of the model and the cache.
        links: connections to the other ranks, in their order.
        children: the processes of the other ranks, if rank 0 started them.
        timeout: maximum seconds until a reply.
    """

    def __init__(self, own: Rank, links: list[Connection], children: list[subprocess.Popen], timeout: float) -> None:
        self.own, self.ranks, self.states = own, len(links) + 1, []
        self.forgotten: deque[int] = deque()  # numbers of prompts and swapped sequences to delete
        self._links, self._children, self._timeout = links, children, timeout
        self._failure: str | None = None
        self._end = weakref.finalize(self, end, links, children)
        self._collect(own.execute("nothing", (), ()), START_SECONDS)

    def call(self, name: str, *arguments: object) -> list[Reply]:
        """Run a method of `Rank` on every rank and return the replies, rank 0's first.

        Raises:
            RankFailed: if a rank fails, has exited, or does not reply in time. Every later call raises it too.
        """
        if self._failure:
            raise RankFailed(self._failure)
        forgotten = [self.forgotten.popleft() for _ in range(len(self.forgotten))]
        try:
            for link in self._links:
                send(link, (name, arguments, forgotten))
            return self._collect(self.own.execute(name, arguments, forgotten), self._timeout)
        except BaseException as error:
            failed = self._failed(error)
            if not isinstance(error, Exception):  # stop the workers, then re-raise KeyboardInterrupt
                raise
            raise failed from error

    def check(self) -> None:
        """Check between commands whether a rank has exited.

        Raises:
            RankFailed: if so.
        """
        if self._failure:
            raise RankFailed(self._failure)
        if any(link.poll() for link in self._links):  # no command is pending, so this is an exit or an error
            raise self._failed(EOFError())

    def close(self) -> None:
        """Stop the other ranks. Idempotent."""
        self._failure = self._failure or "the model was closed"
        self._end()

    def _collect(self, own: Reply, seconds: float) -> list[Reply]:
        end, replies = time.monotonic() + seconds, [own]
        for rank, link in enumerate(self._links, 1):
            if not link.poll(max(0.0, end - time.monotonic())):
                raise RankFailed(f"rank {rank} has not answered for {seconds:g} seconds")
            reply = receive(link)
            if isinstance(reply, str):
                raise RankFailed(f"rank {rank} has failed: {reply}")
            replies.append(reply)
        self.states = [reply.state for reply in replies]
        return replies

    def _failed(self, error: BaseException) -> RankFailed:
        """Find the rank that failed first and stop the others, which would only wait."""
        if isinstance(error, RankFailed):
            self._failure = str(error)
        else:
            self._failure = last_words(self._links, self._children) or f"rank 0 has failed: {type(error).__name__}: {error}"
        for child in self._children:
            child.kill()
        self._end()
        return RankFailed(self._failure)


def last_words(links: list[Connection], children: list[subprocess.Popen]) -> str | None:
    """Name the rank that failed, with its reason; None if no rank reported an error or exited."""
    end = time.monotonic() + _LAST_WORDS
    while time.monotonic() < end:
        for rank, link in enumerate(links, 1):
            try:
                while link.poll():
                    if isinstance(said := receive(link), str) and "Connection closed by peer" not in said:
                        return f"rank {rank} has failed: {said}"
            except (EOFError, OSError):
                if not children:
                    return f"rank {rank} has ended"
        for rank, child in enumerate(children, 1):
            if child.poll() is not None:
                return ended(rank, child)
        time.sleep(0.02)
    return None


def ended(rank: int, child: subprocess.Popen) -> str:
    """Describe how the process of a rank ended."""
    code = child.returncode
    return f"rank {rank} has ended {f'by signal {-code}' if code < 0 else f'with exit code {code}'}"


def end(links: list[Connection], children: list[subprocess.Popen]) -> None:
    """Tell the ranks to stop, and wait for those that are child processes."""
    for link in links:
        try:
            send(link, None)
        except OSError:
            pass
        link.close()
    for child in children:
        try:
            child.wait(timeout=_LAST_STEP)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
