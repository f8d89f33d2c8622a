"""Which tensors a model has under its Hugging Face names, and the check that it has no others."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path

from dmc.families.base import ModelShape

_BUFFERS = ("rotary_emb.inv_freq",)  # saved by old versions of transformers, computed again by all


def tensors(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Hugging Face name → shape of every tensor of a model, without those that a retrofit adds; tied embeddings once."""
    hidden, inner, size = shape.hidden_size, shape.intermediate_size, shape.head_dim
    queries, keys = shape.num_attention_heads * size, shape.num_key_value_heads * size
    layer: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    for name, rows, columns, bias in (
        ("self_attn.q_proj", queries, hidden, shape.qkv_bias),
        ("self_attn.k_proj", keys, hidden, shape.qkv_bias),
        ("self_attn.v_proj", keys, hidden, shape.qkv_bias),
        ("self_attn.o_proj", hidden, queries, shape.output_bias),
        ("mlp.gate_proj", inner, hidden, shape.mlp_bias),
        ("mlp.up_proj", inner, hidden, shape.mlp_bias),
        ("mlp.down_proj", hidden, inner, shape.mlp_bias),
    ):
        layer[f"{name}.weight"] = (rows, columns)
        if bias:
            layer[f"{name}.bias"] = (rows,)
    if shape.qk_norm:
        layer |= {"self_attn.q_norm.weight": (size,), "self_attn.k_norm.weight": (size,)}
    whole = {"model.embed_tokens.weight": (shape.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not shape.tie_word_embeddings:
        whole["lm_head.weight"] = (shape.vocab_size, hidden)
    return whole | {
        f"model.layers.{index}.{name}": size for index in range(shape.num_hidden_layers) for name, size in layer.items()
    }


def count(shape: ModelShape) -> int:
    """Parameters of a model, without those that a retrofit adds."""
    return sum(math.prod(size) for size in tensors(shape).values())


def check_names(shape: ModelShape, names: Collection[str], where: str | Path, *, added: Collection[str] = ()) -> None:
    """Refuses weights that are not those of the shape: a tensor that is missing would be random, a surplus one be left out.

    Args:
        shape: by config.json.
        names: of the tensors that there are.
        where: the directory, for the error.
        added: names of tensors that a retrofit adds, which must be there as well.

    Raises:
        ValueError: naming the first tensor that is missing or surplus, and how many there are.
    """
    wanted, found = set(tensors(shape)) | set(added), set(names)
    surplus = {name for name in found - wanted if not name.endswith(_BUFFERS)}
    if shape.tie_word_embeddings:
        surplus.discard("lm_head.weight")
    for rest, said in ((wanted - found, "lacks"), (surplus, "has, beyond those of its config.json,")):
        if rest:
            raise ValueError(
                f"{where} {said} the tensor {min(rest)} ({len(rest)} such): weights and config.json do not belong together"
            )
