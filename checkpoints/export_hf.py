"""Writes a retrofitted model as a self-contained Hugging Face directory.

The directory holds safetensors, config.json with `auto_map`, the model code of `checkpoints.hf_model`, the
tokenizer, generation_config.json and a model card. It appears under its name complete or not at all. Weights that
are read when they are looked up (`checkpoints.trained`) pass through one shard at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig

from checkpoints import family_code, peft
from checkpoints.files import SHARD_BYTES, write_weights
from checkpoints.model_card import model_card
from dmc.families import by_type

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_TOKENIZER_FILES = (
    *_VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
)
_NOT_COPIED = ("model_type", "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version", "dmc")


def export(
    state_dict: Mapping[str, Tensor],
    hf_config: Mapping,
    *,
    out: str | Path,
    decision: str,
    offset: float,
    gain: float,
    target_cr: float,
    measured_cr: float,
    tokenizer_dir: str | Path,
    card: Mapping | str,
    method: str = "dmc",
    window: int | None = None,
    looks_ahead: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = SHARD_BYTES,
    adapter: Callable[[Path], None] | None = None,
) -> Path:
    """Write the model to `out`, with the gain of training folded into the weights.

    Args:
        state_dict: every tensor under its Hugging Face name, and with the decision head also
            `model.layers.{i}.self_attn.decision.weight` [2H, hidden] (DMS: [H, hidden]); with `looks_ahead` H more rows,
            and `model.layers.{i}.self_attn.decision.bias`; the gain not applied. Each is looked up once, when its turn
            comes; a `meta` method, as of `checkpoints.trained.TrainedWeights`, tells shapes before that.
        hf_config: the fields of the base model's config.json.
        out: directory to create.
        decision: "neuron" or "head".
        offset: `c` of the decisions.
        gain: what training multiplied the decision and importance logits by.
        target_cr, measured_cr: compression ratio aimed at and reached, tokens per entry.
        tokenizer_dir: directory with the tokenizer's files, and generation_config.json if there is one.
        card: the README.md, or what `model_card` makes one of.
        method: "dmc" or "dms".
        window: of "dms": tokens after which a marked one is evicted; of "dmc": newest tokens that stay as they are
            (late merging), None to merge at once.
        looks_ahead: whether decisions also read the hidden state `window` tokens later.
        dtype: of the weights written.
        max_shard_bytes: weights above this are spread over several files.
        adapter: writes low-rank updates, which are in the weights already, to a directory inside (`checkpoints.peft`).

    Returns:
        `out`.

    Raises:
        ValueError: if `out` exists, the tensors do not fit the configuration, or there is no tokenizer.
    """
    out, tokenizer_dir = free(out), _with_tokenizer(tokenizer_dir)
    dmc = {"method": method, "decision": decision, "offset": offset, "target_cr": target_cr, "measured_cr": measured_cr}
    if method == "dms" or window is not None:
        dmc |= {"window": window, "decide": "late" if looks_ahead else "arrival"}
    family = by_type(hf_config.get("model_type", "llama"), "the model's configuration")
    settings, model = family_code.classes(family)
    code = family_code.auto_map(family)
    config = settings(dmc=dmc, architectures=[model.__name__], auto_map=code, dtype=dtype, **_kept(hf_config))
    plan = _plan(state_dict, config, model, dtype)
    fold = folding(config, gain)
    text = card if isinstance(card, str) else model_card(out.name, config, card)
    with staged(out) as staging:
        write_weights(staging, plan, lambda name: fold(name, state_dict[name]), max_shard_bytes)
        _write_rest(staging, config, tokenizer_dir, text, family_code.files(family))
        if adapter is not None:
            adapter(staging / peft.FOLDER)
    return out


def export_plain(
    state_dict: Mapping[str, Tensor],
    hf_config: Mapping,
    *,
    out: str | Path,
    tokenizer_dir: str | Path,
    card: str,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write an uncompressed model (pretrained, or the control of a retrofit) as an ordinary directory of its family.

    Arguments, result and errors as those of `export`.
    """
    out, tokenizer_dir = free(out), _with_tokenizer(tokenizer_dir)
    title = by_type(hf_config.get("model_type", "llama"), "the model's configuration").title
    settings, model = (getattr(transformers, f"{title}{kind}") for kind in ("Config", "ForCausalLM"))
    config = settings(architectures=[model.__name__], dtype=dtype, **_kept(hf_config))
    plan = _plan(state_dict, config, model, dtype)
    with staged(out) as staging:
        write_weights(staging, plan, state_dict.__getitem__, max_shard_bytes)
        _write_rest(staging, config, tokenizer_dir, card, {})
    return out


