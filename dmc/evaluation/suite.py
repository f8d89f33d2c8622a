"""Retrieval by generation through the compressed cache: what is still written when entries were merged, evicted or encoded.

A document with the first question is the prompt, which the cache compresses when it has been read; the answer is generated,
greedily. Of samples with several turns the right replies and the later questions are fed to the compressed cache token by token,
and the last turn's answer counts: what a policy dropped because the first question did not ask for it is missing then.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

from dmc.engine import LLM
from dmc.evaluation.continuations import Request, follow
from dmc.evaluation.haystack import Haystack
from dmc.evaluation.paired import mean
from dmc.evaluation.retrieval import KINDS, Sample, draw_sample
from dmc.evaluation.seeds import policy_seed

_MORE_TOKENS = 8  # generated beyond the reply's


@dataclass(frozen=True)
class SuiteSettings:
    """What is tried.

    Attributes:
        lengths: tokens of document and first question together.
        kinds: of `dmc.evaluation.retrieval.KINDS`.
        trials: samples of each kind and length.
        seed: of all draws; equal seeds give equal samples, whatever the cache.
        seeds: number of seeds, from ``seed`` on. Each gives its own samples; the k-th adds k to the seed of a policy that draws.

    Raises:
        ValueError: if a value is out of range.
    """

    lengths: tuple[int, ...] = (512,)
    kinds: tuple[str, ...] = tuple(KINDS)
    trials: int = 5
    seed: int = 0
    seeds: int = 1

    def __post_init__(self) -> None:
        """Checks the ranges."""
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown:
            raise ValueError(f"unknown kind of retrieval {unknown[0]!r}; known: {', '.join(KINDS)}")
        for name, fine, allowed in (
            ("lengths", self.lengths and min(self.lengths) >= 1, "at least one number of tokens"),
            ("kinds", self.kinds, f"some of {', '.join(KINDS)}"),
            ("trials", self.trials >= 1, "at least 1"),
            ("seeds", self.seeds >= 1, "at least 1"),
        ):
            if not fine:
                raise ValueError(f"retrieval {name} must be {allowed}, got {getattr(self, name)!r}")


SUITES = {"quick": SuiteSettings(), "retrieval": SuiteSettings(lengths=(512, 1024), trials=20)}


@dataclass(frozen=True)
class Answered:
    """One sample: what was to be found and what was written. The cache is that after the answer.

    Attributes:
        kind: of `dmc.evaluation.retrieval.KINDS`.
        length: tokens of document and first question that were asked for.
        answers, generated: what was to be found; the generated text.
        found: share of the answers that are in the generated text.
        tokens: in the cache.
        entries: mean over layers and heads.
        sample: hash of the tokens that the model got: 16 hex digits.
        held_bytes, dense_bytes: of the cache; of a dense bf16 cache of the same tokens.
    """

    kind: str
    length: int
    answers: tuple[str, ...]
    generated: str
    found: float
    tokens: int
    entries: float
    held_bytes: int
    dense_bytes: int
    seed: int
    sample: str


def run(llm: LLM, haystack: Haystack, settings: SuiteSettings, progress: Callable[[int], None] | None = None) -> list[Answered]:
    """Answers all samples, as many together as ``max_batch`` allows.

    Args:
        llm: with an empty cache and a tokenizer.
        haystack: that kinds with needles hide them in.
        settings: which samples.
        progress: called with a number of samples that are done; there are `count` of them.

    Raises:
        ValueError: if a length is too short for a kind or too long for the model, or the haystack is too short.
    """
    check_room(settings, llm.model.config.positions)
    answered = []
    for seed in range(settings.seed, settings.seed + settings.seeds):
        samples = [
            (length, draw_sample(kind, llm.tokenizer, haystack, length, random.Random(f"{seed} {kind} {length} {number}")))
            for kind in settings.kinds
            for length in settings.lengths
            for number in range(settings.trials)
        ]
        requests = [_request(sample) for _, sample in samples]
        with policy_seed(llm, seed - settings.seed):
            done = follow(llm, requests, progress)
        for (length, sample), request, scored in zip(samples, requests, done, strict=True):
            said, answers, stats = llm.tokenizer.decode(scored.tokens), sample.turns[-1].answers, scored.stats
            answered.append(
                Answered(
                    sample.kind,
                    length,
                    answers,
                    said,
                    fmean(answer in said for answer in answers),
                    stats.cached_tokens,
                    int(stats.entries.sum()) / stats.entries.numel(),
                    stats.held_bytes,
                    stats.dense_bytes,
                    seed,
                    _hash(request),
                )
            )
    return answered


def check_room(settings: SuiteSettings, positions: int) -> None:
    """Raises ValueError if the longest text leaves no room for an answer in a model with so many positions."""
    longest = max(settings.lengths)
    if longest >= positions:
        raise ValueError(
            f"retrieval: a text of {longest} tokens and its answer need more than {longest} positions, and the model has "
            f"{positions}: ask for shorter --lengths"
        )


def count(settings: SuiteSettings) -> int:
    """Samples in all."""
    return settings.seeds * len(settings.kinds) * len(settings.lengths) * settings.trials


def summary(answered: Sequence[Answered]) -> dict:
    """Mean and standard error of what was found; ``cr`` is tokens / entries, ``byte_ratio`` dense bf16 bytes / held bytes."""
    found, error = mean([one.found for one in answered])
    return {
        "found": found,
        "stderr": error,
        "n": len(answered),
        "cr": sum(one.tokens for one in answered) / sum(one.entries for one in answered),
        "held_bytes": fmean(one.held_bytes for one in answered),
        "byte_ratio": sum(one.dense_bytes for one in answered) / sum(one.held_bytes for one in answered),
    }


def report(answered: Sequence[Answered], haystack: Haystack, settings: SuiteSettings) -> dict:
    """All figures, ready for JSON."""
    groups: dict[tuple[str, int], list[Answered]] = {}
    for one in answered:
        groups.setdefault((one.kind, one.length), []).append(one)
    cells = [{"kind": kind, "length": length} | summary(group) for (kind, length), group in groups.items()]
    seeds = {one.seed: [] for one in answered}
    for one in answered:
        seeds[one.seed].append(one)
    return {
        "schema": 1,
        "haystack": haystack.name,
        "haystack_hash": haystack.hash,
        "settings": asdict(settings),
        "cells": cells,
        "all": summary(answered),
        "seeds": [{"seed": seed} | summary(some) for seed, some in seeds.items()],
        "samples": [asdict(one) for one in answered],
    }


def as_text(figures: dict) -> str:
    """A `report` as a table: a line per kind and length."""
    lines = [f"{'kind':<12} {'tokens':>6}  found (standard error, n)"]
    for cell in figures["cells"]:
        lines.append(f"{cell['kind']:<12} {cell['length']:>6}  {_found(cell)}")
    whole = figures["all"]
    lines.append(
        f"all: {_found(whole)}; CR {whole['cr']:.2f}, held {whole['held_bytes']:,.0f} bytes per text, dense bf16 / held "
        f"{whole['byte_ratio']:.2f}"
    )
    if len(figures["seeds"]) > 1:
        lines.append("by seed: " + "; ".join(f"{one['seed']}: {_found(one)}" for one in figures["seeds"]))
    return "\n".join(lines)


def _found(cell: dict) -> str:
    error = "" if cell["stderr"] is None else f"{cell['stderr']:.2f}, "
    return f"{cell['found']:.2f} ({error}n {cell['n']})"


def _request(sample: Sample) -> Request:
    first, *later = sample.turns
    fed = [token for before, turn in zip(sample.turns, later, strict=False) for token in (*before.reply, *turn.question)]
    return Request([*sample.document, *first.question], len(sample.turns[-1].reply) + _MORE_TOKENS, fed)


def _hash(request: Request) -> str:
    return hashlib.sha256(json.dumps([list(request.context), list(request.fed)]).encode()).hexdigest()[:16]
