"""Language-modelling and distillation losses over logits whose vocabulary is sharded by tensor parallelism."""

from __future__ import annotations

import torch
from torch import Tensor


def language_and_distillation(
    logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor | None,
    *,
    lm_weight: float,
    kl_weight: float,
    group: torch.distributed.ProcessGroup,
    scored: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``lm_weight * CE(labels) + kl_weight * KL(teacher || model)``, summed over tokens.

    Args:
        logits: ``[B, T, V / TP]`` of the model, this rank's part of the vocabulary.
        labels: ``[B, T]`` int64.
        teacher_logits: as ``logits``, of the frozen original model; None leaves the KL term out.
        group: the tensor-parallel group.
        scored: ``[B, T]`` bool, the predictions that count; None: all of them.

    Returns:
        ``(loss, cross entropy, KL)``: sums over the tokens that count, fp32 scalars; the last two detached.
    """
    return _Losses.apply(logits, labels, teacher_logits, lm_weight, kl_weight, group, scored)


class _Losses(torch.autograd.Function):
    """Computes the gradient ``lm (p - onehot) + kl (p - p_teacher)`` in the forward pass, and keeps only it."""

    @staticmethod
    def forward(ctx, logits, labels, teacher, lm_weight, kl_weight, group, scored):  # noqa: ANN001, ANN205
        log_p = _log_softmax(logits.float(), group)
        first = group.rank() * logits.shape[-1]
        local = labels - first
        mine = (local >= 0) & (local < logits.shape[-1])
        mine = mine if scored is None else mine & scored
        picked = log_p.gather(-1, local.clamp(0, logits.shape[-1] - 1)[..., None])[..., 0]
        cross_entropy = _sum_over(-torch.where(mine, picked, 0.0).sum(), group)
        p = log_p.exp()
        divergence = torch.zeros_like(cross_entropy)
        grad = p * (lm_weight + (kl_weight if teacher is not None else 0.0))
        if scored is not None:
            grad.mul_(scored[..., None])
        if teacher is not None:
            log_t = _log_softmax(teacher.float(), group)
            t = log_t.exp() if scored is None else log_t.exp() * scored[..., None]  # rows that do not count add 0 to both
            divergence = _sum_over((t * (log_t - log_p)).sum(), group)
            grad.sub_(t, alpha=kl_weight)
        if lm_weight:
            grad.scatter_add_(-1, local.clamp(0, logits.shape[-1] - 1)[..., None], -lm_weight * mine[..., None].float())
        ctx.save_for_backward(grad.to(logits.dtype))
        loss = lm_weight * cross_entropy + kl_weight * divergence
        ctx.mark_non_differentiable(cross_entropy, divergence)
        return loss, cross_entropy, divergence

    @staticmethod
    def backward(ctx, grad_loss, *_):  # noqa: ANN001, ANN205
        (grad,) = ctx.saved_tensors
        return grad * grad_loss.to(grad.dtype), None, None, None, None, None, None


def _log_softmax(x: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    if group.size() == 1:
        return x.log_softmax(-1)
    top = x.amax(-1, keepdim=True)
    torch.distributed.all_reduce(top, op=torch.distributed.ReduceOp.MAX, group=group)
    shifted = x - top
    total = shifted.exp().sum(-1, keepdim=True)
    torch.distributed.all_reduce(total, group=group)
    return shifted - total.log()


def _sum_over(x: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    if group.size() > 1:
        torch.distributed.all_reduce(x, group=group)
    return x
