"""Texts with something to be found in them, and the questions: the kinds of RULER, key-value retrieval, several turns.

Everything is drawn from a seed, a haystack and a tokenizer, and fills a given number of tokens, so it needs no data. Questions
end with the beginning of the answer's sentence, so that a base model, which follows no instructions, can go on.

RULER: Hsieh et al., arXiv 2404.06654 (needles, variable tracking, common and frequent words). Key-value retrieval: Liu et al.,
arXiv 2307.03172. Several turns over one compressed context: SCBench, Li et al., arXiv 2412.10319. The wording is this project's.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from dmc.engine.tokenizer import Tokenizer
from dmc.evaluation.haystack import Haystack

_KEYS = (
    "anchor basket candle dragon engine forest garden harbor island jacket kettle lantern mirror needle orange pepper quartz "
    "ribbon saddle temple umbrella violin walnut yogurt zipper bridge copper desert falcon guitar hammer insect jungle ladder "
    "magnet napkin oyster pencil rabbit silver tunnel velvet window"
).split()
_SYLLABLES = (
    "ba be bi bo da de di do fa fe ga go ka ke ki ko la le li lo ma me mi mo na ne no pa pe ra re ro sa se ta te to va vo"
).split()


@dataclass(frozen=True)
class Turn:
    """A question over the document and the turns before it.

    Attributes:
        question: token ids.
        answers: all of them must be in the answer; each counts the same.
        reply: token ids of the right answer, which goes before the next turn's question.
    """

    question: list[int]
    answers: tuple[str, ...]
    reply: list[int]


@dataclass(frozen=True)
class Sample:
    """One text with its questions.

    Attributes:
        kind: a name of `KINDS`.
        document: token ids, what the tokenizer puts before a text among them; with the first question as long as was asked for.
        turns: at least one; the last is the one that counts.
    """

    kind: str
    document: list[int]
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class _Plan:
    """What a kind wants in a document: lines hidden in hay at random depths, in this order, or items that fill it alone."""

    hidden: list[str]
    questions: list[tuple[str, tuple[str, ...]]]
    fill: Callable[[int], str] | None = None  # number of items → the whole document


def _number(draw: random.Random) -> str:
    return str(draw.randrange(10_000, 100_000))


def _needle(key: str, value: str) -> str:
    return f"The secret number of the {key} is {value}.\n"


def _ask(key: str) -> str:
    return f"\nWhat is the secret number of the {key}? The secret number of the {key} is"


def _single(draw: random.Random) -> _Plan:
    key, value = draw.choice(_KEYS), _number(draw)
    return _Plan([_needle(key, value)], [(_ask(key), (value,))])


def _multikey(draw: random.Random) -> _Plan:
    pairs = [(key, _number(draw)) for key in draw.sample(_KEYS, 4)]
    key, value = draw.choice(pairs)
    return _Plan([_needle(*pair) for pair in pairs], [(_ask(key), (value,))])


def _multivalue(draw: random.Random) -> _Plan:
    key, values = draw.choice(_KEYS), tuple(_number(draw) for _ in range(3))
    question = f"\nWhat are the three secret numbers of the {key}? The secret numbers of the {key} are"
    return _Plan([_needle(key, value) for value in values], [(question, values)])


def _multiquery(draw: random.Random) -> _Plan:
    pairs = [(key, _number(draw)) for key in draw.sample(_KEYS, 4)]
    first, second = draw.sample(pairs, 2)
    question = (
        f"\nWhat are the secret numbers of the {first[0]} and the {second[0]}? "
        f"The secret numbers of the {first[0]} and the {second[0]} are"
    )
    return _Plan([_needle(*pair) for pair in pairs], [(question, (first[1], second[1]))])


def _tracking(draw: random.Random) -> _Plan:
    names, value = ["".join(draw.sample("ABCDEFGHJKLMNPQRSTUVWXYZ", 3)) for _ in range(3)], _number(draw)
    lines = [f"VAR {names[0]} = {value}\n"]
    lines += [f"VAR {name} = VAR {before}\n" for before, name in zip(names, names[1:], strict=False)]
    question = f"\nWhich three variables have the value {value}? The variables with the value {value} are"
    return _Plan(lines, [(question, tuple(names))])


def _pairs(draw: random.Random) -> _Plan:
    """Random keys and values of 8 hex digits; the key that is asked for is among the first items."""
    hexes = lambda: f"{draw.getrandbits(32):08x}"  # noqa: E731
    items = [(hexes(), hexes()) for _ in range(4096)]
    wanted = draw.random()

    def fill(count: int) -> str:
        some = items[1:count]
        some.insert(int(wanted * (len(some) + 1)), items[0])
        return "".join(f'"{key}": "{value}"\n' for key, value in some)

    key, value = items[0]
    return _Plan([], [(f'\nThe value of the key "{key}" is:\n"{key}": "', (value,))], fill)


def _common(draw: random.Random) -> _Plan:
    """Three words come five times as often as the others."""
    words = draw.sample(_KEYS, len(_KEYS))
    often, seed = words[:3], draw.random()
    others = ["".join(draw.sample(_SYLLABLES, 3)) for _ in range(4096)]

    def fill(count: int) -> str:
        some = [*often * max(2, count // 8), *others[: max(0, count - 3 * max(2, count // 8))]]
        random.Random(seed).shuffle(some)
        return "".join(f"{number}. {word}\n" for number, word in enumerate(some, 1))

    question = "\nWhich three words come most often in this list? The three words that come most often are"
    return _Plan([], [(question, tuple(often))], fill)


def _frequent(draw: random.Random) -> _Plan:
    """Made-up words whose frequencies fall as 1 / rank; the three most frequent ones."""
    words = list(dict.fromkeys("".join(draw.sample(_SYLLABLES, 2)) for _ in range(200)))[:40]
    seed = draw.random()

    def fill(count: int) -> str:
        total = sum(1 / rank for rank in range(1, len(words) + 1))
        some = [word for rank, word in enumerate(words, 1) for _ in range(max(1, round(count / rank / total)))]
        random.Random(seed).shuffle(some)
        return " ".join(some[:count]) + "\n"

    question = "\nWhich three words come most often in this text? The three words that come most often are"
    return _Plan([], [(question, tuple(words[:3]))], fill)


def _turns(count: int) -> Callable[[random.Random], _Plan]:
    def plan(draw: random.Random) -> _Plan:
        pairs = [(key, _number(draw)) for key in draw.sample(_KEYS, 4)]
        asked = draw.sample(pairs, count)
        return _Plan([_needle(*pair) for pair in pairs], [(_ask(key), (value,)) for key, value in asked])

    return plan


KINDS: dict[str, Callable[[random.Random], _Plan]] = {
    "single": _single,
    "multikey": _multikey,
    "multivalue": _multivalue,
    "multiquery": _multiquery,
    "tracking": _tracking,
    "common": _common,
    "frequent": _frequent,
    "pairs": _pairs,
    "two-turns": _turns(2),
    "three-turns": _turns(3),
}
"""Name → what is drawn. Of the last two only the last turn counts: its question comes when the cache has been compressed."""


def draw_sample(kind: str, tokenizer: Tokenizer, haystack: Haystack, length: int, draw: random.Random) -> Sample:
    """Draws a sample whose document and first question have ``length`` tokens, or of a list as many as whole items give.

    Raises:
        ValueError: if there is no such kind, or ``length`` has no room for it.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of retrieval {kind!r}; known: {', '.join(KINDS)}")
    plan, encode = KINDS[kind](draw), tokenizer.encode_inside
    turns = tuple(Turn(encode(question), answers, encode(f" {', '.join(answers)}.\n")) for question, answers in plan.questions)
    first = tokenizer.encode("")  # what this tokenizer puts before a text
    room = length - len(first) - len(turns[0].question)
    document = _listed(plan, encode, room) if plan.fill else _hidden(plan, tokenizer, haystack, room, draw)
    if document is None:
        raise ValueError(f"a text of {length} tokens has no room for retrieval of kind {kind!r}: ask for more tokens")
    return Sample(kind, [*first, *document], turns)


def _listed(plan: _Plan, encode: Callable[[str], list[int]], room: int) -> list[int] | None:
    low, high = 0, max(0, room)
    while low < high:  # the most items that fit
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(encode(plan.fill(middle))) <= room else (low, middle - 1)
    return encode(plan.fill(low)) if low >= 8 else None


def _hidden(plan: _Plan, tokenizer: Tokenizer, haystack: Haystack, room: int, draw: random.Random) -> list[int] | None:
    needles = [tokenizer.encode_inside(line) for line in plan.hidden]
    hay = room - sum(map(len, needles))
    if hay < 1:
        return None
    tokens = haystack.tokens(tokenizer, hay, draw)
    lines = [0, *(i + 1 for i, token in enumerate(tokens) if tokenizer.piece(token).endswith("\n"))]
    depths = sorted(draw.random() for _ in needles)
    at = [max(line for line in lines if line <= depth * hay) for depth in depths]
    out = []
    for start, end, needle in zip([0, *at], [*at, hay], [*needles, []], strict=True):
        out += tokens[start:end] + needle
    return out
