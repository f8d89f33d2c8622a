"""Weights between Hugging Face's Llama names and megatron-core's, one tensor at a time.

megatron-core fuses q, k and v per key/value group (``q1..qG k v`` of group 1, then of group 2, ...) and gate
with up. The decision head's rows are interleaved per head (alpha, omega) on the megatron side and stacked
(all alphas, all omegas) on the Hugging Face side.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import dmc.training  # noqa: F401 - before anything of megatron
from checkpoints import store

# Which dimension tensor parallelism cuts; None: every rank holds the whole.
_CUT = {
    "embedding.word_embeddings.weight": 0, "output_layer.weight": 0, "self_attention.linear_qkv.weight": 0,
    "self_attention.decision.weight": 0, "self_attention.linear_proj.weight": 1, "mlp.linear_fc1.weight": 0,
    "mlp.linear_fc2.weight": 1,
}


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
    rope = (hf.rope_parameters or {}).get("rope_type", "default")
    if rope != "default" and rope not in ROPE_INIT_FUNCTIONS:
        known = ", ".join(["default", *sorted(ROPE_INIT_FUNCTIONS)])
        raise ValueError(f"{path} names the rope_type {rope!r}: known are {known}")
    return hf


class HfWeights:
    """Tensors of a Hugging Face directory by name, read one at a time from its safetensors files."""

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        index = self._directory / "model.safetensors.index.json"
        if index.is_file():
            files = _shards(index)
        elif (self._directory / "model.safetensors").is_file():
            files = ["model.safetensors"]
        else:
            raise ValueError(f"{directory} has no model.safetensors and no model.safetensors.index.json")
        self._file_of: dict[str, Path] = {}
        for name in files:
            path = self._directory / name
            if not path.is_file():
                raise ValueError(f"{directory} lacks {name}, which its index names: copy the missing shard")
            for key in self._open(path).keys():  # noqa: SIM118 - safe_open is no mapping
                self._file_of[key] = path

    def __call__(self, name: str) -> Tensor:
        """The tensor of that name.

        Raises:
            ValueError: if no file holds it, or its file is truncated.
        """
        if name not in self._file_of:
            raise ValueError(f"{self._directory} has no tensor {name!r}: the weights do not match its config.json")
        return self._open(self._file_of[name]).get_tensor(name)

    @staticmethod
    def _open(path: Path):  # noqa: ANN205
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is truncated or no safetensors file ({error}): fetch it again") from None


def to_megatron(
    hf: LlamaConfig, weights: Callable[[str], Tensor], names: Iterator[str], *, first_layer: int, rank: int, size: int,
) -> Iterator[tuple[str, Tensor]]:
    """``(megatron name, this rank's tensor)`` for every name the rank's model holds.

    Args:
        hf: the model.
        weights: returns a Hugging Face tensor by name, e.g. `HfWeights`.
        names: parameter names of the rank's GPTModel. A decision head's weight is skipped: it is new.
        first_layer: global index of the rank's first layer.
        rank, size: of tensor parallelism.
    """
    for name in names:
        if name.endswith("self_attention.decision.weight"):
            continue
        whole = _from_hf(hf, weights, name, first_layer)
        yield name, _cut(name, whole, rank, size).contiguous()


def load_hf_state(checkpoint: str | Path) -> tuple[dict[str, Tensor], dict]:
    """A training checkpoint, of whatever parallel layout, under Hugging Face names.

    Returns:
        The whole tensors in the dtype of training, gain not folded, and the checkpoint's meta data with the
        keys that `checkpoints.export_hf` takes: ``hf_config``, ``tokenizer_dir``, ``decision``, ``offset``,
        ``gain``, ``target_cr``, ``measured_cr``, ``step``, ``compressed`` and ``results`` for the model card.

    Raises:
        ValueError: if the checkpoint is incomplete or damaged.
    """
    meta = store.verify(checkpoint)
    # The weights are read by name through torch's own reader: no process group, model or layout is needed.
    reader = FileSystemReader(str(checkpoint))
    stored = reader.read_metadata().state_dict_metadata
    wanted = {
        name: torch.empty(item.size, dtype=item.properties.dtype)
        for name, item in stored.items()
        if isinstance(item, TensorStorageMetadata) and name.startswith(("embedding.", "decoder.", "output_layer."))
    }
    load(wanted, storage_reader=reader, no_dist=True)
    hf = LlamaConfig(**meta["hf_config"])
    tensors = to_hf(hf, dict(_unstack(wanted)))
    if hf.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    settings = meta["config"]["dmc"]
    measured = {
        "held-out perplexity": round(meta["perplexity"], 4), "training text": meta["corpus_hash"],
        "held-out text": meta["held_out_hash"], "context, tokens": meta["config"]["data"]["sequence_length"],
    }
    results = {"base_model": Path(meta["config"]["run"]["model"]).name, "measured": measured}
    return tensors, meta | {
        "decision": settings["decision"], "offset": settings["offset"], "gain": settings["gain"], "results": results,
    }


def loader(hf: LlamaConfig, weights: Callable[[str], Tensor]) -> Callable[[list[str], int, int, int], dict[str, Tensor]]:
    """What `dmc.training.setup.load_weights` calls: (names, first layer, tensor rank, its size) → tensors."""
    return lambda names, first_layer, rank, size: dict(
        to_megatron(hf, weights, iter(names), first_layer=first_layer, rank=rank, size=size)
    )


def fingerprint(directory: str | Path, init: str = "pretrained") -> str:
    """16 hex digits that identify the model a run started from: its config and its weight files."""
    digest = hashlib.sha256((Path(directory) / "config.json").read_bytes() + init.encode())
    if init == "pretrained":
        for path in sorted(Path(directory).glob("*.safetensors")):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def count(hf: LlamaConfig) -> int:
    """Parameters of the model."""
    attention = 2 * hf.hidden_size * hf.head_dim * (hf.num_attention_heads + hf.num_key_value_heads)
    layer = attention + 3 * hf.hidden_size * hf.intermediate_size + 2 * hf.hidden_size
    embeddings = hf.vocab_size * hf.hidden_size * (1 if hf.tie_word_embeddings else 2)
    return hf.num_hidden_layers * layer + embeddings + hf.hidden_size


def to_hf(hf: LlamaConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face names for whole (unsharded) megatron-core tensors with global layer numbers."""
    out: dict[str, Tensor] = {}
    heads, size = hf.num_key_value_heads, hf.head_dim
    for name, tensor in tensors.items():
        layer, local = _layer_of(name)
        prefix = f"model.layers.{layer}."
        if local == "self_attention.linear_qkv.weight":
            grouped = tensor.view(heads, -1, size, hf.hidden_size)
            queries = grouped.shape[1] - 2
            parts = grouped.split([queries, 1, 1], dim=1)
            for letter, part in zip("qkv", parts, strict=True):
                out[f"{prefix}self_attn.{letter}_proj.weight"] = part.reshape(-1, hf.hidden_size).contiguous()
        elif local == "mlp.linear_fc1.weight":
            gate, up = tensor.chunk(2)
            out[prefix + "mlp.gate_proj.weight"], out[prefix + "mlp.up_proj.weight"] = gate.clone(), up.clone()
        elif local == "self_attention.decision.weight":
            out[prefix + "self_attn.decision.weight"] = (
                tensor.view(heads, 2, -1).transpose(0, 1).reshape(2 * heads, -1).contiguous()
            )
        else:
            out[_plain_name(name, layer)] = tensor
    return out


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of weights ({type(error).__name__}: {error}): fetch it again") from None


def _from_hf(hf: LlamaConfig, weights: Callable[[str], Tensor], name: str, first_layer: int) -> Tensor:
    layer, local = _layer_of(name)
    if layer is None:
        if local == "output_layer.weight" and hf.tie_word_embeddings:  # the last pipeline stage's copy
            local = "embedding.word_embeddings.weight"
        return weights(_plain_name(local, None))
    prefix = f"model.layers.{layer + first_layer}."
    if local == "self_attention.linear_qkv.weight":
        heads, size = hf.num_key_value_heads, hf.head_dim
        rows = {"q": hf.num_attention_heads * size, "k": heads * size, "v": heads * size}
        parts = [_of_rows(weights, f"{prefix}self_attn.{x}_proj.weight", rows[x], hf) for x in "qkv"]
        return torch.cat([x.view(heads, -1, size, hf.hidden_size) for x in parts], dim=1).reshape(-1, hf.hidden_size)
    if local == "mlp.linear_fc1.weight":
        return torch.stack([_of_rows(weights, f"{prefix}mlp.{x}_proj.weight", hf.intermediate_size, hf) for x in ("gate", "up")])
    return weights(_plain_name(name, layer + first_layer))


def _of_rows(weights: Callable[[str], Tensor], name: str, rows: int, hf: LlamaConfig) -> Tensor:
    """The tensor of that name, refused if it is not ``[rows, hidden]``: fused tensors would hide a wrong shape."""
    tensor = weights(name)
    if tuple(tensor.shape) != (rows, hf.hidden_size):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} in the weights and {(rows, hf.hidden_size)} by config.json: "
            "they do not belong together"
        )
    return tensor


