"""Configurations of exported models for transformers' AutoConfig, so that vLLM needs no code from the model's directory."""

from __future__ import annotations

import transformers
from transformers import AutoConfig, PreTrainedConfig

from dmc.families import Family, families

KNOWN = ("method", "decision", "offset", "target_cr", "measured_cr", "window", "decide")
"""Fields of ``dmc`` in config.json."""


def register(wrong: str | None) -> None:
    """Registers a configuration class for each family.

    Args:
        wrong: sentence that the classes raise instead; None: none.
    """
    for family in families().values():
        AutoConfig.register(family.export_type, configuration(family, wrong), exist_ok=True)


def configuration(family: Family, wrong: str | None = None) -> type[PreTrainedConfig]:
    """The configuration class of a family's exports: transformers' own, and the field ``dmc``."""
    base = getattr(transformers, f"{family.title}Config")

    class Configuration(base):
        """Configuration of an export of this project."""

        model_type = family.export_type

        def __init__(self, dmc: dict | None = None, **kwargs) -> None:
            if wrong is not None:
                raise ValueError(wrong)
            check_fields(dmc or {})
            self.dmc = dmc
            super().__init__(**kwargs)

    Configuration.__name__ = Configuration.__qualname__ = f"Dmc{family.title}Config"
    return Configuration


def check_fields(fields: dict) -> None:
    """Checks that an export has no field that this version does not know.

    Raises:
        ValueError: if it has one.
    """
    unknown = sorted(set(fields) - set(KNOWN))
    if unknown:
        raise ValueError(
            f"config.json has dmc.{unknown[0]}, which this version of dmc does not know: the model was exported by another "
            "version, so install that one"
        )
