"""Long generation: how far a text from the compressed cache stays the text that the full cache writes.

The uncompressed model writes n tokens after each prompt, greedily, over a full dense cache. Two passes compare with them:

- free: the compressed cache writes n tokens of its own. Where do they differ first, and how many are equal?
- forced: the full cache's tokens are fed through the compressed cache one by one, and every prediction is compared with the
  full cache's: KL in segments of the text, and how often both find the same token most likely.

After the first different token two texts can both be good and have no token in common, so the share of equal tokens alone says
little; KL along the full cache's text does not have that fault. Nothing ends at an end token: all texts have n tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from dmc.engine import LLM
from dmc.engine.tokenizer import Tokenizer
from dmc.evaluation.continuations import Request, Scored, follow
from dmc.evaluation.haystack import Haystack
from dmc.evaluation.measure import forced
from dmc.evaluation.paired import mean, segment_mean
from dmc.evaluation.provenance import model_hash
from dmc.evaluation.reference import Reference, keep, read_kept, reference
from dmc.evaluation.seeds import policy_seed
from dmc.evaluation.windows import Windows

NEW_TOKENS = 1000
SEGMENTS = 8
_FORMAT = 1  # of kept texts; goes into their names


@dataclass(frozen=True)
class LongSettings:
    """What is generated.

    Attributes:
        lengths: tokens of the prompts, each at least 2.
        trials: texts of each length.
        new_tokens: n, generated tokens of each text. None: 1,000, or as many as the model's positions leave behind the longest
            prompt.
        seed: of the prompts; equal seeds give equal prompts, whatever the cache.
        seeds: number of seeds, from ``seed`` on. Each gives its own prompts; the k-th adds k to the seed of a policy that draws.

    Raises:
        ValueError: if a value is out of range.
    """

    lengths: tuple[int, ...] = (256,)
    trials: int = 8
    new_tokens: int | None = None
    seed: int = 0
    seeds: int = 1

    def __post_init__(self) -> None:
        """Checks the ranges."""
        for name, fine, allowed in (
            ("lengths", self.lengths and min(self.lengths) >= 2, "at least one number of tokens, each at least 2"),
            ("trials", self.trials >= 1, "at least 1"),
            ("seeds", self.seeds >= 1, "at least 1"),
            ("new_tokens", self.new_tokens is None or self.new_tokens >= 1, "at least 1"),
        ):
            if not fine:
                raise ValueError(f"long generation: {name} must be {allowed}, got {getattr(self, name)!r}")

    def count(self, positions: int) -> int:
        """n for a model with so many positions.

        Raises:
            ValueError: if the longest prompt and n tokens need more.
        """
        longest = max(self.lengths)
        room = positions + 1 - longest  # the last token is not fed
        if room < (self.new_tokens or 1):
            wanted = f"{self.new_tokens or 1} new token{'s' * (self.new_tokens not in (None, 1))}"
            remedy = f"at most {room} new tokens" if room > 0 else "shorter prompts"
            raise ValueError(
                f"long generation: a prompt of {longest} tokens and {wanted} need more than the model's {positions} positions: "
                f"ask for {remedy}"
            )
        return min(NEW_TOKENS, room) if self.new_tokens is None else self.new_tokens


@dataclass(frozen=True)
class Written:
    """Prompts of one length with what the uncompressed model wrote after them.

    Attributes:
        length: P, tokens of a prompt.
        windows: tokens ``[N, P + n]``; the last token of the prompt is the first that is fed.
        reference: predictions of all written tokens.
        seed: of the prompts.
    """

    length: int
    windows: Windows
    reference: Reference
    seed: int = 0

    @property
    def texts(self) -> Tensor:
        """The written tokens, int64 ``[N, n]``."""
        return self.windows.tokens[:, self.length :]


@dataclass(frozen=True)
class Continued:
    """One text over the compressed cache against that of the full cache.

    Attributes:
        length, number, seed: tokens of the prompt, and which prompt of this length and seed.
        same_tokens: tokens before the first different one; n if none differs.
        equal: share of the n tokens that are equal, position by position.
        agreement: share of positions of the full cache's text at which both find the same token most likely.
        kl: mean KL(full || this) in nats/token of each segment of the full cache's text.
        tokens, entries, held_bytes, dense_bytes: of the cache after the own text.
        full, generated: both texts.
    """

    length: int
    number: int
    same_tokens: int
    equal: float
    agreement: float
    kl: list[float]
    tokens: int
    entries: float
    held_bytes: int
    dense_bytes: int
    full: str
    generated: str
    seed: int


def write_full(
    base: str | Path,
    tokenizer: Tokenizer,
    haystack: Haystack,
    settings: LongSettings,
    *,
    store: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    max_batch: int = 16,
    progress: Callable[[int], None] | None = None,
) -> list[Written]:
    """Draws the prompts and lets the uncompressed model continue them over a full dense cache.

    Args:
        base: directory of the uncompressed model.
        tokenizer: cuts the haystack into tokens.
        haystack: the prompts are pieces of it, from starts of lines.
        settings: what is drawn.
        store: folder in which texts and predictions are kept for the next cache; None keeps nothing.
        device, dtype, max_batch: as `LLM` takes them.
        progress: called with numbers of texts that are written.

    Raises:
        ValueError: if the model is a retrofit, or prompts and texts do not fit it, or the haystack is too short.
    """
    llm = LLM(base, policy="full", device=device, dtype=dtype, max_batch=max_batch)
    count, written, head = settings.count(llm.model.config.positions), [], None
    seeds = range(settings.seed, settings.seed + settings.seeds)
    for seed, length in product(seeds, settings.lengths):
        prompts = [_prompt(tokenizer, haystack, length, seed, number) for number in range(settings.trials)]
        tokens = _texts(llm, prompts, count, store)
        windows = Windows(tokens, length - 1, f"long {length}", haystack.hash)
        wanted = reference(base, windows, store=store, dtype=llm.model.dtype, device=llm.model.device)
        head = wanted.head if head is None else head  # one output matrix in memory, however many lengths
        written.append(Written(length, windows, Reference(**vars(wanted) | {"head": head}), seed))
        if progress:
            progress(len(prompts))
    return written


def run(llm: LLM, written: Sequence[Written], progress: Callable[[int], None] | None = None) -> list[Continued]:
    """Continues the same prompts over the compressed cache, freely and along the full cache's texts.

    Args:
        llm: with an empty cache and a tokenizer.
        written: of `write_full`, for a model with this tokenizer.
        progress: called with a number of tokens that are done; there are 2 n for each text.

    Raises:
        ValueError: if the texts do not fit the model or its cache.
    """
    continued = []
    for one in written:
        prompts = one.windows.tokens[:, : one.length].tolist()
        count = one.texts.shape[1]
        own = progress and partial(_each, progress, count)
        with policy_seed(llm, one.seed - written[0].seed):
            done = follow(llm, [Request(prompt, count) for prompt in prompts], own)
            runs = forced(llm, one.windows, reference=one.reference, progress=progress)
        kl, same = torch.cat([run.kl for run in runs]), torch.cat([run.same for run in runs])
        for number, scored in enumerate(done):
            continued.append(_continued(llm, one, number, scored, kl[number], same[number]))
    return continued


def segments(count: int) -> list[tuple[int, int]]:
    """Equal parts of n tokens, `SEGMENTS` of them if there are so many tokens: (first, end) of each."""
    parts = min(SEGMENTS, count)
    return [(i * count // parts, (i + 1) * count // parts) for i in range(parts)]


def summary(continued: Sequence[Continued], count: int) -> dict:
    """Means and standard errors over texts; ``cr`` is tokens / entries, ``byte_ratio`` dense bf16 bytes / held bytes."""
    figures: dict[str, Any] = {"n": len(continued), "unchanged": sum(one.same_tokens == count for one in continued)}
    for name in ("same_tokens", "equal", "agreement"):
        figures[name], figures[f"{name}_stderr"] = mean([getattr(one, name) for one in continued])
    figures["same_tokens_median"] = median(one.same_tokens for one in continued)
    parts = segments(count)
    figures["kl"], figures["kl_stderr"] = mean([segment_mean(one.kl, parts) for one in continued])
    by_part = [mean([one.kl[part] for one in continued]) for part in range(len(parts))]
    figures["kl_segments"], figures["kl_segments_stderr"] = ([pair[i] for pair in by_part] for i in (0, 1))
    return figures | {
        "cr": sum(one.tokens for one in continued) / sum(one.entries for one in continued),
        "held_bytes": fmean(one.held_bytes for one in continued),
        "byte_ratio": sum(one.dense_bytes for one in continued) / sum(one.held_bytes for one in continued),
    }


def report(continued: Sequence[Continued], written: Sequence[Written], haystack: Haystack, settings: LongSettings) -> dict:
    """All figures, ready for JSON."""
    count = written[0].texts.shape[1]
    groups: dict[int, list[Continued]] = {}
    for one in continued:
        groups.setdefault(one.length, []).append(one)
    return {
        "schema": 1,
        "base": written[0].reference.model,
        "base_hash": written[0].reference.model_hash,
        "haystack": haystack.name,
        "haystack_hash": haystack.hash,
        "samples_hash": [one.windows.hash for one in written],
        "settings": asdict(settings) | {"new_tokens": count},
        "segments": segments(count),
        "cells": [{"length": length} | summary(group, count) for length, group in groups.items()],
        "all": summary(continued, count),
        "samples": [asdict(one) for one in continued],
    }


def as_text(figures: dict) -> str:
    """A `report` as tables: the own texts, then KL along the full cache's."""
    count, rows = figures["settings"]["new_tokens"], [*figures["cells"]]
    lines = [
        f"{count} tokens over this cache against the full cache's (standard error in brackets)",
        f"{'prompt':>6} {'n':>3}  {'tokens until they differ':>24} {'median':>6} {'unchanged':>9}  {'equal tokens':>15}",
    ]
    for row in rows:
        lines.append(
            f"{row['length']:>6} {row['n']:>3}  {_with_error(row, 'same_tokens', '.1f'):>24} {row['same_tokens_median']:>6.0f} "
            f"{row['unchanged']:>9}  {_with_error(row, 'equal', '.3f'):>15}"
        )
    lines += [
        "along the full cache's text: KL in nats/token, and how often the same token is most likely",
        f"{'prompt':>6} {'n':>3}  {'tokens':>11}  KL",
    ]
    for row in rows:
        for (first, end), kl, error in zip(figures["segments"], row["kl_segments"], row["kl_segments_stderr"], strict=True):
            lines.append(f"{row['length']:>6} {row['n']:>3}  {f'{first + 1}-{end}':>11}  {_number(kl, error, 'z.5f')}")
        lines.append(
            f"{row['length']:>6} {row['n']:>3}  {'all':>11}  {_with_error(row, 'kl', 'z.5f')}; same most likely token "
            f"{_with_error(row, 'agreement', '.1%')}"
        )
    whole = figures["all"]
    lines.append(
        f"at the end of the own texts (n {whole['n']}): CR {whole['cr']:.2f}, held {whole['held_bytes']:,.0f} bytes per "
        f"text, dense bf16 / held {whole['byte_ratio']:.2f}"
    )
    return "\n".join(lines)


