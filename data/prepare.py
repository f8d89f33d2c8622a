"""From documents to a prepared corpus: split, tokenise in parallel, write next to the final place, rename.

The bytes written depend on the documents, their order, the tokenizer and the split, not on the number of workers.
"""

from __future__ import annotations

import errno
import fcntl
import heapq
import itertools
import os
import shutil
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron.core.datasets.indexed_dataset import DType
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from data import sources, tokens
from data.chat import ChatTemplate, Messages, template_hash
from data.column import Column
from data.encode import Document, chunked, encode_all
from data.opening import opening
from data.skipped import Skipped
from data.writer import PartWriter, sync_directory, write_meta

MOST_COUNTED = 2**16  # documents that a held-out count may keep in memory


@dataclass(frozen=True)
class HeldOut:
    """What is kept for evaluation: a ``fraction`` in (0, 1) or a ``count`` of the documents, or ``files`` of their own.

    Fraction and count go by the SHA-256 of the text: the same documents whatever their order, copies on one side.
    """

    fraction: float = 0.0
    count: int = 0
    files: list[str] = field(default_factory=list)

    @classmethod
    def parse(cls, share: str | None, files: list[str]) -> HeldOut:
        """From the command line: a number below 1 is a fraction, a whole number a count.

        Raises:
            ValueError: for anything else, or for both a share and files.
        """
        if share is None or share == "0":
            return cls(files=files)
        if files:
            raise ValueError(f"--held-out {share} and --held-out-file {files[0]} exclude each other: give one")
        try:
            if share.isdecimal() and 0 < int(share) <= MOST_COUNTED:
                return cls(count=int(share))
            fraction = float(share)
        except ValueError:
            fraction = -1.0
        if not 0 < fraction < 1:
            raise ValueError(f"--held-out is {share}: it must be a fraction below 1 or a count of 1 to {MOST_COUNTED} documents")
        return cls(fraction=fraction)

    def __bool__(self) -> bool:
        """Whether anything is held out."""
        return bool(self.fraction or self.count or self.files)


