"""State of a fit of decisions between two layers, on disk: what a crash leaves to continue from."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_FORMAT = "dmc-decisions-state-1"


def fingerprint(*parts: object) -> str:
    """16 hex digits of whatever determines a fit."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.cpu().contiguous().numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode())
    return digest.hexdigest()[:16]


@dataclass
class FitState:
    """What the layers so far gave.

    Attributes:
        key: `fingerprint` of the fit.
        hidden: ``[N, T, hidden]``, inputs of the next block.
        weights: of each layer, fp32 ``[F, H]``.
        scores: of each layer, fp32 ``[N n, H]``.
        r2: of each layer.
        dropped: shares of tokens that eviction dropped, of each threshold measured so far.
    """

    key: str
    hidden: Tensor
    weights: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    r2: list[float] = field(default_factory=list)
    dropped: list[float] = field(default_factory=list)

    @property
    def layers(self) -> int:
        """Number of layers that are fitted."""
        return len(self.weights)

    @property
    def steps(self) -> tuple[int, int]:
        """Numbers of layers that are fitted and of thresholds that are measured."""
        return len(self.weights), len(self.dropped)

    @classmethod
    def start(cls, path: Path | None, key: str, hidden: Tensor) -> FitState:
        """The state in ``path`` if it is of the same fit, else a new one; says so on stderr if there is another file."""
        if path is None or not path.is_file():
            return cls(key, hidden)
        try:
            with safe_open(path, framework="pt") as file:
                notes = file.metadata() or {}
                if notes.get("format") == _FORMAT and notes.get("key") == key:
                    count = int(notes["layers"])
                    parts = [[file.get_tensor(f"{name}.{i}") for i in range(count)] for name in ("weights", "scores")]
                    print(f"{path}: continuing an interrupted run after layer {count}", file=sys.stderr)
                    return cls(key, file.get_tensor("hidden"), *parts, *(file.get_tensor(n).tolist() for n in ("r2", "dropped")))
            print(f"{path} is of another model, text or settings: starting from the first layer", file=sys.stderr)
        except (SafetensorError, OSError) as error:
            print(f"{path} is damaged ({error}): starting from the first layer", file=sys.stderr)
        return cls(key, hidden)

    def add(self, weights: Tensor, scores: Tensor, r2: float, hidden: Tensor) -> None:
        """Takes the result of a layer and the inputs of the next one."""
        self.weights.append(weights)
        self.scores.append(scores)
        self.r2.append(r2)
        self.hidden = hidden

    def write(self, path: Path | None) -> None:
        """Writes the state atomically; None keeps it in memory only.

        Raises:
            ValueError: if the file cannot be written.
        """
        if path is None:
            return
        numbers = {name: torch.tensor(getattr(self, name), dtype=torch.float64) for name in ("r2", "dropped")}
        tensors = {"hidden": self.hidden} | numbers
        for name in ("weights", "scores"):
            tensors |= {f"{name}.{i}": part.contiguous() for i, part in enumerate(getattr(self, name))}
        part = path.with_name(path.name + ".part")
        try:
            save_file(tensors, str(part), metadata={"format": _FORMAT, "key": self.key, "layers": str(self.layers)})
            part.replace(path)
        except (SafetensorError, OSError) as error:
            part.unlink(missing_ok=True)
            raise ValueError(f"{path} cannot be written: {error}") from error

    @staticmethod
    def remove(path: Path | None) -> None:
        """Deletes the file."""
        if path is not None:
            path.unlink(missing_ok=True)
