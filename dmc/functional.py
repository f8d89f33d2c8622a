"""The maths of Dynamic Memory Compression in plain differentiable PyTorch.

Everything else in the project (kernels, the megatron-core layer, the Hugging Face export, the serving
engine) is tested against this file. Source: Nawrot et al., "Dynamic Memory Compression: Retrofitting LLMs
for Accelerated Inference", ICML 2024, arXiv 2403.09636 ("the paper"; equations are numbered as there).

Dimension letters of the whole project:

    B batch    T tokens    H key/value heads    G query heads per key/value head    D head size
    L layers   N entries of a cache            Hq = H * G query heads

Arithmetic is in fp32 (fp64 if the inputs are), whatever the dtype of the inputs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

DEFAULT_OFFSET = 5.0
DEFAULT_TEMPERATURE = 0.1
_CHUNK = 32  # tokens that one small matrix product of the scan covers


# ------------------------------------------------------------------------------------------- decisions


def sample_alpha(
    logits: Tensor, *, offset: float = DEFAULT_OFFSET, temperature: float = DEFAULT_TEMPERATURE, noise: Tensor | None = None
) -> Tensor:
    """Relaxed decision to merge, alpha in (0, 1): the Gumbel-sigmoid of eq. 8.

    Args:
        logits: ``gain * k[0]`` before RoPE, any shape.
        offset: ``c``, subtracted from the logits, so that an untrained neuron means "append".
        temperature: ``tau`` of the relaxation; constant over a retrofit.
        noise: a Logistic(0, 1) sample of the shape of ``logits`` (the difference of two Gumbels).
            Drawn from torch's default generator if None; pass zeros for no noise.

    Returns:
        alpha, fp32 (fp64 for fp64 logits), shape of ``logits``. 1 merges the token into the accumulating entry.
    """
    return torch.sigmoid(_relaxed(logits, offset, temperature, noise))


def sample_log_keep(
    logits: Tensor, *, offset: float = DEFAULT_OFFSET, temperature: float = DEFAULT_TEMPERATURE, noise: Tensor
) -> Tensor:
    """``log(1 - alpha)`` of `sample_alpha` with the same noise, computed as ``logsigmoid(-x)``.

    Exact where ``1 - alpha`` would have been rounded away. Same shape and dtype as alpha.
    """
    return F.logsigmoid(-_relaxed(logits, offset, temperature, noise))


def round_alpha(logits: Tensor, *, offset: float = DEFAULT_OFFSET) -> Tensor:
    """The hard decision of inference: 1 where ``logits > offset``, else 0; shape and dtype of ``logits``."""
    return (_work(logits) > offset).to(logits.dtype)


def importance(logits: Tensor, *, offset: float = DEFAULT_OFFSET) -> Tensor:
    """The weight omega of a token in its entry: ``sigmoid(logits + offset)``, in fp32.

    Args:
        logits: neuron 0 of the queries before RoPE, averaged over the G query heads of a group; any shape.
        offset: ``c``, added, so that an untrained neuron means a weight near 1.
    """
    return torch.sigmoid(_work(logits) + offset)


def mask_starts(alpha: Tensor, starts: Tensor | None) -> Tensor:
    """Alpha with the first token of every document set to 0, since it always opens an entry.

    Args:
        alpha: ``[B, H, T]``.
        starts: ``[B, T]`` bool, True at the first token of each document; None if only token 0 is one.
    """
    first = torch.zeros(alpha.shape[-1], dtype=torch.bool, device=alpha.device)
    first[0] = True
    if starts is not None:
        first = (first | starts)[:, None]
    return alpha.masked_fill(first, 0.0)


def compression_loss(alpha: Tensor, target_cr: float) -> Tensor:
    """One-sided compression loss, eq. 10: how far the share of kept entries is above ``1 / target_cr``.

    Args:
        alpha: decisions of every layer, head and token that the hinge covers, any shape.
        target_cr: compression ratio, tokens per entry, at least 1.

    Returns:
        A scalar ``max(0, mean(1 - alpha) - 1 / target_cr)``; no gradient once the target is met.

    Raises:
        ValueError: if ``target_cr`` is below 1 or not finite.
    """
    if not (math.isfinite(target_cr) and target_cr >= 1):
        raise ValueError(f"target_cr must be a finite number of at least 1, got {target_cr}")
    return F.relu((1 - _work(alpha)).mean() - 1 / target_cr)


# ------------------------------------------------------------------------------------------- merging


def accumulate(x: Tensor, alpha: Tensor, omega: Tensor, *, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Partial accumulation, eq. 9: every intermediate state of the entries, by a chunked scan.

    ``z_t = alpha_t z_{t-1} + omega_t`` and ``x'_t = (alpha_t z_{t-1} x'_{t-1} + omega_t x_t) / z_t``.
    Differentiable once (the backward pass is one reverse scan).

    Args:
        x: keys **before** RoPE, or values, ``[B, H, T, D]``.
        alpha: ``[B, H, T]`` in [0, 1]; that of a document's first token is taken as 0.
        omega: ``[B, H, T]``, positive.
        starts: ``[B, T]`` bool, first tokens of documents; no merge crosses one.

    Returns:
        ``(merged [B, H, T, D], z [B, H, T])``, fp32 or fp64. ``merged[:, :, t]`` is the accumulating entry after
        token t.
    """
    numerators, z = accumulate_numerators(x, alpha, omega, starts=starts)
    return numerators / z[..., None], z


