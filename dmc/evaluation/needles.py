"""What is hidden in a haystack, and how it is asked for: sentences with a value that no model can guess.

Every kind ends its question with the beginning of the needle's own sentence, so that a base model, which follows no
instructions, can answer by going on. Wrong values of a kind have as many tokens as the right one.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from dmc.engine.tokenizer import Tokenizer

_CITIES = ("Lisbon", "Kyoto", "Boston", "Nairobi", "Oslo", "Quito", "Hanoi", "Dublin", "Prague", "Denver", "Cairo", "Lima")
_VERBS = ("buy", "draw", "eat", "find", "paint", "sell", "share", "taste", "visit", "wash", "write", "watch")
_COLOURS = ("black", "blue", "brown", "golden", "green", "grey", "orange", "pink", "purple", "red", "silver", "white")
_THINGS = ("apple", "bicycle", "boat", "bridge", "candle", "garden", "guitar", "lamp", "letter", "market", "mountain", "river")
_NAMES = ("ALPHA", "BUFFER", "CACHE", "DELTA", "FRAME", "INDEX", "LIMIT", "QUEUE", "RETRY", "SESSION", "TOKEN", "WINDOW")
_DRAWS = 1000  # of wrong values until there are enough of the right one's length


@dataclass(frozen=True)
class Kind:
    """A kind of needle.

    Attributes:
        subject: drawn first; the same in needle and question.
        value: drawn, what is asked for.
        needle, question: with ``{subject}``, the needle with ``{value}`` also.
        source: whose test it is like.
    """

    subject: Callable[[random.Random], str]
    value: Callable[[random.Random], str]
    needle: str
    question: str
    source: str


def _digits(draw: random.Random) -> str:
    return str(draw.randrange(10_000, 100_000))


KINDS = {
    "passkey": Kind(
        subject=lambda draw: "",
        value=_digits,
        needle="The pass key is {value}. Remember it. {value} is the pass key.\n",
        question="\nWhat is the pass key? The pass key is",
        source="passkey retrieval, Mohtashami and Jaggi, arXiv 2305.16300, appendix",
    ),
    "fact": Kind(
        subject=lambda draw: draw.choice(_CITIES),
        value=lambda draw: f"{draw.choice(_VERBS)} the {draw.choice(_COLOURS)} {draw.choice(_THINGS)}",
        needle="The best thing to do in {subject} is to {value}.\n",
        question="\nWhat is the best thing to do in {subject}? The best thing to do in {subject} is to",
        source="needle in a haystack, Kamradt 2023, github.com/gkamradt/LLMTest_NeedleInAHaystack",
    ),
    "constant": Kind(
        subject=lambda draw: f"DEFAULT_{draw.choice(_NAMES)}_{draw.choice(_NAMES)}",
        value=_digits,
        needle="{subject} = {value}\n",
        question="\nassert {subject} ==",
        source="this project's, for models of code",
    ),
}


@dataclass(frozen=True)
class Needle:
    """One needle in tokens.

    Attributes:
        needle, question: token ids.
        answer: the value as text.
        choices: token ids of the right answer, first, and of wrong ones; all of one length.
    """

    needle: list[int]
    question: list[int]
    answer: str
    choices: list[list[int]]


def draw_needle(kind: str, tokenizer: Tokenizer, draw: random.Random, choices: int) -> Needle:
    """Draws a needle of a kind, and as many possible answers as ``choices``, itself included.

    Raises:
        ValueError: if there is no such kind, or the tokenizer cuts the kind's values into too different lengths.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of needle {kind!r}; known: {', '.join(KINDS)}")
    made = KINDS[kind]
    encode = tokenizer.encode_inside
    subject, value = made.subject(draw), made.value(draw)
    wanted = {value: encode(f" {value}")}
    for _ in range(_DRAWS):
        if len(wanted) == choices:
            break
        other = made.value(draw)
        tokens = encode(f" {other}")
        if len(tokens) == len(wanted[value]):
            wanted.setdefault(other, tokens)
    else:
        raise ValueError(
            f"{choices} values of kind {kind!r} with {len(wanted[value])} tokens each were not found; ask for fewer choices"
        )
    fill = {"subject": subject, "value": value}
    return Needle(encode(made.needle.format(**fill)), encode(made.question.format(**fill)), value, list(wanted.values()))
