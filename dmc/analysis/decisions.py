"""Which tokens of a text a retrofitted model merges, or marks for eviction."""

from __future__ import annotations

import torch
from torch import Tensor

from dmc import functional as fn
from dmc import functional_dms as dms
from dmc.model import Llama


def decisions(model: Llama, tokens: Tensor) -> Tensor:
    """The hard decisions of every layer and head over one text.

    Args:
        model: a retrofitted Llama of the serving side.
        tokens: ``[T]`` int64.

    Returns:
        ``[L, H, T]`` fp32, 1 where token t merges into the open entry of its head or, with DMS, is marked.
    """
    window = model.config.window if model.config.method == "dms" else None
    made: list[Tensor] = []
    cos, sin = model.rope(torch.arange(len(tokens), device=model.device))

    def attend(_: int, query: Tensor, key: Tensor, value: Tensor, alpha: Tensor, omega: Tensor) -> Tensor:
        query, key, value, alpha, omega = (x.transpose(0, 1)[None] for x in (query, key, value, alpha, omega))
        if window is not None:
            made.append(alpha[0].float().cpu())
            return dms.attention(query, key, value, alpha, window=window, rope=(cos, sin))[0].transpose(0, 1)
        made.append(fn.mask_starts(alpha, None)[0].float().cpu())
        return fn.attention(query, key, value, alpha, omega, rope=(cos, sin))[0].transpose(0, 1)

    with torch.no_grad():
        model.hidden(tokens.to(model.device), attend)
    return torch.stack(made)
