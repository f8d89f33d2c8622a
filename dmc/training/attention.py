"""Self attention with DMC for megatron-core: decisions before RoPE, merging, and the fused attention.

It replaces the whole forward of megatron's SelfAttention, because megatron rotates the keys before it calls
its core attention, and merging happens before the rotation. Projections, tensor and sequence parallelism
stay megatron's.
"""

from __future__ import annotations

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from dmc import functional as fn
from dmc.kernels.attention import dmc_attention, plain_attention
from dmc.training import context, noise
from dmc.training.state import AddGradient, LayerState


def row_info(samples: Tensor, starts: Tensor) -> Tensor:
    """What a layer must know of each sequence, as the one tensor that megatron hands through to it.

    It travels as megatron's ``attention_mask``, which reaches every layer, also recomputed ones, unchanged.

    Args:
        samples: ``[B]`` int64, global index of each sequence in the order of the data.
        starts: ``[B, T]`` bool, first tokens of documents.

    Returns:
        ``[B, 1 + T]`` int64.
    """
    return torch.cat([samples[:, None], starts.to(samples.dtype)], dim=1)


class DmcSelfAttention(SelfAttention):
    """Llama attention that runs plain, repurposing, with soft or with hard decisions (`LayerState.mode`)."""

    def __init__(self, config, *args, **kwargs) -> None:  # noqa: ANN001, ANN002, ANN003
        super().__init__(config, *args, **kwargs)
        self.state: LayerState = config.dmc_state
        self.rope: tuple[Tensor, Tensor] = config.dmc_rope
        self.first_head = self.num_query_groups_per_partition * self.tp_group.rank()
        if self.state.settings.decision == "head":
            # Rows interleaved per head (alpha, omega), so that a tensor-parallel rank holds its own heads'.
            self.decision = ColumnParallelLinear(
                config.hidden_size, 2 * config.num_query_groups, config=config, bias=False, gather_output=False,
                init_method=torch.nn.init.zeros_, skip_bias_add=False, tp_group=self.tp_group,
            )

    def forward(self, hidden_states: Tensor, attention_mask: Tensor, **_: object) -> tuple[Tensor, Tensor | None]:
        """``[T, B, hidden]`` (of T, this rank's share under context and sequence parallelism) → the same shape, and
        a bias of None.

        ``attention_mask`` is the tensor of `row_info`.
        """
        query, key, value = (x.permute(1, 2, 0, 3) for x in self.get_query_key_value_tensors(hidden_states)[:3])
        samples, starts = attention_mask[:, 0], attention_mask[:, 1:].bool()
        mode = self.state.mode
        if mode in ("plain", "repurpose"):
            if mode == "repurpose":
                query, key = (_scale_neuron(x, self.state.neuron_scale) for x in (query, key))
            context = self._run_core(self._plain, query, key, value, starts)
        else:
            logits, weights, query, key = self._decide(hidden_states, query, key)
            context = self._run_core(self._compressed, query, key, value, logits, weights, samples, starts)
        context = context.permute(2, 0, 1, 3).flatten(2).contiguous()
        return self.linear_proj(context)

    def _decide(self, hidden: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits of alpha and omega ``[B, H, T]`` fp32, and query and key with the neuron taken out."""
        gain = self.state.settings.gain
        if self.state.settings.decision == "head":
            both, _ = self.decision(hidden)
            both = gain * both.float().unflatten(-1, (-1, 2)).permute(1, 2, 0, 3)
            return both[..., 0], both[..., 1], query, key
        logits = gain * key[..., 0].float()
        weights = gain * query[..., 0].float().unflatten(1, (key.shape[1], -1)).mean(2)
        return logits, weights, _scale_neuron(query, 0.0), _scale_neuron(key, 0.0)

    def _run_core(self, core, *inputs: Tensor) -> Tensor:  # noqa: ANN001
        if self.checkpoint_core_attention and self.training:
            return tensor_parallel.checkpoint(core, False, *inputs)
        return core(*inputs)

    def _plain(self, query: Tensor, key: Tensor, value: Tensor, starts: Tensor) -> Tensor:
        key, value = (context.gather(x, 2) for x in (key, value))
        return plain_attention(
            query, key, value, rope=self._tables(key), starts=starts, spans=context.my_spans(key.shape[2])
        )

    def _compressed(
        self, query: Tensor, key: Tensor, value: Tensor, logits: Tensor, weights: Tensor, samples: Tensor,
        starts: Tensor,
    ) -> Tensor:
        alpha, log_keep = self._alpha(logits, samples, starts)
        omega = fn.importance(weights, offset=self.state.settings.offset)
        key, value, alpha, omega = (context.gather(x, 2) for x in (key, value, alpha, omega))
        log_keep = None if log_keep is None else context.gather(log_keep, 2)
        return dmc_attention(
            query, key, value, alpha, omega, rope=self._tables(key), starts=starts, log_keep=log_keep,
            spans=context.my_spans(key.shape[2]),
        )

    def _alpha(self, logits: Tensor, samples: Tensor, starts: Tensor) -> tuple[Tensor, Tensor | None]:
        """Decisions of this rank's positions ``[B, H, T]`` with the loss's gradient attached, and log(1 - alpha)
        where they are soft. Counted here, before ranks exchange them: each rank counts what it decided."""
        state, settings = self.state, self.state.settings
        positions = torch.arange(starts.shape[1], device=logits.device)
        begins = context.my_part(starts | (positions == 0), 1)[:, None]
        hard = fn.round_alpha(logits, offset=settings.offset).masked_fill(begins, 0.0)
        alpha, log_keep = hard, None
        if state.mode == "soft":
            drawn = noise.logistic(
                settings.seed, state.step, self.layer_number - 1, samples=samples,
                heads=torch.arange(logits.shape[1], device=logits.device) + self.first_head,
                tokens=context.my_part(positions, 0),
            )
            options = dict(offset=settings.offset, temperature=settings.temperature, noise=drawn)
            # In this order the mask stops the constant too: a first token is kept whatever its logit says.
            alpha = fn.sample_alpha(logits, **options).masked_fill(begins, 0.0)
            alpha = AddGradient.apply(alpha, state.alpha_gradient)
            log_keep = fn.sample_log_keep(logits, **options)
        if state.decisions is not None and (torch.is_grad_enabled() or not self.training):
            # Recomputed activations run twice, the first time without gradients: counted once.
            state.decisions.add(
                self.layer_number - 1, self.first_head, (1 - alpha).sum((0, 2)), (1 - hard).sum((0, 2))
            )
        return alpha, log_keep

    def _tables(self, key: Tensor) -> tuple[Tensor, Tensor]:
        tokens = key.shape[2]
        return self.rope[0][:tokens].to(key.device), self.rope[1][:tokens].to(key.device)


def _scale_neuron(x: Tensor, scale: float) -> Tensor:
    """Neuron 0 of every head times ``scale``."""
    factors = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)
    factors[0] = scale
    return x * factors
