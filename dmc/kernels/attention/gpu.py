"""Training attention in Triton: causal, a bias for each key, keys exempt from it, documents separate.

    score(i, j) = scale <q_i, k_j> + (bias_j if j < i - window else 0)        for first_i <= j <= i, else -inf

In late merging the softmax covers two sets of keys: those above for j < i - window, the last of them without its bias, and the
recent keys j >= i - window as they are.

Keys and values are those of the key/value heads; a query head reads its group's, without copies. No tensor of size
T x T is stored: the forward pass keeps the logarithm of each softmax's sum, from which the backward pass recomputes
the weights, once for the queries' gradient and once for that of keys, values and bias. The bias's gradient is the
sum over later queries of the scores' gradient and costs a row sum of a tile that is computed anyway. Blocks of keys
before the first document of a block of queries are skipped.

Queries may be those of the last R of the T tokens. Arithmetic is in fp32, exponentials have base 2; the operands of matmuls
have the dtype of the query, as in flash attention.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from dmc.kernels.attention.backward_gpu import backward_keys, backward_queries, delta_rows
from dmc.kernels.attention.forward_gpu import forward
from dmc.kernels.backend import in_reach, interpreted


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, *, starts: Tensor | None = None,
    scale: float | None = None, window: int = 0,
) -> Tensor:
    """Attention with a bias for each key; differentiable in query, key, value and bias.

    Args:
        query: ``[B, Hq, M, D]``, rotated, of the last M of the T tokens; Hq a multiple of H; bf16, fp16 or fp32; D up
            to 128.
        key, value: ``[B, H, T, D]`` in the dtype of ``query``, key rotated.
        bias: ``[B, H, T]`` fp32, added to the scores of a key with queries more than ``window`` tokens later; -inf is
            allowed. None: 0.
        starts: ``[B, T]`` bool, first tokens of documents.
        scale: of the scores, ``1 / sqrt(D)`` if None.
        window: 0: a query's own key alone is exempt (DMC). A kernel is compiled for each window.

    Returns:
        ``[B, Hq, M, D]`` in the dtype of ``query``.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _Attention.apply(query, key, value, bias, None, None, *_boundaries(starts), scale, window)


