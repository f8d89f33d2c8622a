"""Texts to tokens, in this process or in workers; light to import, since every worker does.

A document's tokens depend on its text and the tokenizer alone, never on its neighbours or the worker.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

CHUNK_DOCUMENTS, CHUNK_CHARACTERS = 512, 2**20  # handed to a worker at once: what ends first
_encode: Encoder | None = None  # of a worker process


class Conversation(str):
    """A rendered conversation. ``turns``: ``(start, stop)`` characters of each assistant turn, if they are needed."""

    turns: tuple[tuple[int, int], ...]

    def __new__(cls, text: str, turns: tuple[tuple[int, int], ...] = ()) -> Conversation:
        """The text with its turns."""
        made = super().__new__(cls, text)
        made.turns = turns
        return made


class Document(NamedTuple):
    """Tokens of one document: ``ids`` [n], the characters and SHA-256 of its text, and ``scored`` [n] as in `Encoded`."""

    ids: np.ndarray
    characters: int
    digest: bytes
    scored: np.ndarray | None = None


@dataclass(frozen=True)
class Encoded:
    """Documents of one chunk: all ``ids`` in a row, and per document ``lengths``, ``characters``, SHA-256 ``digests``.

    ``scored``: uint8 for each id, 1 where it belongs to an assistant turn; None where the loss is on everything.
    """

    ids: np.ndarray
    lengths: list[int]
    characters: list[int]
    digests: list[bytes]
    scored: np.ndarray | None = None

    def documents(self) -> Iterator[Document]:
        """Each document."""
        stop = 0
        for length, characters, digest in zip(self.lengths, self.characters, self.digests, strict=True):
            start, stop = stop, stop + length
            yield Document(self.ids[start:stop], characters, digest, None if self.scored is None else self.scored[start:stop])


class Encoder:
    """Encodes chunks of texts; every document begins with the tokens ``begin`` and ends with the token ``end``.

    A conversation (``loss_on``) has the tokens of its text alone: its template writes the first and the last one.

    Args:
        tokenizer: the JSON of a `tokenizers.Tokenizer`.
        end: the end-of-text token.
        dtype: name of numpy's dtype of the ids.
        begin: tokens that every document begins with (`data.opening`). A text that begins with them already, as a chat
            template may write it, gets no second ones.
        parse_special: whether the names of special tokens in a text stand for the tokens (text written by a chat
            template) or are text like any other (web pages: the ``</s>`` of struck-out HTML ends no document).
        loss_on: None for texts. For conversations (`Conversation`) "everything", or "assistant" to find the tokens
            of their assistant turns: those that hold a character of one.
    """

    def __init__(
        self, tokenizer: str, end: int, dtype: str, *, parse_special: bool, begin: Sequence[int] = (), loss_on: str | None = None
    ) -> None:
        self._tokenizer = Tokenizer.from_str(_without_trimming(tokenizer) if loss_on else tokenizer)
        self._loss_on = loss_on
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = not parse_special
        self._begin, self._end, self._dtype = list(begin), [] if loss_on else [end], np.dtype(dtype)

    def __call__(self, texts: list[str]) -> Encoded:
        """The tokens of some texts."""
        scores = self._loss_on == "assistant"
        encode = self._tokenizer.encode_batch if scores else self._tokenizer.encode_batch_fast  # the latter has no offsets
        found = encode(texts, add_special_tokens=False)
        parts = [self._begun(e.ids) for e in found]
        lengths = [len(ids) + len(self._end) for ids in parts]
        ids = np.empty(sum(lengths), self._dtype)
        stop = 0
        for part, length in zip(parts, lengths, strict=True):
            start, stop = stop, stop + length
            ids[start : start + len(part)], ids[start + len(part) : stop] = part, self._end
        return Encoded(
            ids,
            lengths,
            [len(t) for t in texts],
            [hashlib.sha256(t.encode()).digest() for t in texts],
            np.concatenate([_in_turns(e.offsets, t.turns) for e, t in zip(found, texts, strict=True)]) if scores else None,
        )

    def _begun(self, ids: list[int]) -> list[int]:
        return ids if ids[: len(self._begin)] == self._begin else self._begin + ids


def _in_turns(offsets: list[tuple[int, int]], turns: Sequence[tuple[int, int]]) -> np.ndarray:
    """[n] uint8: 1 for the tokens from the first to the last one that hold characters of a turn.

    Args:
        offsets: ``(start, stop)`` characters of each token, in order. The bytes of one character may be several tokens.
        turns: ``(start, stop)`` characters of each turn.
    """
    starts, stops = np.array(offsets, np.int64).reshape(-1, 2).T
    scored = np.zeros(len(starts), np.uint8)
    for start, stop in turns:
        scored[np.searchsorted(stops, start, side="right") : np.searchsorted(starts, stop, side="left")] = 1
    return scored


def _without_trimming(tokenizer: str) -> str:
    """A tokenizer whose offsets hold the spaces of its tokens: its post-processor may trim them, and adds no token here."""
    return json.dumps(json.loads(tokenizer) | {"post_processor": None})


def encode_all(chunks: Iterable[list[str]], settings: dict, workers: int) -> Iterator[Encoded]:
    """Encode chunks in their order, in ``workers`` processes of their own if there are several.

    Never more than a few chunks a worker are held, however long the input.

    Args:
        chunks: lists of texts.
        settings: of `Encoder`.
        workers: processes; 1 encodes in this one.

    Raises:
        ValueError: if a worker was killed (most often for memory).
    """
    if workers == 1:
        yield from map(Encoder(**settings), chunks)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _start, (settings,)) as pool:
        try:
            yield from _in_order(pool, chunks, 3 * workers)
        except BrokenProcessPool:
            raise ValueError(
                f"one of the {workers} tokenising processes was killed, most often for lack of memory: use fewer --workers"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def chunked(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in lists of at most `CHUNK_DOCUMENTS`, closed as soon as they hold `CHUNK_CHARACTERS`."""
    chunk: list[str] = []
    size = 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if len(chunk) == CHUNK_DOCUMENTS or size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _in_order(pool: ProcessPoolExecutor, chunks: Iterable[list[str]], held: int) -> Iterator[Encoded]:
    waiting: deque[Future[Encoded]] = deque()
    for chunk in chunks:
        waiting.append(pool.submit(_work, chunk))
        if len(waiting) >= held:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _start(settings: dict) -> None:
    global _encode
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a worker is one core
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encode = Encoder(**settings)


def _end_with_parent() -> None:
    """A killed parent leaves no worker behind, waiting for work for ever."""
    wait([parent_process().sentinel])
    os._exit(1)


def _work(texts: list[str]) -> Encoded:
    return _encode(texts)
