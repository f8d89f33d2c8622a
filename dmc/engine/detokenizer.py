"""The text of generated tokens as it grows, token by token.

The text is ``decode(prompt + tokens)`` without ``decode(prompt)``: a tokenizer such as Llama 2's strips the first space of
what it decodes, so generated tokens cannot be decoded alone.

This is what `tokenizers.decoders.DecodeStream` does as well, but with tokenizers 0.23 that class raises an error if
bytes that follow a complete character turn out to be invalid, repeats text of a prompt that ends within a character, and
never returns the bytes that are left at the end.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

_INVALID = "\ufffd"  # what a tokenizer decodes bytes to that are not a whole character
_INCOMPLETE = 3  # bytes of a character of which more can come
_TAIL = 8  # tokens of the prompt that are enough in nearly all cases


class Decodes(Protocol):
    """What a `Detokenizer` asks of a tokenizer (`dmc.engine.tokenizer.Tokenizer`)."""

    special: frozenset[int]

    def decode(self, tokens: Sequence[int]) -> str: ...  # noqa: D102

    def raw_bytes(self, token: int) -> bytes | None: ...  # noqa: D102


class Detokenizer:
    """The text of one completion.

    A window of tokens is decoded at each step: the tokens of the last text that was complete, and those after it. The cost
    of a token does not grow with the length of the text.

    Args:
        tokenizer: None where prompts are token ids and the directory has no tokenizer; the text stays empty.
        prompt: token ids that the text follows.

    Attributes:
        text: so far, without bytes that may still become a character.
    """

    def __init__(self, tokenizer: Decodes | None, prompt: Sequence[int] = ()) -> None:
        self.tokenizer, self.text = tokenizer, ""
        self._window = [] if tokenizer is None else _tail(tokenizer, prompt)
        self._complete = len(self._window)  # tokens of the window whose text is complete
        self._known = self._decoded()  # text of the window that is in `text`, or in the prompt
        self._before = None  # the same without the character that the prompt ends within
        if self._known.endswith(_INVALID):
            self._before = _before_character(tokenizer, self._window, self._known)
        self._ended = tokenizer is None

    def add(self, token: int) -> str:
        """Takes one more token and returns what it adds to the text: all characters that are complete by now."""
        if self._ended or token in self.tokenizer.special:
            return ""
        self._window.append(token)
        decoded = self._decoded()
        if not decoded.startswith(self._known):
            decoded = self._recover(decoded)
        invalid = len(decoded) - len(decoded.rstrip(_INVALID))
        new = decoded[len(self._known) : len(decoded) - min(invalid, _INCOMPLETE)]
        self._known += new
        if new:
            self._before = None
        if not invalid:
            self._advance()
        self.text += new
        return new

    def finish(self) -> str:
        """Ends the text, and returns what that adds: bytes that did not become a character, as the tokenizer decodes them."""
        if self._ended:
            return ""
        self._ended = True
        decoded = self._decoded()
        new = decoded[len(self._known) :] if decoded.startswith(self._known) else ""
        self.text += new
        return new

    def cut(self, stops: Sequence[str], since: int) -> bool:
        """Ends the text before the first of the stop texts that ends after ``since`` characters; True if there is one."""
        found = [self.text.find(stop, max(0, since - len(stop) + 1)) for stop in stops]
        first = min((index for index in found if index >= 0), default=-1)
        if first >= 0:
            self.text, self._ended = self.text[:first], True
        return first >= 0

    def settled(self, stops: Sequence[str]) -> int:
        """Number of characters at the beginning that no stop text can still cut off: these may be shown before the end."""
        held = 0
        for stop in stops:
            for length in range(min(len(stop) - 1, len(self.text)), held, -1):
                if self.text.endswith(stop[:length]):
                    held = length
                    break
        return len(self.text) - held

    def _decoded(self) -> str:
        return self.tokenizer.decode(self._window) if self._window else ""

    def _recover(self, decoded: str) -> str:
        """Handles new bytes that change how earlier bytes of the window are decoded; returns the window's text."""
        if self._before is not None and decoded.startswith(self._before):
            self._known, self._before = self._before, None
            return decoded
        # With byte fallback one invalid byte makes its whole run of bytes invalid; what has been returned stays as it is.
        del self._window[: self._complete]
        self._complete, self._known = 0, ""
        return self._decoded()

    def _advance(self) -> None:
        """Drops the complete tokens from the window, if the others are enough for a context.

        They are if they decode to some text that does not begin within a character: the first space of the next token is
        then not the window's first, and no byte lacks those before it.
        """
        known = self.tokenizer.decode(self._window[self._complete :])
        if known and not known.startswith(_INVALID):
            del self._window[: self._complete]
            self._known = known
        self._complete = len(self._window)


def _tail(tokenizer: Decodes, prompt: Sequence[int]) -> list[int]:
    """The last tokens of a prompt that decode to some text and do not begin within a character; all, if none do."""
    count = _TAIL
    while True:
        tail = [token for token in prompt[-count:] if token not in tokenizer.special]
        text = tokenizer.decode(tail) if tail else ""
        if count >= len(prompt) or (text and not text.startswith(_INVALID)):
            return tail
        count *= 4


def _before_character(tokenizer: Decodes, tokens: Sequence[int], text: str) -> str | None:
    """The text of tokens without the character that they end within; None if they end with a whole one."""
    data, count = b"", 0
    while len(data) <= _INCOMPLETE and count < len(tokens) and (raw := tokenizer.raw_bytes(tokens[-1 - count])) is not None:
        data, count = raw + data, count + 1
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data)
    begun = len(decoder.getstate()[0])  # bytes of the character
    if not begun:
        return None
    size = count = 0
    while size < begun:
        count += 1
        size += len(tokenizer.raw_bytes(tokens[-count]))
    # If the first of these tokens has other bytes too, the tokenizer is byte-level, and the character is the last in the text.
    return tokenizer.decode(tokens[:-count]) if size == begun else text[:-1]
