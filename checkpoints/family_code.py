"""The model code of an exported retrofit, for the family of its model.

`checkpoints.hf_model` is written for Llama. An export of another family carries two more files, made here: the configuration,
which is transformers' own of that family with what decisions need, and the model, which has that configuration.
"""

from __future__ import annotations

import sys
import types
from functools import cache
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

from dmc.families import Family

FOLDER = Path(__file__).parent / "hf_model"
_SHARED = (
    "configuration_dmc_llama",
    "cache_dmc_llama",
    "entries_dmc_llama",
    "eviction_dmc_llama",
    "late_dmc_llama",
    "step_dmc_llama",
    "modeling_dmc_llama",
)

_CONFIGURATION = '''"""Configuration of a {title} model whose key/value cache compresses itself."""

from transformers import {title}Config

from .configuration_dmc_llama import DmcFields


class Dmc{title}Config(DmcFields, {title}Config):
    """{title}'s configuration and, under `dmc`, what its decisions need: see `DmcFields`."""

    model_type = "{export_type}"
    qk_norm = {qk_norm}
{biases}
    def __init__(self, dmc: dict | None = None, **kwargs) -> None:
        """See the class."""
        super().__init__(dmc, **kwargs)
'''
_MODEL = '''"""A {title} model whose key/value cache compresses itself: `modeling_dmc_llama` with {title}'s configuration."""

from .configuration_{export_type} import Dmc{title}Config
from .modeling_dmc_llama import DmcLlamaForCausalLM


class Dmc{title}ForCausalLM(DmcLlamaForCausalLM):
    """A causal language model; `generate(..., return_dict_in_generate=True).past_key_values` tells its ratio."""

    config_class = Dmc{title}Config
'''


def auto_map(family: Family) -> dict[str, str]:
    """What config.json names for transformers' automatic classes."""
    return {
        "AutoConfig": f"configuration_{family.export_type}.Dmc{family.title}Config",
        "AutoModelForCausalLM": f"modeling_{family.export_type}.Dmc{family.title}ForCausalLM",
    }


def files(family: Family) -> dict[str, str]:
    """File name → text of all the code that an export carries."""
    return {f"{name}.py": (FOLDER / f"{name}.py").read_text() for name in _SHARED} | {
        f"{name}.py": text for name, text in _own(family).items()
    }


@cache
def classes(family: Family) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """Configuration and model of an export, from the same code."""
    for name, text in _own(family).items():
        module = types.ModuleType(f"{__package__}.hf_model.{name}")
        module.__package__ = f"{__package__}.hf_model"
        sys.modules[module.__name__] = module  # where the second one's import finds the first
        exec(compile(text, f"{name}.py", "exec"), module.__dict__)  # noqa: S102 - the text above
    found = []
    for place in auto_map(family).values():
        name, item = place.split(".")
        found.append(getattr(__import__(f"{__package__}.hf_model.{name}", fromlist=[item]), item))
    return tuple(found)


def _own(family: Family) -> dict[str, str]:
    """Module name → text of what a family adds to the shared code, in the order of their imports; Llama has nothing."""
    if family.model_type == "llama":
        return {}
    kinds = {"qkv_bias": family.qkv_bias, "output_bias": family.output_bias, "mlp_bias": family.mlp_bias}
    biases = "".join(f"    {name} = {value}\n" for name, value in kinds.items() if value is not None)
    values = {"title": family.title, "export_type": family.export_type, "qk_norm": family.qk_norm, "biases": biases}
    return {
        f"configuration_{family.export_type}": _CONFIGURATION.format(**values),
        f"modeling_{family.export_type}": _MODEL.format(**values),
    }
