"""Any registered codec, ready made: eigen needs a file of bases, which is written here."""

import tempfile
from functools import cache
from pathlib import Path

import torch

from dmc.cache import codec
from dmc.cache.codecs.eigenfile import Bases, EigenFile, write


def frequencies(size, theta):
    """Inverse frequencies of RoPE without scaling, fp32 [D / 2]."""
    return 1.0 / theta ** (torch.arange(0, size, 2).float() / size)


def eigen_file(path, *, layers, heads, size, ranks, theta=100.0, scaling=1.0, model_hash="none", seed=0):
    """Random orthonormal bases, ``ranks``: (of keys, of values) for each layer → the path as text."""
    generator = torch.Generator().manual_seed(seed)

    def basis(rank):
        return torch.linalg.qr(torch.randn(heads, size, size, generator=generator))[0][:, :, :rank]

    made = [Bases(basis(keys), basis(values)) for keys, values in ranks[:layers]]
    write(Path(path), EigenFile(model_hash, frequencies(size, theta), scaling, made, {}))
    return str(path)


@cache
def _file(layers, heads, size, theta, model_hash):
    folder = tempfile.TemporaryDirectory()
    ranks = [(size - number % 2, size - 2) for number in range(layers)]
    path = Path(folder.name) / "eigen.safetensors"
    return eigen_file(path, layers=layers, heads=heads, size=size, ranks=ranks, theta=theta, model_hash=model_hash), folder


def needed(name, *, layers, heads, size, theta=100.0, model_hash="none"):
    """Settings without which a codec cannot be made."""
    return {"file": _file(layers, heads, size, theta, model_hash)[0]} if name == "eigen" else {}


def stored(name, *, layers, heads, size, theta=100.0):
    """A codec by name for a model of that shape."""
    return codec(name, **needed(name, layers=layers, heads=heads, size=size, theta=theta))