def prepare(
    request: sources.Request,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    *,
    held_out: HeldOut,
    workers: int = 1,
    parse_special: bool = False,
    limit: int | None = None,
    bos: str | bool = "auto",
    loss_on: str | None = None,
) -> dict:
    """Make a prepared corpus; returns its ``meta.json``.

    Args:
        request: the documents.
        tokenizer: of the model that will train on it.
        output: directory to make; it must not exist.
        held_out: what goes into the part ``held_out``.
        workers: tokenising processes.
        parse_special: see `data.encode.Encoder`.
        limit: documents to stop after.
        bos: whether documents begin with a BOS token (`data.opening.opening`); conversations begin as their template does.
        loss_on: None for texts; for conversations in ``request.column`` one of `data.chat.LOSS_ON`.

    Raises:
        ValueError: one sentence, for sources that cannot be read, a split that comes out empty, or a disk that
            cannot be written. Nothing is left at ``output`` then.
    """
    begin = [] if loss_on else opening(tokenizer, bos)
    template = ChatTemplate(tokenizer, loss_on) if loss_on else None
    try:
        with staged(output) as staging:
            run = _Run(staging, tokenizer, held_out, workers, parse_special, begin, template)
            try:
                meta = run.write(request, limit)
            except BaseException:
                run.abandon()
                raise
            write_meta(staging, meta)
    except OSError as error:  # what the sources raise is a ValueError by now
        full = " (free some space or name another --output)" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
        raise ValueError(f"{output} could not be written: {error.strerror or error}{full}; nothing of it was kept") from None
    return meta


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A directory next to ``output`` that takes its name when the block ends, and goes when the block fails.

    What a killed process left there is removed by the next.

    Raises:
        ValueError: if ``output`` exists, or another process is making it.
    """
    if output.exists():
        raise ValueError(f"{output} exists: remove it, or name another --output")
    staging = output.with_name(output.name + ".partial")
    staging.mkdir(parents=True, exist_ok=True)
    handle = os.open(staging, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = staging.is_dir() and os.fstat(handle).st_ino == staging.stat().st_ino
        except BlockingIOError:
            mine = False
        if not mine:
            raise ValueError(f"another process is writing {staging}: wait for it, or name another --output")
        for path in staging.iterdir():
            path.unlink()
        try:
            yield staging
            os.rename(staging, output)
            sync_directory(output.parent)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    finally:
        os.close(handle)


class _Run:
    """The parts in the making."""

    def __init__(
        self,
        staging: Path,
        tokenizer: PreTrainedTokenizerBase,
        held_out: HeldOut,
        workers: int,
        parse_special: bool,
        begin: list[int],
        template: ChatTemplate | None,
    ) -> None:
        dtype = DType.optimal_dtype(len(tokenizer))
        self._about = tokens.about(tokenizer)
        self._settings = {
            "tokenizer": tokenizer.backend_tokenizer.to_str(),
            "end": tokenizer.eos_token_id,
            "dtype": dtype.__name__,
            "parse_special": parse_special or template is not None,
            "begin": begin,
            "loss_on": template and template.loss_on,
        }
        self._template, self._held_out, self._workers = template, held_out, workers
        self._chat = {"chat": {"template": template_hash(tokenizer), "loss_on": template.loss_on}} if template else {}
        scores = template is not None and template.loss_on == "assistant"
        parts = ("train", *(["held_out"] if held_out else []))
        self._parts = {p: PartWriter(staging, p, dtype, scores=scores) for p in parts}
        self._skipped, self._copies = Skipped(), 0

    def write(self, request: sources.Request, limit: int | None) -> dict:
        kept: set[bytes] = set()
        if self._held_out.files:
            with closing(self._encoded(_files(request, self._held_out.files), None, "held out")) as documents:
                for document in documents:
                    kept.add(document.digest)
                    self._add("held_out", document)
        with closing(self._encoded(request, limit, "documents")) as documents:  # workers and bar end before an error is told
            self._split(documents, kept)
        for name, part in self._parts.items():
            if not part.documents:
                read = sum(p.documents for p in self._parts.values())
                raise ValueError(
                    f"of {read} documents (left out: {self._skipped or 'none'}, {self._copies} copies of held-out ones) none "
                    f"went into the {name.replace('_', '-')} part: give more text, or another --held-out"
                )
        source = {k: v for k, v in asdict(request).items() if k != "streaming"}
        return {
            "tokenizer": self._about,
            "begin": self._settings["begin"],
            "special_tokens": "parsed" if self._settings["parse_special"] else "text",
            **self._chat,
            "source": source | {"limit": limit, "held_out": asdict(self._held_out)},
            "blank_documents": self._skipped.blank,
            "null_documents": self._skipped.null,
            "empty_files": self._skipped.files,
            "copies_of_held_out": self._copies,
            "parts": {name: part.finish() for name, part in self._parts.items()},
        }

    def abandon(self) -> None:
        for part in self._parts.values():
            part.abandon()

    def _split(self, documents: Iterator[Document], kept: set[bytes]) -> None:
        smallest = _Smallest(self._held_out.count)
        threshold = int(self._held_out.fraction * 2**64)
        for document in documents:
            if document.digest in kept:  # evaluating on what was trained on would measure memory
                self._copies += 1
            elif int.from_bytes(document.digest[:8], "big") < threshold:
                self._add("held_out", document)
            else:
                for other in smallest.offer(document):
                    self._add("train", other)
        for document in smallest.documents():
            self._add("held_out", document)

    def _add(self, part: str, document: Document) -> None:
        self._parts[part].add(document.ids, characters=document.characters, digest=document.digest, scored=document.scored)

    def _encoded(self, request: sources.Request, limit: int | None, what: str) -> Generator[Document]:
        progress = sources.Progress()
        column = Messages(request.column, self._template) if self._template else Column(request.column)
        texts = itertools.islice(sources.documents(request, progress, column), limit)
        interval = 0.5 if sys.stderr.isatty() else 30.0
        done, begun = 0, time.perf_counter()
        with tqdm(desc=what, unit=" docs", mininterval=interval, dynamic_ncols=True) as bar:
            for chunk in encode_all(chunked(texts), self._settings, self._workers):
                yield from chunk.documents()
                done += len(chunk.ids)
                expected = progress.expected
                bar.total = expected if limit is None or expected is None else min(expected, limit)
                bar.set_postfix_str(f"{done / (time.perf_counter() - begun):,.0f} tokens/s", refresh=False)
                bar.update(len(chunk.lengths))
            bar.total = bar.n
        self._skipped += progress.skipped


class _Smallest:
    """Holds the documents with the ``count`` smallest digests of those offered; lets go of the others."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._kept: dict[bytes, list[Document]] = {}
        self._largest: list[int] = []  # a heap of negated digests

    def offer(self, document: Document) -> list[Document]:
        """Take a document; returns those that are out for good."""
        digest = document.digest
        if digest in self._kept:
            self._kept[digest].append(_own(document))
            return []
        number = -int.from_bytes(digest, "big")
        if len(self._kept) < self._count:
            heapq.heappush(self._largest, number)
            self._kept[digest] = [_own(document)]
            return []
        if not self._count or number < self._largest[0]:
            return [document]
        out = -heapq.heapreplace(self._largest, number)
        self._kept[digest] = [_own(document)]
        return self._kept.pop(out.to_bytes(32, "big"))

    def documents(self) -> Iterator[Document]:
        """Those held, by digest."""
        for digest in sorted(self._kept):
            yield from self._kept[digest]


def _own(document: Document) -> Document:
    """The document with arrays of its own: views would keep its whole chunk in memory."""
    scored = None if document.scored is None else document.scored.copy()
    return document._replace(ids=document.ids.copy(), scored=scored)


def _files(request: sources.Request, names: list[str]) -> sources.Request:
    return sources.Request(names, column=request.column, txt_documents=request.txt_documents)
