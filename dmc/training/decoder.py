"""A decoder built on megatron-core from the shape of a Hugging Face model, of any family (`dmc.families`).

The layers need neither transformer-engine nor apex: an RMSNorm that permits sequence parallelism, megatron's
own parallel linear layers, and `DmcSelfAttention`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from dmc.families import ModelShape
from dmc.rope import Rope, RopeSettings
from dmc.training import cpu
from dmc.training.attention import DmcSelfAttention
from dmc.training.backends import Layers
from dmc.training.config import ParallelConfig
from dmc.training.stage import Stage
from dmc.training.state import LayerState


class RMSNorm(nn.Module):
    """The norm of every family; its gradient is summed over the tensor-parallel group under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=cpu.device()))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden]`` → the same shape and dtype."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def build(
    hf: ModelShape,
    parallel: ParallelConfig,
    state: LayerState,
    *,
    sequence_length: int,
    dtype: torch.dtype,
    layers: Layers | None = None,
) -> list[Stage]:
    """The chunks of the model that this rank holds, with random weights: one, or ``parallel.virtual`` of them.

    Args:
        hf: the model's shape.
        parallel: the layout; megatron's process groups must have been initialised with it.
        state: shared by all attention layers of this model, and kept in its configuration.
        sequence_length: longest sequence, for the rotary tables.
        dtype: of the weights.
        layers: which library's linear layers to use; None takes megatron-core's own.

    Raises:
        ValueError: if the layout does not divide the model, or the model has parts that cannot be trained here.
    """
    check_layout(hf, parallel)
    config = transformer_config(hf, parallel, dtype)
    config.dmc_state = state
    config.dmc_rope = rope_tables(hf, sequence_length)
    return [
        _chunk(hf, config, state, sequence_length, index if parallel.virtual > 1 else None, layers or Layers())
        for index in range(parallel.virtual)
    ]


def _chunk(hf: ModelShape, config: TransformerConfig, state: LayerState, tokens: int, index: int | None, layers: Layers) -> Stage:
    spec = TransformerBlockSubmodules(
        layer_specs=[_layer_spec(layers, hf)] * get_num_layers_to_build(config, vp_stage=index), layer_norm=RMSNorm
    )
    stage = Stage(
        config,
        spec,
        vocab_size=hf.vocab_size,
        max_sequence_length=tokens,
        parallel_output=True,
        pre_process=mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=index),
        post_process=mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=index),
        position_embedding_type="none",
        share_embeddings_and_output_weights=bool(hf.tie_word_embeddings),
        vp_stage=index,
        state=state,
    )
    return stage.to(cpu.device())


def check_layout(hf: ModelShape, parallel: ParallelConfig) -> None:
    """Refuse what this builder cannot build.

    Raises:
        ValueError: naming the numbers.
    """
    tensor, pipeline = parallel.tensor, parallel.pipeline
    for name, value in (
        ("num_key_value_heads", hf.num_key_value_heads),
        ("num_attention_heads", hf.num_attention_heads),
        ("intermediate_size", hf.intermediate_size),
        ("vocab_size", hf.vocab_size),
    ):
        if value % tensor:
            raise ValueError(f"parallel.tensor {tensor} does not divide the model's {name} {value}: use a divisor")
    if hf.num_hidden_layers % (pipeline * parallel.virtual):
        chunks = f" x parallel.virtual {parallel.virtual}" if parallel.virtual > 1 else ""
        raise ValueError(f"parallel.pipeline {pipeline}{chunks} does not divide the model's {hf.num_hidden_layers} layers")
    if hf.output_bias or hf.mlp_bias:
        which = "attention_bias" if hf.output_bias else "mlp_bias"
        raise ValueError(
            f"the model has {which}: biases are trained on queries, keys and values alone (as in Qwen2), not on the output "
            "projection or the MLP"
        )


def transformer_config(hf: ModelShape, parallel: ParallelConfig, dtype: torch.dtype) -> TransformerConfig:
    """megatron-core's view of a model."""
    recompute = {}
    if parallel.recompute == "full":
        recompute = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    elif parallel.recompute == "selective":
        recompute = dict(recompute_granularity="selective", recompute_modules=["core_attn"])
    spread = hf.initializer_range
    return TransformerConfig(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.intermediate_size,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_key_value_heads,
        kv_channels=hf.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=hf.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=hf.qkv_bias,
        qk_layernorm=hf.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=spread,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual if parallel.virtual > 1 else None,
        # With the batched form two ranks mismatch the messages of an interleaved schedule, without an error.
        overlap_p2p_comm=parallel.virtual > 1,
        batch_p2p_comm=parallel.virtual == 1,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=not torch.cuda.is_available(),
        # Losses and the compression gradient are sums over tokens; megatron divides by the global token count.
        calculate_per_token_loss=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        **recompute,
    )


def rope_tables(hf: ModelShape, tokens: int) -> tuple[Tensor, Tensor]:
    """(cos, sin), each ``[T, D]`` fp32, times the attention factor where the scaling has one.

    Raises:
        ValueError: if transformers has other frequencies for as many tokens.
    """
    check_length(hf.rope, tokens)
    return Rope.of(hf.rope, dtype=torch.float32, device=cpu.device())(torch.arange(tokens, device=cpu.device()))


def check_length(settings: RopeSettings, tokens: int) -> None:
    """Refuse sequences for which the model has other frequencies than for those that it is served with.

    Raises:
        ValueError: naming the setting and the limit.
    """
    if not settings.fixed and tokens > settings.positions:
        raise ValueError(
            f"data.sequence_length {tokens} exceeds the {settings.positions} positions of the model"
            f"{settings.why_limited}: lower data.sequence_length"
        )


def _layer_spec(layers: Layers, hf: ModelShape) -> ModuleSpec:
    head_norm = RMSNorm if hf.qk_norm else IdentityOp
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=DmcSelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=layers.column,
                    core_attention=_NoCore,
                    linear_proj=layers.row,
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=layers.column, linear_fc2=layers.row)),
            mlp_bda=get_bias_dropout_add,
        ),
    )


class _NoCore(nn.Module):
    """Stands where megatron builds a core attention; `DmcSelfAttention` calls its own."""

    def __init__(self, **_: object) -> None:
        super().__init__()
