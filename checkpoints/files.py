"""Weights written to safetensors files in shards of a bounded size; `dmc.weights.Weights` reads them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_BYTES = 4 * 10**9


def write_weights(directory: Path, plan: Mapping[str, Tensor], fetch: Callable[[str], Tensor], limit: int) -> None:
    """Write ``model.safetensors``, or shards and their index; holds the tensors of one shard at a time.

    Args:
        directory: that gets the files.
        plan: for every name a tensor, on the meta device too, of the shape and dtype to write.
        fetch: returns the tensor of a name; converted to the plan's dtype here.
        limit: bytes of weights a shard holds at most (a single larger tensor gets a shard of its own).

    Raises:
        ValueError: if a fetched tensor has another shape than the plan says.
        OSError: if a file cannot be written.
    """
    shards = list(_shards(plan, limit))
    files = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors = {name: _ready(name, plan[name], fetch) for name in names}
        try:
            save_file(tensors, directory / file, metadata={"format": "pt"})
        except SafetensorError as error:  # what safetensors makes of a full disk
            raise OSError(f"{file} was not written: {error}") from None
        del tensors  # before the next shard is read
        files.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(map(_nbytes, plan.values()))}, "weight_map": files}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def parse_size(text: str) -> int:
    """``"4GB"``, ``"500 MB"``, ``"200MiB"`` or plain bytes → bytes.

    Raises:
        ValueError: if it is not such a size, or not positive.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", text.strip(), re.IGNORECASE)
    unit = (found and found[2] or "").lower()
    size = int(float(found[1]) * (1024 if "i" in unit else 1000) ** " kmgt".index(unit[:1] or " ")) if found else 0
    if size < 1:
        raise ValueError(f"{text!r} is not a size: give bytes or a number with a unit, as in 4GB or 500MB")
    return size


def _ready(name: str, wanted: Tensor, fetch: Callable[[str], Tensor]) -> Tensor:
    tensor = fetch(name).detach()
    if tensor.shape != wanted.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, and {tuple(wanted.shape)} is to be written")
    return tensor.to("cpu", wanted.dtype).contiguous()


def _shards(plan: Mapping[str, Tensor], limit: int) -> Iterator[list[str]]:
    names, size = [], 0
    for name, tensor in plan.items():
        if names and size + _nbytes(tensor) > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += _nbytes(tensor)
    yield names


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.dtype.itemsize
