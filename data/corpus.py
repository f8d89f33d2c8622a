"""Tokenised corpora on disk: megatron-core's ``.bin/.idx`` pairs next to a ``meta.json``, read through memory maps.

A directory holds one pair a part (``train``, ``held_out``; ``tokens`` in the cache) and, written last, ``meta.json``:

    {"format": 1, "tokenizer": {"hash", "vocabulary", "end"}, "begin": [tokens before each document], "source": {...},
     "parts": {PART: {"hash", "text_hash", "documents", "tokens", "characters", "files": {NAME: {"bytes", "sha256"}}}}}

A corpus of conversations has ``"chat": {"template", "loss_on"}`` too. With loss on assistant turns each part has a third file
``PART.scored``, one byte per token, 1 in assistant turns, and the number of these tokens as ``"scored"``.

Opening checks the sizes of all files against the index and ``meta.json``; `verify` reads every byte.
"""

from __future__ import annotations

import json
import struct
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import DType
from torch import Tensor

from data.skipped import Skipped
from data.writer import FORMAT, combined_hash, sha256_of

_HEADER = struct.Struct("<9sQBQQ")  # magic, version, code of the dtype, sequences, document bounds
_PART = ("hash", "text_hash", "documents", "tokens", "characters", "files")
_MAGIC = b"MMIDIDX\x00\x00"


@dataclass(frozen=True)
class Corpus:
    """A tokenised text whose documents end with the tokenizer's end-of-text token, or conversations as their template ends them.

    ``tokens`` [N] uint16 or int32, ``offsets`` [documents] int64, the byte offset of each document in ``tokens``, and
    ``scored`` [N] uint8, 1 where the loss counts the prediction of the token (None: everywhere), are memory maps: only what is
    read takes memory.
    """

    name: str
    tokens: np.ndarray
    offsets: np.ndarray
    hash: str
    characters: int
    skipped: Skipped = field(default_factory=Skipped)  # what the files of the text held besides these documents
    chat: bool = False  # documents are conversations
    scored: np.ndarray | None = None
    scored_tokens: int = 0  # how many there are, with `scored`

    def __len__(self) -> int:
        """Tokens."""
        return len(self.tokens)

    def cut(self, first: list[int], length: int) -> tuple[Tensor, Tensor]:
        """Pieces of the stream, and where documents start in them.

        Args:
            first: [B] positions.
            length: T, of each piece.

        Returns:
            [B, T] int64 tokens, and [B, T] bool: first tokens of documents.
        """
        rows = np.stack([self.tokens[a : a + length] for a in first]).astype(np.int64)
        starts = torch.zeros(rows.shape, dtype=torch.bool)
        size = self.tokens.itemsize
        for row, a in enumerate(first):
            # bisect reads a few dozen entries; numpy's searchsorted would copy the unaligned map
            low, high = bisect_left(self.offsets, a * size), bisect_left(self.offsets, (a + length) * size)
            starts[row, self._positions(low, high) - a] = True
        return torch.from_numpy(rows), starts

    def scores(self, first: int, length: int) -> Tensor:
        """[length] bool: whether the loss counts the predictions of the tokens from position ``first``."""
        if self.scored is None:
            return torch.ones(length, dtype=torch.bool)
        return torch.from_numpy(self.scored[first : first + length] != 0)

    def document_spans(self, chunk: int = 2**20) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """``(starts, stops)`` of documents as positions [<= chunk] int64, in order, a chunk at a time."""
        for low in range(0, len(self.offsets), chunk):
            high = min(low + chunk, len(self.offsets))
            starts = self._positions(low, high)
            last = self._positions(high, high + 1) if high < len(self.offsets) else np.array([len(self.tokens)])
            yield starts, np.concatenate([starts[1:], last])

    def _positions(self, low: int, high: int) -> np.ndarray:
        return np.asarray(self.offsets[low:high]) // self.tokens.itemsize


def is_corpus(path: str | Path) -> bool:
    """Whether something at the path claims to be a prepared corpus: a directory, or a prefix of a ``.bin`` or ``.idx``."""
    return Path(path).is_dir() or any(Path(f"{path}{suffix}").is_file() for suffix in (".bin", ".idx"))


def read_meta(directory: str | Path) -> dict:
    """The description of a prepared corpus.

    Raises:
        ValueError: if the directory has none or it is of another format.
    """
    path = Path(directory) / "meta.json"
    if not path.is_file():
        raise ValueError(f"{directory} is not a prepared corpus: it has no meta.json; make one with scripts/prepare_data.py")
    try:
        meta = json.loads(path.read_text())
        found, parts = meta["format"], list(meta["parts"])
        if found == FORMAT:
            _ = [meta["tokenizer"][key] for key in ("hash", "vocabulary", "end")]
            _ = [about[key] for about in meta["parts"].values() for key in _PART]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{path} is not readable ({type(error).__name__}: {error}): prepare the corpus again") from None
    if found != FORMAT or not parts:
        raise ValueError(f"{path} is of format {found} with parts {parts}, this code reads {FORMAT}: prepare it again")
    return meta


