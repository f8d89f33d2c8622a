"""Fitted decisions: linear heads that predict which tokens are still needed, and the file that holds them.

`dmc calibrate --decisions` fits the heads by ridge regression from forward passes alone. Serving reads them as a policy,
training as the start of a retrofit. Per layer and key/value head the score of token t is

    s_t = arrival · h_t + late · h_{t+w} + bias

h is the input of the attention block's projections (after input_layernorm), w the window. The score predicts the natural
logarithm of the largest attention that t receives from queries more than w tokens later. A token with s_t >= threshold is
kept, another one is dropped or merged. Always kept: the first `sinks` tokens of a document, and the newest w + 1.

Dimension letters: L layers, H key/value heads, T tokens, Q quantiles.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

FORMAT = "dmc-decisions-1"
QUANTILES = 2049  # entries that `dmc calibrate --decisions` stores; the finest step at both ends is 6e-7
_TENSORS = ("arrival", "late", "bias", "quantiles")
_AGAIN = "make it again with `dmc calibrate --decisions`"


@dataclass(frozen=True, eq=False)
class FittedDecisions:
    """Decision heads of one model and one window.

    Attributes:
        arrival: fp32 ``[L, H, hidden]``, weights on h_t.
        late: fp32 ``[L, H, hidden]``, weights on h_{t+w}; zeros if the heads were fitted at arrival only.
        bias: fp32 ``[L, H]``.
        window: w, at least 0.
        sinks: first tokens of each document that are always kept, at least 0.
        quantiles: fp32 ``[Q]``, not falling: quantiles of the score at `levels` over all layers and heads, on
            calibration tokens outside the sinks and the window.
        model: `dmc.model.fingerprint.model_hash` of the model.
        meta: how the file was made (text and its hash, tokens, target, R2 per layer, version, command); JSON values.

    Raises:
        ValueError: if a shape or dtype is wrong, a value is not finite, or the quantiles fall.
    """

    arrival: Tensor
    late: Tensor
    bias: Tensor
    window: int
    sinks: int
    quantiles: Tensor
    model: str
    meta: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks shapes and values."""
        shape = tuple(self.arrival.shape)
        if len(shape) != 3 or 0 in shape or self.late.shape != shape or tuple(self.bias.shape) != shape[:2]:
            raise ValueError(
                f"fitted decisions: arrival {shape}, late {tuple(self.late.shape)} and bias {tuple(self.bias.shape)} must be "
                "[layers, heads, hidden], the same, and [layers, heads]"
            )
        if self.quantiles.dim() != 1 or len(self.quantiles) < 2:
            raise ValueError(f"fitted decisions: quantiles of shape {tuple(self.quantiles.shape)} must be [Q], Q at least 2")
        for name in _TENSORS:
            tensor = getattr(self, name)
            if tensor.dtype != torch.float32:
                raise ValueError(f"fitted decisions: {name} is {tensor.dtype}, it must be torch.float32")
            if not tensor.isfinite().all():
                raise ValueError(f"fitted decisions: {name} holds NaN or infinity; {_AGAIN}")
        if (self.quantiles.diff() < 0).any():
            raise ValueError(f"fitted decisions: the quantiles fall; {_AGAIN}")
        if self.window < 0 or self.sinks < 0:
            raise ValueError(f"fitted decisions: window {self.window} and sinks {self.sinks} must be at least 0")

    @property
    def looks_ahead(self) -> bool:
        """True if the score reads h_{t+w}; False if it is complete when the token arrives."""
        return bool(self.late.any())

    def scores(self, layer: int, hidden: Tensor) -> Tensor:
        """Scores of one document from its start: the reference for training and serving.

        Args:
            layer: index of the block.
            hidden: ``[T, hidden]``, inputs of its attention projections.

        Returns:
            ``[T, H]``, fp32 (fp64 for fp64 input). +inf for the first `sinks` and the last `window` + 1 tokens, which are
            kept whatever the threshold is.
        """
        hidden = hidden if hidden.dtype == torch.float64 else hidden.float()
        arrival, late, bias = (x[layer].to(hidden) for x in (self.arrival, self.late, self.bias))
        scores = hidden.new_full((len(hidden), len(bias)), math.inf)
        behind = range(self.sinks, len(hidden) - self.window - 1)
        if behind:
            at = slice(behind.start, behind.stop)
            then = slice(at.start + self.window, at.stop + self.window)
            scores[at] = hidden[at] @ arrival.T + hidden[then] @ late.T + bias
        return scores

    def threshold(self, target_cr: float, length: int) -> float:
        """Smallest score that is kept, so that a document of ``length`` tokens reaches ``target_cr`` = tokens / kept tokens.

        The newest `window` + 1 tokens and the `sinks` count as kept. The ratio is met for text like that of the
        calibration; on other text the measured one differs.

        Returns:
            The threshold; -inf keeps everything (CR 1), +inf only what is always kept.

        Raises:
            ValueError: if ``target_cr`` is not a finite number of at least 1, ``length`` is below 1, or the tokens that are
                always kept make the ratio impossible.
        """
        if not (math.isfinite(target_cr) and target_cr >= 1):
            raise ValueError(f"target CR must be a finite number of at least 1, got {target_cr}")
        if length < 1:
            raise ValueError(f"target CR {target_cr:g}: the length must be at least 1 token, got {length}")
        always = min(length, self.window + 1 + self.sinks)
        kept = length / target_cr
        if kept < always:
            raise ValueError(
                f"target CR {target_cr:g} is impossible at {length} tokens: it would keep {length} / {target_cr:g} = {kept:.1f} "
                f"tokens, and the newest {self.window} + 1 and the first {self.sinks} are always kept; the largest CR at this "
                f"length is {length / always:.2f}"
            )
        if target_cr == 1:
            return -math.inf
        share = (kept - always) / (length - always)  # kept, of the tokens that may be dropped
        return math.inf if share == 0 else interpolate(1 - share, self.quantiles)

    def check(self, model_fingerprint: str, layers: int, heads: int, hidden: int, window: int) -> None:
        """Checks that the heads belong to a model and a window.

        Raises:
            ValueError: naming everything that differs.
        """
        own = (self.model, *self.arrival.shape, self.window)
        given = (model_fingerprint, layers, heads, hidden, window)
        names = ("model fingerprint", "layers", "key/value heads", "hidden size", "window")
        differs = [f"{name} {a}, not {b}" for name, a, b in zip(names, own, given, strict=True) if a != b]
        if differs:
            raise ValueError(
                f"these decisions were fitted for another model or window ({'; '.join(differs)}): "
                "fit them with `dmc calibrate --decisions` for this one"
            )

    def save(self, path: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Writes a safetensors file, atomically.

        Args:
            path: of the file; its folder must exist.
            dtype: of the weights in the file (arrival and late); torch.float16 halves its size.

        Raises:
            ValueError: if a weight is too large for ``dtype``, meta cannot be written as JSON, or the file cannot be written.
        """
        path = Path(path)
        tensors = {name: getattr(self, name).detach().cpu().contiguous() for name in _TENSORS}
        for name in ("arrival", "late"):
            tensors[name] = tensors[name].to(dtype)
            if not tensors[name].isfinite().all():
                raise ValueError(f"{path}: {name} has weights too large for {dtype}; write torch.float32")
        try:
            meta = json.dumps(self.meta, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: meta cannot be written as JSON: {error}") from error
        notes = {"format": FORMAT, "model": self.model, "window": str(self.window), "sinks": str(self.sinks), "meta": meta}
        content = save(tensors, notes | {"digest": _digest(tensors, notes)})
        part = None
        try:
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
                part = Path(file.name)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.chmod(0o644)
            part.replace(path)
        except OSError as error:
            if part is not None:
                part.unlink(missing_ok=True)
            raise ValueError(f"{path} cannot be written: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: str | Path) -> FittedDecisions:
        """Reads a file of `save`.

        Raises:
            ValueError: if the file is missing, damaged, of another format or version, or holds values that are not finite.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path} is missing; `dmc calibrate MODEL --decisions --text TEXT --out {path}` makes it")
        try:
            with safe_open(path, framework="pt") as file:
                notes = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged or not a safetensors file ({error}); {_AGAIN}") from error
        found = notes.get("format")
        if found != FORMAT:
            kind = f"has version {found}" if str(found).startswith("dmc-decisions-") else "is not a decisions file"
            raise ValueError(f"{path} {kind}, this program reads {FORMAT}; {_AGAIN}")
        digest = notes.pop("digest", None)
        if set(tensors) != set(_TENSORS) or digest != _digest(tensors, notes):
            raise ValueError(f"{path} is damaged: its content does not match its digest; {_AGAIN}")
        try:
            return cls(
                **{name: tensor.float() for name, tensor in tensors.items()},
                model=notes["model"],
                window=int(notes["window"]),
                sinks=int(notes["sinks"]),
                meta=json.loads(notes["meta"]),
            )
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} cannot be used: {error}") from error


