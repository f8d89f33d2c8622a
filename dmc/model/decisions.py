"""The decisions of a retrofitted model about its tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dmc.functional import importance, round_alpha
from dmc.model.config import ModelConfig


def decide(
    config: ModelConfig, weight: Tensor | None, bias: Tensor | None, x: Tensor, query: Tensor, key: Tensor
) -> tuple[Tensor, ...]:
    """Decisions of N tokens.

    Args:
        config: of a retrofitted model, or of a rank's heads.
        weight: of the decision head, ``[logits_per_head * H, hidden]`` in fp32 (fp64 of an fp64 model); None with neurons.
        bias: of the decision head, ``[logits_per_head * H]``, or None.
        x: input of the attention projections, ``[N, hidden]``.
        query: ``[N, Hq, D]``; key ``[N, H, D]``; not rotated, after their norms. In the neuron variant the neurons that were
            read are set to 0, in place.

    Returns:
        ``[N, H]`` each: alpha, 0 or 1, or for a model with a window its logit, above 0 to merge; omega, with DMS 1; and for a
        model that looks ahead, what each token adds to the logit of the token that leaves the window when it comes.
    """
    heads, offset = config.num_key_value_heads, config.offset
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    late: tuple[Tensor, ...] = ()
    omega: Tensor | None = None
    if config.decision == "head":
        logits = F.linear(x.to(weight.dtype), weight, bias).split(heads, dim=1)
        merge, omega = logits[0], logits[1] if config.method == "dmc" else None
        late = (logits[-1],) if config.looks_ahead else ()
    elif config.method == "dms":
        read = query.unflatten(1, (heads, -1))[:, :, 0, 0]  # the first query head of each group
        merge = read.to(work, copy=True)
        read.zero_()
    else:
        merge = key[..., 0].to(work, copy=True)
        omega = query[..., 0].to(work).unflatten(1, (heads, -1)).mean(2)
        query[..., 0] = 0
        key[..., 0] = 0
    omega = torch.ones_like(merge) if omega is None else importance(omega, offset=offset)
    return (merge - offset if config.window is not None else round_alpha(merge, offset=offset)), omega, *late
