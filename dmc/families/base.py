"""The data types: a family of models, and the shape of one model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dmc.rope import RopeSettings

# megatron-core's module → the Hugging Face modules that it holds. Of a layer: names within it.
TENSORS = {
    "embedding.word_embeddings": ("model.embed_tokens",),
    "decoder.final_layernorm": ("model.norm",),
    "output_layer": ("lm_head",),
    "input_layernorm": ("input_layernorm",),
    "self_attention.linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.q_layernorm": ("self_attn.q_norm",),
    "self_attention.k_layernorm": ("self_attn.k_norm",),
    "self_attention.linear_proj": ("self_attn.o_proj",),
    "pre_mlp_layernorm": ("post_attention_layernorm",),
    "mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.linear_fc2": ("mlp.down_proj",),
}


@dataclass(frozen=True)
class Family:
    """Decoders that differ in sizes alone: RMSNorm, rotary positions, grouped queries, gated SiLU.

    Attributes:
        model_type: as in config.json.
        title: what transformers' classes are called by: ``Llama`` for LlamaConfig and LlamaForCausalLM.
        models: well-known ones, for the documentation.
        qkv_bias: whether the projections of queries, keys and values have biases; None: as ``attention_bias`` says.
        output_bias: the same of attention's output projection.
        mlp_bias: the same of the MLP; None: as ``mlp_bias`` says.
        qk_norm: whether queries and keys are normed, each head separately, before they are rotated.
        sliding: whether a config.json may ask for attention over a window, which is then rejected.
        tensors: see `TENSORS`.
    """

    model_type: str
    title: str
    models: tuple[str, ...]
    qkv_bias: bool | None = False
    output_bias: bool | None = False
    mlp_bias: bool | None = False
    qk_norm: bool = False
    sliding: bool = False
    tensors: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: TENSORS, hash=False)

    @property
    def export_type(self) -> str:
        """``model_type`` of an exported retrofit."""
        return f"dmc_{self.model_type}"


@dataclass(frozen=True)
class ModelShape:
    """The sizes and parts of one model; names as in config.json where it has one.

    Attributes:
        num_key_value_heads: H.
        head_dim: D.
        rope: its rotary embedding, as transformers reads config.json.
        qkv_bias, output_bias, mlp_bias: which projections have biases.
        qk_norm: whether queries and keys are normed before they are rotated.
        fields: every field of config.json, those that it leaves out included.
    """

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    initializer_range: float
    rope: RopeSettings
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    fields: Mapping = field(repr=False, compare=False)

    @property
    def positions(self) -> int:
        """Tokens of the longest sequence that can be served; see `dmc.rope.RopeSettings.why_limited`."""
        return min(self.max_position_embeddings, self.rope.positions)
