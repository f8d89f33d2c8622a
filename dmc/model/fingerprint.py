"""Which model it is: a hash of its files."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import torch.distributed as dist


def model_hash(directory: str | Path, init: str = "pretrained", *, together: bool = False) -> str:
    """16 hex digits of a Hugging Face directory's config and weight files: what a run started from, or an engine serves.

    Args:
        directory: with config.json and safetensors weights.
        init: how a training run begins; other than "pretrained" it reads no weights, and none count.
        together: all ranks of the initialised process group call it, and each reads its share of the files.

    Raises:
        ValueError: if there is no config.json, or no safetensors file where weights count.
    """
    directory = Path(directory)
    weights = sorted(directory.glob("*.safetensors")) if init == "pretrained" else []
    if not (directory / "config.json").is_file() or (init == "pretrained" and not weights):
        raise ValueError(f"{directory} is not a model directory: it needs config.json and safetensors weights")
    digest = hashlib.sha256((directory / "config.json").read_bytes() + init.encode())
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    shares = [[_digest(path, path.stat().st_mtime_ns, path.stat().st_size) for path in weights[rank::ranks]]]
    if together:
        shares, own = [[]] * ranks, shares[0]
        dist.all_gather_object(shares, own)
    for i in range(len(weights)):
        digest.update(shares[i % ranks][i // ranks])
    return digest.hexdigest()[:16]


@cache
def _digest(path: Path, changed: int, size: int) -> bytes:  # noqa: ARG001 - they are the file's state
    """Digest of a file as it was at a time; kept, since hashing takes seconds for a large model."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
