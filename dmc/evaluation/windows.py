"""Windows of a text: tokens that go into the cache as a prompt, and tokens after them that are scored."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dmc.engine.tokenizer import Tokenizer
from dmc.model import read_config


@dataclass(frozen=True)
class Windows:
    """Equally long pieces of one text.

    Attributes:
        tokens: int64 ``[W, P + S + 1]``. The first P are the prompt; each of the S after them is fed to the model, which
            predicts the token that follows it.
        prompt: P, at least 1.
        name: of the text.
        text_hash: SHA-256 of the whole text's bytes, 16 hex digits.
    """

    tokens: Tensor
    prompt: int
    name: str = ""
    text_hash: str = ""

    def __post_init__(self) -> None:
        """Raises ValueError if there is nothing to score."""
        if self.tokens.dim() != 2 or self.prompt < 1 or self.tokens.shape[1] < self.prompt + 2 or not len(self.tokens):
            raise ValueError(
                f"windows of shape {tuple(self.tokens.shape)} with a prompt of {self.prompt}: at least one window, a prompt "
                "of at least 1 and two tokens after it are needed"
            )

    @property
    def scored(self) -> int:
        """S, predictions that are scored in each window."""
        return self.tokens.shape[1] - self.prompt - 1

    @property
    def hash(self) -> str:
        """16 hex digits of the tokens and where the prompt ends."""
        tokens = self.tokens.to(torch.int64).contiguous().cpu()
        return hashlib.sha256(f"{self.prompt} {tuple(tokens.shape)}".encode() + tokens.numpy().tobytes()).hexdigest()[:16]


def read_windows(text: str | Path, tokenizer: str | Path, *, prompt: int, scored: int, count: int) -> Windows:
    """Windows spread evenly over a text, without overlap; the first starts where the text does.

    Args:
        text: a UTF-8 file.
        tokenizer: model directory whose tokenizer cuts the text. What it puts before a text (such as a BOS token) stands
            at the start of each window, and counts as its tokens.
        prompt, scored, count: P, S and W of `Windows`.

    Raises:
        ValueError: if the file is not there or no UTF-8, there is no tokenizer, or the text is too short; the sentence says
            how long it is.
    """
    return cut_windows([_read(Path(text))], tokenizer, prompt=prompt, scored=scored, count=count, name=Path(text).name)


def cut_windows(texts: Sequence[str], tokenizer: str | Path, *, prompt: int, scored: int, count: int, name: str) -> Windows:
    """`read_windows` of several texts: each window is from one of them, and long texts give more of them than short ones.

    Args:
        texts: at least one.
        name: of them all.

    Raises:
        ValueError: as `read_windows`.
    """
    for setting, value in (("prompt", prompt), ("scored", scored), ("windows", count)):
        if value < 1:
            raise ValueError(f"{setting} must be at least 1, got {value}")
    made = Tokenizer(tokenizer, read_config(tokenizer).vocab_size)
    first = made.encode("")
    length = max(2, prompt + scored + 1 - len(first))
    tokens = [made.inner.encode(text, add_special_tokens=False, verbose=False) for text in texts]
    room = [len(part) // length for part in tokens]
    if sum(room) < count:
        raise ValueError(
            f"{name} has {sum(map(len, tokens))} tokens in {len(texts)} texts, which give {sum(room)} windows of {prompt} + "
            f"{scored}, and {count} are asked for: give a longer text, or ask for fewer or shorter windows"
        )
    taken = [((i + 1) * count) // sum(room) - (i * count) // sum(room) for i in range(sum(room))]  # evenly, `count` in all
    rows = []
    for part, places in zip(tokens, room, strict=True):
        chosen, taken = sum(taken[:places]), taken[places:]
        rows += [part[i * (len(part) // chosen) :][:length] for i in range(chosen)]
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    return Windows(torch.tensor([first + row for row in rows]), prompt, name, digest)


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): give a plain text file") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
