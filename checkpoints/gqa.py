"""Fewer key/value heads by mean-pooling: the start of grouped-query up-training, the paper's training baseline.

Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints", EMNLP 2023:
the key (and value) heads of a group are averaged into one; then pretraining goes on. Consecutive heads form a group,
as the query heads that read them do. The rotation is the same for all heads, so the mean of rotated keys is the
rotated mean. Linear in the weights, and exact where the heads of a group are equal.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from checkpoints.export_hf import copy_tokenizer
from checkpoints.files import write_weights
from dmc.families import read_shape
from dmc.weights import Weights

_POOLED = tuple(f"self_attn.{letter}_proj.{kind}" for letter in "kv" for kind in ("weight", "bias"))


def convert(source: Path, out: Path, kv_heads: int, *, dtype: torch.dtype | None, limit: int) -> None:
    """Write the model of `source` with `kv_heads` key/value heads to the existing, empty directory `out`.

    Args:
        source: a Hugging Face model directory.
        out: gets safetensors, config.json, the tokenizer's files and generation_config.json if `source` has one.
        kv_heads: key/value heads of the result; divides those of `source`.
        dtype: of the weights written; None keeps every tensor's own. The mean is taken in fp32.
        limit: bytes a shard of weights holds at most; also about what is held in memory.

    Raises:
        ValueError: if `source` is not a readable model, or `kv_heads` does not divide its key/value heads.
    """
    hf, weights = read_shape(source), Weights(source)
    heads = hf.num_key_value_heads
    if kv_heads < 1 or kv_heads >= heads or heads % kv_heads:
        smaller = ", ".join(str(n) for n in range(1, heads) if heads % n == 0) or "none"
        raise ValueError(f"{source} has {heads} key/value heads, which cannot become {kv_heads}: possible are {smaller}")

    def planned(name: str) -> Tensor:
        tensor = weights.meta(name)
        rows = tensor.shape[0]
        if name.endswith(_POOLED):
            if rows != heads * hf.head_dim:
                raise ValueError(
                    f"{name} of {source} has {rows} rows, not the {heads} heads of {hf.head_dim} of its config.json: "
                    "they do not belong together"
                )
            rows = kv_heads * hf.head_dim
        return torch.empty(rows, *tensor.shape[1:], dtype=dtype or tensor.dtype, device="meta")

    def made(name: str) -> Tensor:
        return pool(weights(name), hf.head_dim, heads // kv_heads) if name.endswith(_POOLED) else weights(name)

    write_weights(out, {name: planned(name) for name in weights}, made, limit)
    settings = json.loads((source / "config.json").read_text()) | {"num_key_value_heads": kv_heads}
    if dtype is not None:
        settings.pop("torch_dtype", None)
        settings["dtype"] = str(dtype).removeprefix("torch.")
    (out / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    copy_tokenizer(source, out)
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", out / "generation_config.json")


def pool(weight: Tensor, size: int, group: int) -> Tensor:
    """Mean of every `group` consecutive heads: ``[H · size, ...]`` → ``[H / group · size, ...]`` fp32."""
    return weight.unflatten(0, (-1, group, size)).float().mean(1).flatten(0, 1)
