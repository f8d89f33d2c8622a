"""Training attention of DMC (merging at once, and late) and of DMS, in memory linear in T.

`dmc.functional.attention` and `dmc.functional_dms.attention` are the naive twins ("reference"). `dmc.kernels.backend`
says which of these runs:

    triton      the project's kernels: merge and rotation in one pass (`dmc.kernels.scan`), and attention with a
                bias for each key, exempt band and borders of documents (`dmc.kernels.attention_triton`)
    sdpa        PyTorch's fused causal attention, below: what runs on a CPU
    flash       the same through the package flash-attn, where it is installed and asked for
    flex        PyTorch's FlexAttention (`dmc.kernels.flex`), for comparison

To these kernels the two methods are one: every key has a bias, which queries up to ``window`` tokens after it are exempt
from. In DMC the window is 0: the query's own state alone. Two facts let an ordinary causal kernel (sdpa) compute it:

- the per-key bias is one more feature of the keys, met by a constant feature of the queries;
- what is exempt becomes an extra key in front (the **anchor**), whose score for query i is made to be the
  query's own score, or the logarithm of the summed exponentials of its band (`dmc.kernels.band`), and whose value row
  carries a marker. Shifted so that query i sees the anchor and the keys j < i - window, the marker's share of the
  output is the weight of what is exempt.

Late merging has two kinds of keys: the band of recent tokens, and merged states behind it. There the anchor stands for the
band and the accumulating entry together (`late_attention`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from dmc import functional as fn
from dmc import functional_dms as dms
from dmc.kernels.backend import choose
from dmc.kernels.band import band_attention
from dmc.kernels.rope import rotate
from dmc.kernels.scan import merge


def dmc_attention(
    query: Tensor, key: Tensor, value: Tensor, alpha: Tensor, omega: Tensor, *,
    rope: tuple[Tensor, Tensor], starts: Tensor | None = None, scale: float | None = None,
    log_keep: Tensor | None = None, spans: list[tuple[int, int]] | None = None, backend: str | None = None,
) -> Tensor:
    """`dmc.functional.attention` (same arguments and result), differentiable in every tensor argument.

    Merging is in fp32; the attention product is in the dtype of ``query``. In sdpa's form, in bf16 and fp16, the
    bias and the diagonal's score travel as two features each, so that they keep 16 bits of mantissa.

    Args:
        spans: where only some positions are asked (context parallelism): the ``[first, stop)`` of the positions
            whose queries ``query`` holds, one after the other; all other arguments stay whole.
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

    Args and errors beyond its own as in `dmc_attention`. The band is in fp32, what lies behind it in the query's dtype.
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

    Merging, the band and the accumulating entry are in fp32; attention over final entries is in the query's dtype.

    Args:
        spans: see `dmc_attention`.
        backend: a name of `dmc.kernels.backend`, over the default.

    Raises:
        ValueError: if the backend cannot run on these tensors, or has no kernels for late merging.
    """
    backend, spans = choose(query, backend), spans or [(0, key.shape[2])]
    if backend == "reference":
        return _reference(
            fn.attention, query, key, value, alpha, omega, spans, window=window, rope=rope, starts=starts, scale=scale,
            log_keep=log_keep,
        )
    if backend != "sdpa":
        raise ValueError(f"run.kernels={backend} has no kernels for late merging (dmc.window): choose sdpa or auto")
    keys, values = merge(key, value, alpha, omega, rope=rope, starts=starts, backend=backend)
    bias = fn.key_bias(alpha, starts=starts, log_keep=log_keep)
    query, key = rotate(query, _tables_at(rope, spans), backend=backend), rotate(key, rope, backend=backend)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    whole = (key.to(query.dtype), value.to(query.dtype), keys.to(query.dtype), values.to(query.dtype), bias)
    parts = []
    for (first, stop), rows in zip(spans, query.split([b - a for a, b in spans], dim=2), strict=True):
        seen = None if starts is None else starts[:, :stop]
        cut = [x[:, :, :stop] for x in whole]
        parts.append(_in_span(lambda *part: _late(*part, window, scale), seen, first, rows, *cut))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, *, rope: tuple[Tensor, Tensor], starts: Tensor | None = None,
    scale: float | None = None, spans: list[tuple[int, int]] | None = None, backend: str | None = None,
) -> Tensor:
    """Causal attention without compression, documents apart; arguments as in `dmc_attention`.

    Rows of one document each (``starts`` of None) go to PyTorch's own kernel also where Triton was chosen.
    """
    backend, spans = choose(query, backend), spans or [(0, key.shape[2])]
    if backend == "reference":
        alpha = torch.zeros(key.shape[:3], device=key.device)
        return _reference(fn.attention, query, key, value, alpha, alpha + 1, spans, rope=rope, starts=starts, scale=scale)
    query, key = rotate(query, _tables_at(rope, spans), backend=backend), rotate(key, rope, backend=backend)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _attend("sdpa" if starts is None and backend == "triton" else backend, starts, spans, scale, query, key, value, None)


def _reference(attend: Callable[..., Tensor], query: Tensor, key: Tensor, *rest: Tensor, **options) -> Tensor:  # noqa: ANN003
    """A naive twin, asked for all positions and cut to those of the spans, the last of ``rest``."""
    *rest, spans = rest
    at = torch.cat([torch.arange(a, b, device=query.device) for a, b in spans])
    whole = query.new_zeros(*query.shape[:2], key.shape[2], query.shape[3]).index_copy(2, at, query)
    return attend(whole, key, *rest, **options)[:, :, at]


def _attend(
    backend: str, starts: Tensor | None, spans: list[tuple[int, int]], scale: float, query: Tensor, key: Tensor,
    value: Tensor, bias: Tensor | None, window: int = 0,
) -> Tensor:
    """The attention product, span by span; everything merged and rotated. The newest ``window`` keys before a query and
    its own are exempt from the bias."""
    parts, causal = [], _flash if backend == "flash" else _causal
    for (first, stop), rows in zip(spans, query.split([b - a for a, b in spans], dim=2), strict=True):
        seen = None if starts is None else starts[:, :stop]
        keys = [None if x is None else x[:, :, :stop] for x in (key, value, bias)]
        if backend == "triton":
            from dmc.kernels.attention_triton import attend

            parts.append(attend(rows, *keys, starts=seen, scale=scale, window=window))
        elif backend == "flex":
            from dmc.kernels.flex import attend_flex

            parts.append(attend_flex(rows, *keys, starts=seen, scale=scale, window=window))
        elif bias is None:
            parts.append(_in_span(lambda *part: causal(*part, scale=scale), seen, first, rows, *keys[:2]))
        elif window:
            parts.append(_in_span(lambda *part: _band_exempt(*part, causal, window, scale), seen, first, rows, *keys))
        else:
            parts.append(_in_span(lambda *part: _own_exempt(*part, causal, scale), seen, first, rows, *keys))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _tables_at(rope: tuple[Tensor, Tensor], spans: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """The rows of the rotary tables at the positions of ``spans``."""
    cos, sin = (torch.cat([table[a:b] for a, b in spans]) for table in rope)
    return cos, sin


def _causal(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """Causal attention of the last queries of a sequence: query m of n sees keys up to m + (keys - n)."""
    if query.shape[2] == key.shape[2]:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    # Not every fused kernel behind the shifted mask knows grouped queries: here the keys are repeated.
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    mask = causal_lower_right(query.shape[2], key.shape[2])
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def _flash(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """`_causal` through flash-attn, whose causal mask is aligned to the last key and which knows grouped queries."""
    from flash_attn import flash_attn_func

    rows = (x.transpose(1, 2) for x in (query, key, value))
    return flash_attn_func(*rows, softmax_scale=scale, causal=True).transpose(1, 2)


def _own_exempt(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, causal: Callable[..., Tensor], scale: float,
) -> Tensor:
    """The last queries of a sequence over all earlier keys with their bias, and over their own without."""
    heads, rows = key.shape[1], query.shape[2]
    grouped = query.unflatten(1, (heads, -1))
    own = (grouped * key[:, :, None, -rows:]).sum(-1, dtype=torch.float32).flatten(1, 2)  # [B, Hq, rows], unscaled
    out, share = _anchored(query, key[..., :-1, :], value[..., :-1, :], bias[..., :-1], own, causal, scale)
    return out + (share.unflatten(1, (heads, -1)) * value[:, :, None, -rows:]).flatten(1, 2)


def _band_exempt(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, causal: Callable[..., Tensor], window: int, scale: float,
) -> Tensor:
    """As `_own_exempt`, with the ``window`` keys before a query's own exempt as well."""
    rows, behind = query.shape[2], key.shape[2] - window - 1  # keys that the last query sees with a bias
    if behind <= 0:
        return causal(query, key, value, scale=scale)
    out, lse = band_attention(query, key, value, window=window, scale=scale)
    out = out.to(query.dtype)
    near = max(0, rows - behind - 1)  # queries that see nothing but their band; one more is left, whose anchor is all it sees
    past = [x[:, :, :behind] for x in (key, value, bias)]
    far, share = _anchored(query[:, :, near:], *past, lse[:, :, near:] / scale, causal, scale)
    joined = far + share * out[:, :, near:]
    return torch.cat([out[:, :, :near], joined], dim=2) if near else joined


