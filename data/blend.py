"""Blends of corpora: how they are written down, and which corpus each sequence of a run comes from.

`Interleave` deals the sequences of a run out so that after any number of them every corpus has had its share to
within one sequence. It is the uniprocessor case of proportionate fair scheduling (Baruah, Cohen, Plaxton and Varvel,
Algorithmica 1996): the m-th sequence of a corpus of share w belongs to the window [floor(m / w), ceil((m + 1) / w)),
and taking the open window that ends first meets every window. Shares are exact fractions, so the deal repeats with
their common denominator, and the corpus of any position of the run is known from its remainder.
"""

from __future__ import annotations

import math
import re
from array import array
from dataclasses import dataclass
from fractions import Fraction

_WEIGHTED = re.compile(r"\s*([-+.\d][-+.\deE/]*|nan|[-+]?inf(?:inity)?)\s*:(.+)", re.DOTALL | re.IGNORECASE)
_CHUNK = 1024  # positions between two remembered counts


@dataclass(frozen=True)
class Part:
    """One corpus of a blend: what it is (as in ``data.text``) and its share of the sequences, in (0, 1]."""

    text: str
    share: Fraction


def parse(value: str | list, name: str) -> list[Part]:
    """The parts of ``data.text`` or ``data.held_out``; one of share 1 where no weights are given.

    Args:
        value: a corpus without weight; ``"0.7:A,0.3:B"``; or a list of ``{path, weight}``. Weights are relative:
            they need not sum to 1. A part of weight 0 is left out.
        name: of the setting, for the errors.

    Raises:
        ValueError: naming the part, for a weight that is not a number of at least 0, parts without weight among
            parts with one, or weights that sum to 0.
    """
    if isinstance(value, str):
        items = [item for item in value.split(",") if item.strip()]
        if not any(_weight_of(item) for item in items):
            return [Part(value.strip(), Fraction(1))]
        pairs: list[tuple[str, object]] = [_weight_of(item) or (item, None) for item in items]
    else:
        pairs = [_entry(item, name) for item in value]
    weights = [(text.strip(), _number(weight, text, name)) for text, weight in pairs]
    total = sum(weight for _, weight in weights)
    if total == 0:
        shown = ", ".join(f"{weight}:{text}" for text, weight in weights) or "no corpus"
        raise ValueError(f"the weights of {name} sum to 0 ({shown}): give at least one corpus a positive weight")
    return [Part(text, weight / total) for text, weight in weights if weight]


def _weight_of(item: str) -> tuple[str, str] | None:
    """``(corpus, weight)`` of ``weight:corpus``; None if nothing before a colon looks like a number."""
    found = _WEIGHTED.fullmatch(item)
    return (found[2], found[1]) if found else None


def _entry(item: object, name: str) -> tuple[str, object]:
    if not isinstance(item, dict) or set(item) != {"path", "weight"} or not isinstance(item["path"], str):
        raise ValueError(f"{name} holds {item!r}: an entry of a list is {{path: CORPUS, weight: NUMBER}}")
    return item["path"], item["weight"]


def _number(weight: object, text: str, name: str) -> Fraction:
    if weight is None:
        raise ValueError(f"{name} gives {text.strip()!r} no weight: in a blend every corpus has one, as in 0.7:A,0.3:B")
    try:
        number = Fraction(str(weight))  # through the decimal form: 0.7 is 7/10, not the nearest binary fraction
    except (ValueError, ZeroDivisionError):
        number = Fraction(-1)
    if number < 0 or isinstance(weight, bool):
        raise ValueError(f"{name} gives {text.strip()!r} the weight {weight}: it must be a number of at least 0")
    return number


class Interleave:
    """Which corpus each sequence of a run comes from, and how many came from it before.

    Positions are dealt in order and remembered (2 bytes each, at most one period of the shares), so a run pays as it
    goes and a resumed one deals what is before it again, about a million positions in a few seconds.
    """

    def __init__(self, shares: list[Fraction]) -> None:
        if sum(shares) != 1 or min(shares) <= 0:
            raise ValueError(f"shares {[str(s) for s in shares]} must be positive and sum to 1")
        self._period = math.lcm(*(s.denominator for s in shares))
        self._parts = [int(s * self._period) for s in shares]  # sequences of each corpus in a period
        self._dealt = array("H")
        self._counts: list[list[int]] = []  # of each corpus before positions 0, _CHUNK, 2 * _CHUNK ...
        self._next = [0] * len(shares)
        self._opens = [0] * len(shares)
        self._closes = [self._close(c, 0) for c in range(len(shares))]

    def __call__(self, sample: int) -> tuple[int, int]:
        """``(corpus, index)`` of position ``sample``: it is the ``index``-th sequence that the corpus gives."""
        rounds, place = divmod(sample, self._period)
        self._deal(place + 1)
        corpus = self._dealt[place]
        chunk = place // _CHUNK
        before = self._counts[chunk][corpus] + self._dealt[chunk * _CHUNK : place].count(corpus)
        return corpus, rounds * self._parts[corpus] + before

    def counts(self, samples: int) -> list[int]:
        """How many of the first ``samples`` sequences each corpus gives."""
        rounds, place = divmod(samples, self._period)
        self._deal(place + 1)  # one more than is counted, so that the chunk of the position exists
        chunk = place // _CHUNK
        rest = self._dealt[chunk * _CHUNK : place]
        return [rounds * part + self._counts[chunk][c] + rest.count(c) for c, part in enumerate(self._parts)]

    def _deal(self, stop: int) -> None:
        corpora = range(len(self._parts))
        for place in range(len(self._dealt), stop):
            if place % _CHUNK == 0:
                self._counts.append(list(self._next))
            chosen = min((c for c in corpora if self._opens[c] <= place), key=self._closes.__getitem__)
            self._dealt.append(chosen)
            self._next[chosen] += 1
            m = self._next[chosen]
            self._opens[chosen] = m * self._period // self._parts[chosen]
            self._closes[chosen] = self._close(chosen, m)

    def _close(self, corpus: int, m: int) -> int:
        return -(-(m + 1) * self._period // self._parts[corpus])
