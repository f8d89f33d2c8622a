"""A page that shows which tokens of a text share an entry of the cache, per layer and key/value head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from dmc.analysis.markup import render


def segments_html(tokens: Sequence[str], alpha: Tensor, out_html: str | Path) -> None:
    """Write a self-contained page (no network): the text with its entries coloured, layer and head to choose.

    Spaces, tabs and line ends are marked; an entry's tooltip gives its index and number of tokens.

    Args:
        tokens: the text's tokens as they read (decoded), T of them.
        alpha: hard decisions `[L, H, T]`, 1 where the token merges into the entry before it; the first token's is
            taken as 0.
        out_html: file to write.

    Raises:
        ValueError: if there is no token, or alpha has another shape or a value that is neither 0 nor 1.
    """
    if not tokens or alpha.dim() != 3 or alpha.shape[-1] != len(tokens) or not alpha.numel():
        raise ValueError(f"alpha must be [L, H, {len(tokens)}] for {len(tokens)} tokens, got {tuple(alpha.shape)}")
    if not ((alpha == 0) | (alpha == 1)).all():
        raise ValueError("alpha must be 0 or 1: round the decisions first")
    merges = ["".join(map(str, row)) for row in alpha.long().flatten(0, 1).tolist()]
    heads = alpha.shape[1]
    data = {"tokens": list(tokens), "merges": [merges[i : i + heads] for i in range(0, len(merges), heads)]}
    Path(out_html).write_text(render("segments.html", data=data), encoding="utf-8")
