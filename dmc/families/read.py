"""config.json → `ModelShape`, by transformers' own configuration class of the family."""

from __future__ import annotations

import copy
import importlib
import json
import pkgutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from dmc.families.base import Family, ModelShape
from dmc.rope import settings_of

_OWN = ("base", "read", "tensors")  # modules of this folder that are no family
_NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@cache
def families() -> dict[str, Family]:
    """Every family by its ``model_type``."""
    names = sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]) if module.name not in _OWN)
    found = [importlib.import_module(f"{__package__}.{name}").FAMILY for name in names]
    return {family.model_type: family for family in found}


def known(*, exports: bool) -> list[str]:
    """Values of ``model_type`` that can be read; with ``exports`` also those of exported retrofits."""
    names = list(families())
    return names + [family.export_type for family in families().values()] if exports else names


def by_type(model_type: object, where: str | Path, *, exports: bool = False) -> Family:
    """The family of a ``model_type``.

    Args:
        model_type: as config.json has it.
        where: the file, for the error.
        exports: whether an exported retrofit will do.

    Raises:
        ValueError: if it is not a known one.
    """
    for family in families().values():
        if model_type == family.model_type or (exports and model_type == family.export_type):
            return family
    if any(model_type == family.export_type for family in families().values()):
        raise ValueError(
            f"{where} describes an exported retrofit (model_type {model_type!r}), which cannot be retrofitted again: name the "
            "model that it was made from"
        )
    raise ValueError(f"{where} describes a model of type {model_type!r}; known: {', '.join(known(exports=exports))}")


def read_shape(directory: str | Path) -> ModelShape:
    """The shape of a Hugging Face model directory that is not an exported retrofit.

    Raises:
        ValueError: one sentence, if there is no readable config.json, or it is of a model that is not supported.
    """
    path = Path(directory) / "config.json"
    return shape_of(read_fields(path), where=path)


def read_fields(path: str | Path) -> dict:
    """The fields of a config.json, or of another file of a model directory that holds a JSON object.

    Raises:
        ValueError: if there is no such file, or it holds no JSON object; one sentence.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path.parent} is not a model directory: it has no {path.name}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return content


def shape_of(fields: Mapping, *, where: str | Path = "the configuration", exports: bool = False) -> ModelShape:
    """The shape that the fields of a config.json describe.

    Args:
        fields: with ``model_type``.
        where: the file, for errors.
        exports: whether the fields may be those of an exported retrofit.

    Raises:
        ValueError: if the family is not known, or the fields describe no model of it that is supported; one sentence.
    """
    family = by_type(fields.get("model_type"), where, exports=exports)
    if fields.get("quantization_config"):
        method = dict(fields["quantization_config"]).get("quant_method", "unnamed")
        raise ValueError(
            f"{where} describes quantised weights (quantization_config, {method}): take the checkpoint that was not quantised; "
            "the cache is quantised by --codec"
        )
    missing = [name for name in _NEEDED if type(fields.get(name)) is not int]
    if missing:
        raise ValueError(f"{where} does not give {', '.join(missing)} as a whole number")
    config = _resolved(family, fields, where)
    if config.hidden_act != "silu":
        raise ValueError(f"{where}: hidden_act {config.hidden_act!r} is not supported, only 'silu'")
    queries, heads = config.num_attention_heads, config.num_key_value_heads
    if heads < 1 or queries % heads:
        raise ValueError(f"{where}: num_attention_heads {queries} is not a multiple of num_key_value_heads {heads}")
    if family.sliding:
        _refuse_window(config, where)
    try:
        rope = settings_of(config)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None

    def bias(of_family: bool | None, name: str) -> bool:
        return bool(getattr(config, name, False)) if of_family is None else of_family

    return ModelShape(
        family,
        **{name: getattr(config, name) for name in _NEEDED},
        num_key_value_heads=heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // queries,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        initializer_range=config.initializer_range,
        rope=rope,
        tie_word_embeddings=bool(config.tie_word_embeddings),
        qkv_bias=bias(family.qkv_bias, "attention_bias"),
        output_bias=bias(family.output_bias, "attention_bias"),
        mlp_bias=bias(family.mlp_bias, "mlp_bias"),
        qk_norm=family.qk_norm,
        fields=config.to_dict(),
    )


def _resolved(family: Family, fields: Mapping, where: str | Path):  # noqa: ANN202
    """transformers' configuration of the family."""
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    given = {name: copy.deepcopy(value) for name, value in fields.items() if name not in ("dmc", "auto_map", "model_type")}
    try:
        return getattr(transformers, f"{family.title}Config")(**given)
    except (StrictDataclassError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where} does not describe a {family.title}: {' '.join(str(error).split())}") from None


def _refuse_window(config, where: str | Path) -> None:  # noqa: ANN001
    """Refuse attention over a sliding window that is shorter than the model's positions."""
    window, kinds = config.sliding_window, set(getattr(config, "layer_types", None) or ())
    slides = "sliding_attention" in kinds if kinds else window is not None
    if slides and (window is None or window < config.max_position_embeddings):
        raise ValueError(
            f"{where}: sliding_window {window} is active below max_position_embeddings {config.max_position_embeddings}, and "
            "attention over a sliding window is not supported, since its cache is bounded already: take a version of the model "
            "without it (Mistral 7B from v0.2, Qwen with use_sliding_window false)"
        )
