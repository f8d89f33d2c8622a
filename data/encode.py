"""Texts to tokens, in this process or in workers; light to import, since every worker does.

A document's tokens depend on its text and the tokenizer alone, never on its neighbours or the worker.
"""

from __future__ import annotations

import hashlib
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

import numpy as np
from tokenizers import Tokenizer

CHUNK_DOCUMENTS, CHUNK_CHARACTERS = 512, 2**20  # handed to a worker at once: what ends first
_encode: Encoder | None = None  # of a worker process


@dataclass(frozen=True)
class Encoded:
    """Documents of one chunk: all ``ids`` in a row, and per document ``lengths``, ``characters``, SHA-256 ``digests``."""

    ids: np.ndarray
    lengths: list[int]
    characters: list[int]
    digests: list[bytes]

    def documents(self) -> Iterator[tuple[np.ndarray, int, bytes]]:
        """``(ids [n], characters, digest)`` of each."""
        stop = 0
        for length, characters, digest in zip(self.lengths, self.characters, self.digests, strict=True):
            start, stop = stop, stop + length
            yield self.ids[start:stop], characters, digest


class Encoder:
    """Encodes chunks of texts; every document begins with the tokens ``begin`` and ends with the token ``end``.

    Args:
        tokenizer: the JSON of a `tokenizers.Tokenizer`.
        end: the end-of-text token.
        dtype: name of numpy's dtype of the ids.
        begin: tokens that every document begins with (`data.opening`). A text that begins with them already, as a chat
            template may write it, gets no second ones.
        parse_special: whether the names of special tokens in a text stand for the tokens (text written by a chat
            template) or are text like any other (web pages: the ``</s>`` of struck-out HTML ends no document).
    """

    def __init__(self, tokenizer: str, end: int, dtype: str, *, parse_special: bool, begin: Sequence[int] = ()) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = not parse_special
        self._begin, self._end, self._dtype = list(begin), end, np.dtype(dtype)

    def __call__(self, texts: list[str]) -> Encoded:
        """The tokens of some texts."""
        parts = [self._begun(e.ids) for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        lengths = [len(ids) + 1 for ids in parts]
        ids = np.empty(sum(lengths), self._dtype)
        stop = 0
        for part, length in zip(parts, lengths, strict=True):
            start, stop = stop, stop + length
            ids[start : stop - 1], ids[stop - 1] = part, self._end
        return Encoded(ids, lengths, [len(t) for t in texts], [hashlib.sha256(t.encode()).digest() for t in texts])

    def _begun(self, ids: list[int]) -> list[int]:
        return ids if ids[: len(self._begin)] == self._begin else self._begin + ids


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
                f"one of the {workers} tokenising processes was killed, most often for want of memory: use fewer --workers"
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