def attend_late(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, recent_key: Tensor, recent_value: Tensor, *, window: int,
    starts: Tensor | None = None, scale: float | None = None,
) -> Tensor:
    """Attention of late merging; differentiable in every tensor argument.

    Query i sees the recent keys i - window .. i, key i - window - 1 without its bias, and all earlier keys with it.

    Args:
        key, value, bias: the states of merging: ``[B, H, T, D]`` twice and ``[B, H, T]``, as in `attend`.
        recent_key, recent_value: the tokens as they are, ``[B, H, T, D]`` in the dtype of ``query``, keys rotated.
        window: at least 0. A kernel is compiled for each.

    Returns:
        ``[B, Hq, M, D]`` in the dtype of ``query``. The other arguments are those of `attend`.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _Attention.apply(query, key, value, bias, recent_key, recent_value, *_boundaries(starts), scale, window)


def _boundaries(starts: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """For each token, the positions where its document and the next one begin: int32 ``[B, T]`` each."""
    if starts is None:
        return None, None
    tokens = starts.shape[1]
    index = torch.arange(tokens, dtype=torch.int32, device=starts.device)
    first = torch.where(starts, index, 0).cummax(1).values
    following = torch.where(starts, index, tokens).roll(-1, 1)
    following[:, -1] = tokens
    return first, following.flip(1).cummin(1).values.flip(1).int().contiguous()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: D102
        ctx, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, recent_key: Tensor | None,
        recent_value: Tensor | None, first: Tensor | None, end: Tensor | None, scale: float, window: int,
    ) -> Tensor:
        query, key, value = (in_reach(x) for x in (query, key, value))
        recent = () if recent_key is None else (in_reach(recent_key), in_reach(recent_value))
        bias = None if bias is None else bias.float().contiguous()
        launch = _Launch(query, key, bias, recent, first, scale, window)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        blocks = launch.blocks("forward")
        grid = (triton.cdiv(query.shape[2], blocks["M"]), query.shape[0] * query.shape[1])
        forward[grid](
            query, key, value, bias, *(recent or (None, None)), first, out, lse, *launch.numbers,
            *_strides(query, key, value, *(recent or (None, None))), **launch.both, **blocks,
        )
        ctx.save_for_backward(query, key, value, bias, first, end, out, lse, *recent)
        ctx.scale, ctx.window = scale, window
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        query, key, value, bias, first, end, out, lse, *recent = ctx.saved_tensors
        grad = grad.contiguous()
        launch = _Launch(query, key, bias, recent, first, ctx.scale, ctx.window)
        (batch, query_heads, rows, size), (heads, tokens) = query.shape, key.shape[1:3]
        delta = torch.empty_like(lse)
        delta_rows[(triton.cdiv(delta.numel(), 32),)](
            out, grad, delta, delta.numel(), M=32, D=size, BLOCK=triton.next_power_of_2(size)
        )
        blocks = launch.blocks("keys")

        def of_keys(key: Tensor, value: Tensor, bias: Tensor | None, constants: dict) -> tuple[Tensor, Tensor, Tensor | None]:
            d_key, d_value = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (key, value))
            d_bias = None if bias is None else torch.empty_like(bias)
            backward_keys[(triton.cdiv(tokens, blocks["N"]), batch * heads)](
                query, key, value, bias, first, end, grad, lse, delta, d_key, d_value, d_bias, *launch.numbers,
                *_strides(query, key, value), **constants, **blocks,
            )
            return d_key, d_value, d_bias

        found = of_keys(key, value, bias, launch.keys)
        found += of_keys(*recent, None, launch.recent)[:2] if recent else (None, None)
        d_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        blocks = launch.blocks("queries")
        backward_queries[(triton.cdiv(rows, blocks["M"]), batch * query_heads)](
            query, key, value, bias, *(recent or (None, None)), first, grad, lse, delta, d_query, *launch.numbers,
            *_strides(query, key, value, *(recent or (None, None))), **launch.both, **blocks,
        )
        return d_query, *found, None, None, None, None


class _Launch:
    """Sizes and compile-time constants that the kernels of one problem share.

    Attributes:
        both, keys, recent: which keys a query sees, in the kernels over both sets of keys and in those over one of them.
    """

    def __init__(
        self, query: Tensor, key: Tensor, bias: Tensor | None, recent: Sequence[Tensor], first: Tensor | None, scale: float,
        window: int,
    ) -> None:
        self.size, self.narrow = query.shape[-1], query.dtype != torch.float32
        self.numbers = (scale, query.shape[1], key.shape[1], query.shape[2], key.shape[2])
        self.constants = dict(
            D=self.size, BLOCK=max(16, triton.next_power_of_2(self.size)), PACKED=first is not None,
            PRECISION="tf32" if self.narrow else "ieee",
        )
        lag, exempt = (window + 1, window + 1) if recent else (0, window)
        seen = dict(BIASED=bias is not None, EXEMPT=exempt, LAG=lag)
        self.both, self.keys = seen | dict(BAND=window if recent else -1), seen | dict(REACH=-1)
        self.recent = dict(BIASED=False, EXEMPT=0, LAG=0, REACH=window)

    def blocks(self, kernel: str) -> dict:
        """Block sizes of one kernel: M queries, N keys, and the compiler's schedule."""
        if interpreted():
            m, n, warps, stages = 32, 16, 4, 1  # small, so that short test sequences have several blocks
        elif not self.narrow:
            m, n, warps, stages = 32, 32, 4, 1
        else:
            m, n, warps, stages = BLOCKS[kernel]
        return dict(M=m, N=n, num_warps=warps, num_stages=stages, **self.constants)


BLOCKS = {
    # kernel: (M, N, warps, stages): the fastest tried for heads of 64 and of 128 (docs/results/kernels.md)
    "forward": (64, 64, 4, 3),
    "keys": (64, 64, 4, 2),
    "queries": (64, 64, 4, 2),
}


def _strides(*tensors: Tensor | None) -> tuple[int, ...]:
    """Strides of batch, head and token of each tensor."""
    return tuple(stride for x in tensors for stride in ((0, 0, 0) if x is None else x.stride()[:3]))
