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
from dmc import functional_dms as dms
from dmc.kernels.attention.attend import dmc_attention, dms_attention, late_attention, plain_attention
from dmc.kernels.decisions.decide import Drawn, soft_decisions
from dmc.training import context, rules
from dmc.training.state import AddGradient, AttachGradient, LayerState


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
    """Attention that runs plain, repurposing, with soft or with hard decisions (`LayerState.mode`)."""

    def __init__(self, config, *args, **kwargs) -> None:  # noqa: ANN001, ANN002, ANN003
        super().__init__(config, *args, **kwargs)
        self.state: LayerState = config.dmc_state
        self.rope: tuple[Tensor, Tensor] = config.dmc_rope
        self.evicts = self.state.settings.method == "dms"
        self.first_head = self.num_query_groups_per_partition * self.tp_group.rank()
        if self.state.settings.decision == "head":
            # Rows interleaved per head (`Settings.logits_per_head`), so that a tensor-parallel rank holds its own heads'.
            settings = self.state.settings
            self.decision = ColumnParallelLinear(
                config.hidden_size,
                settings.logits_per_head * config.num_query_groups,
                config=config,
                bias=settings.looks_ahead,
                gather_output=False,
                init_method=torch.nn.init.zeros_,
                skip_bias_add=False,
                tp_group=self.tp_group,
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
                query, key = self._scale_neurons(query, key, self.state.neuron_scale)
            context = self._run_core(self._plain, query, key, value, starts)
        else:
            logits, weights = None, None
            if self.state.settings.rule is None:
                logits, weights, query, key = self._decide(hidden_states, query, key)
            context = self._run_core(self._compressed, query, key, value, logits, weights, samples, starts)
        context = context.permute(2, 0, 1, 3).flatten(2).contiguous()
        return self.linear_proj(context)

    def _decide(self, hidden: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Logits of alpha and omega ``[B, H, T]`` fp32 (with DMS there is no omega), and query and key with the neuron
        taken out."""
        gain, heads = self.state.settings.gain, key.shape[1]
        if self.state.settings.decision == "head":
            rows, _ = self.decision(hidden)
            rows = gain * rows.float().unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
            logits = rows[..., 0]
            if self.state.settings.looks_ahead:
                logits = logits + self._ahead(rows[..., -1])
            return logits, None if self.evicts else rows[..., 1], query, key
        grouped = query[..., 0].float().unflatten(1, (heads, -1))
        if self.evicts:
            logits, weights = gain * grouped[:, :, 0], None
        else:
            logits, weights = gain * key[..., 0].float(), gain * grouped.mean(2)
        return logits, weights, *self._scale_neurons(query, key, 0.0)

    def _ahead(self, logits: Tensor) -> Tensor:
        """``[B, H, T]`` of this rank's positions → those of the positions ``window`` later, 0 beyond the sequence.

        Beyond the document they are another one's; such a token is never decided about (`dmc.functional.undecided`).
        """
        window, whole = self.state.settings.window, context.gather(logits, 2)
        later = whole[:, :, window:]
        return context.my_part(torch.nn.functional.pad(later, (0, whole.shape[2] - later.shape[2])), 2)

    def _scale_neurons(self, query: Tensor, key: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """The neurons that decisions are read from times ``scale``: neuron 0 of every query and key head; with DMS of
        the first query head of each group alone."""
        if not self.evicts:
            return _scale_neuron(query, scale), _scale_neuron(key, scale)
        first, others = query.unflatten(1, (key.shape[1], -1)).tensor_split([1], dim=2)
        return torch.cat([_scale_neuron(first, scale), others], dim=2).flatten(1, 2), key

    def _run_core(self, core, *inputs: Tensor) -> Tensor:  # noqa: ANN001
        if self.checkpoint_core_attention and self.training:
            return tensor_parallel.checkpoint(core, False, *inputs)
        return core(*inputs)

    def _plain(self, query: Tensor, key: Tensor, value: Tensor, starts: Tensor) -> Tensor:
        key, value = (context.gather(x, 2) for x in (key, value))
        return plain_attention(query, key, value, rope=self._tables(key), starts=starts, spans=context.my_spans(key.shape[2]))

    def _compressed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        logits: Tensor | None,
        weights: Tensor | None,
        samples: Tensor,
        starts: Tensor,
    ) -> Tensor:
        alpha, log_keep, omega = self._decisions(logits, weights, samples, starts)
        if self.evicts:
            return self._evicting(query, key, value, alpha, log_keep, starts)
        alpha = AddGradient.apply(alpha, self.state.alpha_gradient)
        key, value, alpha, omega = (context.gather(x, 2) for x in (key, value, alpha, omega))
        log_keep = None if log_keep is None else context.gather(log_keep, 2)
        options = dict(rope=self._tables(key), starts=starts, log_keep=log_keep, spans=context.my_spans(key.shape[2]))
        if self.state.settings.window is None:
            return dmc_attention(query, key, value, alpha, omega, **options)
        return late_attention(query, key, value, alpha, omega, window=self.state.settings.window, **options)

    def _evicting(
        self, query: Tensor, key: Tensor, value: Tensor, alpha: Tensor, log_keep: Tensor | None, starts: Tensor
    ) -> Tensor:
        """DMS: soft decisions reach attention as ``log_keep`` alone, so the loss's gradient hangs on the keys."""
        key = AttachGradient.apply(key, alpha, self.state.alpha_gradient)
        key, value, alpha = (context.gather(x, 2) for x in (key, value, alpha))
        log_keep = None if log_keep is None else context.gather(log_keep, 2)
        return dms_attention(
            query,
            key,
            value,
            alpha,
            window=self._window,
            rope=self._tables(key),
            starts=starts,
            log_keep=log_keep,
            spans=context.my_spans(key.shape[2]),
        )

    @property
    def _window(self) -> int | None:
        """The window in force; one that follows from the target CR changes along the ramp."""
        settings = self.state.settings
        return settings.window if settings.rule is None else settings.rule.window_at(self.state.target_cr)

    def _kept(self, starts: Tensor) -> Tensor:
        """bool ``[B, 1, T]`` of this rank's positions: tokens that are kept whatever was decided about them.

        These are the first of each document, with late merging those that never leave the window (`dmc.functional.undecided`),
        or with DMS the last ``window`` of the sequence; if decided late or by a rule, of each document.
        """
        settings, window = self.state.settings, self._window
        if self.evicts and (settings.looks_ahead or settings.rule is not None):
            kept = fn.undecided(starts, window - 1)
        elif self.evicts:
            kept = dms.undecided(starts.shape[1], window, device=starts.device).expand_as(starts)
        elif window is not None:
            kept = fn.undecided(starts, window)
        else:
            kept = starts | (torch.arange(starts.shape[1], device=starts.device) == 0)
        return context.my_part(kept, 1)[:, None]

    def _decisions(
        self, logits: Tensor | None, weights: Tensor | None, samples: Tensor, starts: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Alpha of this rank's positions ``[B, H, T]``, log(1 - alpha) where they are soft, and omega but with DMS.

        Counted here, before ranks exchange them: each rank counts what it decided. Alpha is 0 where a token is kept whatever
        its logit says. A rule's decisions are hard in training too.
        """
        state, settings, kept = self.state, self.state.settings, self._kept(starts)
        positions = torch.arange(starts.shape[1], device=starts.device)
        if settings.rule is not None:
            heads = self.first_head + torch.arange(self.num_query_groups_per_partition, device=starts.device)
            places = context.my_part(rules.positions(starts), 1)
            alpha = settings.rule.alpha(state.target_cr, places, self.layer_number - 1, heads).masked_fill(kept, 0.0)
            log_keep, omega = None, None if self.evicts else torch.ones_like(alpha)
            sums = ((1 - alpha).sum((0, 2)),) * 2
        elif state.mode == "soft":
            drawn = Drawn(
                settings.seed, state.step, self.layer_number - 1, samples, self.first_head, context.my_part(positions, 0)
            )
            # The constant gradient of alpha comes after, so that the mask stops it too.
            made = soft_decisions(logits, weights, kept, drawn, offset=settings.offset, temperature=settings.temperature)
            alpha, log_keep, omega, sums = made.alpha, made.log_keep, made.omega, (made.soft_kept, made.hard_kept)
        else:
            alpha = fn.round_alpha(logits, offset=settings.offset).masked_fill(kept, 0.0)
            log_keep, omega = None, None if weights is None else fn.importance(weights, offset=settings.offset)
            sums = ((1 - alpha).sum((0, 2)),) * 2
        if state.decisions is not None and (torch.is_grad_enabled() or not self.training):
            # Recomputed activations run twice, the first time without gradients: counted once.
            state.decisions.add(self.layer_number - 1, self.first_head, *sums)
        return alpha, log_keep, omega

    def _tables(self, key: Tensor) -> tuple[Tensor, Tensor]:
        tokens = key.shape[2]
        return self.rope[0][:tokens].to(key.device), self.rope[1][:tokens].to(key.device)


def _scale_neuron(x: Tensor, scale: float) -> Tensor:
    """Neuron 0 of every head times ``scale``."""
    factors = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)
    factors[0] = scale
    return x * factors
