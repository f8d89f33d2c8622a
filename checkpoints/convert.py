"""A Hugging Face directory into a model in training, and a training checkpoint back out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

import dmc.training  # noqa: F401 - before anything of megatron
from checkpoints import store
from checkpoints.names import to_hf, to_megatron
from checkpoints.trained import TrainedWeights
from dmc.families import ModelShape, shape_of
from dmc.training.config import recorded

__all__ = ["load_hf_state", "loader", "to_hf", "to_megatron"]


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
    settings = recorded(meta["config"]["dmc"])
    scale = settings.lora_alpha / settings.lora_rank if settings.train == "lora" else None
    tensors = TrainedWeights(checkpoint, shape_of(meta["hf_config"], where=checkpoint), lora_scale=scale)
    measured = {
        "held-out perplexity": round(meta["perplexity"], 4),
        "training text": meta["corpus_hash"],
        "held-out text": meta["held_out_hash"],
        "context, tokens": meta["config"]["data"]["sequence_length"],
    }
    results = {"base_model": meta.get("model_name") or Path(meta["config"]["run"]["model"]).name, "measured": measured}
    return tensors, meta | {
        "method": settings.method,
        "window": settings.recent,
        "looks_ahead": settings.looks_ahead,
        "decision": settings.decision,
        "offset": settings.offset,
        "gain": settings.gain,
        "results": results,
    }


def loader(
    hf: ModelShape, weights: Callable[[str], Tensor]
) -> Callable[[list[str], int, int, int], Iterator[tuple[str, Tensor]]]:
    """What `dmc.training.setup.load_weights` calls: (names, first layer, tensor rank, its size) → (name, tensor)s."""
    return lambda names, first_layer, rank, size: to_megatron(hf, weights, names, first_layer=first_layer, rank=rank, size=size)
