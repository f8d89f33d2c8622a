"""Writes a retrofitted Llama as a self-contained Hugging Face directory.

The directory holds safetensors, config.json with `auto_map`, the model code of `checkpoints.hf_model`, the
tokenizer, generation_config.json and a model card. It appears under its name complete or not at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from checkpoints.hf_model.configuration_dmc_llama import DmcLlamaConfig
from checkpoints.hf_model.modeling_dmc_llama import DmcLlamaForCausalLM
from checkpoints.model_card import model_card

_CODE = Path(__file__).parent / "hf_model"
_CODE_FILES = ("configuration_dmc_llama.py", "cache_dmc_llama.py", "modeling_dmc_llama.py")
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_TOKENIZER_FILES = (
    *_VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt",
    "chat_template.jinja",
)
_NOT_COPIED = ("model_type", "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version", "dmc")


def export(
    state_dict: Mapping[str, Tensor], hf_config: Mapping, *, out: str | Path, decision: str, offset: float,
    gain: float, target_cr: float, measured_cr: float, tokenizer_dir: str | Path, card: Mapping | str,
    dtype: torch.dtype = torch.bfloat16, max_shard_bytes: int = 4 * 10**9,
) -> Path:
    """Write the model to `out`, with the gain of training folded into the weights.

    Args:
        state_dict: every tensor under Llama's Hugging Face names, and with the decision head also
            `model.layers.{i}.self_attn.decision.weight` [2H, hidden]; the gain not applied.
        hf_config: the fields of the base model's config.json.
        out: directory to create.
        decision: "neuron" or "head".
        offset: `c` of the decisions.
        gain: what training multiplied the decision and importance logits by.
        target_cr, measured_cr: compression ratio aimed at and reached, tokens per entry.
        tokenizer_dir: directory with the tokenizer's files, and generation_config.json if there is one.
        card: the README.md, or what `model_card` makes one of.
        dtype: of the weights written.
        max_shard_bytes: weights above this are spread over several files.

    Returns:
        `out`.

    Raises:
        ValueError: if `out` exists, the tensors do not fit the configuration, or there is no tokenizer.
    """
    out, tokenizer_dir = _free(out), _with_tokenizer(tokenizer_dir)
    dmc = {"decision": decision, "offset": offset, "target_cr": target_cr, "measured_cr": measured_cr}
    config = _config(hf_config, dmc, dtype)
    tensors = fold_gain(_checked(state_dict, config, DmcLlamaForCausalLM), config, gain)
    text = card if isinstance(card, str) else model_card(out.name, config, card)
    with staged(out) as staging:
        _write_weights(staging, tensors, dtype, max_shard_bytes)
        _write_rest(staging, config, tokenizer_dir, text)
    return out


def export_plain(
    state_dict: Mapping[str, Tensor], hf_config: Mapping, *, out: str | Path, tokenizer_dir: str | Path, card: str,
    dtype: torch.dtype = torch.bfloat16, max_shard_bytes: int = 4 * 10**9,
) -> Path:
    """Write an uncompressed model (pretrained, or the control of a retrofit) as an ordinary Llama directory.

    Arguments, result and errors as those of `export`.
    """
    out, tokenizer_dir = _free(out), _with_tokenizer(tokenizer_dir)
    fields = {key: value for key, value in hf_config.items() if key not in _NOT_COPIED and not key.startswith("_")}
    config = LlamaConfig(architectures=["LlamaForCausalLM"], dtype=dtype, **fields)
    tensors = _checked(state_dict, config, LlamaForCausalLM)
    with staged(out) as staging:
        _write_weights(staging, tensors, dtype, max_shard_bytes)
        _write_rest(staging, config, tokenizer_dir, card, code=())
    return out


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A directory beside `out` to write to; flushed and renamed to `out` at the end, removed after an error."""
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield staging
        staging.chmod(0o777 & ~_umask())
        for path in staging.iterdir():
            _sync(path)
        os.rename(staging, out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def fold_gain(state_dict: Mapping[str, Tensor], config: DmcLlamaConfig, gain: float) -> dict[str, Tensor]:
    """The tensors with the decision and importance logits multiplied by `gain`; changed ones are fp32 copies.

    With the neuron these are the first rows of every key and query head, with the head all of its rows.

    Raises:
        ValueError: if `gain` is not a positive finite number.
    """
    if not 0 < gain < float("inf"):
        raise ValueError(f"gain must be a positive finite number, got {gain}")
    rows = {".q_proj.weight", ".k_proj.weight", ".q_proj.bias", ".k_proj.bias"}
    step = config.head_dim
    if config.dmc["decision"] == "head":
        rows, step = {".decision.weight"}, 1
    folded = dict(state_dict)
    for name, tensor in state_dict.items():
        if any(name.endswith(ending) for ending in rows):
            folded[name] = tensor.detach().to(torch.float32, copy=True)
            folded[name][::step] *= gain
    return folded


def _config(hf_config: Mapping, dmc: dict, dtype: torch.dtype) -> DmcLlamaConfig:
    kind = hf_config.get("model_type", "llama")
    if kind != "llama":
        raise ValueError(f"only a Llama (model_type 'llama') can be exported, got model_type {kind!r}")
    fields = {key: value for key, value in hf_config.items() if key not in _NOT_COPIED and not key.startswith("_")}
    code = {"AutoConfig": "configuration_dmc_llama.DmcLlamaConfig"}
    code["AutoModelForCausalLM"] = "modeling_dmc_llama.DmcLlamaForCausalLM"
    architectures = [code["AutoModelForCausalLM"].split(".")[1]]
    return DmcLlamaConfig(dmc=dmc, architectures=architectures, auto_map=code, dtype=dtype, **fields)


def _free(out: str | Path) -> Path:
    out = Path(out)
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} exists already: name a new directory, or remove it first")
    return out


