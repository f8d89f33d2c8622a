"""config.json of a Llama directory, plain ("llama") or retrofitted ("dmc_llama")."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dmc.rope import RopeSettings, read_settings

MODEL_TYPES = ("llama", "dmc_llama")
DECISIONS = ("neuron", "head")
METHODS = ("dmc", "dms")
_NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class ModelConfig:
    """What the serving model needs to know; names as in config.json where it has one.

    Attributes:
        num_key_value_heads: H.
        head_dim: D.
        rope: its rotary embedding, as transformers reads config.json.
        method: that the model was retrofitted with, "dmc" or "dms"; None for a plain Llama.
        decision: where its decisions come from: "neuron", "head", or None for a plain Llama.
        offset: c of the decisions.
        window: newest tokens that stay as they are, before they are merged (dmc) or evicted (dms); None: merged at once.
        looks_ahead: whether decisions also read the hidden state ``window`` tokens later.
        measured_cr: compression ratio that the checkpoint reports of itself, or None.
        dtype: of the weights as saved, such as "bfloat16", or None if config.json does not say.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeSettings
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    eos_token_ids: tuple[int, ...]
    method: str | None
    decision: str | None
    offset: float
    window: int | None
    looks_ahead: bool
    measured_cr: float | None
    dtype: str | None

    @property
    def positions(self) -> int:
        """Tokens of the longest sequence that can be served; see `dmc.rope.RopeSettings.why_limited`."""
        return min(self.max_position_embeddings, self.rope.positions)

    @property
    def logits_per_head(self) -> int:
        """Rows of the decision head for each key/value head: the decision; with dmc the weight; the decision's late part."""
        return 1 + (self.method == "dmc") + self.looks_ahead

    @property
    def kept_first(self) -> dict[str, int]:
        """What policy "dms" is told of first tokens that are kept whatever was decided: one if decisions are made late."""
        return {"sinks": 1} if self.method == "dms" and self.looks_ahead else {}


def read_config(directory: str | Path) -> ModelConfig:
    """Reads and checks ``directory/config.json`` (and generation_config.json for the end tokens).

    Raises:
        ValueError: if there is no such file, it is no JSON, the model is not a Llama, or a field is missing or
            cannot be served; one sentence that names it.
    """
    path = Path(directory) / "config.json"
    raw = _read_json(path)
    if raw.get("model_type") not in MODEL_TYPES:
        raise ValueError(
            f"{path} describes a model of type {raw.get('model_type')!r}, which is not a Llama; "
            f"types that can be served: {', '.join(MODEL_TYPES)}"
        )
    missing = [name for name in _NEEDED if not isinstance(raw.get(name), int)]
    if missing:
        raise ValueError(f"{path} does not give {', '.join(missing)} as a whole number")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{path}: hidden_act {raw['hidden_act']!r} cannot be served, only 'silu'")
    query_heads = raw["num_attention_heads"]
    heads = raw.get("num_key_value_heads") or query_heads
    if query_heads % heads:
        raise ValueError(f"{path}: num_attention_heads {query_heads} is no multiple of num_key_value_heads {heads}")
    return ModelConfig(
        **{name: raw[name] for name in _NEEDED},
        num_key_value_heads=heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // query_heads,
        max_position_embeddings=raw.get("max_position_embeddings", 2048),
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope=_rope(path, raw),
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        attention_bias=raw.get("attention_bias", False),
        mlp_bias=raw.get("mlp_bias", False),
        eos_token_ids=_end_tokens(path.parent, raw),
        **_decisions(path, raw),
        dtype=raw.get("dtype") or raw.get("torch_dtype"),
    )


def _decisions(path: Path, raw: dict) -> dict:
    """The fields of `ModelConfig` that a retrofit sets; exports of before DMS name no method."""
    if raw["model_type"] == "llama":
        return {"method": None, "decision": None, "offset": 0.0, "window": None, "looks_ahead": False, "measured_cr": None}
    settings = raw.get("dmc")
    if not isinstance(settings, dict) or settings.get("decision") not in DECISIONS:
        raise ValueError(f"{path}: a dmc_llama needs a field dmc with decision one of {', '.join(DECISIONS)}")
    method, window, decide = settings.get("method", "dmc"), settings.get("window"), settings.get("decide", "arrival")
    if method not in METHODS:
        raise ValueError(f"{path}: dmc.method {method!r} cannot be served; known: {', '.join(METHODS)}")
    if (window is not None or method == "dms") and (type(window) is not int or window < (method == "dms")):
        raise ValueError(f"{path}: dmc.window {window!r} must be a whole number, with method dms at least 1")
    if decide not in ("arrival", "late"):
        raise ValueError(f"{path}: dmc.decide {decide!r} cannot be served; known: arrival, late")
    if decide == "late" and (not window or settings["decision"] != "head"):
        raise ValueError(f"{path}: dmc.decide late needs dmc.window of at least 1 and dmc.decision head")
    return {
        "method": method, "decision": settings["decision"], "offset": float(settings.get("offset", 5.0)), "window": window,
        "looks_ahead": decide == "late", "measured_cr": settings.get("measured_cr"),
    }


def _rope(path: Path, raw: dict) -> RopeSettings:
    try:
        return read_settings(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _end_tokens(directory: Path, raw: dict) -> tuple[int, ...]:
    path = directory / "generation_config.json"
    generation = _read_json(path) if path.exists() else {}
    tokens = generation.get("eos_token_id", raw.get("eos_token_id"))
    return () if tokens is None else tuple(tokens) if isinstance(tokens, list) else (tokens,)


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path} is missing: {path.parent} is not a Hugging Face model directory")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return content
