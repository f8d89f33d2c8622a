"""vLLM's Llama with decisions, and attention over merged entries: only the attention module differs."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.utils import extract_layer_index, maybe_prefix

from dmc.model import ModelConfig
from dmc.model.decisions import decide
from dmc.model.fitted_heads import FittedHeads
from dmc_vllm import arena
from dmc_vllm.settings import Serving, read


class DmcAttention(nn.Module):
    """Projections, decisions and attention of a layer's heads that this rank has, for any family of `dmc.families`.

    Args:
        serving: what the model is served with.
        fitted: heads of fitted decisions; None: the model was retrofitted.
        arena_name: of the layer that has the KV memory.
        quant_config: vLLM's, of the projections; decisions are computed in fp32.
        prefix: name of the layer.
        _: vLLM's other arguments, which are in ``serving`` too.
    """

    def __init__(
        self,
        serving: Serving,
        fitted: FittedHeads | None,
        arena_name: str,
        *,
        quant_config=None,
        prefix: str = "",  # noqa: ANN001
        **_: object,
    ) -> None:
        super().__init__()
        self.config, self.arena_name, self.layer = serving.part, arena_name, extract_layer_index(prefix)
        self.fitted = fitted
        config: ModelConfig = serving.config
        size, hidden = config.head_dim, config.hidden_size
        self.qkv_proj = QKVParallelLinear(
            hidden,
            size,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=config.qkv_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * size,
            hidden,
            bias=config.output_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        if config.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(size, eps=config.rms_norm_eps) for _ in range(2))
        self.decision = None
        if config.decision == "head":
            self.decision = Decision(self.config)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """Hidden states ``[N, hidden]``; their positions come with the batch."""
        config = self.config
        heads, size = config.num_key_value_heads, config.head_dim
        states = self.qkv_proj(hidden_states)[0].unflatten(-1, (-1, size))
        query, key, value = states.split([config.num_attention_heads, heads, heads], dim=1)
        if config.qk_norm:
            query, key = self.q_norm(query.contiguous()), self.k_norm(key.contiguous())
        alpha, omega, *late = self._decide(hidden_states, query, key)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        torch.ops.dmc_vllm.attend(query, key, value, alpha, omega, late[0] if late else None, out, self.layer, self.arena_name)
        return self.o_proj(out.flatten(1))[0]

    def _decide(self, hidden_states: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        """Decisions about the tokens; see `dmc.model.decisions.decide`."""
        if self.fitted is not None:
            return self.fitted.decide(self.layer, hidden_states)
        weight, bias = (None, None) if self.decision is None else (self.decision.weight, self.decision.bias)
        return decide(self.config, weight, bias, hidden_states, query, key)


class Decision(nn.Module):
    """Weights of the decision head for a rank's heads, in fp32; not a linear layer: vLLM changes the layout of those on a CPU.

    Args:
        config: sizes of the rank's part.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kinds, self.heads = config.logits_per_head, config.num_key_value_heads
        self.weight = self._parameter(config.hidden_size)
        self.bias = self._parameter() if config.looks_ahead else None

    def _parameter(self, *inputs: int) -> nn.Parameter:
        parameter = nn.Parameter(torch.empty(self.kinds * self.heads, *inputs, dtype=torch.float32), requires_grad=False)
        parameter.weight_loader = self._load
        return parameter

    def _load(self, parameter: nn.Parameter, whole: Tensor) -> None:
        """Takes the rank's rows: one kind of logit for all heads, then the next kind."""
        own = slice(get_tensor_model_parallel_rank() * self.heads, (get_tensor_model_parallel_rank() + 1) * self.heads)
        parameter.data.copy_(whole.unflatten(0, (self.kinds, -1))[:, own].flatten(0, 1))


class DmcForCausalLM(LlamaForCausalLM):
    """A model of any family: retrofitted, or plain with fitted decisions.

    Attributes:
        arena: its KV memory.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        serving, name = read(vllm_config), maybe_prefix(prefix, "model.layers.0.self_attn.arena")
        fitted = serving.fitted_heads(vllm_config.device_config.device, get_tensor_model_parallel_rank())
        attention = partial(DmcAttention, serving, fitted, name)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=partial(LlamaDecoderLayer, attn_layer_type=attention))
        self.arena = arena.Arena(serving, name)
