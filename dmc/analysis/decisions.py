"""Which tokens of a text a retrofitted model merges, or marks for eviction."""

from __future__ import annotations

import torch
from torch import Tensor

from dmc import functional as fn
from dmc import functional_dms as dms
from dmc.model import Decoder


def decisions(model: Decoder, tokens: Tensor) -> Tensor:
    """The hard decisions of every layer and head over one text.

    Args:
        model: a retrofitted Llama of the serving side.
        tokens: ``[T]`` int64.

    Returns:
        ``[L, H, T]`` fp32, 1 where token t merges into the accumulating entry of its head or, with DMS, is marked.
    """
    config = model.config
    made: list[Tensor] = []
    cos, sin = model.rope(torch.arange(len(tokens), device=model.device))

    def attend(
        _: int, query: Tensor, key: Tensor, value: Tensor, alpha: Tensor, omega: Tensor, late: Tensor | None = None
    ) -> Tensor:
        query, key, value, alpha, omega = (x.transpose(0, 1)[None] for x in (query, key, value, alpha, omega))
        if config.window is not None:
            alpha = behind_window(alpha[0], None if late is None else late.T, config.window, merges=config.method == "dmc")[None]
        made.append(fn.mask_starts(alpha, None)[0].float().cpu() if config.method == "dmc" else alpha[0].float().cpu())
        if config.method == "dms":
            return dms.attention(query, key, value, alpha, window=config.window, rope=(cos, sin))[0].transpose(0, 1)
        return fn.attention(query, key, value, alpha, omega, window=config.window, rope=(cos, sin))[0].transpose(0, 1)

    with torch.no_grad():
        model.hidden(tokens.to(model.device), attend)
    return torch.stack(made)


def behind_window(logits: Tensor, late: Tensor | None, window: int, *, merges: bool) -> Tensor:
    """What a model with a window decides about the tokens of one text, by the time that the text ends.

    Args:
        logits, late: ``[H, T]`` of `dmc.model.decoder.Attend`.
        window: w.
        merges: False for a model that evicts.

    Returns:
        ``[H, T]`` in the dtype of ``logits``, 1 where a token merges or is evicted; 0 for the tokens that have not left the
        window, and for the first one with ``merges`` or if decided late.
    """
    left = max(0, logits.shape[1] - window - merges)  # a token merges once the query window + 1 later has come
    whole = logits[:, :left] if late is None else logits[:, :left] + late[:, window : window + left]
    alpha = torch.nn.functional.pad((whole > 0).to(logits.dtype), (0, logits.shape[1] - left))
    if merges or late is not None:
        alpha[:, :1] = 0
    return alpha
