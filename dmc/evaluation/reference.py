"""What the uncompressed model predicts for windows of a text, computed once and kept on disk.

Kept are last hidden states, not logits: they are smaller by vocabulary / hidden size (85 times for SmolLM2-135M), and
the product with the model's output matrix gives the logits back exactly as they were.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dmc.cache import KVCache, Shape, codec, policy
from dmc.engine.runner import Chunk, Runner
from dmc.evaluation.provenance import model_hash
from dmc.evaluation.windows import Windows
from dmc.model import Decoder, read_config

_FORMAT = 1  # of the files; goes into their names
_CHUNK = 512  # tokens run through the model at a time


@dataclass(frozen=True)
class Reference:
    """Predictions of an uncompressed model.

    Attributes:
        hidden: ``[W, S, hidden]``, last hidden states at the scored positions.
        head: ``[V, hidden]``, output matrix.
        model: name of its directory.
        model_hash: see `dmc.evaluation.provenance.model_hash`.
        windows_hash: of the windows that it is for.
        token_bytes: of the model's keys and values of one token in bf16.
    """

    hidden: Tensor
    head: Tensor
    model: str
    model_hash: str
    windows_hash: str
    token_bytes: int

    def logprobs(self, rows: slice, place: int) -> Tensor:
        """Log-probabilities of windows ``rows`` at scored position ``place``: ``[rows, V]``, fp32 at least."""
        logits = self.hidden[rows, place].to(self.head.device) @ self.head.T
        return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)


def default_store() -> Path:
    """Where references are kept unless the user says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dmc" / "references"


def reference(
    directory: str | Path,
    windows: Windows,
    *,
    store: str | Path | None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Reference:
    """Predictions of a plain model for the scored tokens of windows, from ``store`` if it has them.

    Args:
        directory: of the base model: the one that was retrofitted, or the one whose cache is compressed.
        windows: of tokens of the model's own vocabulary.
        store: folder of kept references; None keeps nothing.
        dtype, device: of the model.

    Raises:
        ValueError: if the directory holds a retrofitted model or none, or the windows are too long for it.
    """
    config, digest = read_config(directory), model_hash(directory)
    if config.decision is not None:
        raise ValueError(
            f"{directory} holds a retrofitted model, which cannot say what the uncompressed one predicts: give the base model "
            "that it was retrofitted from"
        )
    check_fits(windows, config.vocab_size, config.positions, directory)
    model = Decoder.load(directory, dtype=dtype, device=device)
    path = None
    if store is not None:
        kind = f"{str(dtype)[6:]}-{torch.device(device).type}"
        path = Path(store) / f"{digest}-{windows.hash}-{kind}-{_FORMAT}.safetensors"
    hidden = path and read_kept(path, "hidden", (len(windows.tokens), windows.scored, config.hidden_size), dtype)
    if hidden is None:
        hidden = _predict(model, windows)
        if path:
            keep(path, "hidden", hidden)
    token_bytes = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return Reference(hidden, model.head, Path(directory).resolve().name, digest, windows.hash, token_bytes)


def check_fits(windows: Windows, vocabulary: int, positions: int, directory: str | Path) -> None:
    """Raises ValueError if a model cannot run these windows."""
    if windows.tokens.shape[1] - 1 > positions:
        raise ValueError(
            f"windows of {windows.prompt} + {windows.scored} tokens are longer than the {positions} positions of {directory}: "
            "ask for fewer tokens"
        )
    if windows.tokens.min() < 0 or windows.tokens.max() >= vocabulary:
        raise ValueError(f"the windows hold tokens outside the vocabulary of {directory}, which has {vocabulary}")


def _predict(model: Decoder, windows: Windows) -> Tensor:
    """Plain causal attention over whole windows."""
    config = model.config
    shape = Shape(config.num_hidden_layers, config.num_key_value_heads, config.head_dim, model.dtype)
    runner = Runner(model, KVCache(shape, policy("full"), codec("dense"), slots=1, device=model.device))
    kept = []
    for row in windows.tokens.tolist():
        prompt, parts = runner.cache.prompt(), []
        for start in range(0, len(row) - 1, _CHUNK):
            _, (hidden,) = runner.step([], [], [], [Chunk(prompt, row[start : min(start + _CHUNK, len(row) - 1)])])
            parts.append(hidden)
        kept.append(torch.cat(parts)[windows.prompt :].cpu())
    return torch.stack(kept)


def read_kept(path: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """A tensor that `keep` has written; None if the file is not there or is incomplete: it is computed again then."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            kept = file.get_tensor(name)
    except (SafetensorError, OSError):
        return None
    return kept if tuple(kept.shape) == shape and kept.dtype == dtype else None


def keep(path: Path, name: str, tensor: Tensor) -> None:
    """Writes a tensor atomically, whoever else writes the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    number, part = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(number)
    try:
        save_file({name: tensor.contiguous()}, part)
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