def _with_tokenizer(directory: str | Path) -> Path:
    directory = Path(directory)
    if not any((directory / name).is_file() for name in _VOCABULARIES):
        raise ValueError(f"{directory} holds no tokenizer (none of {', '.join(_VOCABULARIES)})")
    return directory


def _checked(state_dict: Mapping[str, Tensor], config: LlamaConfig, model: type) -> dict[str, Tensor]:
    """The tensors to write, after a comparison of names and shapes with the model's own."""
    with torch.device("meta"):
        wanted = {name: tuple(x.shape) for name, x in model(config).state_dict().items()}
    found = dict(state_dict)
    if config.tie_word_embeddings:
        wanted.pop("lm_head.weight")
        head = found.pop("lm_head.weight", None)
        if head is not None and not torch.equal(head, found.get("model.embed_tokens.weight", head)):
            raise ValueError("lm_head.weight differs from the embedding, but the configuration ties them")
    for kind, names in (("lacks", wanted.keys() - found.keys()), ("does not know", found.keys() - wanted.keys())):
        if names:
            subject = "the state dict" if kind == "lacks" else "the configured model"
            raise ValueError(f"{subject} {kind} {sorted(names)[0]} ({len(names)} such tensors)")
    for name, shape in wanted.items():
        if tuple(found[name].shape) != shape:
            raise ValueError(f"{name} has shape {tuple(found[name].shape)}, the configuration asks for {shape}")
    return {name: found[name] for name in wanted}


def _write_weights(directory: Path, tensors: dict[str, Tensor], dtype: torch.dtype, limit: int) -> None:
    shards = list(_shards(tensors, dtype.itemsize, limit))
    files = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        ready = {name: tensors[name].detach().to("cpu", dtype).contiguous() for name in names}
        save_file(ready, directory / file, metadata={"format": "pt"})
        files.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        total = sum(x.numel() for x in tensors.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _shards(tensors: dict[str, Tensor], itemsize: int, limit: int) -> Iterator[list[str]]:
    names, size = [], 0
    for name, tensor in tensors.items():
        added = tensor.numel() * itemsize
        if names and size + added > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += added
    yield names


def _write_rest(
    directory: Path, config: LlamaConfig, tokenizer_dir: Path, card: str, code: tuple[str, ...] = _CODE_FILES,
) -> None:
    (directory / "config.json").write_text(config.to_json_string())
    (directory / "README.md").write_text(card)
    for name in code:
        shutil.copyfile(_CODE / name, directory / name)
    for name in _TOKENIZER_FILES:
        if (tokenizer_dir / name).is_file():
            shutil.copyfile(tokenizer_dir / name, directory / name)
    generation = tokenizer_dir / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, directory / generation.name)
    else:
        GenerationConfig.from_model_config(config).save_pretrained(directory)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
