"""What was found out about a model on some texts: as numbers for JSON, and in sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dmc.analysis.attention import FIRST, NEWEST
from dmc.analysis.figures import number
from dmc.analysis.measure import CACHED, Measures
from dmc.analysis.ranks import ENERGY

KIND_NAMES = {"keys_before_rope": "keys before RoPE", "keys": "keys after RoPE", "values": "values", "attention": "attention"}


@dataclass(frozen=True)
class Inspection:
    """All results of one run.

    Attributes:
        about: facts for the head of the report, by name: model, texts and their hashes, settings.
        measures: see `dmc.analysis.measure`.
        merges: bool ``[L, H, T]`` of the first window.
        pieces: T texts, what its tokens read.
        cache: figures of the engine; see `dmc.engine.inspect.report`.
        recommendation: see `dmc.analysis.recommend`; None if none was asked for.
    """

    about: dict[str, object]
    measures: Measures
    merges: Tensor
    pieces: Sequence[str]
    cache: dict
    recommendation: dict | None = None

    @property
    def merging(self) -> bool:
        """Whether any token was merged."""
        return bool((self.measures.entries.sum(-1) < self.measures.tokens).any())


def numbers(found: Inspection) -> dict:
    """Everything as JSON can hold it: lists ``[layer][head]...``; null where there is no number."""
    measured = found.measures
    return {
        "format": "dmc-inspect-1",
        **found.about,
        "cache": found.cache,
        "window_tokens": measured.tokens,
        "windows": measured.windows,
        "bin_tokens": measured.bins.tolist(),
        "cr_learnt": listed(measured.cr),
        "entries": listed(measured.entries),
        "effective_rank": {kind: listed(rank) for kind, rank in measured.rank.items()},
        "stable_rank": {kind: listed(rank) for kind, rank in measured.stable.items()},
        "singular_values": {kind: listed(values) for kind, values in measured.spectrum.items()},
        "entropy_bits": listed(measured.entropy),
        "entropy_share": listed(measured.entropy_overall),
        "entropy_share_along": listed(measured.entropy_share),
        "recommendation": found.recommendation,
        "attention_on_first": listed(measured.first),
        "attention_on_newest": listed(measured.newest),
    }


def listed(values: Tensor) -> list:
    """A tensor as nested lists of numbers with five significant digits; None for what is not a finite number."""
    if values.dim() > 1:
        return [listed(row) for row in values]
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values.double().tolist()]


def findings(found: Inspection) -> list[str]:
    """The main results, a sentence each."""
    measured, size = found.measures, found.measures.spectrum["keys"].shape[-1]
    heads = measured.cr.numel()
    said = []
    if found.merging:
        overall = measured.tokens * heads / float(measured.entries.sum())
        said.append(
            f"The model merges {number(overall)} tokens into an entry on average; most in {_where(measured.cr, largest=True)}, "
            f"least in {_where(measured.cr, largest=False)}. {int((measured.cr < 1.05).sum())} of {heads} heads keep "
            "nearly every token (CR below 1.05)."
        )
    else:
        said.append("The model merges nothing under this policy: every token is an entry of its own.")
    ranks = ", ".join(f"{KIND_NAMES[kind]} {number(float(measured.rank[kind].mean()))}" for kind in CACHED)
    said.append(
        f"Dimensions of {size} that hold {ENERGY:.0%} of the energy, averaged over heads: {ranks}. Least for the keys before "
        f"RoPE: {_where(measured.rank['keys_before_rope'], largest=False)}; most for the values: "
        f"{_where(measured.rank['values'], largest=True)}."
    )
    said.append(
        f"Attention over the first {measured.spectrum['attention'].shape[-1]} tokens of a window has effective rank "
        f"{number(float(measured.rank['attention'].mean()))} and stable rank "
        f"{number(float(measured.stable['attention'].mean()))} on average over query heads."
    )
    share = measured.entropy_overall
    if not share.isnan().all():
        said.append(
            f"Attention spreads over {number(float(measured.entropy.mean()))} bits on average, {number(float(share.nanmean()))} "
            f"of what an even spread would have; narrowest in {_where(share, largest=False, kind='query head')}, widest in "
            f"{_where(share, largest=True, kind='query head')}."
        )
    if not measured.first.isnan().any():
        said.append(
            f"{int((measured.first > 0.5).sum())} of {measured.first.numel()} query heads put more than half of their attention "
            f"on the first {FIRST} positions, {int((measured.newest > 0.5).sum())} on their newest {NEWEST}."
        )
    return said


def _where(values: Tensor, *, largest: bool, kind: str = "head") -> str:
    known = values.nan_to_num(-torch.inf if largest else torch.inf)
    place = int(known.argmax() if largest else known.argmin())
    layer, head = divmod(place, values.shape[1])
    return f"layer {layer}, {kind} {head} ({number(float(values[layer, head]))})"
