"""dmc: retrofit a pretrained LLM with Dynamic Memory Compression and serve it from a compressed KV cache."""

from importlib import import_module

__version__ = "0.2.0"

_LAZY = {"LLM": "dmc.engine", "SamplingParams": "dmc.engine"}  # imported on first use: `import dmc` stays light
_MODULES = ("cache", "engine", "functional", "model")


def __getattr__(name: str) -> object:
    """Lazily import the public API."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name in _MODULES:
        return import_module(f"dmc.{name}")
    raise AttributeError(f"module 'dmc' has no attribute {name!r}")
