"""Rank 0's hold of all ranks: it tells them what to do, over a link to each, and hears what came of it.

Commands go over plain connections, so that an idle rank waits without a timeout and a dead one is noticed by its closed
connection. Tensors go over torch.distributed (`dmc.model.group`).
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
    """Rank 0's hold of all ranks, itself included. One thread at a time may use it.

    Args:
        own: what rank 0 does itself.
        links: to the other ranks, in their order.
        children: their processes, where rank 0 has started them.
        timeout: seconds that an answer may take.
    """

    def __init__(self, own: Rank, links: list[Connection], children: list[subprocess.Popen], timeout: float) -> None:
        self.own, self.ranks, self.states = own, len(links) + 1, []
        self.forgotten: deque[int] = deque()  # numbers of prompts and swapped sequences that nobody needs any more
        self._links, self._children, self._timeout = links, children, timeout
        self._failure: str | None = None
        self._end = weakref.finalize(self, end, links, children)
        self._collect(own.execute("nothing", (), ()), START_SECONDS)

    def call(self, name: str, *arguments: object) -> list[Reply]:
        """Has every rank run a command of `Rank` → their replies, rank 0's first.

        Raises:
            RankFailed: if a rank cannot, has gone, or does not answer in time. So does every later call.
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
            if not isinstance(error, Exception):  # Ctrl-C: the ranks are ended, and it stays what it is
                raise
            raise failed from error

    def check(self) -> None:
        """Notices, while nothing is computed, that a rank has gone.

        Raises:
            RankFailed: if so.
        """
        if self._failure:
            raise RankFailed(self._failure)
        if any(link.poll() for link in self._links):  # nothing was asked, so this is an end or an error
            raise self._failed(EOFError())

    def close(self) -> None:
        """Lets the other ranks end; more than once does no harm."""
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
        """Finds out which rank failed first, and ends the others: they could only wait."""
        if isinstance(error, RankFailed):
            self._failure = str(error)
        else:
            self._failure = last_words(self._links, self._children) or f"rank 0 has failed: {type(error).__name__}: {error}"
        for child in self._children:
            child.kill()
        self._end()
        return RankFailed(self._failure)


def last_words(links: list[Connection], children: list[subprocess.Popen]) -> str | None:
    """Which rank failed, and why, if one says so or has ended."""
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
    """How the process of a rank ended."""
    code = child.returncode
    return f"rank {rank} has ended {f'by signal {-code}' if code < 0 else f'with exit code {code}'}"


def end(links: list[Connection], children: list[subprocess.Popen]) -> None:
    """Tells ranks to end, and waits for those that are processes of this one."""
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
