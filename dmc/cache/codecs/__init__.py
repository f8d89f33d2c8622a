"""How an entry is stored. `codec` makes one by name; a new codec is a file here and a line in `CODECS`."""

from __future__ import annotations

import inspect

from dmc.cache.codecs.base import Blocks, Codec
from dmc.cache.codecs.dense import DenseCodec
from dmc.cache.codecs.eigen import EigenCodec
from dmc.cache.codecs.fp8 import Fp8Codec
from dmc.cache.codecs.gear import GearCodec
from dmc.cache.codecs.int8 import Int8Codec
from dmc.cache.codecs.kivi import KiviCodec
from dmc.cache.codecs.presets import PRESETS
from dmc.cache.codecs.svd import SvdCodec
from dmc.cache.codecs.turbo import RotatedCodec

CODECS: dict[str, type[Codec]] = {codec.name: codec for codec in (
    DenseCodec,
    Int8Codec,
    Fp8Codec,
    KiviCodec,
    RotatedCodec,
    SvdCodec,
    EigenCodec,
    GearCodec,
    *PRESETS,
)}

__all__ = ["CODECS", "Blocks", "Codec", "codec"]


def codec(name: str, **settings: object) -> Codec:
    """A codec by its name, for example ``codec("gear", bits=4)``.

    Raises:
        ValueError: if the name or a setting is unknown (the known ones are listed) or a value is not allowed.
    """
    if name not in CODECS:
        raise ValueError(f"unknown codec {name!r}; known: {', '.join(CODECS)}")
    known = CODECS[name].settings()
    unknown = [setting for setting in settings if setting not in known]
    if unknown:
        raise ValueError(f"the {name} codec has no setting {', '.join(unknown)}; it has: {', '.join(known)}")
    return CODECS[name](**{setting: _whole(name, setting, value) for setting, value in settings.items()})


def _whole(name: str, setting: str, value: object) -> object:
    """2.0 as 2 where a whole number is meant, so that one setting has one name; a truth value is none."""
    signatures = (inspect.signature(kind.__init__).parameters for kind in CODECS[name].__mro__)  # a preset's settings are GEAR's
    default = next(known[setting].default for known in signatures if setting in known)
    if type(default) is not int or not isinstance(value, bool | float):
        return value
    if isinstance(value, bool) or not value.is_integer():
        raise ValueError(f"{name} codec: {setting} must be a whole number, got {value!r}")
    return int(value)
