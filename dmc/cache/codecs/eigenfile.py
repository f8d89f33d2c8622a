"""The file of `dmc calibrate`: bases of Eigen Attention, as safetensors, with the hash of their model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "dmc-eigen-1"


@dataclass(frozen=True)
class Bases:
    """Orthonormal bases of one layer's heads.

    Attributes:
        keys: ``[H, D, r_k]``, of keys before RoPE.
        values: ``[H, D, r_v]``.
    """

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class EigenFile:
    """Content of a file.

    Attributes:
        model_hash: `dmc.model.fingerprint.model_hash` of the model.
        frequencies: fp32 ``[D / 2]`` of its RoPE.
        scaling: attention factor of its RoPE, by which cos and sin are multiplied.
        layers: bases of each.
        notes: how it was made: budget, text, tokens, errors of the layers.
    """

    model_hash: str
    frequencies: Tensor
    scaling: float
    layers: list[Bases]
    notes: dict[str, str]


def write(path: Path, made: EigenFile) -> None:
    """Writes a file atomically: first under another name, then renamed."""
    tensors = {"frequencies": made.frequencies.float().contiguous()}
    known = {"format": FORMAT, "model_hash": made.model_hash, "rope_scaling": repr(made.scaling)}
    for number, bases in enumerate(made.layers):
        tensors[f"layers.{number}.keys"] = bases.keys.float().contiguous()
        tensors[f"layers.{number}.values"] = bases.values.float().contiguous()
    part = path.with_name(f".{path.name}.part")
    try:
        save_file(tensors, str(part), metadata={**made.notes, **known})
        part.replace(path)
    except (SafetensorError, OSError) as error:
        part.unlink(missing_ok=True)
        raise ValueError(f"{path} cannot be written: {error}") from error


def read(path: Path) -> EigenFile:
    """Reads a file.

    Raises:
        ValueError: if it is missing, damaged, or not a file of `dmc calibrate`.
    """
    if not path.is_file():
        raise ValueError(f"eigen codec: {path} is missing; `dmc calibrate DIR --text TEXT --out {path}` makes it")
    try:
        with safe_open(path, framework="pt") as file:
            notes = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"eigen codec: {path} is damaged or not a safetensors file: {error}") from error
    if notes.pop("format", None) != FORMAT:
        raise ValueError(f"eigen codec: {path} is not a file of `dmc calibrate` (format {FORMAT})")
    try:
        count = (len(tensors) - 1) // 2
        layers = [Bases(tensors[f"layers.{i}.keys"], tensors[f"layers.{i}.values"]) for i in range(count)]
        bases = [part for one in layers for part in (one.keys, one.values)]
        if not bases or any(part.dim() != 3 or 2 * len(tensors["frequencies"]) != part.shape[1] for part in bases):
            raise ValueError(f"eigen codec: {path} holds no bases [H, D, r] for each layer; make it again with `dmc calibrate`")
        # A file without the field is of a model whose RoPE has none: others could not be loaded when it was written.
        scaling = float(notes.pop("rope_scaling", "1.0"))
        return EigenFile(notes.pop("model_hash"), tensors["frequencies"], scaling, layers, notes)
    except KeyError as error:
        raise ValueError(f"eigen codec: {path} lacks {error.args[0]}; make it again with `dmc calibrate`") from error