def open_part(directory: str | Path, part: str) -> Corpus:
    """Map one part of a prepared corpus, after a check of sizes that reads no tokens.

    Raises:
        ValueError: naming the file and the numbers, if files are missing, cut short or do not belong together.
    """
    directory = Path(directory)
    meta = read_meta(directory)
    about = meta["parts"].get(part)
    if about is None:
        raise ValueError(f"{directory} has no part {part!r}, only {', '.join(meta['parts'])}: name another")
    for name, expected in about["files"].items():
        _check_size(directory / name, expected["bytes"])
    dtype, sequences, bounds = _read_header(directory / f"{part}.idx")
    if not about["tokens"] or not sequences:
        raise ValueError(f"{directory} has no tokens in its part {part}: prepare it again")
    _check_size(directory / f"{part}.idx", _HEADER.size + 12 * sequences + 8 * bounds)
    _check_size(directory / f"{part}.bin", about["tokens"] * dtype().itemsize)
    if sequences != about["documents"]:
        raise ValueError(
            f"{directory / part}.idx lists {sequences} documents, meta.json {about['documents']}: prepare the corpus again"
        )
    tokens = np.memmap(directory / f"{part}.bin", dtype=dtype, mode="r")
    index = np.memmap(directory / f"{part}.idx", dtype=np.uint8, mode="r")
    offsets = np.frombuffer(index, dtype=np.int64, count=sequences, offset=_HEADER.size + 4 * sequences)
    scored = np.memmap(directory / f"{part}.scored", dtype=np.uint8, mode="r") if "scored" in about else None
    if scored is not None:
        _check_size(directory / f"{part}.scored", about["tokens"])
    if not 0 <= offsets[-1] < tokens.nbytes:
        raise ValueError(f"{directory / part}.idx points to byte {offsets[-1]} of a .bin of {tokens.nbytes}: prepare it again")
    return Corpus(
        f"{directory}",
        tokens,
        offsets,
        about["hash"],
        about["characters"],
        chat="chat" in meta,
        scored=scored,
        scored_tokens=about.get("scored", 0),
    )


def verify(directory: str | Path) -> dict:
    """Read every byte of a prepared corpus and compare with ``meta.json``; returns the latter.

    Raises:
        ValueError: naming the first file that differs.
    """
    directory = Path(directory)
    meta = read_meta(directory)
    end = meta["tokenizer"]["end"]
    for part, about in meta["parts"].items():
        corpus = open_part(directory, part)
        found = {name: sha256_of(directory / name) for name in about["files"]}
        for name, expected in about["files"].items():
            if found[name] != expected["sha256"]:
                raise ValueError(
                    f"{directory / name} has SHA-256 {found[name][:16]}..., meta.json says {expected['sha256'][:16]}...: "
                    "the file was changed or damaged; prepare the corpus again"
                )
        if (hashed := combined_hash(found, part)) != about["hash"]:
            raise ValueError(f"{directory / 'meta.json'} gives {part} the hash {about['hash']}, its files have {hashed}")
        for starts, stops in () if corpus.chat else corpus.document_spans():
            for place, token in enumerate(meta.get("begin", [])):
                unopened = int((corpus.tokens[starts + place] != token).sum())
                if unopened:
                    raise ValueError(
                        f"{unopened} documents of {directory / part} do not begin with tokens {meta['begin']}: prepare it again"
                    )
            unmarked = int((corpus.tokens[stops - 1] != end).sum())
            if unmarked:
                raise ValueError(f"{unmarked} documents of {directory / part} do not end with token {end}: prepare it again")
    return meta


def _check_size(path: Path, expected: int) -> None:
    size = path.stat().st_size if path.is_file() else None
    if size != expected:
        what = "is missing" if size is None else f"has {size} bytes"
        raise ValueError(f"{path} {what}, it must have {expected}: it was cut or replaced; prepare the corpus again")


def _read_header(path: Path) -> tuple[type, int, int]:
    with open(path, "rb") as file:
        header = file.read(_HEADER.size)
    try:
        magic, version, code, sequences, bounds = _HEADER.unpack(header)
        if (magic, version) != (_MAGIC, 1):
            raise ValueError(f"magic {magic!r}, version {version}")
        return DType.dtype_from_code(code), sequences, bounds
    except (struct.error, ValueError) as error:
        raise ValueError(f"{path} is not a Megatron index ({error}): prepare the corpus again") from None
