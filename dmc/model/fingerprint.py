"""Which model it is: a hash of its files."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path


def model_hash(directory: str | Path) -> str:
    """16 hex digits of a Hugging Face directory's config and weight files.

    A training run records the same digits of the model that it started from.

    Raises:
        ValueError: if there is no config.json or no safetensors file.
    """
    directory = Path(directory)
    weights = sorted(directory.glob("*.safetensors"))
    if not weights or not (directory / "config.json").is_file():
        raise ValueError(f"{directory} is no model directory: it needs config.json and safetensors weights")
    state = tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in (directory / "config.json", *weights))
    return _digest(state)


@cache
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Of files as they were at a time; kept, since hashing takes seconds for a large model."""
    config, *weights = (path for path, _, _ in files)
    digest = hashlib.sha256(config.read_bytes() + b"pretrained")
    for path in weights:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