def levels(count: int) -> Tensor:
    """Levels of ``count`` stored quantiles, fp64, from 0 to 1: ``(1 - cos(pi i / (count - 1))) / 2``, dense at both ends."""
    steps = torch.arange(count, dtype=torch.float64) / (count - 1)
    return torch.sin(steps * (math.pi / 2)).square()  # the same, without the cancellation near 0


def interpolate(level: float, quantiles: Tensor) -> float:
    """Quantile at ``level``, linear between the stored ones."""
    at = levels(len(quantiles))
    upper = int(torch.searchsorted(at, level).clamp(1, len(at) - 1))
    (low, high), (left, right) = at[upper - 1 : upper + 1].tolist(), quantiles[upper - 1 : upper + 1].tolist()
    return left + (right - left) * (level - low) / (high - low)


def _digest(tensors: dict[str, Tensor], notes: dict[str, str]) -> str:
    """16 hex digits of tensors and metadata: safetensors itself does not notice a changed byte."""
    digest = hashlib.sha256(json.dumps(notes, sort_keys=True).encode())
    for name in _TENSORS:
        tensor = tensors[name].cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def read_heads(path: str | Path) -> tuple[Tensor, Tensor, str | None]:
    """Linear heads that score a token by its hidden state alone, for policy kvzap.

    Args:
        path: safetensors with ``weight [L, H, hidden]`` and ``bias [L, H]``; or of `dmc calibrate --decisions --arrival-only`,
            which is checked as `FittedDecisions.load` does.

    Returns:
        weight and bias, fp32, and the fingerprint of the model that they were fitted for, None if the file has none.

    Raises:
        ValueError: if there is no such file, tensors are missing, have other shapes or values that are not finite, the file is
            damaged, or the heads look ahead.
    """
    try:
        with safe_open(path, framework="pt") as file:
            ours = str((file.metadata() or {}).get("format")).startswith("dmc-decisions-")
        found = {} if ours else load_file(path)
        decisions = FittedDecisions.load(path) if ours else None
        weight, bias = (decisions.arrival, decisions.bias) if decisions else (found["weight"].float(), found["bias"].float())
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(f"{path} does not hold the tensors weight and bias of linear heads ({error})") from None
    if weight.dim() != 3 or weight.shape[:2] != bias.shape or (decisions and decisions.late.any()):
        raise ValueError(f"{path} needs weight [L, H, hidden], bias [L, H] and no look-ahead (--arrival-only)")
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise ValueError(f"{path} has weights that are not finite")
    return weight, bias, decisions.model if decisions else None
