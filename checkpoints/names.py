"""Weights between Hugging Face's names and megatron-core's, one tensor at a time.

Which tensors a model has, and which of Hugging Face's one of megatron-core's holds, the family says (`dmc.families`).
megatron-core fuses q, k and v per key/value group (``q1..qG k v`` of group 1, then of group 2, ...) and gate
with up. The decision head's rows are interleaved per head on the megatron side (alpha, omega, alpha's late part) and
stacked on the Hugging Face side (all alphas, all omegas, all late parts). DMS has no omegas; only a head that looks ahead
has late parts and a bias.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from dmc.families import ModelShape

# Which dimension tensor parallelism cuts; the others every rank holds whole. The fused tensors are cut in their parts.
_CUT = {
    "embedding.word_embeddings.weight": 0,
    "output_layer.weight": 0,
    "self_attention.linear_proj.weight": 1,
    "mlp.linear_fc2.weight": 1,
}
_DECISION = "self_attention.decision."
_QKV, _GATED = "self_attention.linear_qkv", "mlp.linear_fc1"


def to_megatron(
    hf: ModelShape, weights: Callable[[str], Tensor], names: Iterable[str], *, first_layer: int, rank: int, size: int
) -> Iterator[tuple[str, Tensor]]:
    """``(megatron name, this rank's tensor)`` for every name the rank's model holds, each made when it is asked for.

    A tensor of `weights` is cut before it is copied: one that is mapped from a file (`Weights`) is read no further
    than the rank's part.

    Args:
        hf: the model.
        weights: returns a Hugging Face tensor by name, e.g. `Weights`.
        names: parameter names of the rank's GPTModel. Those of a decision head are skipped: it is new.
        first_layer: global index of the rank's first layer.
        rank, size: of tensor parallelism.

    Raises:
        ValueError: if a tensor that megatron-core fuses has another shape than the configuration says.
    """
    for name in names:
        if not layer_of(name)[1].startswith(_DECISION):
            yield name, _from_hf(hf, weights, name, first_layer, lambda x, dim=0: x.chunk(size, dim=dim)[rank])


def to_hf(hf: ModelShape, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face names for whole (unsharded) megatron-core tensors with global layer numbers."""
    out: dict[str, Tensor] = {}
    heads, size = hf.num_key_value_heads, hf.head_dim
    for name, tensor in tensors.items():
        layer, local = layer_of(name)
        prefix = "" if layer is None else f"model.layers.{layer}."
        if local.startswith(_DECISION):
            rows = tensor.view(heads, -1, *tensor.shape[1:]).transpose(0, 1)
            out[f"{prefix}self_attn.decision.{local.removeprefix(_DECISION)}"] = rows.flatten(0, 1).contiguous()
            continue
        module, kind = local.rsplit(".", 1)
        held = [f"{prefix}{part}.{kind}" for part in hf.family.tensors[module]]
        if module == _QKV:
            grouped = tensor.view(heads, -1, size, *tensor.shape[1:])
            parts = grouped.split([grouped.shape[1] - 2, 1, 1], dim=1)
            out |= {part_name: part.flatten(0, 2).contiguous() for part_name, part in zip(held, parts, strict=True)}
        elif module == _GATED:
            out |= {part_name: part.clone() for part_name, part in zip(held, tensor.chunk(2), strict=True)}
        else:
            (whole,) = held
            out[whole] = tensor
    return out


def layer_of(name: str) -> tuple[int | None, str]:
    """``decoder.layers.3.mlp.x`` → ``(3, "mlp.x")``; other names → ``(None, name)``."""
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        return int(parts[2]), ".".join(parts[3:])
    return None, name


def _from_hf(hf: ModelShape, weights: Callable[[str], Tensor], name: str, first_layer: int, cut: Callable[..., Tensor]) -> Tensor:
    layer, local = layer_of(name)
    if local == "output_layer.weight" and hf.tie_word_embeddings:  # the last pipeline stage's copy
        local = "embedding.word_embeddings.weight"
    prefix = "" if layer is None else f"model.layers.{layer + first_layer}."
    module, kind = local.rsplit(".", 1)
    held = [f"{prefix}{part}.{kind}" for part in hf.family.tensors[module]]
    if module == _QKV:
        heads, size = hf.num_key_value_heads, hf.head_dim
        counts = (hf.num_attention_heads, heads, heads)
        parts = (_of_rows(weights, part, count * size, hf) for part, count in zip(held, counts, strict=True))
        grouped = [cut(part.view(heads, -1, size, *part.shape[1:])) for part in parts]
        return torch.cat(grouped, dim=1).flatten(0, 2)
    if module == _GATED:
        return torch.cat([cut(_of_rows(weights, part, hf.intermediate_size, hf)) for part in held])
    whole = weights(*held)
    return cut(whole, _CUT[local]) if local in _CUT else whole


def _of_rows(weights: Callable[[str], Tensor], name: str, rows: int, hf: ModelShape) -> Tensor:
    """The tensor of that name, rejected if it is not ``[rows, hidden]`` (a bias: ``[rows]``): fused tensors would hide a wrong
    shape."""
    tensor = weights(name)
    wanted = (rows,) if name.endswith(".bias") else (rows, hf.hidden_size)
    if tuple(tensor.shape) != wanted:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} in the weights and {wanted} by config.json: they do not belong together"
        )
    return tensor
