"""The engine in a thread of its own, for callers that wait in an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from torch import Tensor

from dmc.engine.llm import LLM
from dmc.engine.sampler import TokenLogprob
from dmc.engine.sequence import Output, Sequence


class QueueFull(RuntimeError):
    """More requests wait than may; come back later."""


class ShuttingDown(RuntimeError):
    """No new request is taken."""


class EngineDead(RuntimeError):
    """The engine failed; nothing is served any more."""


@dataclass(frozen=True)
class Progress:
    """What is new of one completion.

    Attributes:
        index: of the sequence in its request.
        text: that was added and will not change any more.
        tokens: that were added.
        pieces: what each of these tokens adds to the text, see `Output`.
        logprobs: of these tokens, if asked for.
        output: the whole, once it has ended.
        merges: of tokens that were fed, prompt included, bool ``[L, H]`` each, if the sequence is traced; with a window, of
            those that have left it.
        held_bytes, dense_bytes: of a traced sequence, now.
    """

    index: int
    text: str
    tokens: list[int]
    pieces: list[str]
    logprobs: list[TokenLogprob]
    output: Output | None
    merges: list[Tensor] = field(default_factory=list)
    held_bytes: int = 0
    dense_bytes: int = 0


class Stream:
    """A request that was taken: iterate over its progress until every sequence has ended.

    Attributes:
        sequences: of the request.
    """

    def __init__(self, service: Service, sequences: list[Sequence]) -> None:
        self.sequences = sequences
        self._service, self._left = service, len(sequences)
        self._events: asyncio.Queue[Progress | Exception] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._shown = 0  # decisions of a traced sequence handed on
        self._seen = [[0, 0] for _ in sequences]  # characters and tokens handed on

    async def __aiter__(self) -> AsyncIterator[Progress]:
        """Progress as it comes.

        Raises:
            EngineDead: if the engine fails.
        """
        while self._left:
            event = await self._events.get()
            if isinstance(event, Exception):
                raise event
            self._left -= event.output is not None
            yield event

    def cancel(self) -> None:
        """Ends what has not ended; its pages are free one step later."""
        if self._left:
            self._left = 0
            self._service.command(lambda: self._service.drop(self))

    def push(self, event: Progress | Exception) -> None:
        """Hands an event over from the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:
            pass  # the event loop has ended, and with it whoever listened

    def progress(self, sequence: Sequence) -> Progress:
        """What of a sequence is new since the last call."""
        index = self.sequences.index(sequence)
        characters, tokens = self._seen[index]
        done = sequence.finish_reason is not None
        until = len(sequence.text.text) if done else sequence.text.settled(sequence.params.stop)
        until = max(until, characters)
        self._seen[index] = [until, len(sequence.tokens)]
        return Progress(
            index,
            sequence.text.text[characters:until],
            sequence.tokens[tokens:],
            sequence.pieces[tokens:],
            sequence.logprobs[tokens:],
            sequence.output() if done else None,
            *self._traced(sequence),
        )

    def _traced(self, sequence: Sequence) -> tuple[list[Tensor], int, int]:
        if sequence.trace is None:
            return [], 0, 0
        # With a window each entry is about the token that left it: the first ones are about none.
        first = max(self._shown, self._service.llm.cache.policy.ring or 0)
        new, self._shown = sequence.trace[first:], len(sequence.trace)
        cache, stats = self._service.llm.cache, sequence.stats
        if stats is not None:
            return new, stats.held_bytes, stats.dense_bytes
        return new, sequence.held_bytes, cache.dense_bytes(len(sequence.trace))


