"""Prompts with more entries than their request has pages for: neighbouring entries are merged when they are put into pages."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dmc.cache import KVCache, Prompt
from dmc.cache.reading.prompt import NONE, Layer
from dmc.functional import rotate, unrotate
from dmc.rope import Rope

_HALVINGS = 20  # of the share of entries that is searched for


class FittedPrompt:
    """A prompt whose entries are final; `dmc.cache.KVCache.load` takes it in place of the prompt.

    Args:
        prompt: that it was made of.
        layers: entries of each layer, and their number per head.
    """

    def __init__(self, prompt: Prompt, layers: list[tuple[Layer, Tensor]]) -> None:
        self.prompt, self.layers = prompt, layers

    def final(self, number: int) -> tuple[Layer, Tensor]:
        """Entries of a layer, left-aligned, and their number per head."""
        return self.layers[number]

    def notes(self, number: int) -> Tensor:
        """See `dmc.cache.reading.late_prompt.LatePrompt.notes`."""
        return self.prompt.notes(number)


def fitted(prompt: Prompt, cache: KVCache, rope: Rope, limit: int) -> tuple[FittedPrompt, int]:
    """A finished prompt with as many entries as fit into ``limit`` pages.

    If there are too many, each head keeps the same share of the entries behind its window. Runs of neighbouring entries become
    one: under a merging policy the mean, weighted with their tokens, at the position of the newest one; else the newest one.

    Returns:
        The prompt, and the number of entries that are gone.
    """
    policy = cache.policy
    layers = [prompt.final(number) for number in range(cache.shape.layers)]
    counts = torch.stack([count for _, count in layers])
    if cache.pages_of(counts) <= limit:
        return FittedPrompt(prompt, layers), 0
    lead = policy.sinks if policy.ring is None else policy.ring + 1 + policy.sinks
    kept = _kept(cache, counts, lead, limit)
    merge = _merged if policy.merges else _newest
    return FittedPrompt(
        prompt, [(_shortened(layer, lead, had, keep, merge, rope), keep) for (layer, had), keep in zip(layers, kept, strict=True)]
    ), int((counts - kept).sum())


def _kept(cache: KVCache, counts: Tensor, lead: int, limit: int) -> Tensor:
    """Entries that each head keeps, ``[L, H]`` like ``counts``, the first ``lead`` among them."""
    first, rest = counts.clamp(max=lead), (counts - lead).clamp(min=0)
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        fits = cache.pages_of(first + (rest * middle).long()) <= limit
        low, high = (middle, high) if fits else (low, middle)
    kept = first + (rest * low).long()
    assert cache.pages_of(kept) <= limit, "a request has no pages for its window"
    return kept


def _shortened(layer: Layer, lead: int, had: Tensor, keep: Tensor, merge, rope: Rope) -> Layer:  # noqa: ANN001
    """The layer with ``keep [H]`` of its ``had [H]`` entries in each head."""
    keys, values, positions = layer.keys.clone(), layer.values.clone(), layer.positions.clone()
    for head, (before, after) in enumerate(zip(had.tolist(), keep.tolist(), strict=True)):
        if after == before:
            continue
        some = slice(lead, before)
        group = torch.arange(before - lead, device=keys.device) * (after - lead) // (before - lead)
        new = merge(keys[head, some], values[head, some], positions[head, some].long(), group, rope)
        for held, part in zip((keys, values, positions), new, strict=True):
            held[head, lead:after] = part.to(held.dtype)
        positions[head, after:] = NONE
    most = int(keep.max())
    return dataclasses.replace(layer, keys=keys[:, :most], values=values[:, :most], positions=positions[:, :most])


def _newest(keys: Tensor, values: Tensor, positions: Tensor, group: Tensor, _: Rope) -> tuple[Tensor, Tensor, Tensor]:
    """The newest entry of each group: keys, values ``[n, D]``, positions and group ``[n]``, both rising."""
    last = torch.cat([group[1:] != group[:-1], torch.ones_like(group[:1], dtype=torch.bool)])
    return keys[last], values[last], positions[last]


def _merged(keys: Tensor, values: Tensor, positions: Tensor, group: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
    """The mean of each group, as `_newest`; an entry's weight is its number of tokens."""
    work = torch.float64 if keys.dtype == torch.float64 else torch.float32
    tokens = torch.diff(positions, prepend=positions.new_tensor([-1])).to(work)[:, None]
    table = rope(positions)
    plain = torch.cat([unrotate(keys.to(work), table), values.to(work)], -1) * tokens
    groups = int(group[-1]) + 1
    total = plain.new_zeros(groups, 1).index_add_(0, group, tokens)
    mean = plain.new_zeros(groups, plain.shape[1]).index_add_(0, group, plain) / total
    newest = _newest(keys, values, positions, group, rope)[2]
    size = keys.shape[-1]
    return rotate(mean[:, :size], rope(newest)), mean[:, size:], newest
