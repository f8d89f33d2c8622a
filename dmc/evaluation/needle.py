"""Retrieval of a needle from a haystack through the compressed cache, at depths x lengths.

A prompt is haystack with a needle in it and the question at the end. It is scored three ways, all with the prompt's
pages encoded before its last token is fed (`dmc.evaluation.continuations`):

- exact: greedy generation begins with the answer;
- choice: the answer is more likely than every wrong one (chance 1 / choices);
- margin: log-probability of the answer minus the mean of the wrong ones', nats; 0 on average for a cache that has lost
  the needle, whatever the model, since right and wrong answers are drawn alike. This says something of small models too.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

from dmc.engine import LLM
from dmc.evaluation.continuations import Request, Scored, follow
from dmc.evaluation.haystack import Haystack
from dmc.evaluation.needles import KINDS, Needle, draw_needle

METRICS = ("exact", "choice", "margin", "logprob")
_MORE_TOKENS = 3  # generated beyond the answer's, which may be cut differently


@dataclass(frozen=True)
class NeedleSettings:
    """What is tried.

    Attributes:
        lengths: tokens of the whole prompt.
        depths: where the needle begins, 0 (start of the haystack) to 1 (its end).
        kinds: of `dmc.evaluation.needles.KINDS`.
        trials: prompts a cell, each with its own piece of haystack and its own needle.
        choices: possible answers, the right one included.
        seed: of all draws; equal seeds give equal prompts, whatever the cache.

    Raises:
        ValueError: if a value is out of range.
    """

    lengths: tuple[int, ...] = (256, 512, 1024)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    kinds: tuple[str, ...] = ("passkey", "fact")
    trials: int = 4
    choices: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the ranges."""
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown:
            raise ValueError(f"unknown kind of needle {unknown[0]!r}; known: {', '.join(KINDS)}")
        for name, fine, allowed in (
            ("lengths", self.lengths and min(self.lengths) >= 1, "at least one number of tokens"),
            ("depths", self.depths and 0 <= min(self.depths) <= max(self.depths) <= 1, "numbers from 0 to 1"),
            ("kinds", self.kinds, f"some of {', '.join(KINDS)}"),
            ("trials", self.trials >= 1, "at least 1"),
            ("choices", self.choices >= 2, "at least 2"),
        ):
            if not fine:
                raise ValueError(f"needle {name} must be {allowed}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Trial:
    """One prompt: where its needle is, what was answered, and the cache when the answer was generated.

    Attributes:
        kind: of needle.
        length: tokens of the prompt that was asked for.
        depth: of the needle, between 0 (start) and 1 (end).
        needle_at: token at which the needle begins.
        answer, generated: the right value; the greedily generated text.
        exact: if the text begins with the value, and no letter or digit follows.
        choice: if the value is more likely than the wrong ones.
        margin: its log-probability minus the mean of the wrong ones', nats.
        logprob: of the value, nats/token.
        tokens: of the prompt and the generated text.
        entries: mean over layers and heads.
        held_bytes, encoded_bytes, dense_bytes: of the cache; of its encoded pages; of a dense bf16 cache of the same tokens.
    """

    kind: str
    length: int
    depth: float
    needle_at: int
    answer: str
    generated: str
    exact: bool
    choice: bool
    margin: float
    logprob: float
    tokens: int
    entries: float
    held_bytes: int
    encoded_bytes: int
    dense_bytes: int


def needle(llm: LLM, haystack: Haystack, settings: NeedleSettings, progress: Callable[[int], None] | None = None) -> list[Trial]:
    """Tries every kind, length and depth.

    Args:
        llm: with an empty cache and a tokenizer. One prompt's answers run together, as far as ``max_batch`` allows.
        progress: called with a number of trials that are done; there are `count` of them.

    Raises:
        ValueError: if a prompt is too long for the model, or too short for needle and question, or the haystack is.
    """
    longest, positions = max(settings.lengths), llm.model.config.positions
    if longest >= positions:
        raise ValueError(f"a prompt of {longest} tokens leaves no room for an answer in the model's {positions} positions")
    trials = []
    for kind in settings.kinds:
        for length in settings.lengths:
            for depth in settings.depths:
                for number in range(settings.trials):
                    draw = random.Random(f"{settings.seed} {kind} {length} {number}")  # the same for all depths
                    trials.append(_try(llm, haystack, settings, kind, length, depth, draw))
                    if progress:
                        progress(1)
    return trials


def count(settings: NeedleSettings) -> int:
    """Trials in all."""
    return len(settings.kinds) * len(settings.lengths) * len(settings.depths) * settings.trials


def cells(trials: Sequence[Trial]) -> list[dict]:
    """Means over the trials of each kind, length and depth, in the order of the trials."""
    groups: dict[tuple, list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.kind, trial.length, trial.depth), []).append(trial)
    return [dict(zip(("kind", "length", "depth"), key, strict=True)) | summary(group) for key, group in groups.items()]


