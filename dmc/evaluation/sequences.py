"""Sequences of a text for calibration: equally long, spread evenly over a text of any size.

Only the tokens that are used are tokenised, so a large text costs no more than a small one.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from dmc.engine.tokenizer import Tokenizer
from dmc.model import read_config

STDLIB = "stdlib"
_CHARACTERS = 8  # of a token at most, usually; a slice that gives too few tokens is followed by another one
_LINE = 2000  # characters within which a sequence looks for the start of a line


@dataclass(frozen=True)
class Sequences:
    """Tokens of a text.

    Attributes:
        tokens: int64 ``[N, T]``, without overlap.
        name: of the text.
        text_hash: SHA-256 of the whole text, 16 hex digits.
    """

    tokens: Tensor
    name: str
    text_hash: str


def read_sequences(text: str, tokenizer: str | Path, *, length: int, count: int | None, at_most: int = 100) -> Sequences:
    """Cuts sequences out of a text; the first starts where the text does, the others at starts of lines.

    Documents that are shorter than a sequence follow one another, with the tokenizer's EOS token between them. What the
    tokenizer puts before a text (such as BOS) stands at the start of each sequence and counts as its tokens.

    Args:
        text: a UTF-8 file; ``.jsonl`` holds ``{"text": ...}`` per line, and either may be packed as ``.xz``. "stdlib":
            the part of the standard library that training uses.
        tokenizer: model directory with the tokenizer.
        length: T, tokens of a sequence.
        count: N; None takes as many as the text gives, at most ``at_most``.

    Raises:
        ValueError: if the text cannot be read, there is no tokenizer, or the text is too short; the sentence says how many
            sequences it gives.
    """
    if count is not None and count < 1:
        raise ValueError(f"the number of sequences must be at least 1, got {count}")
    texts = _stdlib() if text == STDLIB else _read(Path(text))
    made = Tokenizer(tokenizer, read_config(tokenizer).vocab_size)
    first = made.encode("")
    if length <= len(first):
        raise ValueError(f"a sequence of {length} tokens has no room for text: give it at least {len(first) + 1}")
    cutter = _Cutter(made.inner, texts, length - len(first))
    wanted = count or at_most
    rows = cutter.spread(wanted) or cutter.consecutive(wanted)
    name = text if text == STDLIB else Path(text).name
    needed = count or 1
    if len(rows) < needed:
        raise ValueError(
            f"{name} gives {len(rows)} sequences of {length} tokens, and {needed} {'is' if needed == 1 else 'are'} needed: "
            "give a longer text, or ask for fewer or shorter sequences"
        )
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    return Sequences(torch.tensor([first + row for row in rows]), name, digest)


class _Cutter:
    """Cuts token sequences out of documents, from any position on."""

    def __init__(self, tokenizer, texts: list[str], length: int) -> None:  # noqa: ANN001 (a Hugging Face tokenizer)
        self._tokenizer, self._texts, self._length = tokenizer, texts, length
        self._ends = list(accumulate(map(len, texts)))  # documents as one long text, without anything between them

    def spread(self, count: int) -> list[list[int]]:
        """``count`` sequences at even distances; empty if they would not fit."""
        rows, position = [], 0
        for index in range(count):
            position = max(position, self._line(index * self._ends[-1] // count) if index else 0)
            cut = self._cut(position)
            if cut is None:
                return []
            tokens, position = cut
            rows.append(tokens)
        return rows

    def consecutive(self, count: int) -> list[list[int]]:
        """Sequences that follow one another from the text's start, at most ``count``."""
        rows, position = [], 0
        while len(rows) < count and (cut := self._cut(position)) is not None:
            tokens, position = cut
            rows.append(tokens)
        return rows

    def _line(self, position: int) -> int:
        """The next start of a line or document, if there is one near."""
        document = bisect_right(self._ends, position)
        start = self._ends[document] - len(self._texts[document])
        found = self._texts[document].find("\n", position - start, position - start + _LINE)
        return position if found < 0 else start + found + 1

    def _cut(self, position: int) -> tuple[list[int], int] | None:
        """Tokens from a position on, and the position behind them; None if the text ends before."""
        tokens: list[int] = []
        while position < self._ends[-1]:
            document = bisect_right(self._ends, position)
            text, end = self._texts[document], self._ends[document]
            need = self._length - len(tokens)
            start = position - (end - len(text))
            part = text[start : start + _CHARACTERS * need + 64]
            found = self._tokenizer(part, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ids, offsets = found["input_ids"], found["offset_mapping"]
            if len(ids) > need:  # the last token of the part may be cut short, so it is not used
                return tokens + ids[:need], position + max(1, offsets[need - 1][1])
            if position + len(part) < end and len(ids) > 1:
                tokens, position = tokens + ids[:-1], position + max(1, offsets[-2][1])
                continue
            position += len(part)
            tokens += ids
            if position == end and self._tokenizer.eos_token_id is not None:
                tokens.append(self._tokenizer.eos_token_id)
            if len(tokens) >= self._length:
                return tokens[: self._length], position
        return None


def _stdlib() -> list[str]:
    try:
        from data.stdlib import documents, split
    except ModuleNotFoundError as error:
        raise ValueError("the text stdlib needs a checkout of the project (pip install -e .): give --text FILE") from error
    return [document.text for document in split(documents())[0]]


def _read(path: Path) -> list[str]:
    """Documents of a file that are not blank."""
    try:
        content = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        text = content.decode("utf-8-sig")  # a byte order mark is not text
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): give a plain text file") from error
    except lzma.LZMAError as error:
        raise ValueError(f"{path} is not a valid .xz file: {error}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    documents = _json_lines(path, text) if ".jsonl" in path.suffixes else [text]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ValueError(f"{path} holds no text")
    return documents


def _json_lines(path: Path, text: str) -> list[str]:
    documents = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)["text"]
            if document is None:  # as in training: a null text is none
                continue
            document.encode()  # a lone surrogate is JSON, but not text
        except (json.JSONDecodeError, UnicodeEncodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f'line {number} of {path} is not {{"text": "..."}} ({type(error).__name__}: {error})') from None
        documents.append(document)
    return documents
