"""Weights of a model directory, from one safetensors file or several: read by name when asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_STORED = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Weights:
    """The tensors of a directory by their Hugging Face names.

    A file is mapped again for each tensor: what was read costs memory while the tensor is held, and no longer.

    Args:
        directory: with model.safetensors, or model.safetensors.index.json and its shards.

    Raises:
        ValueError: if a file is missing, cut short or no safetensors file; the sentence names it and what to do.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._files: dict[str, Path] = {}  # of the tensor of a name
        for path in self._paths():
            if not path.is_file():
                raise ValueError(f"{self.directory} lacks {path.name}, which its index names: copy the missing shard")
            self._files |= dict.fromkeys(_opened(path).keys(), path)

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        """The names, in the order of the files."""
        return iter(self._files)

    def __len__(self) -> int:
        """How many tensors there are."""
        return len(self._files)

    def __call__(self, name: str) -> Tensor:
        """The tensor of that name, mapped from its file.

        Raises:
            ValueError: if there is none, or the weights are quantised.
        """
        self.meta(name)
        return _opened(self._files[name]).get_tensor(name)

    def meta(self, name: str) -> Tensor:
        """An empty tensor on the meta device with the shape and dtype of that name's tensor; reads the header alone.

        Raises:
            ValueError: as for a call.
        """
        part = self._slice(name)
        if part.get_dtype() not in _STORED:
            raise ValueError(
                f"{name} in {self.directory} is stored as {part.get_dtype()}: only {', '.join(_STORED)} weights are read; "
                "take the checkpoint that was not quantised"
            )
        return torch.empty(part.get_shape(), dtype=_STORED[part.get_dtype()], device="meta")

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor, which must have ``shape``.

        Raises:
            ValueError: if it is missing or has another shape.
        """
        return self.part(name, shape, 0, slice(None))

    def part(self, name: str, shape: tuple[int, ...], dim: int, which: slice) -> Tensor:
        """A slice along dimension 0 or 1 of a tensor that has ``shape`` as a whole; nothing else of it is read.

        Raises:
            ValueError: as `get`.
        """
        tensor = self._slice(name)
        if tuple(tensor.get_shape()) != shape:
            raise ValueError(
                f"{self.directory}: tensor {name} has shape {tensor.get_shape()}, but by config.json it is {list(shape)}"
            )
        return tensor[which] if dim == 0 else tensor[:, which]

    def _slice(self, name: str):  # noqa: ANN202 - a type of safetensors that it does not name
        if name not in self._files:
            raise ValueError(f"{self.directory} has no tensor {name!r}: the weights do not match its config.json")
        return _opened(self._files[name]).get_slice(name)

    def _paths(self) -> Iterator[Path]:
        index = self.directory / _INDEX
        if not index.exists():
            if not (self.directory / _SINGLE).is_file():
                raise ValueError(_no_weights(self.directory))
            yield self.directory / _SINGLE
            return
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index} is not an index of weights ({type(error).__name__}: {error}): fetch it again") from None
        yield from (self.directory / shard for shard in sorted(shards))


def _opened(path: Path):  # noqa: ANN202
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}): fetch it again") from None


def _no_weights(directory: Path) -> str:
    missing = f"{directory} has no {_SINGLE} and no {_INDEX}"
    if any(directory.glob("pytorch_model*.bin*")):
        return (
            f"{missing}, only pytorch_model.bin, which is a pickle and not read here: convert it once with "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) of transformers"
        )
    if any(directory.glob("*.gguf")):
        return f"{missing}, only a GGUF file: convert it once with scripts/gguf_to_hf.py"
    return missing