def accumulate_numerators(x: Tensor, alpha: Tensor, omega: Tensor, *, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`accumulate` before the division: ``(sum of omega x [B, H, T, D], z [B, H, T])``."""
    omega = _work(omega)
    weighted = torch.cat([_work(x) * omega[..., None], omega[..., None].to(_work(x).dtype)], dim=-1)
    summed = _Recurrence.apply(mask_starts(_work(alpha), starts).to(weighted.dtype), weighted)
    return summed[..., :-1], summed[..., -1]


class _Recurrence(torch.autograd.Function):
    """``y_t = decay_t y_{t-1} + x_t`` with decay ``[..., T]``, x ``[..., T, F]``.

    The gradient is the same recurrence run backwards in time: ``h_t = g_t + decay_{t+1} h_{t+1}``, with
    ``dx_t = h_t`` and ``d decay_t = <h_t, y_{t-1}>``; so nothing but decay and y is kept.
    """

    @staticmethod
    def forward(ctx, decay: Tensor, x: Tensor) -> Tensor:
        y = _recur(decay, x)
        ctx.save_for_backward(decay, y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        decay, y = ctx.saved_tensors
        following = F.pad(decay[..., 1:], (0, 1))
        h = _recur(following.flip(-1), grad.flip(-2)).flip(-2)
        previous = F.pad(y[..., :-1, :], (0, 0, 1, 0))
        return (h * previous).sum(-1), h


def _recur(decay: Tensor, x: Tensor) -> Tensor:
    tokens = x.shape[-2]
    if tokens <= _CHUNK:
        return _products(decay) @ x
    pad = -tokens % _CHUNK
    decay = F.pad(decay, (0, pad)).unflatten(-1, (-1, _CHUNK))
    x = F.pad(x, (0, 0, 0, pad)).unflatten(-2, (-1, _CHUNK))
    within = _products(decay) @ x  # [..., chunks, _CHUNK, F]: what each chunk would hold on its own
    through = decay.cumprod(-1)  # how much of the state before the chunk is left at each token
    ends = _recur(through[..., -1], within[..., -1, :])  # the same recurrence, one step a chunk
    before = F.pad(ends[..., :-1, :], (0, 0, 1, 0))
    return (within + through[..., None] * before[..., None, :]).flatten(-3, -2)[..., :tokens, :]


def _products(decay: Tensor) -> Tensor:
    """``[..., C] → [..., C, C]`` with ``out[i, j] = decay[j+1] * ... * decay[i]`` for i >= j, else 0.

    Products and not differences of logarithms: exact for decays of 0 and 1.
    """
    size = decay.shape[-1]
    later = torch.ones(size, size, dtype=torch.bool, device=decay.device).tril(-1)
    return torch.where(later, decay[..., :, None], 1.0).cumprod(-2).tril()


# ------------------------------------------------------------------------------------------- attention


def key_bias(alpha: Tensor, *, starts: Tensor | None = None, log_keep: Tensor | None = None) -> Tensor:
    """What is added to every score on intermediate state j from a later query: ``log(1 - alpha_{j+1})``.

    State j disappears to the degree that token j+1 merged into it.

    Args:
        alpha: ``[B, H, T]``. Exactly 1 gives -inf, with no gradient there.
        starts: ``[B, T]`` bool, first tokens of documents (their alpha is taken as 0).
        log_keep: ``log(1 - alpha)`` from `sample_log_keep`, where alpha comes from logits; else it is
            taken from alpha.

    Returns:
        ``[B, H, T]``, fp32 or fp64; 0 for the last token.
    """
    if log_keep is None:
        alpha = _work(alpha)
        merged = alpha >= 1
        log_keep = torch.log1p(-alpha.masked_fill(merged, 0.0)).masked_fill(merged, -math.inf)
    return F.pad(mask_starts(log_keep, starts)[..., 1:], (0, 1))


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding in the half-split layout of Llama; x ``[..., T, D]``, (cos, sin) ``[T, D]`` each."""
    cos, sin = (table.to(x.dtype) for table in rope)
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


def rotate_rounded(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """`rotate` in fp32 at least, rounded once to the dtype of x."""
    return rotate(x if x.dtype == torch.float64 else x.float(), rope).to(x.dtype)


def unrotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """The inverse of `rotate`, also for tables with an attention factor; in the dtype of x."""
    cos, sin = rope
    return rotate(x, (cos, -sin)) / (cos * cos + sin * sin).to(x.dtype)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor,
    omega: Tensor,
    *,
    window: int | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    starts: Tensor | None = None,
    scale: float | None = None,
    log_keep: Tensor | None = None,
) -> Tensor:
    """Causal attention of DMC over all intermediate states: the reference, O(T^2) memory.

    ``window=None`` merges at once (the paper): query i sees its own state i unmasked, every earlier state j with
    `key_bias`, no later one, and nothing of another document. With alpha in {0, 1} this is inference (the paper's
    Algorithm 1) to rounding.

    ``window=w`` merges late (ours): query i sees the tokens j with ``0 <= i - j <= w`` as they are, and of the tokens
    0 .. m, ``m = i - w - 1``, what DMC makes of them: state m, the accumulating entry, without bias, and every state
    j < m with `key_bias`. One softmax covers both. With alpha in {0, 1} this is a cache of the newest w + 1 tokens
    behind which Algorithm 1 runs, to rounding.

    Args:
        query: ``[B, Hq, T, D]``, neuron 0 already zeroed, before RoPE.
        key, value: ``[B, H, T, D]``; key as query. Hq is a multiple of H.
        alpha, omega: ``[B, H, T]``. With a window, the decision of a token that never leaves it has no effect
            (`undecided`).
        window: None, or w >= 0.
        rope: (cos, sin), each ``[T, D]``: state t is rotated to position t, that of its newest token.
        starts: ``[B, T]`` bool, first tokens of documents.
        scale: of the scores, ``1 / sqrt(D)`` if None.
        log_keep: see `key_bias`.

    Returns:
        ``[B, Hq, T, D]`` in the dtype of ``query``.

    Raises:
        ValueError: if the head counts do not divide, the shapes of alpha and key differ, or the window is negative.
    """
    batch, query_heads, tokens, size = query.shape
    heads = key.shape[1]
    if query_heads % heads or alpha.shape != key.shape[:3] or omega.shape != alpha.shape:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)}, alpha {tuple(alpha.shape)}, omega "
            f"{tuple(omega.shape)}: query heads must be a multiple of key heads, and alpha and omega [B, H, T]"
        )
    if window is not None and window < 0:
        raise ValueError(f"window must be None or at least 0, got {window}")
    merged, _ = accumulate(torch.cat([_work(key), _work(value)], dim=-1), alpha, omega, starts=starts)
    keys, values = merged[..., :size], merged[..., size:]
    queries = _work(query)
    if rope is not None:
        keys, queries = rotate(keys, rope), rotate(queries, rope)
    queries = queries.unflatten(1, (heads, -1))  # [B, H, G, T, D]
    scale = size**-0.5 if scale is None else scale
    position = torch.arange(tokens, device=query.device)
    behind = position[:, None] - position  # [T, T], how far key j is behind query i
    same = behind >= 0
    if starts is not None:
        document = starts.cumsum(-1)
        same = same & (document[:, :, None] == document[:, None, :])[:, None, None]
    first = 0 if window is None else window + 1  # how far the newest visible state is behind its query
    bias = key_bias(alpha, starts=starts, log_keep=log_keep)[:, :, None, None, :].masked_fill(behind == first, 0.0)
    scores = queries @ keys[:, :, None].transpose(-1, -2) * scale + bias
    scores = scores.masked_fill(~(same & (behind >= first)), -math.inf)
    values = values[:, :, None]
    if window is not None:
        recent = _work(key) if rope is None else rotate(_work(key), rope)
        near = queries @ recent[:, :, None].transpose(-1, -2) * scale
        scores = torch.cat([near.masked_fill(~(same & (behind <= window)), -math.inf), scores], dim=-1)
        values = torch.cat([_work(value)[:, :, None], values], dim=-2)
    out = scores.softmax(-1) @ values
    return out.flatten(1, 2).to(query.dtype)


def undecided(starts: Tensor, window: int) -> Tensor:
    """Tokens whose decision never takes effect when merging is late.

    These are the first token of each document, which always opens an entry, and its last ``window + 1`` tokens, which no
    query of the document sees from outside the window. They count as kept in the CR loss and in every CR.

    Args:
        starts: ``[B, T]`` bool, first tokens of documents; position 0 is one whatever it says.
        window: w >= 0.

    Returns:
        bool ``[B, T]``.
    """
    first = starts.clone()
    first[:, 0] = True
    document = first.cumsum(-1)
    leaves = torch.zeros_like(first)
    leaves[:, : max(0, first.shape[1] - window - 1)] = document[:, window + 1 :] == document[:, : -window - 1]
    return first | ~leaves


# ------------------------------------------------------------------------------------------- helpers


def _relaxed(logits: Tensor, offset: float, temperature: float, noise: Tensor | None) -> Tensor:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    logits = _work(logits)
    if noise is None:
        uniform = torch.rand_like(logits).clamp(1e-7, 1 - 1e-7)
        noise = torch.logit(uniform)
    return (logits - offset + noise) / temperature


def _work(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
