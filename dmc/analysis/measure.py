"""Ranks, attention and compression of every layer and head of a model, averaged over windows of text.

Ranks and spectra are those of a window's own matrices: of what the cache of one head holds at its end ([N, D]; N is the
number of tokens unless the model merges), and of attention over these entries in its first tokens ([S, N]; an open
entry's states are one column). Then they are averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dmc.analysis.attention import States, attend, states
from dmc.analysis.ranks import effective_rank, spectrum, stable_rank
from dmc.cache import Policy
from dmc.model import Decoder

CACHED = ("keys_before_rope", "keys", "values")
KINDS = (*CACHED, "attention")
_BINS = 32  # of positions along a window
PRECISIONS = {"fp32": torch.float32, "fp64": torch.float64}


@dataclass
class Measures:
    """Averages over windows of T tokens. L layers, H key/value heads, Hq query heads, B bins of positions.

    Attributes:
        tokens: T.
        windows: how many.
        bins: int64 ``[B]``, tokens of a window in each bin.
        entries: ``[L, H, B]``, entries that a window opens in each bin; summed over B: those of a window.
        rank, stable: by kind of `KINDS`, ``[L, H]``, for attention ``[L, Hq]``.
        spectrum: by kind, singular values ``[L, H or Hq, n]``, largest first.
        entropy: ``[L, Hq]`` bits, averaged over queries.
        entropy_share: ``[L, Hq, B]``, entropy / the log2 of how many entries the query sees; of queries that see one
            entry only there is none.
        first, newest: ``[L, Hq]``; see `dmc.analysis.attention.Attended`.
    """

    tokens: int
    windows: int
    bins: Tensor
    entries: Tensor
    rank: dict[str, Tensor]
    stable: dict[str, Tensor]
    spectrum: dict[str, Tensor]
    entropy: Tensor
    entropy_share: Tensor
    first: Tensor
    newest: Tensor

    @property
    def cr(self) -> Tensor:
        """Learnt compression ratio ``[L, H]``: tokens / entries, the accumulating entry counted."""
        return self.tokens / self.entries.sum(-1)

    @property
    def entropy_overall(self) -> Tensor:
        """`entropy_share` averaged over the positions, ``[L, Hq]``."""
        return torch.nanmean(self.entropy_share, -1)


@torch.no_grad()
def measure(
    model: Decoder,
    policy: Policy,
    windows: Sequence[Sequence[int]],
    *,
    leading: int = 512,
    precision: str = "fp64",
    progress: Callable[[int], object] = lambda windows: None,
) -> tuple[Measures, Tensor]:
    """Runs a model over windows, each a text of its own.

    Args:
        model: on any device.
        policy: what it decides on merges is followed; that it evicts is not: attention is over all entries.
        windows: token ids, all of one length T.
        leading: attention's rank is that over so many first tokens of a window, or all if it has fewer.
        precision: "fp32" or "fp64", of the singular values.
        progress: called after each window with 1.

    Returns:
        The averages, and the merges of the first window, bool ``[L, H, T]``.

    Raises:
        ValueError: if windows differ in length, there is none, or a setting is out of range.
    """
    if not windows or len({len(window) for window in windows}) != 1:
        raise ValueError("windows must be token ids of one length, at least one window")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if leading < 2:
        raise ValueError(f"attention's rank needs at least 2 tokens, got {leading}")
    merges, measured = None, []
    for window in windows:
        layers = _window(model, policy, window, leading, PRECISIONS[precision])
        figures = {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}
        own = figures.pop("merges")
        merges = own if merges is None else merges
        measured.append(figures)
        progress(1)
    # What a window lacks, as the share of entropy where a head sees one entry only, is left out of its average.
    mean = {name: torch.stack([figures[name] for figures in measured]).nanmean(0) for name in measured[0]}
    by_kind = {name: {kind: mean.pop(f"{name} {kind}") for kind in KINDS} for name in ("rank", "stable", "spectrum")}
    tokens = len(windows[0])
    bins = torch.tensor([len(part) for part in torch.arange(tokens).tensor_split(min(_BINS, tokens))])
    return Measures(tokens, len(windows), bins, **by_kind, **mean), merges


def _window(model: Decoder, policy: Policy, window: Sequence[int], leading: int, precision: torch.dtype) -> list[dict]:
    tokens = torch.tensor(window, device=model.device)
    rope = model.rope(torch.arange(len(tokens), device=model.device))
    layers: list[dict] = []

    def through(
        _: int, query: Tensor, key: Tensor, value: Tensor, alpha: Tensor, omega: Tensor, late: Tensor | None = None
    ) -> Tensor:
        merges = policy.merges and policy.ring is not None  # behind the window
        decided = policy.decide(alpha, omega) if policy.ring is None else (torch.zeros_like(omega), torch.ones_like(omega))
        if merges:
            decided = _late(policy, alpha, omega, late)
        layer = states(query, key, value, *decided, rope, policy.ring if merges else None)
        attended = attend(layer, leading)
        visible = layer.visible.repeat_interleave(layer.query.shape[1], 0)
        share = torch.where(visible > 1, attended.entropy / visible.log2(), torch.nan)
        figures = {
            "merges": torch.cat([layer.merged.new_zeros(len(layer.merged), 1), layer.merged[:, :-1]], dim=-1),
            "entropy": attended.entropy.double().mean(-1),
            "first": attended.first,
            "newest": attended.newest,
            "entropy_share": _binned(share, torch.nanmean),
            **_ranks(layer, attended.leading, precision),
        }
        figures["entries"] = _binned((~figures["merges"]).double(), torch.sum)
        layers.append({name: tensor.cpu() for name, tensor in figures.items()})
        return attended.out.to(query.dtype)

    model.hidden(tokens, through)
    return layers


def _late(policy: Policy, logits: Tensor, omega: Tensor, late: Tensor | None) -> tuple[Tensor, Tensor]:
    """Alpha and omega ``[T, H]`` of tokens that have left the window after the last one, as the cache carries them out."""
    window, tokens = policy.ring, len(logits)
    left = max(0, tokens - window)
    if late is not None:
        logits = logits + torch.nn.functional.pad(late[window:], (0, 0, 0, tokens - left))
    alpha = (logits > 0).to(omega.dtype)
    alpha[: policy.sinks + 1] = 0
    if policy.max_entries is not None:
        alpha = torch.where((alpha == 0).cumsum(0) > policy.max_entries, 1.0, alpha)
    alpha[left:] = 0
    return alpha, policy.weigh(logits, omega).to(omega.dtype)


def _ranks(layer: States, leading: Tensor, precision: torch.dtype) -> dict[str, Tensor]:
    size = layer.keys.shape[-1]
    entries = [layer.entries(head) for head in range(len(layer.keys))]
    values = {kind: torch.stack([spectrum(own[part].to(precision), size) for own in entries]) for part, kind in enumerate(CACHED)}
    values["attention"] = torch.stack(
        [
            spectrum(matrix.to(precision), len(matrix))
            for matrix in _over_entries(layer, leading)  # one [S, N] at a time
        ]
    )
    figures = {}
    for kind, own in values.items():
        figures |= {
            f"rank {kind}": effective_rank(own).double(),
            f"stable {kind}": stable_rank(own),
            f"spectrum {kind}": own.double(),
        }
    return figures


def _over_entries(layer: States, leading: Tensor) -> Iterator[Tensor]:
    """Weights of each query head over the entries instead of their states: ``[Hq, S, S] → [S, N]`` one by one."""
    tokens, group = leading.shape[-1], layer.query.shape[1]
    for head, weight in enumerate(leading):
        opened = (~layer.merged[head // group, : tokens - 1]).long().cumsum(-1)
        entry = torch.cat([opened.new_zeros(1), opened])  # that each state is of
        yield weight.new_zeros(tokens, int(entry[-1]) + 1).index_add_(1, entry, weight)


def _binned(values: Tensor, reduce: Callable) -> Tensor:
    """Over bins of positions that are as even as can be: ``[..., T] → [..., B]``."""
    tokens = values.shape[-1]
    return torch.stack([reduce(part, dim=-1) for part in values.tensor_split(min(_BINS, tokens), dim=-1)], dim=-1)
