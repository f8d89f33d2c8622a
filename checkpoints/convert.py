"""A Hugging Face Llama directory into a model in training, and a training checkpoint back out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import LlamaConfig

import dmc.training  # noqa: F401 - before anything of megatron
from checkpoints import store
from checkpoints.files import HfWeights
from checkpoints.names import to_hf, to_megatron
from checkpoints.trained import TrainedWeights
from dmc.rope import settings_of
from dmc.training.config import recorded

__all__ = ["HfWeights", "count", "load_hf_state", "loader", "read_config", "to_hf", "to_megatron"]

def read_config(directory: str | Path) -> LlamaConfig:
    """The configuration of a Hugging Face Llama directory.

    Raises:
        ValueError: if there is none, or it is of another architecture, or its values do not make a Llama.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} is no model directory: it has no config.json")
    try:
        values = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable as JSON: {error}") from None
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind != "llama":
        raise ValueError(f"{directory} holds a model of type {kind!r}: only Llama (model_type 'llama') can be retrofitted")
    try:
        hf = LlamaConfig(**values)
    except (StrictDataclassError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not describe a Llama: {' '.join(str(error).split())}") from None
    try:
        settings_of(hf)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return hf


def load_hf_state(checkpoint: str | Path) -> tuple[TrainedWeights, dict]:
    """A training checkpoint, of whatever parallel layout, under Hugging Face names.

    Returns:
        The weights, each read from the disk when it is looked up, and the checkpoint's meta data with the
        keys that `checkpoints.export_hf` takes: ``hf_config``, ``tokenizer_dir``, ``method``, ``window``,
        ``looks_ahead``, ``decision``, ``offset``, ``gain``, ``target_cr``, ``measured_cr``, ``step``, ``compressed`` and
        ``results`` for the model card.

    Raises:
        ValueError: if the checkpoint is incomplete or damaged.
    """
    meta = store.verify(checkpoint)
    tensors = TrainedWeights(checkpoint, LlamaConfig(**meta["hf_config"]))
    settings = recorded(meta["config"]["dmc"])
    measured = {
        "held-out perplexity": round(meta["perplexity"], 4), "training text": meta["corpus_hash"],
        "held-out text": meta["held_out_hash"], "context, tokens": meta["config"]["data"]["sequence_length"],
    }
    results = {"base_model": Path(meta["config"]["run"]["model"]).name, "measured": measured}
    return tensors, meta | {
        "method": settings.method, "window": settings.recent, "looks_ahead": settings.looks_ahead,
        "decision": settings.decision, "offset": settings.offset, "gain": settings.gain, "results": results,
    }


def loader(
    hf: LlamaConfig, weights: Callable[[str], Tensor]
) -> Callable[[list[str], int, int, int], Iterator[tuple[str, Tensor]]]:
    """What `dmc.training.setup.load_weights` calls: (names, first layer, tensor rank, its size) → (name, tensor)s."""
    return lambda names, first_layer, rank, size: to_megatron(
        hf, weights, names, first_layer=first_layer, rank=rank, size=size
    )


def count(hf: LlamaConfig) -> int:
    """Parameters of the model."""
    attention = 2 * hf.hidden_size * hf.head_dim * (hf.num_attention_heads + hf.num_key_value_heads)
    layer = attention + 3 * hf.hidden_size * hf.intermediate_size + 2 * hf.hidden_size
    embeddings = hf.vocab_size * hf.hidden_size * (1 if hf.tie_word_embeddings else 2)
    return hf.num_hidden_layers * layer + embeddings + hf.hidden_size
