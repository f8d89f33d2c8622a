"""Attention weights of one layer over a window, a chunk of queries at a time, and what they say of its heads.

Under DMC a query sees the entries that are closed, and its own intermediate state: ``[T, T]`` weights over states, in
which those that were merged on are zero. Without merges this is causal attention. Behind a window (late merging) a query sees
the newest tokens as they are, the entries of the tokens before them, and of these the accumulating one; the weights on a
token and on the state of the same position are then added up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dmc.functional import accumulate, rotate

_SCORES = 1 << 22  # held at once, over all heads
FIRST, NEWEST = 4, 32  # positions that count as the text's first, and as a query's newest


@dataclass(frozen=True)
class States:
    """One layer over a window of T tokens, in fp32 at least.

    Attributes:
        query: ``[H, G, T, D]``, rotated and scaled.
        before, keys, values: ``[H, T, D]``, the intermediate states; keys before RoPE and after.
        merged: bool ``[H, T]``: the next token was merged into state t, which only its own query sees.
        window: tokens before its own that each query sees as they are; None: merged at once.
        recent: with a window, keys after RoPE and values of the tokens as they are, ``[H, T, D]``.
    """

    query: Tensor
    before: Tensor
    keys: Tensor
    values: Tensor
    merged: Tensor
    window: int | None = None
    recent: tuple[Tensor, Tensor] | None = None

    def entries(self, head: int) -> tuple[Tensor, Tensor, Tensor]:
        """What a cache of one head holds after the window: keys before RoPE, keys, values, each ``[N, D]``."""
        there = ~self.merged[head]
        return self.before[head, there], self.keys[head, there], self.values[head, there]

    @property
    def visible(self) -> Tensor:
        """How many entries each query sees: int64 ``[H, T]``."""
        closed = (~self.merged).long()
        seen = closed.cumsum(-1) - closed + 1
        if self.window is None:
            return seen
        tokens = seen.shape[-1]
        ages = torch.arange(tokens, device=seen.device)
        behind = torch.nn.functional.pad(seen, (self.window + 1, 0))[:, :tokens]  # of the newest state that it sees
        return behind + ages.clamp(max=self.window) + 1


def states(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor,
    omega: Tensor,
    rope: tuple[Tensor, Tensor],
    window: int | None = None,
) -> States:
    """From what a layer of `dmc.model.Llama` attends with, for one text from its first token on.

    Args:
        query: ``[T, Hq, D]``, key, value ``[T, H, D]``, not rotated.
        alpha, omega: ``[T, H]``, hard decisions; the first token's is taken as 0.
        rope: (cos, sin), each ``[T, D]``.
        window: see `States`; tokens that have not left it have alpha 0.
    """
    query, key, value = (x.transpose(0, 1).to(_work(x)) for x in (query, key, value))
    alpha, omega = alpha.T.clone(), omega.T
    alpha[:, 0] = 0
    recent = None if window is None else (rotate(key, rope), value)
    merged = torch.cat([alpha[:, 1:] != 0, alpha.new_zeros(len(alpha), 1, dtype=torch.bool)], dim=-1)
    if merged.any():
        both, _ = accumulate(torch.cat([key, value], dim=-1)[None], alpha[None], omega[None])
        key, value = both[0].to(key.dtype).chunk(2, dim=-1)
    queries = rotate(query, rope).unflatten(0, (len(key), -1)) * query.shape[-1] ** -0.5
    return States(queries, key, rotate(key, rope), value, merged, window, recent)


def weights(layer: States) -> Iterator[tuple[int, Tensor]]:
    """Softmax weights of successive queries: ``(first query, [H, G, t, T])``; t is so small that memory stays bounded.

    With a window ``[H, G, t, 2 T]``: those on states, then those on tokens as they are.
    """
    heads, group, tokens, _ = layer.query.shape
    step, window = max(1, _SCORES // (heads * group * tokens)), layer.window
    place = torch.arange(tokens, device=layer.query.device)
    for start in range(0, tokens, step):
        query = layer.query[:, :, start : start + step]
        own = place[start : start + step, None]
        newest = own if window is None else own - window - 1  # state that a query sees while it may still change
        seen, keys = (place == newest) | ((place < newest) & ~layer.merged[:, None]), layer.keys  # [H, t, T]
        if window is not None:
            recent = ((place <= own) & (place >= own - window)).expand_as(seen)
            seen, keys = torch.cat([seen, recent], -1), torch.cat([keys, layer.recent[0]], 1)
        scores = query @ keys[:, None].transpose(-1, -2)
        yield start, scores.masked_fill_(~seen[:, None], -torch.inf).softmax(-1)


@dataclass(frozen=True)
class Attended:
    """What the weights of a layer say, and its output.

    Attributes:
        out: ``[T, Hq, D]``.
        entropy: ``[Hq, T]``, bits, of each query's weights.
        first, newest: ``[Hq]``, share of the weights on the first `FIRST` positions and on the query's `NEWEST` ones,
            averaged over the queries at which the two are apart; NaN if there is none.
        leading: ``[Hq, S, S]``, the weights of the first S queries, which is the whole attention matrix of a text
            that ends there.
    """

    out: Tensor
    entropy: Tensor
    first: Tensor
    newest: Tensor
    leading: Tensor


def attend(layer: States, leading: int) -> Attended:
    """Goes through the weights of a layer once; S is ``leading``, or T if that is less."""
    heads, group, tokens, size = layer.query.shape
    leading = min(leading, tokens)
    fresh = layer.query.new_zeros
    out, entropy = fresh(heads, group, tokens, size), fresh(heads, group, tokens)
    block, shares = fresh(heads, group, leading, leading), fresh(2, heads, group)
    apart = range(FIRST + NEWEST - 1, tokens)
    values = layer.values if layer.window is None else torch.cat([layer.values, layer.recent[1]], 1)
    for start, weight in weights(layer):
        stop = start + weight.shape[2]
        out[:, :, start:stop] = weight @ values[:, None]
        entropy[:, :, start:stop] = torch.special.entr(weight).sum(-1) / torch.log(torch.tensor(2.0))
        if layer.window is not None:
            weight = weight.unflatten(-1, (2, tokens)).sum(-2)
        if start < leading:
            block[:, :, start:stop] = weight[:, :, : leading - start, :leading]
        counted = weight[:, :, max(0, apart.start - start) :]
        query = torch.arange(stop - counted.shape[2], stop, device=weight.device)
        newest = torch.arange(tokens, device=weight.device) > query[:, None] - NEWEST
        shares[0] += counted[..., :FIRST].sum((-1, -2))
        shares[1] += (counted * newest).sum((-1, -2))
    first, newest = (shares / len(apart) if len(apart) else shares + torch.nan).flatten(1)
    return Attended(out.flatten(0, 1).transpose(0, 1), entropy.flatten(0, 1), first, newest, block.flatten(0, 1))


def _work(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
