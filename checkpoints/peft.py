"""The low-rank updates of a retrofit as an adapter that the library peft reads.

The adapter holds the updates alone, not the decision heads, which no adapter of peft has: with it the base model computes what
the retrofit computes without compression.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

FOLDER = "adapter"  # within an export


def write(
    directory: Path, updates: Iterable[tuple[str, Tensor, Tensor]], *, base: str, rank: int, alpha: float, dtype: torch.dtype
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` to a new directory.

    Args:
        directory: to make.
        updates: (Hugging Face name of a weight, A ``[rank, inputs]``, B ``[outputs, rank]``).
        base: name or directory of the base model.
        rank: of the updates.
        alpha: they are scaled by ``alpha / rank``.
        dtype: of the tensors written.
    """
    tensors, targets = {}, set()
    for weight, a, b in updates:
        module = weight.removesuffix(".weight")
        targets.add(module.rsplit(".", 1)[1])
        for kind, tensor in (("A", a), ("B", b)):
            name = f"base_model.model.{module}.lora_{kind}.weight"
            tensors[name] = tensor.to(dtype).clone(memory_format=torch.contiguous_format)
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(targets),
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
