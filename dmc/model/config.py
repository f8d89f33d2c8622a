"""config.json of a model directory, plain ("llama") or retrofitted ("dmc_llama")."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dmc.families import ModelShape, read_fields, shape_of

DECISIONS = ("neuron", "head")
METHODS = ("dmc", "dms")


@dataclass(frozen=True)
class ModelConfig(ModelShape):
    """What the serving model needs to know: a model's shape, and what a retrofit added.

    Attributes:
        eos_token_ids: tokens that end a text.
        method: that the model was retrofitted with, "dmc" or "dms"; None for a plain model.
        decision: where its decisions come from: "neuron", "head", or None for a plain model.
        offset: c of the decisions.
        window: newest tokens that stay as they are, before they are merged (dmc) or evicted (dms); None: merged at once.
        looks_ahead: whether decisions also read the hidden state ``window`` tokens later.
        measured_cr: compression ratio that the checkpoint reports of itself, or None.
        dtype: of the weights as saved, such as "bfloat16", or None if config.json does not say.
    """

    eos_token_ids: tuple[int, ...]
    method: str | None
    decision: str | None
    offset: float
    window: int | None
    looks_ahead: bool
    measured_cr: float | None
    dtype: str | None

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
        ValueError: if there is no such file, it is not JSON, the model is of no known family, or a field is missing or
            cannot be served; one sentence that names it.
    """
    path = Path(directory) / "config.json"
    raw = read_fields(path)
    shape = shape_of(raw, where=path, exports=True)
    return ModelConfig(
        **{item.name: getattr(shape, item.name) for item in dataclasses.fields(shape)},
        eos_token_ids=_end_tokens(path.parent, raw),
        **_decisions(path, raw, retrofitted=raw["model_type"] != shape.family.model_type),
        dtype=raw.get("dtype") or raw.get("torch_dtype"),
    )


def _decisions(path: Path, raw: Mapping, *, retrofitted: bool) -> dict:
    """The fields of `ModelConfig` that a retrofit sets; exports older than DMS name no method."""
    if not retrofitted:
        return {"method": None, "decision": None, "offset": 0.0, "window": None, "looks_ahead": False, "measured_cr": None}
    settings = raw.get("dmc")
    if not isinstance(settings, dict) or settings.get("decision") not in DECISIONS:
        raise ValueError(f"{path}: a {raw['model_type']} needs a field dmc with decision one of {', '.join(DECISIONS)}")
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
        "method": method,
        "decision": settings["decision"],
        "offset": float(settings.get("offset", 5.0)),
        "window": window,
        "looks_ahead": decide == "late",
        "measured_cr": settings.get("measured_cr"),
    }


def _end_tokens(directory: Path, raw: Mapping) -> tuple[int, ...]:
    path = directory / "generation_config.json"
    generation = read_fields(path) if path.exists() else {}
    tokens = generation.get("eos_token_id", raw.get("eos_token_id"))
    return () if tokens is None else tuple(tokens) if isinstance(tokens, list) else (tokens,)
