"""Weights in safetensors files: read by name one tensor at a time, written in shards of a bounded size."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_BYTES = 4 * 10**9
_STORED = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class HfWeights:
    """Tensors of a Hugging Face directory by name, each read when it is asked for from its safetensors file.

    The files stay mapped, not read: a tensor costs memory while it is held, the rest of the model does not.
    """

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        index = self._directory / "model.safetensors.index.json"
        if index.is_file():
            files = _indexed(index)
        elif (self._directory / "model.safetensors").is_file():
            files = ["model.safetensors"]
        else:
            raise ValueError(_no_weights(self._directory))
        self._file_of: dict[str, Path] = {}
        for name in files:
            path = self._directory / name
            if not path.is_file():
                raise ValueError(f"{directory} lacks {name}, which its index names: copy the missing shard")
            for key in self._open(path).keys():  # noqa: SIM118 - safe_open is no mapping
                self._file_of[key] = path

    def __call__(self, name: str) -> Tensor:
        """The tensor of that name, mapped from its file: what is not looked at is not read.

        Raises:
            ValueError: if no file holds it, its file is truncated, or the weights are quantised.
        """
        self.meta(name)
        return self._open(self._path(name)).get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        """The names, in the order of the files."""
        return iter(self._file_of)

    def meta(self, name: str) -> Tensor:
        """An empty tensor on the meta device with the shape and dtype of that name's tensor; reads the header alone.

        Raises:
            ValueError: as for a call, and if the weights are quantised.
        """
        part = self._open(self._path(name)).get_slice(name)
        if part.get_dtype() not in _STORED:
            raise ValueError(
                f"{name} in {self._directory} is stored as {part.get_dtype()}: only {', '.join(_STORED)} weights are read; "
                "take the checkpoint that was not quantised"
            )
        return torch.empty(part.get_shape(), dtype=_STORED[part.get_dtype()], device="meta")

    def _path(self, name: str) -> Path:
        if name not in self._file_of:
            raise ValueError(f"{self._directory} has no tensor {name!r}: the weights do not match its config.json")
        return self._file_of[name]

    @staticmethod
    def _open(path: Path):  # noqa: ANN205
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is truncated or no safetensors file ({error}): fetch it again") from None


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
        ValueError: if it is no such size, or not positive.
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


def _indexed(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of weights ({type(error).__name__}: {error}): fetch it again") from None


def _no_weights(directory: Path) -> str:
    missing = f"{directory} has no model.safetensors and no model.safetensors.index.json"
    if any(directory.glob("pytorch_model*.bin*")):
        return (
            f"{missing}, only pytorch_model.bin, which is a pickle and not read here: convert it once with "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) of transformers"
        )
    if any(directory.glob("*.gguf")):
        return f"{missing}, only a GGUF file: convert it once with scripts/gguf_to_hf.py"
    return missing
