"""Training attention of DMC (merging at once, and late) and of DMS, in memory linear in T.

`dmc.functional.attention` and `dmc.functional_dms.attention` are the reference implementations. `dmc.kernels.backend`
chooses:

    triton      the project's kernels: merge and rotation in one pass (`dmc.kernels.scan.merge`), and attention with a
                bias for each key, exempt band and document boundaries; late merging in the same softmax
                (`dmc.kernels.attention.gpu`)
    torch       PyTorch's fused causal attention, below; used on a CPU

Both methods use the same kernels: every key has a bias, and queries up to ``window`` tokens after the key are exempt from it.
In DMC the window is 0: only the query's own state is exempt. Two facts let an ordinary causal kernel compute this:

- the per-key bias is one more feature of the keys, multiplied by a constant feature of the queries;
- the exempt keys become one extra key in front (the **anchor**), whose score for query i equals the
  query's own score, or the logarithm of the summed exponentials of its band (`dmc.kernels.attention.band`), and whose value row
  carries a marker. Shifted so that query i sees the anchor and the keys j < i - window, the marker's share of the
  output is the weight of the exempt keys.

Late merging has two kinds of keys: the band of recent tokens, and merged states behind it. With PyTorch the anchor replaces
the band and the accumulating entry together (`late_attention`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dmc import functional as fn
from dmc import functional_dms as dms
from dmc.kernels.attention.band import band_attention
from dmc.kernels.attention.rotate import rotate
from dmc.kernels.attention.sdpa import _anchored, band_exempt, causal_attention, in_span, own_exempt
from dmc.kernels.backend import Backend, choose
from dmc.kernels.scan.merge import merge


def dmc_attention(
    query: Tensor, key: Tensor, value: Tensor, alpha: Tensor, omega: Tensor, *,
    rope: tuple[Tensor, Tensor], starts: Tensor | None = None, scale: float | None = None,
    log_keep: Tensor | None = None, spans: list[tuple[int, int]] | None = None, backend: str | None = None,
) -> Tensor:
    """`dmc.functional.attention` (same arguments and result), differentiable in every tensor argument.

    Merging is in fp32; the attention product is in the dtype of ``query``. In PyTorch, in bf16 and fp16, the
    bias and the diagonal's score are two features each, so that they keep 16 bits of mantissa.

    Args:
        spans: with context parallelism, the ``[first, stop)`` of the positions whose queries ``query`` holds, one
            after the other; all other arguments cover the whole sequence.
        backend: a name of `dmc.kernels.backend`, over the default.

    Raises:
        ValueError: if the backend cannot run on these tensors.
    """
    backend, spans = choose(query, backend), spans or [(0, key.shape[2])]
    if backend == "reference":
        return _reference(
            fn.attention, query, key, value, alpha, omega, spans, rope=rope, starts=starts, scale=scale, log_keep=log_keep
        )
    keys, values = merge(key, value, alpha, omega, rope=rope, starts=starts, backend=backend)
    bias = fn.key_bias(alpha, starts=starts, log_keep=log_keep)
    query = rotate(query, _tables_at(rope, spans), backend=backend)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _attend(backend, starts, spans, scale, query, keys.to(query.dtype), values.to(query.dtype), bias)


def dms_attention(
    query: Tensor, key: Tensor, value: Tensor, alpha: Tensor, *, window: int, rope: tuple[Tensor, Tensor],
    starts: Tensor | None = None, scale: float | None = None, log_keep: Tensor | None = None,
    spans: list[tuple[int, int]] | None = None, backend: str | None = None,
) -> Tensor:
    """`dmc.functional_dms.attention` (same arguments and result), differentiable in every tensor argument.

    Further arguments and errors as in `dmc_attention`. The band is in fp32, keys behind it are in the query's dtype.
    """
    backend, spans = choose(query, backend), spans or [(0, key.shape[2])]
    if backend == "reference":
        return _reference(
            dms.attention, query, key, value, alpha, spans, window=window, rope=rope, starts=starts, scale=scale,
            log_keep=log_keep,
        )
    bias = dms.key_bias(alpha, log_keep=log_keep)
    query, key = rotate(query, _tables_at(rope, spans), backend=backend), rotate(key, rope, backend=backend)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _attend(backend, starts, spans, scale, query, key, value.to(query.dtype), bias, window)


def late_attention(
    query: Tensor, key: Tensor, value: Tensor, alpha: Tensor, omega: Tensor, *, window: int,
    rope: tuple[Tensor, Tensor], starts: Tensor | None = None, scale: float | None = None, log_keep: Tensor | None = None,
    spans: list[tuple[int, int]] | None = None, backend: str | None = None,
) -> Tensor:
    """`dmc.functional.attention` with a window (same arguments and result), differentiable in every tensor argument.

    Merging is in fp32. In PyTorch the band and the accumulating entry are too; other matmuls of attention are in the
    query's dtype.

    Args:
        spans: see `dmc_attention`.
        backend: a name of `dmc.kernels.backend`, over the default.

    Raises:
        ValueError: if the backend cannot run on these tensors.
    """
    backend, spans = choose(query, backend), spans or [(0, key.shape[2])]
    if backend == "reference":
        return _reference(
            fn.attention, query, key, value, alpha, omega, spans, window=window, rope=rope, starts=starts, scale=scale,
            log_keep=log_keep,
        )
    keys, values = merge(key, value, alpha, omega, rope=rope, starts=starts, backend=backend)
    bias = fn.key_bias(alpha, starts=starts, log_keep=log_keep)
    query, key = rotate(query, _tables_at(rope, spans), backend=backend), rotate(key, rope, backend=backend)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    whole = (keys.to(query.dtype), values.to(query.dtype), bias, key.to(query.dtype), value.to(query.dtype))
    parts = []
    for (first, stop), rows in zip(spans, query.split([b - a for a, b in spans], dim=2), strict=True):
        seen = None if starts is None else starts[:, :stop]
        cut = [x[:, :, :stop] for x in whole]
        if backend == "triton":
            from dmc.kernels.attention.gpu import attend_late

            parts.append(attend_late(rows, *cut, window=window, starts=seen, scale=scale))
        else:
            parts.append(in_span(lambda *part: _late(*part, window, scale), seen, first, rows, *cut))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, *, rope: tuple[Tensor, Tensor], starts: Tensor | None = None,
    scale: float | None = None, spans: list[tuple[int, int]] | None = None, backend: str | None = None,
) -> Tensor:
    """Causal attention without compression, documents separate; arguments as in `dmc_attention`.

    Rows of one document each (``starts`` of None) use PyTorch's own kernel even if Triton was chosen.
    """
    backend, spans = choose(query, backend), spans or [(0, key.shape[2])]
    if backend == "reference":
        alpha = torch.zeros(key.shape[:3], device=key.device)
        return _reference(fn.attention, query, key, value, alpha, alpha + 1, spans, rope=rope, starts=starts, scale=scale)
    query, key = rotate(query, _tables_at(rope, spans), backend=backend), rotate(key, rope, backend=backend)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    backend = Backend.TORCH if starts is None and backend == "triton" else backend
    return _attend(backend, starts, spans, scale, query, key, value, None)


def _reference(attend: Callable[..., Tensor], query: Tensor, key: Tensor, *rest: Tensor, **options) -> Tensor:  # noqa: ANN003
    """A reference implementation at all positions, cut to those of the spans, which are the last of ``rest``."""
    *rest, spans = rest
    at = torch.cat([torch.arange(a, b, device=query.device) for a, b in spans])
    whole = query.new_zeros(*query.shape[:2], key.shape[2], query.shape[3]).index_copy(2, at, query)
    return attend(whole, key, *rest, **options)[:, :, at]


def _attend(
    backend: str, starts: Tensor | None, spans: list[tuple[int, int]], scale: float, query: Tensor, key: Tensor,
    value: Tensor, bias: Tensor | None, window: int = 0,
) -> Tensor:
    """Attention span by span; everything is merged and rotated. The newest ``window`` keys before a query and
    its own are exempt from the bias."""
    parts = []
    for (first, stop), rows in zip(spans, query.split([b - a for a, b in spans], dim=2), strict=True):
        seen = None if starts is None else starts[:, :stop]
        keys = [None if x is None else x[:, :, :stop] for x in (key, value, bias)]
        if backend == "triton":
            from dmc.kernels.attention.gpu import attend

            parts.append(attend(rows, *keys, starts=seen, scale=scale, window=window))
        elif bias is None:
            parts.append(in_span(lambda *part: causal_attention(*part, scale=scale), seen, first, rows, *keys[:2]))
        elif window:
            parts.append(in_span(lambda *part: band_exempt(*part, window, scale), seen, first, rows, *keys))
        else:
            parts.append(in_span(lambda *part: own_exempt(*part, scale), seen, first, rows, *keys))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _tables_at(rope: tuple[Tensor, Tensor], spans: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """The rows of the rotary tables at the positions of ``spans``."""
    cos, sin = (torch.cat([table[a:b] for a, b in spans]) for table in rope)
    return cos, sin


def _late(
    query: Tensor, merged_key: Tensor, merged_value: Tensor, bias: Tensor, key: Tensor, value: Tensor, window: int,
    scale: float,
) -> Tensor:
    """The last R queries of a document: query ``[B, Hq, R, D]``, the others ``[B, H, T, D]``, all rotated."""
    heads, tokens, rows = key.shape[1], key.shape[2], query.shape[2]
    behind = tokens - window - 1  # states that the last query sees, its accumulating entry included
    if behind <= 0:
        return causal_attention(query, key, value, scale=scale)
    near = max(0, rows - behind)  # queries that see only their band
    out, lse = band_attention(query, key, value, window=window, scale=scale)
    (alone, out), (_, lse) = (x.split([near, rows - near], dim=2) for x in (out, lse))
    far = query[:, :, near:]
    entries = slice(behind - rows + near, behind)  # the accumulating entry of each
    grouped = far.unflatten(1, (heads, -1)).to(lse.dtype)
    score = ((grouped * merged_key[:, :, None, entries]).sum(-1) * scale).flatten(1, 2)
    both = torch.logaddexp(lse, score)
    past, share = far.new_zeros(1, dtype=lse.dtype), 1.0
    if behind > 1:
        final = slice(0, behind - 1)
        past, share = _anchored(
            far, merged_key[:, :, final], merged_value[:, :, final], bias[:, :, final], both / scale, scale,
        )
        past, share = past.to(lse.dtype), share[..., 0].to(lse.dtype)
    # Weights are scaled instead of values, since a pass over the values costs D times a pass over the weights.
    band, accumulating = ((share * (x - both).exp())[..., None].unflatten(1, (heads, -1)) for x in (lse, score))
    joined = torch.addcmul(past, band.flatten(1, 2), out).unflatten(1, (heads, -1))
    joined = torch.addcmul(joined, accumulating, merged_value[:, :, None, entries].to(lse.dtype)).flatten(1, 2)
    return torch.cat([alone, joined], dim=2).to(query.dtype) if near else joined.to(query.dtype)
