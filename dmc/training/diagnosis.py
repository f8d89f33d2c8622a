"""What was wrong in a step: gradient norms by part of the model, tensors that are not finite, the sequences."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator

import torch
from megatron.core import parallel_state as mpu
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor, nn

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


def examine(chunks: list[nn.Module], optimizer: MegatronOptimizer, samples: Tensor) -> dict | None:
    """Gather from every rank, on rank 0; None elsewhere.

    Args:
        chunks: the parts of the model on this rank, gradients in ``main_grad``.
        optimizer: tells which part of a gradient is this rank's under the distributed optimizer.
        samples: ``[n]`` indices of this rank's sequences.

    Returns:
        ``samples`` (sorted indices of all ranks), ``gradient_norms`` (of each layer's attention and
        feed-forward, of embeddings and so on; before clipping), ``nonfinite`` (names of ``gradients`` and
        ``weights`` that hold NaN or infinite values). Layers count from 0 over the whole model.
    """
    squares: dict[str, float] = defaultdict(float)
    broken: dict[str, set[str]] = {"gradients": set(), "weights": set()}
    for name, weight in _parameters(chunks):
        own = _own_gradient(weight, optimizer)
        if not torch.isfinite(own).all():
            broken["gradients"].add(name)
        if not torch.isfinite(weight).all():
            broken["weights"].add(name)
        if param_is_not_shared(weight) and param_is_not_tensor_parallel_duplicate(weight):
            squares[_group(name)] += own.double().square().sum().item()
    everyone: list | None = [None] * torch.distributed.get_world_size() if torch.distributed.get_rank() == 0 else None
    torch.distributed.gather_object((dict(squares), broken, samples.tolist()), everyone)
    if everyone is None:
        return None
    groups = sorted({group for parts, _, _ in everyone for group in parts}, key=_natural)
    return {
        "samples": sorted({index for _, _, indices in everyone for index in indices}),
        "gradient_norms": {group: math.sqrt(sum(parts.get(group, 0.0) for parts, _, _ in everyone)) for group in groups},
        "nonfinite": {kind: sorted({name for _, names, _ in everyone for name in names[kind]}, key=_natural) for kind in broken},
    }


def _parameters(chunks: list[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """Trained parameters, layers under their number in the whole model."""
    for chunk in chunks:
        for name, weight in chunk.named_parameters():
            if not weight.requires_grad:
                continue
            layer = _LAYER.fullmatch(name)
            if layer:
                name = f"decoder.layers.{chunk.decoder.layers[int(layer[1])].layer_number - 1}.{layer[2]}"
            yield name, weight


def _own_gradient(weight: nn.Parameter, optimizer: MegatronOptimizer) -> Tensor:
    """The part of a reduced gradient that no other data-parallel rank reports."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        shards = getattr(part, "model_param_gbuf_map", None)  # of the distributed optimizer
        if shards is not None and weight in shards:
            own = part._get_model_param_range_map(weight)["param"]
            return weight.main_grad.view(-1)[own.start : own.end]
    distributed = any(hasattr(p, "model_param_gbuf_map") for p in getattr(optimizer, "chained_optimizers", [optimizer]))
    first = mpu.get_data_parallel_rank(with_context_parallel=True) == 0 and not distributed
    return weight.main_grad if first else weight.main_grad.view(-1)[:0]


def _group(name: str) -> str:
    """``decoder.layers.3.self_attention`` for a layer's tensors; else the module."""
    parts = name.split(".")
    return ".".join(parts[:4]) if _LAYER.fullmatch(name) else ".".join(parts[:-1])


def _natural(name: str) -> list:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