def free(out: str | Path) -> Path:
    """The path, after a check that nothing is there.

    Raises:
        ValueError: if there is.
    """
    out = Path(out)
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} exists already: name a new directory, or remove it first")
    return out


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A directory next to `out` to write to; flushed and renamed to `out` at the end, removed after an error."""
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield staging
        staging.chmod(0o777 & ~_umask())
        for path in staging.rglob("*"):
            if path.is_dir():
                path.chmod(0o777 & ~_umask())
                continue
            path.chmod(0o666 & ~_umask())  # safetensors makes its files readable to their owner alone
            _sync(path)
        os.rename(staging, out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def copy_tokenizer(source: str | Path, out: Path) -> None:
    """Copy a tokenizer's files from one directory to another.

    Raises:
        ValueError: if `source` holds none.
    """
    source = _with_tokenizer(source)
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def folding(config: PreTrainedConfig, gain: float) -> Callable[[str, Tensor], Tensor]:
    """The function (name, tensor) → tensor that multiplies the decision and importance logits by `gain`.

    With the neuron these are the first rows of every key and query head (DMS: of the first query head of each group), or the
    first weight of their norms where the family has them; with the head all of its rows. What it changes is a copy in
    fp32, the rest the tensor itself.

    Raises:
        ValueError: if `gain` is not a positive finite number.
    """
    if not 0 < gain < float("inf"):
        raise ValueError(f"gain must be a positive finite number, got {gain}")
    rows: tuple[str, ...] = (".q_proj.weight", ".k_proj.weight", ".q_proj.bias", ".k_proj.bias")
    step = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if config.dmc["decision"] == "head":
        rows, step = (".decision.weight", ".decision.bias"), 1
    elif config.qk_norm:
        rows = (".q_norm.weight", ".k_norm.weight")
    elif config.dmc["method"] == "dms":
        rows = (".q_proj.weight", ".q_proj.bias")
        step *= config.num_attention_heads // config.num_key_value_heads

    def fold(name: str, tensor: Tensor) -> Tensor:
        if not name.endswith(rows):
            return tensor
        folded = tensor.detach().to(torch.float32, copy=True)
        folded[::step] *= gain
        return folded

    return fold


def _readable_before_5(config: PreTrainedConfig) -> str:
    """config.json of an ordinary model, with its rotary settings also in the two fields that readers before
    transformers 5 (and others that go by them) know: without these they take rope_theta 10000 and no scaling, unsaid.
    """
    fields = json.loads(config.to_json_string())
    rope = dict(fields["rope_parameters"])
    fields["rope_theta"] = rope.pop("rope_theta")
    fields["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    return json.dumps(fields, indent=2, sort_keys=True) + "\n"


def _kept(hf_config: Mapping) -> dict:
    """The fields that an export takes from the model's config.json."""
    return {key: value for key, value in hf_config.items() if key not in _NOT_COPIED and not key.startswith("_")}


def _with_tokenizer(directory: str | Path) -> Path:
    directory = Path(directory)
    if not any((directory / name).is_file() for name in _VOCABULARIES):
        raise ValueError(f"{directory} holds no tokenizer (none of {', '.join(_VOCABULARIES)})")
    return directory


def _plan(state_dict: Mapping[str, Tensor], config: PreTrainedConfig, model: type, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors to write, on the meta device, after a comparison of names and shapes with the model's own."""
    with torch.device("meta"):
        wanted = {name: torch.empty_like(x, dtype=dtype) for name, x in model(config).state_dict().items()}
    found = set(state_dict)
    if config.tie_word_embeddings:
        wanted.pop("lm_head.weight")
        embedding = "model.embed_tokens.weight"
        if {"lm_head.weight", embedding} <= found and not torch.equal(state_dict["lm_head.weight"], state_dict[embedding]):
            raise ValueError("lm_head.weight differs from the embedding, but the configuration ties them")
        found.discard("lm_head.weight")
    for kind, names in (("lacks", wanted.keys() - found), ("does not know", found - wanted.keys())):
        if names:
            subject = "the state dict" if kind == "lacks" else "the configured model"
            raise ValueError(f"{subject} {kind} {sorted(names)[0]} ({len(names)} such tensors)")
    look = getattr(state_dict, "meta", state_dict.__getitem__)
    for name, tensor in wanted.items():
        if look(name).shape != tensor.shape:
            raise ValueError(f"{name} has shape {tuple(look(name).shape)}, the configuration asks for {tuple(tensor.shape)}")
    return wanted


def _write_rest(directory: Path, config: PreTrainedConfig, tokenizer_dir: Path, card: str, code: Mapping[str, str]) -> None:
    settings = config.to_json_string() if code else _readable_before_5(config)  # the model code needs transformers 5
    (directory / "config.json").write_text(settings)
    (directory / "README.md").write_text(card)
    for name, text in code.items():
        (directory / name).write_text(text)
    copy_tokenizer(tokenizer_dir, directory)
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