def summary(trials: Sequence[Trial]) -> dict:
    """Means over trials; ``cr`` is tokens / entries and ``byte_ratio`` dense bf16 bytes / held bytes, of all together."""
    means = {name: fmean(getattr(trial, name) for trial in trials) for name in METRICS}
    sums = {name: sum(getattr(trial, name) for trial in trials) for name in ("tokens", "entries", "held_bytes", "dense_bytes")}
    return means | {
        "trials": len(trials),
        "cr": sums["tokens"] / sums["entries"],
        "held_bytes": sums["held_bytes"] / len(trials),
        "encoded_bytes": fmean(trial.encoded_bytes for trial in trials),
        "byte_ratio": sums["dense_bytes"] / sums["held_bytes"],
    }


def report(trials: Sequence[Trial], haystack: Haystack, settings: NeedleSettings) -> dict:
    """All figures, ready for JSON."""
    kinds = {kind: summary([trial for trial in trials if trial.kind == kind]) for kind in settings.kinds}
    return {
        "haystack": haystack.name,
        "haystack_hash": haystack.hash,
        "settings": asdict(settings),
        "kinds": kinds,
        "cells": cells(trials),
        "trials": [asdict(trial) for trial in trials],
    }


def as_text(figures: dict) -> str:
    """A `report` as a table: a line a kind and length, exact / choice / margin at each depth."""
    depths = figures["settings"]["depths"]
    title = "  ".join(f"{f'{depth:.0%}':>18}" for depth in depths)
    trials = figures["settings"]["trials"]
    lines = [
        f"exact / choice / margin in nats, by depth of the needle (n {trials} in each cell)",
        f"{'kind':<9} {'length':>6}  {title}",
    ]
    rows: dict[tuple[str, int], list[dict]] = {}
    for cell in figures["cells"]:
        rows.setdefault((cell["kind"], cell["length"]), []).append(cell)
    for (kind, length), row in rows.items():
        parts = (f"{cell['exact']:.2f} / {cell['choice']:.2f} / {cell['margin']:+.1f}" for cell in row)
        lines.append(f"{kind:<9} {length:>6}  " + "  ".join(f"{part:>18}" for part in parts))
    for kind, mean in figures["kinds"].items():
        lines.append(
            f"{kind}: exact {mean['exact']:.3f}, choice {mean['choice']:.3f} (chance "
            f"{1 / figures['settings']['choices']:.2f}), margin {mean['margin']:+.2f} nats (n {mean['trials']}); "
            f"CR {mean['cr']:.2f}, held {mean['held_bytes']:,.0f} bytes per prompt, dense bf16 / held {mean['byte_ratio']:.2f}"
        )
    return "\n".join(lines)


def _try(
    llm: LLM, haystack: Haystack, settings: NeedleSettings, kind: str, length: int, depth: float, draw: random.Random
) -> Trial:
    made = draw_needle(kind, llm.tokenizer, draw, settings.choices)
    context, place = _prompt(llm, haystack, made, length, depth, draw)
    answers = [Request(context, choice) for choice in made.choices]
    free, *scored = follow(llm, [Request(context, len(made.choices[0]) + _MORE_TOKENS), *answers])
    return _trial(llm, made, free, [each.logprob for each in scored], kind=kind, length=length, depth=depth, needle_at=place)


def _prompt(llm: LLM, haystack: Haystack, made: Needle, length: int, depth: float, draw: random.Random) -> tuple[list[int], int]:
    """Token ids ``[length]``, and where the needle begins."""
    first = llm.tokenizer.encode("")  # what this tokenizer puts before a text
    hay = length - len(first) - len(made.needle) - len(made.question)
    if hay < 1:
        raise ValueError(f"a prompt of {length} tokens has no room for hay next to the needle and the question: ask for more")
    tokens = haystack.tokens(llm.tokenizer, hay, draw)
    place = round(depth * hay)
    lines = [i + 1 for i, token in enumerate(tokens) if llm.tokenizer.piece(token).endswith("\n")]
    place = max((line for line in lines if line <= place), default=0)  # needles stand at the beginning of a line
    return [*first, *tokens[:place], *made.needle, *tokens[place:], *made.question], len(first) + place


def _trial(llm: LLM, made: Needle, free: Scored, logprobs: list[float], **where: str | float) -> Trial:
    right, *wrong = logprobs
    said = llm.tokenizer.decode(free.tokens).lstrip()
    after = said[len(made.answer) : len(made.answer) + 1]
    stats = free.stats
    return Trial(
        **where,
        answer=made.answer,
        generated=said,
        exact=said.startswith(made.answer) and not after.isalnum(),
        choice=right > max(wrong),
        margin=right - fmean(wrong),
        logprob=right / len(made.choices[0]),
        tokens=stats.cached_tokens,
        entries=int(stats.entries.sum()) / stats.entries.numel(),
        held_bytes=stats.held_bytes,
        encoded_bytes=stats.held["pages"],
        dense_bytes=stats.dense_bytes,
    )
