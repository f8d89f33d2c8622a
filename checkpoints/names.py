"""Weights between Hugging Face's Llama names and megatron-core's, one tensor at a time.

megatron-core fuses q, k and v per key/value group (``q1..qG k v`` of group 1, then of group 2, ...) and gate
with up. The decision head's rows are interleaved per head on the megatron side (alpha, omega, alpha's late part) and
stacked on the Hugging Face side (all alphas, all omegas, all late parts). DMS has no omegas; only a head that looks ahead
has late parts and a bias.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor
from transformers import LlamaConfig

# Which dimension tensor parallelism cuts; the others every rank holds whole. The fused tensors are cut in their parts.
_CUT = {
    "embedding.word_embeddings.weight": 0, "output_layer.weight": 0, "self_attention.linear_proj.weight": 1,
    "mlp.linear_fc2.weight": 1,
}
_DECISION = "self_attention.decision."
_PLAIN = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
}


def to_megatron(
    hf: LlamaConfig, weights: Callable[[str], Tensor], names: Iterable[str], *, first_layer: int, rank: int, size: int,
) -> Iterator[tuple[str, Tensor]]:
    """``(megatron name, this rank's tensor)`` for every name the rank's model holds, each made when it is asked for.

    A tensor of `weights` is cut before it is copied: one that is mapped from a file (`HfWeights`) is read no further
    than the rank's part.

    Args:
        hf: the model.
        weights: returns a Hugging Face tensor by name, e.g. `HfWeights`.
        names: parameter names of the rank's GPTModel. Those of a decision head are skipped: it is new.
        first_layer: global index of the rank's first layer.
        rank, size: of tensor parallelism.

    Raises:
        ValueError: if a tensor that megatron-core fuses has another shape than the configuration says.
    """
    for name in names:
        if not layer_of(name)[1].startswith(_DECISION):
            yield name, _from_hf(hf, weights, name, first_layer, lambda x, dim=0: x.chunk(size, dim=dim)[rank])


def to_hf(hf: LlamaConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face names for whole (unsharded) megatron-core tensors with global layer numbers."""
    out: dict[str, Tensor] = {}
    heads, size = hf.num_key_value_heads, hf.head_dim
    for name, tensor in tensors.items():
        layer, local = layer_of(name)
        prefix = f"model.layers.{layer}."
        if local == "self_attention.linear_qkv.weight":
            grouped = tensor.view(heads, -1, size, hf.hidden_size)
            queries = grouped.shape[1] - 2
            parts = grouped.split([queries, 1, 1], dim=1)
            for letter, part in zip("qkv", parts, strict=True):
                out[f"{prefix}self_attn.{letter}_proj.weight"] = part.reshape(-1, hf.hidden_size).contiguous()
        elif local == "mlp.linear_fc1.weight":
            gate, up = tensor.chunk(2)
            out[prefix + "mlp.gate_proj.weight"], out[prefix + "mlp.up_proj.weight"] = gate.clone(), up.clone()
        elif local.startswith(_DECISION):
            rows = tensor.view(heads, -1, *tensor.shape[1:]).transpose(0, 1)
            out[f"{prefix}self_attn.decision.{local.removeprefix(_DECISION)}"] = rows.flatten(0, 1).contiguous()
        else:
            out[_PLAIN[local] if layer is None else prefix + _PLAIN[local]] = tensor
    return out


def layer_of(name: str) -> tuple[int | None, str]:
    """``decoder.layers.3.mlp.x`` → ``(3, "mlp.x")``; other names → ``(None, name)``."""
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        return int(parts[2]), ".".join(parts[3:])
    return None, name


def _from_hf(
    hf: LlamaConfig, weights: Callable[[str], Tensor], name: str, first_layer: int, cut: Callable[..., Tensor]
) -> Tensor:
    layer, local = layer_of(name)
    if local == "output_layer.weight" and hf.tie_word_embeddings:  # the last pipeline stage's copy
        local = "embedding.word_embeddings.weight"
    prefix = "" if layer is None else f"model.layers.{layer + first_layer}."
    if local == "self_attention.linear_qkv.weight":
        heads, size = hf.num_key_value_heads, hf.head_dim
        rows = {"q": hf.num_attention_heads * size, "k": heads * size, "v": heads * size}
        parts = (_of_rows(weights, f"{prefix}self_attn.{x}_proj.weight", rows[x], hf) for x in "qkv")
        grouped = [cut(part.view(heads, -1, size, hf.hidden_size)) for part in parts]
        return torch.cat(grouped, dim=1).reshape(-1, hf.hidden_size)
    if local == "mlp.linear_fc1.weight":
        parts = (_of_rows(weights, f"{prefix}mlp.{x}_proj.weight", hf.intermediate_size, hf) for x in ("gate", "up"))
        return torch.cat([cut(part) for part in parts])
    whole = weights(prefix + _PLAIN[local])
    return cut(whole, _CUT[local]) if local in _CUT else whole


def _of_rows(weights: Callable[[str], Tensor], name: str, rows: int, hf: LlamaConfig) -> Tensor:
    """The tensor of that name, refused if it is not ``[rows, hidden]``: fused tensors would hide a wrong shape."""
    tensor = weights(name)
    if tuple(tensor.shape) != (rows, hf.hidden_size):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} in the weights and {(rows, hf.hidden_size)} by config.json: "
            "they do not belong together"
        )
    return tensor
