"""Configurations of exported models for transformers' AutoConfig, so that vLLM needs no code from the model's directory."""

from __future__ import annotations

import transformers
from transformers import AutoConfig, PreTrainedConfig

from dmc.families import Family, families

KNOWN = ("method", "decision", "offset", "target_cr", "measured_cr", "window", "decide")
"""Fields of ``dmc`` in config.json."""


WRONG: str | None = None
"""Sentence that the configurations raise instead, in another version of vLLM."""


def configuration(family: Family) -> type[PreTrainedConfig]:
    """The configuration class of a family's exports: transformers' own, and the field ``dmc``."""
    base = getattr(transformers, f"{family.title}Config")

    class Configuration(base):
        """Configuration of an export of this project."""

        model_type = family.export_type

        def __init__(self, dmc: dict | None = None, **kwargs) -> None:
            if WRONG is not None:
                raise ValueError(WRONG)
            check_fields(dmc or {})
            self.dmc = dmc
            super().__init__(**kwargs)

    Configuration.__name__ = Configuration.__qualname__ = f"Dmc{family.title}Config"
    return Configuration


CLASSES = [configuration(family) for family in families().values()]
globals().update({one.__name__: one for one in CLASSES})  # vLLM sends a configuration to its other processes by pickle


def register(wrong: str | None) -> None:
    """Registers the configuration classes.

    Args:
        wrong: sentence that they raise; None: none.
    """
    global WRONG
    WRONG = wrong
    for one in CLASSES:
        AutoConfig.register(one.model_type, one, exist_ok=True)


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
