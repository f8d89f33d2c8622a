"""Text ⇄ tokens, and the text of a sequence as it grows."""

from __future__ import annotations

from pathlib import Path

from dmc import pretrained

_UNFINISHED = "\ufffd"  # what a tokenizer prints for bytes that are no whole character yet


class Tokenizer:
    """The tokenizer of a Hugging Face directory.

    Args:
        directory: with tokenizer.json and tokenizer_config.json.
        vocab_size: of the model.

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

    def encode(self, text: str) -> list[int]:
        """Tokens of a prompt, with the special tokens that this tokenizer adds.

        Raises:
            ValueError: if the text has half a surrogate pair, which is no character.
        """
        return self.inner.encode(_checked(text))

    def chat(self, messages: list[dict]) -> list[int]:
        """Tokens of a conversation, by the tokenizer's chat template, up to where the answer begins.

        Args:
            messages: each with "role" and "content", texts.

        Raises:
            ValueError: if there is no template, or it refuses the conversation.
        """
        if not self.inner.chat_template:
            raise ValueError("this model's tokenizer has no chat template: send the text to /v1/completions instead")
        try:
            text = self.inner.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # whatever the template raises
            raise ValueError(f"the model's chat template refuses these messages: {error}") from error
        return self.inner.encode(_checked(text), add_special_tokens=False)

    def piece(self, token: int) -> str:
        """Text of one token by itself."""
        return self.inner.decode([token], clean_up_tokenization_spaces=False)

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens, special tokens left out."""
        return self.inner.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _checked(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text is no valid Unicode at character {error.start}: half a surrogate pair") from error
    return text


class GrowingText:
    """The text of generated tokens, extended token by token at a cost that does not grow with its length.

    Args:
        tokenizer: None where prompts are token ids and the directory has no tokenizer; the text stays empty.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer, self.text = tokenizer, ""
        self._tokens: list[int] = []
        self._context = 0  # tokens from here on are decoded together, so that spaces come out right
        self._shown = 0  # tokens before this are in `text`

    def add(self, token: int) -> None:
        """Takes one more token; `text` grows once its characters are complete."""
        self._tokens.append(token)
        if self.tokenizer is None:
            return
        known = self.tokenizer.decode(self._tokens[self._context : self._shown])
        now = self.tokenizer.decode(self._tokens[self._context :])
        if len(now) > len(known) and not now.endswith(_UNFINISHED):
            self.text += now[len(known) :]
            self._context, self._shown = self._shown, len(self._tokens)

    def finish(self) -> None:
        """Adds what never became a whole character, as the tokenizer prints it."""
        if self.tokenizer is not None:
            known = self.tokenizer.decode(self._tokens[self._context : self._shown])
            self.text += self.tokenizer.decode(self._tokens[self._context :])[len(known) :]
            self._context = self._shown = len(self._tokens)

    def cut(self, stops: tuple[str, ...], since: int) -> bool:
        """Cuts the text before the first of ``stops`` that ends after ``since`` characters; whether there was one."""
        found = [self.text.find(stop, max(0, since - len(stop) + 1)) for stop in stops]
        first = min((place for place in found if place >= 0), default=-1)
        if first >= 0:
            self.text = self.text[:first]
        return first >= 0

    def settled(self, stops: tuple[str, ...]) -> int:
        """Characters at the beginning that no stop text can still cut off: what may be shown before the end."""
        held = 0
        for stop in stops:
            for length in range(min(len(stop) - 1, len(self.text)), held, -1):
                if self.text.endswith(stop[:length]):
                    held = length
                    break
        return len(self.text) - held
