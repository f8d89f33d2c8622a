"""Training attention of DMC through PyTorch's fused causal attention, in memory linear in T.

`dmc.functional.attention` is the naive twin. Two facts let an ordinary causal kernel compute it:

- the per-key bias is one more feature of the keys, met by a constant feature of the queries;
- the exempt diagonal becomes an extra key in front (the **anchor**), whose score for query i is made to be
  the query's own score and whose value row carries a marker. Shifted by that one key, the causal mask lets
  query i see the anchor and the states j < i, and the marker's share of the output is the weight of the
  query's own state.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dmc import functional as fn


def dmc_attention(
    query: Tensor, key: Tensor, value: Tensor, alpha: Tensor, omega: Tensor, *,
    rope: tuple[Tensor, Tensor], starts: Tensor | None = None, scale: float | None = None,
    log_keep: Tensor | None = None,
) -> Tensor:
    """`dmc.functional.attention` (same arguments and result), differentiable in every tensor argument.

    Merging is in fp32; the attention product is in the dtype of ``query``. In bf16 and fp16 the bias and the
    diagonal's score travel as two features each, so that they keep 16 bits of mantissa.
    """
    size = query.shape[-1]
    merged, _ = fn.accumulate(torch.cat([key.float(), value.float()], dim=-1), alpha, omega, starts=starts)
    query = fn.rotate(query.float(), rope).to(query.dtype)
    key = fn.rotate(merged[..., :size], rope).to(query.dtype)
    value = merged[..., size:].to(query.dtype)
    bias = fn.key_bias(alpha, starts=starts, log_keep=log_keep)
    scale = size**-0.5 if scale is None else scale
    return _by_document(lambda *part: _anchored(*part, scale=scale), starts, query, key, value, bias)


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, *, rope: tuple[Tensor, Tensor], starts: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal attention without compression, documents apart; shapes as in `dmc.functional.attention`."""
    query, key = (fn.rotate(x.float(), rope).to(x.dtype) for x in (query, key))
    return _by_document(
        lambda *part: F.scaled_dot_product_attention(*part, is_causal=True, scale=scale, enable_gqa=True),
        starts, query, key, value,
    )


def _anchored(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, *, scale: float) -> Tensor:
    heads, size = key.shape[1], key.shape[-1]
    grouped = query.unflatten(1, (heads, -1))
    own = (grouped * key[:, :, None]).sum(-1, dtype=torch.float32).flatten(1, 2)  # [B, Hq, T], unscaled
    own, bias = _split(own, query.dtype), _split(bias / scale, query.dtype)
    extra = 2 * bias.shape[-1]  # features added; the kernels of GPUs want a multiple of 8
    pad = -(size + extra) % 8 if query.is_cuda else 0
    queries = F.pad(torch.cat([query, torch.ones_like(own), own], dim=-1), (0, pad))
    anchor = torch.cat([key.new_zeros(size + bias.shape[-1]), key.new_ones(bias.shape[-1]), key.new_zeros(pad)])
    keys = F.pad(torch.cat([key, bias], dim=-1), (0, bias.shape[-1] + pad))
    keys = torch.cat([anchor.expand(*keys.shape[:2], 1, -1), keys[..., :-1, :]], dim=-2)
    marker = F.pad(value.new_ones(1), (size, extra - 1 + pad))
    values = F.pad(value, (0, extra + pad))
    values = torch.cat([marker.expand(*values.shape[:2], 1, -1), values[..., :-1, :]], dim=-2)
    out = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale, enable_gqa=True)
    share = out[..., size : size + 1].unflatten(1, (heads, -1))
    return out[..., :size] + (share * value[:, :, None]).flatten(1, 2)


def _split(x: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 ``[...]`` → ``[..., parts]`` in ``dtype`` whose sum is x: one part in fp32, two below."""
    if dtype == torch.float32:
        return x[..., None]
    high = x.to(dtype)
    low = (x - high.float()).nan_to_num(0.0, 0.0, 0.0).to(dtype)  # -inf - -inf: nothing is left over
    return torch.stack([high, low], dim=-1)


def _by_document(attend, starts: Tensor | None, *tensors: Tensor) -> Tensor:
    """Run ``attend`` on whole rows at once where a row is one document, and document by document elsewhere."""
    if starts is None or not bool(starts[:, 1:].any()):
        return attend(*tensors)
    borders = starts[:, 1:].any(-1)
    rows: list[Tensor | None] = [None] * len(borders)
    whole = (~borders).nonzero().flatten()
    if len(whole):
        for row, out in zip(whole.tolist(), attend(*(t[whole] for t in tensors)).split(1), strict=True):
            rows[row] = out
    for row in borders.nonzero().flatten().tolist():
        edges = [0, *(starts[row, 1:].nonzero().flatten() + 1).tolist(), starts.shape[1]]
        parts = [
            attend(*(t[row : row + 1, :, a:b] for t in tensors)) for a, b in zip(edges[:-1], edges[1:], strict=True)
        ]
        rows[row] = torch.cat(parts, dim=2)
    return torch.cat(rows)
