"""Codecs: how entries are stored. `codec` makes one by name; a new codec is a file here and a line in `CODECS`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from dmc.cache.codecs.base import Blocks, Codec
from dmc.cache.codecs.dense import DenseCodec
from dmc.cache.codecs.eigen import EigenCodec
from dmc.cache.codecs.former import current, say
from dmc.cache.codecs.fp8 import Fp8Codec
from dmc.cache.codecs.gear import GearCodec
from dmc.cache.codecs.int8 import Int8Codec
from dmc.cache.codecs.kivi import KiviCodec
from dmc.cache.codecs.presets import Gear2Bit, Gear4Bit, Tcq2Bit, Tcq3Bit, Tcq4Bit
from dmc.cache.codecs.svd import SvdCodec
from dmc.cache.codecs.tcq import TcqCodec
from dmc.cache.codecs.turbo import RotatedCodec
from dmc.plugins import find

CODECS: dict[str, type[Codec]] = {
    codec.name: codec
    for codec in (
        DenseCodec,
        Int8Codec,
        Fp8Codec,
        KiviCodec,
        RotatedCodec,
        SvdCodec,
        EigenCodec,
        GearCodec,
        Gear4Bit,
        Gear2Bit,
        TcqCodec,
        Tcq4Bit,
        Tcq3Bit,
        Tcq2Bit,
    )
}

__all__ = ["CODECS", "Blocks", "Codec", "codec", "codec_class", "make"]


def codec(name: str, **settings: object) -> Codec:
    """A codec by its name, for example ``codec("tcq", bits=4)``.

    Names and settings of version 0.1 that mean something else now are logged once as a warning; see
    `dmc.cache.codecs.former`.

    Raises:
        ValueError: if the name or a setting is unknown (the known ones are listed) or a value is not allowed.
    """
    *now, note = current(name, settings)
    made = make(*now)
    if note:
        say(note)
    return made


def make(name: str, settings: Mapping[str, object], page_size: int | None = None) -> Codec:
    """A codec by its name (see `codec_class`), and with another default page size where one is given.

    Raises:
        ValueError: if the name or a setting is unknown (the known ones are listed) or a value is not allowed.
    """
    kind = codec_class(name)
    known = kind.settings()
    unknown = [setting for setting in settings if setting not in known]
    if unknown:
        raise ValueError(f"the {name} codec has no setting {', '.join(unknown)}; it has: {', '.join(known)}")
    made = kind(**{setting: _whole(name, kind, setting, value) for setting, value in settings.items()})
    if page_size is not None:
        made.page_size = page_size
    return made


def codec_class(name: str) -> type[Codec]:
    """The class of a codec by its name, that of an installed package, or ``module:Class``; see `dmc.plugins.find`.

    Raises:
        ValueError: if there is none.
    """
    return find("codec", name, CODECS, Codec)


def _whole(name: str, kind: type[Codec], setting: str, value: object) -> object:
    """Normalise integral floats (2.0) to int for integer settings, so that each value has one spelling; reject bool."""
    kinds = kind.__mro__  # a preset's settings are those of its base
    signatures = (inspect.signature(kind.__init__).parameters for kind in kinds)
    parameter = next(known[setting] for known in signatures if setting in known)
    whole = type(parameter.default) is int or parameter.annotation in ("int", "int | None")
    if not whole or not isinstance(value, bool | float):
        return value
    if isinstance(value, bool) or not value.is_integer():
        raise ValueError(f"{name} codec: {setting} must be a whole number, got {value!r}")
    return int(value)