def _unstack(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """megatron stores the layers of a kind as one tensor ``decoder.layers.x [L, ...]``: one per layer again."""
    for name, tensor in tensors.items():
        if name.startswith("decoder.layers."):
            for layer, part in enumerate(tensor):
                yield name.replace("decoder.layers.", f"decoder.layers.{layer}."), part
        else:
            yield name, tensor


def _cut(name: str, whole: Tensor, rank: int, size: int) -> Tensor:
    local = _layer_of(name)[1]
    if local == "mlp.linear_fc1.weight":  # gate and up are cut each: [2, ffn, hidden]
        return torch.cat(list(whole.chunk(size, dim=1)[rank]))
    dim = _CUT.get(local)
    return whole if dim is None else whole.chunk(size, dim=dim)[rank]


def _layer_of(name: str) -> tuple[int | None, str]:
    """``decoder.layers.3.mlp.x`` → ``(3, "mlp.x")``; other names → ``(None, name)``."""
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        return int(parts[2]), ".".join(parts[3:])
    return None, name


def _plain_name(name: str, layer: int | None) -> str:
    """The Hugging Face name of a tensor that both sides hold alike."""
    names = {
        "embedding.word_embeddings.weight": "model.embed_tokens.weight",
        "decoder.final_layernorm.weight": "model.norm.weight",
        "output_layer.weight": "lm_head.weight",
        "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
        "mlp.linear_fc2.weight": "mlp.down_proj.weight",
        "input_layernorm.weight": "input_layernorm.weight",
        "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    }
    local = _layer_of(name)[1]
    return names[local] if layer is None else f"model.layers.{layer}.{names[local]}"
