"""The training attention through PyTorch's FlexAttention: a twin to compare with, selectable by name.

On CUDA it is compiled at the first call of each shape (tens of seconds). On a CPU it runs uncompiled, with all scores
in memory, and has no backward pass.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention


def attend_flex(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, *, starts: Tensor | None = None,
    scale: float | None = None, window: int = 0,
) -> Tensor:
    """Arguments and result as in `dmc.kernels.attention.gpu.attend`.

    Raises:
        ValueError: if gradients are asked for on a device where FlexAttention has none.
    """
    needs_gradient = any(x is not None and x.requires_grad for x in (query, key, value, bias))
    if not query.is_cuda and torch.is_grad_enabled() and needs_gradient:
        raise ValueError(f"kernels=flex: FlexAttention has no backward pass on {query.device.type}; choose auto or sdpa")
    (batch, heads, rows), tokens = query.shape[:3], key.shape[2]
    groups, before = heads // key.shape[1], tokens - rows
    document = None if starts is None else starts.cumsum(1)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = j <= i + before
        return seen if document is None else seen & (document[b, i + before] == document[b, j])

    def biased(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(i + before - j <= window, score, score + bias[b, h // groups, j])

    mask = create_block_mask(visible, None if document is None else batch, None, rows, tokens, device=query.device)
    run = _compiled() if query.is_cuda else flex_attention
    return run(query, key, value, None if bias is None else biased, mask, scale, enable_gqa=True)


@functools.cache
def _compiled():  # noqa: ANN202
    return torch.compile(flex_attention, dynamic=False)
