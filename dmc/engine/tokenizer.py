"""Text to tokens and back."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path

from dmc import pretrained
from dmc.engine.detokenizer import Detokenizer

_INVALID = "\ufffd"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a token of SentencePiece's byte fallback


class Tokenizer:
    """The tokenizer of a Hugging Face directory.

    Args:
        directory: with tokenizer.json and tokenizer_config.json.
        vocab_size: of the model.

    Attributes:
        inner: the tokenizer of transformers.
        special: ids of the tokens that `decode` leaves out.

    Raises:
        ValueError: if there is none, it cannot be read, or it has more entries than the model's vocabulary.
    """

    def __init__(self, directory: str | Path, vocab_size: int) -> None:
        if not (Path(directory) / "tokenizer_config.json").is_file():
            raise ValueError(f"{directory} has no tokenizer_config.json: give prompts as token ids, or add its tokenizer")
        self.inner = pretrained.load_tokenizer(directory)
        if len(self.inner) > vocab_size:
            raise ValueError(
                f"the tokenizer in {directory} has {len(self.inner)} entries, but the model's vocabulary has {vocab_size}"
            )
        added = {*self.inner.added_tokens_decoder, *self.inner.all_special_ids}
        self.special = frozenset(token for token in added if self.name(token) and not self.decode([token]))

    def encode(self, text: str) -> list[int]:
        """Tokens of a prompt, with the special tokens that this tokenizer adds.

        Raises:
            ValueError: if the text has half a surrogate pair, which is not a character.
        """
        return self.inner.encode(_checked(text))

    def encode_inside(self, text: str) -> list[int]:
        """Tokens of a text that other text stands before, without special tokens.

        A tokenizer such as Llama 2's puts a space before every text that it encodes. Here that space is left out.
        """
        context, before = self._context
        alone = self.inner.encode(_checked(text), add_special_tokens=False)
        if self.decode([context, *alone]) == before + text:
            return alone
        for lead in ("a", "a\n"):  # tokens must not join the lead and the text
            head, whole = (self.inner.encode(part, add_special_tokens=False) for part in (lead, lead + text))
            inside = whole[len(head) :]
            if whole[: len(head)] == head and self.decode([context, *inside]) == before + text:
                return inside
        return alone  # of a tokenizer that does not keep a text's spaces, wherever the text stands

    def chat(self, messages: list[dict]) -> list[int]:
        """Tokens of a conversation, by the tokenizer's chat template, up to where the answer begins.

        Args:
            messages: each with "role" and "content", texts.

        Raises:
            ValueError: if there is no template, or it rejects the conversation.
        """
        if not self.inner.chat_template:
            raise ValueError("this model's tokenizer has no chat template: send the text to /v1/completions instead")
        try:
            text = self.inner.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # whatever the template raises
            raise ValueError(f"the model's chat template rejects these messages: {error}") from error
        return self.inner.encode(_checked(text), add_special_tokens=False)

    def name(self, token: int) -> str:
        """A special token's name, such as ``</s>``."""
        return self.inner.decode([token], clean_up_tokenization_spaces=False)

    def piece(self, token: int) -> str:
        """Text of a token inside a text: with its first space, if it has one. A special token's name."""
        if token in self.special:
            return self.name(token)
        context, text = self._context
        return self.decode([context, token])[len(text) :]

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """The text that each token adds to the text of those before it; special tokens give their names.

        A character of several tokens is the text of the last of them.
        """
        text = Detokenizer(self)
        pieces = [self.name(token) if token in self.special else text.add(token) for token in tokens]
        if rest := text.finish():
            pieces[-1] += rest
        return pieces

    def raw_bytes(self, token: int) -> bytes | None:
        """The bytes of a token that alone is not text, only a part of a character; None for all others."""
        if token in self.special or _INVALID not in self.piece(token):
            return None
        name = self.inner.convert_ids_to_tokens(token)
        if match := _BYTE.fullmatch(name):
            return bytes([int(match[1], 16)])
        alphabet = _byte_alphabet()
        return bytes(alphabet[letter] for letter in name) if all(letter in alphabet for letter in name) else None

    @cached_property
    def _context(self) -> tuple[int, str]:
        """A token that decodes to the same text whatever follows it, and that text."""
        vocabulary = range(len(self.inner))
        for token in (*self.inner.encode("a", add_special_tokens=False), *vocabulary):
            text = self.decode([token]) if token not in self.special else ""
            if text and _INVALID not in text and self.decode([token, token]).startswith(text):
                return token, text
        raise ValueError("the tokenizer has no token that decodes to a text")

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, without special tokens."""
        return self.inner.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@lru_cache
def _byte_alphabet() -> dict[str, int]:
    """Bytes by the letters that stand for them in byte-level vocabularies: printable ones are themselves (GPT-2)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


def _checked(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text is not valid Unicode at character {error.start}: half a surrogate pair") from error
    return text