def _prompt(tokenizer: Tokenizer, haystack: Haystack, length: int, seed: int, number: int) -> list[int]:
    draw, first = random.Random(f"{seed} long {length} {number}"), tokenizer.encode("")
    if length <= len(first):
        raise ValueError(f"a prompt of {length} tokens has no room for text: ask for at least {len(first) + 1}")
    return [*first, *haystack.tokens(tokenizer, length - len(first), draw)]


def _texts(llm: LLM, prompts: list[list[int]], count: int, store: str | Path | None) -> Tensor:
    """Prompts and what the model writes after them: int64 ``[N, P + n]``."""
    path = None
    if store is not None:
        given = Windows(torch.tensor(prompts).repeat(1, 2), len(prompts[0])).hash  # of the prompts alone
        kind = f"{str(llm.model.dtype)[6:]}-{llm.model.device.type}"
        path = Path(store) / f"{model_hash(llm.path)}-{given}-{count}-{kind}-long-{_FORMAT}.safetensors"
    kept = path and read_kept(path, "tokens", (len(prompts), len(prompts[0]) + count), torch.int64)
    if kept is not None:
        return kept
    done = follow(llm, [Request(prompt, count) for prompt in prompts])
    tokens = torch.tensor([[*prompt, *scored.tokens] for prompt, scored in zip(prompts, done, strict=True)])
    if path:
        keep(path, "tokens", tokens)
    return tokens


def _continued(llm: LLM, one: Written, number: int, scored: Scored, kl: Tensor, same: Tensor) -> Continued:
    full, own, stats = one.texts[number], torch.tensor(scored.tokens), scored.stats
    different = (own != full).nonzero()
    return Continued(
        one.length,
        number,
        int(different[0]) if len(different) else len(full),
        (own == full).double().mean().item(),
        same.mean().item(),
        [kl[first:end].mean().item() for first, end in segments(len(full))],
        stats.cached_tokens,
        int(stats.entries.sum()) / stats.entries.numel(),
        stats.held_bytes,
        stats.dense_bytes,
        llm.tokenizer.decode(full.tolist()),
        llm.tokenizer.decode(scored.tokens),
        one.seed,
    )


def _each(progress: Callable[[int], None], count: int, texts: int) -> None:
    progress(texts * count)


def _with_error(row: dict, name: str, form: str) -> str:
    return _number(row[name], row[f"{name}_stderr"], form)


def _number(value: float, error: float | None, form: str) -> str:
    return f"{value:{form}}" + ("" if error is None else f" ({error:{form}})")