def _late(
    query: Tensor, key: Tensor, value: Tensor, merged_key: Tensor, merged_value: Tensor, bias: Tensor, window: int,
    scale: float,
) -> Tensor:
    """The last R queries of a document: query ``[B, Hq, R, D]``, the others ``[B, H, T, D]``, all rotated."""
    heads, tokens, rows = key.shape[1], key.shape[2], query.shape[2]
    behind = tokens - window - 1  # states that the last query sees, its accumulating entry included
    if behind <= 0:
        return _causal(query, key, value, scale=scale)
    near = max(0, rows - behind)  # queries that see nothing but their band
    out, lse = band_attention(query, key, value, window=window, scale=scale)
    far = query[:, :, near:]
    count = far.shape[2]
    entries = slice(behind - count, behind)  # the accumulating entry of each
    grouped = far.unflatten(1, (heads, -1)).to(lse.dtype)
    score = ((grouped * merged_key[:, :, None, entries]).sum(-1) * scale).flatten(1, 2)
    both = torch.logaddexp(lse[:, :, near:], score)
    weight = (score - both).exp().unflatten(1, (heads, -1))[..., None]
    joined = out[:, :, near:] * (lse[:, :, near:] - both).exp()[..., None]
    joined = (joined + (weight * merged_value[:, :, None, entries]).flatten(1, 2)).to(query.dtype)
    if behind > 1:
        final = slice(0, behind - 1)
        past, share = _anchored(
            far, merged_key[:, :, final], merged_value[:, :, final], bias[:, :, final], both / scale, _causal, scale,
        )
        joined = past + share * joined
    return torch.cat([out[:, :, :near].to(query.dtype), joined], dim=2) if near else joined


