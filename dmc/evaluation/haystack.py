"""The text that needles are hidden in: files, or the prose of the Python standard library."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dmc.engine.tokenizer import Tokenizer

_CHARACTERS = 8  # of text taken for each token that is wanted; more where a tokenizer needs more


@dataclass(frozen=True)
class Haystack:
    """A text.

    Attributes:
        name: of it.
        text: at least one line.
        hash: 16 hex digits of what it was read from.
    """

    name: str
    text: str
    hash: str

    def tokens(self, tokenizer: Tokenizer, count: int, draw: random.Random) -> list[int]:
        """``count`` tokens from a line that is drawn; the text begins again where it ends.

        Raises:
            ValueError: if the whole text has fewer tokens.
        """
        start = draw.randrange(len(self.text))
        start = self.text.rfind("\n", 0, start) + 1
        turned = self.text[start:] + self.text[:start]
        size = _CHARACTERS * count
        while True:
            tokens = tokenizer.inner.encode(turned[:size], add_special_tokens=False, verbose=False)
            if len(tokens) >= count:
                return tokens[:count]
            if size >= len(turned):
                raise ValueError(f"the haystack {self.name} has {len(tokens)} tokens and {count} are needed: give a longer text")
            size *= 2


def read_haystack(files: Sequence[str | Path]) -> Haystack:
    """The texts of UTF-8 files one after another, or `standard_prose` if none is given.

    Raises:
        ValueError: if a file cannot be read, is no UTF-8 or holds nothing but white space.
    """
    if not files:
        return standard_prose()
    texts, digest = [], hashlib.sha256()
    for file in map(Path, files):
        try:
            content = file.read_bytes()
            texts.append(content.decode())
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text (byte {error.start}): give a plain text file") from error
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {error.strerror}") from error
        if not texts[-1].strip():
            raise ValueError(f"{file} holds no text")
        digest.update(content)
    return Haystack("+".join(Path(file).name for file in files), "\n".join(texts), digest.hexdigest()[:16])


def standard_prose() -> Haystack:
    """The Python standard library's prose: the pages of the language reference that ``help()`` shows.

    Raises:
        ValueError: if this Python has none, or the package `data` is missing (an installed wheel does not carry it).
    """
    try:
        from data.stdlib import corpus_hash, documents
    except ModuleNotFoundError as error:
        raise ValueError("the default haystack is read by `data`, a package of the checkout: give --haystack FILE") from error
    found = documents(("topic",))
    return Haystack("stdlib prose", "\n\n".join(document.text for document in found), corpus_hash(found))
