"""Weights of a model directory, from one safetensors file or several."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class Weights:
    """The tensors of a directory by their Hugging Face names, read when asked for.

    Args:
        directory: with model.safetensors, or model.safetensors.index.json and its shards.

    Raises:
        ValueError: if a file is missing, cut short or no safetensors file; the sentence names it.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._files = {}  # tensor name → open file
        for path in self._paths():
            if not path.is_file():
                raise ValueError(f"{path} is missing: the directory has no complete safetensors weights")
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error
            self._files |= dict.fromkeys(file.keys(), file)

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._files)

    def __len__(self) -> int:
        """How many tensors there are."""
        return len(self._files)

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor, which must have ``shape``.

        Raises:
            ValueError: if it is missing or has another shape.
        """
        return self.part(name, shape, 0, slice(None))

    def part(self, name: str, shape: tuple[int, ...], dim: int, which: slice) -> Tensor:
        """Of a tensor that has ``shape`` as a whole, a slice along dimension 0 or 1; nothing else of it is read.

        Raises:
            ValueError: as `get`.
        """
        if name not in self._files:
            raise ValueError(f"{self.directory} has no tensor {name}, which its config.json asks for")
        tensor = self._files[name].get_slice(name)
        if tuple(tensor.get_shape()) != shape:
            raise ValueError(
                f"{self.directory}: tensor {name} has shape {tensor.get_shape()}, but by config.json it is {list(shape)}"
            )
        return tensor[which] if dim == 0 else tensor[:, which]

    def _paths(self) -> Iterator[Path]:
        index = self.directory / _INDEX
        if not index.exists():
            yield self.directory / _SINGLE
            return
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index} is not an index of safetensors shards: {error!r}") from error
        yield from (self.directory / shard for shard in sorted(shards))