def _anchored(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, own: Tensor, causal: Callable[..., Tensor], scale: float,
) -> tuple[Tensor, Tensor]:
    """Queries ``[B, Hq, R, D]`` over N biased keys, of which the last one sees all, each one less than the next, and
    over an anchor of score ``own [B, Hq, R]`` (before scaling) → (the keys' part of the output, the anchor's weight
    ``[B, Hq, R, 1]``)."""
    size = key.shape[-1]
    own, bias = _split(own, query.dtype), _split(bias / scale, query.dtype)
    extra = 2 * bias.shape[-1]  # features added; the kernels of GPUs want a multiple of 8
    pad = -(size + extra) % 8 if query.is_cuda else 0
    queries = F.pad(torch.cat([query, torch.ones_like(own), own], dim=-1), (0, pad))
    anchor = torch.cat([key.new_zeros(size + bias.shape[-1]), key.new_ones(bias.shape[-1]), key.new_zeros(pad)])
    keys = F.pad(torch.cat([key, bias], dim=-1), (0, bias.shape[-1] + pad))
    keys = torch.cat([anchor.expand(*keys.shape[:2], 1, -1), keys], dim=-2)
    marker = F.pad(value.new_ones(1), (size, extra - 1 + pad))
    values = torch.cat([marker.expand(*value.shape[:2], 1, -1), F.pad(value, (0, extra + pad))], dim=-2)
    out = causal(queries, keys, values, scale=scale)
    return out[..., :size], out[..., size : size + 1]


def _split(x: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 ``[...]`` → ``[..., parts]`` in ``dtype`` whose sum is x: one part in fp32, two below."""
    if dtype == torch.float32:
        return x[..., None]
    high = x.to(dtype)
    low = (x - high.float()).nan_to_num(0.0, 0.0, 0.0).to(dtype)  # -inf - -inf: nothing is left over
    return torch.stack([high, low], dim=-1)


def _in_span(attend, starts: Tensor | None, first: int, query: Tensor, *keys: Tensor) -> Tensor:
    """Run ``attend`` on whole rows at once where a row is one document, and document by document elsewhere.

    ``query`` holds the positions from ``first`` to the end of ``keys`` and ``starts``.
    """
    if starts is None or not bool(starts[:, 1:].any()):
        return attend(query, *keys)
    borders = starts[:, 1:].any(-1)
    rows: list[Tensor | None] = [None] * len(borders)
    whole = (~borders).nonzero().flatten()
    if len(whole):
        for row, out in zip(whole.tolist(), attend(*(t[whole] for t in (query, *keys))).split(1), strict=True):
            rows[row] = out
    for row in borders.nonzero().flatten().tolist():
        edges = [0, *(starts[row, 1:].nonzero().flatten() + 1).tolist(), starts.shape[1]]
        parts = [
            attend(query[row : row + 1, :, max(0, a - first) : b - first], *(t[row : row + 1, :, a:b] for t in keys))
            for a, b in zip(edges[:-1], edges[1:], strict=True) if b > first
        ]
        rows[row] = torch.cat(parts, dim=2)
    return torch.cat(rows)
