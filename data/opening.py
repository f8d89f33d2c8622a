"""The tokens that every document begins with: the BOS token, where there is one (``data.bos``)."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

CHOICES = ("auto", True, False)


def opening(tokenizer: PreTrainedTokenizerBase, bos: str | bool = "auto") -> list[int]:
    """Tokens put before each document.

    Args:
        tokenizer: of the model.
        bos: "auto" for what the tokenizer itself puts before a text, which every served prompt begins with; True for the
            same, or the BOS token if the tokenizer adds none; False for nothing.

    Raises:
        ValueError: if a BOS token is asked for and the tokenizer has none.
    """
    if bos not in CHOICES:
        raise ValueError(f"data.bos is {bos!r}: it must be auto, true or false")
    if bos is False:
        return []
    added = _added(tokenizer)
    if bos is True and not added:
        if tokenizer.bos_token_id is None:
            raise ValueError("data.bos is true, but the tokenizer has no BOS token: set data.bos=auto or data.bos=false")
        return [tokenizer.bos_token_id]
    return added


def described(begin: list[int]) -> str:
    """Such as ``documents that begin with tokens [1]``."""
    return f"documents that begin with tokens {begin}" if begin else "documents without a BOS token"


def setting(begin: list[int]) -> str:
    """The value of data.bos that gives these tokens, or no tokens."""
    return "true" if begin else "false"


def _added(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What stands before the tokens of a text when special tokens are added."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a")
    places = range(len(whole) - len(plain) + 1)
    first = next((i for i in places if whole[i : i + len(plain)] == plain), 0)
    return whole[:first]