class Service:
    """Runs an `LLM` for many callers.

    Args:
        llm: to run; nobody else may use it.
        max_waiting: sequences that may wait for admission.
        on_step: called in the engine's thread after each step, with the sequences that advanced.
        on_death: called in the engine's thread when it fails, after all callers were told.
    """

    def __init__(
        self,
        llm: LLM,
        *,
        max_waiting: int = 256,
        on_step: Callable[[list[Sequence]], None] | None = None,
        on_death: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.llm, self.max_waiting, self.on_step, self.on_death = llm, max_waiting, on_step, on_death
        self.accepting, self.last_step = True, time.monotonic()
        self.death: BaseException | None = None
        self._streams: dict[Sequence, Stream] = {}
        self._inbox: deque[Callable[[], object]] = deque()
        self._arriving, self._stop = 0, False  # sequences in the inbox
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Sequences that wait for admission."""
        return self._arriving + len(self.llm.engine.scheduler.waiting)

    @property
    def busy(self) -> bool:
        """Whether any request is under way."""
        return bool(self._inbox) or self.llm.engine.busy

    def stalled(self, seconds: float) -> bool:
        """Whether the engine has work and has not finished a step for so long."""
        return self.busy and time.monotonic() - self.last_step > seconds

    def submit(self, sequences: list[Sequence]) -> Stream:
        """Takes the sequences of a request, which `LLM.sequences` made; called in an event loop.

        Raises:
            QueueFull, ShuttingDown, EngineDead: if it is not taken.
        """
        if self.death is not None:
            raise EngineDead(f"the engine has failed: {self.death}")
        if not self.accepting:
            raise ShuttingDown("the server is shutting down and takes no new requests")
        if self.waiting + len(sequences) > self.max_waiting:
            raise QueueFull(f"{self.waiting} sequences wait already, and at most {self.max_waiting} may")
        stream = Stream(self, sequences)
        self._arriving += len(sequences)
        self.command(lambda: self._add(stream))
        if self.death is not None:  # meanwhile
            raise EngineDead(f"the engine has failed: {self.death}")
        return stream

    def command(self, what: Callable[[], object]) -> None:
        """Has something done in the engine's thread, between two steps."""
        with self._wake:
            if not self.busy:
                self.last_step = time.monotonic()  # it was idle, not stalled
            self._inbox.append(what)
            self._wake.notify()

    async def drain(self, timeout: float) -> None:
        """Takes nothing new, and waits until all is done, at most so many seconds; then cancels the rest."""
        self.accepting = False
        end = time.monotonic() + timeout
        while self.busy and self.death is None and time.monotonic() < end:
            await asyncio.sleep(0.05)
        for stream in set(self._streams.values()):
            stream.push(ShuttingDown("the server was shut down before this request was done"))
            stream.cancel()

    def stop(self) -> None:
        """Ends the thread after the step that it is in, and whatever was under way."""
        self.accepting = False
        with self._wake:
            self._stop = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join()

    # ------------------------------------------------------------------------------------ in the engine's thread

    def _run(self) -> None:
        engine, checked = self.llm.engine, True
        try:
            while not self._stop:
                with self._wake:
                    if not self._inbox and not engine.busy:
                        if not checked:
                            self.llm.check_integrity()
                            checked = True
                        if not self._wake.wait(timeout=1.0):
                            self.llm.check_ranks()
                while self._inbox:
                    self._inbox.popleft()()
                if engine.busy:
                    self._publish(engine.step())
                    self.last_step, checked = time.monotonic(), False
            engine.abort()
        except BaseException as error:  # whatever it is, every caller must hear of it
            self._die(error)

    def _add(self, stream: Stream) -> None:
        self._arriving -= len(stream.sequences)
        for sequence in stream.sequences:
            self._streams[sequence] = stream
            self.llm.engine.add(sequence)

    def drop(self, stream: Stream) -> None:
        """Cancels what of a request is under way; in the engine's thread, through `command`."""
        self.llm.engine.cancel(*stream.sequences)
        for sequence in stream.sequences:
            self._streams.pop(sequence, None)

    def _publish(self, advanced: list[Sequence]) -> None:
        for sequence in advanced:
            stream = self._streams.get(sequence)
            if stream is None:
                continue
            stream.push(stream.progress(sequence))
            if sequence.finish_reason:
                del self._streams[sequence]
        if self.on_step:
            self.on_step(advanced)

    def _die(self, error: BaseException) -> None:
        self.death = error
        failed = EngineDead(f"the engine has failed: {type(error).__name__}: {error}")
        while self._inbox:  # requests that came too late: they are told with the others
            with contextlib.suppress(Exception):
                self._inbox.popleft()()
        for stream in set(self._streams.values()):
            stream.push(failed)
        if self.on_death:
            self.on_death(error)
