"""Arguments of the model ``dmc`` in the lm-evaluation-harness."""

from __future__ import annotations

import inspect

from dmc.cache import codec_class, policy_class
from dmc.engine import LLM
from dmc.evaluation.spec import named

_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
_BATCH = 16  # of --batch_size auto


def llm_of(arguments: dict, flags: dict) -> LLM:
    """The model that the harness's ``--model_args`` describe.

    Args:
        arguments: ``pretrained`` (directory), the arguments of `LLM`, and settings of policy and codec by their own names: the
            harness splits at commas, so H2O is ``policy=h2o,heavy=64,recent=64``. ``dtype`` can be the name in torch.
        flags: of the harness: ``batch_size`` is the largest number of sequences that run at a time ("auto": 16), ``device``
            that of `LLM`.

    Raises:
        ValueError: if ``pretrained`` is missing, an argument is unknown, or a setting is one of both policy and codec.
    """
    given = dict(arguments)
    path = given.pop("pretrained", None)
    if path is None:
        raise ValueError("the model dmc needs its directory: add pretrained=DIR to --model_args")
    known = [name for name in inspect.signature(LLM.__init__).parameters if name not in ("self", "path")]
    own: dict = {"kv_memory": "auto", "max_batch": _max_batch(flags.get("batch_size")), "device": flags.get("device") or "auto"}
    own |= {name: given.pop(name) for name in [*given] if name in known}
    for name in ("policy_settings", "codec_settings"):
        if not isinstance(own.get(name) or {}, dict):
            raise ValueError(f"--model_args {name}={own[name]} must be a dict: give each setting by its own name")
    own["dtype"] = _DTYPES.get(str(own.get("dtype")), own.get("dtype", "auto"))
    classes = {}
    for kind, find in (("policy", policy_class), ("codec", codec_class)):
        if isinstance(own.get(kind), str):
            own[kind], settings = named(own[kind])
            own[f"{kind}_settings"] = (own.get(f"{kind}_settings") or {}) | settings
            classes[kind] = find(own[kind]).settings()
    for name, value in given.items():
        owners = [kind for kind, settings in classes.items() if name in settings]
        if len(owners) != 1:
            what = "a setting of both policy and codec" if owners else "unknown"
            choices = "; ".join(f"of the {kind}: {', '.join(names) or 'none'}" for kind, names in classes.items())
            raise ValueError(
                f"--model_args {name} is {what}; known: pretrained, {', '.join(known)}; settings {choices or '(no policy)'}"
            )
        own[f"{owners[0]}_settings"][name] = value
    return LLM(path, **own)


def _max_batch(size: int | str | None) -> int:
    """Largest batch that ``--batch_size`` asks for: a number, "auto" or "auto:N"."""
    return int(size) if str(size).isdecimal() else _BATCH
