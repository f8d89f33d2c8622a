"""Codec names of version 0.1 whose meaning has changed. They work for one more version, with a warning.

Until then ``gear`` and its presets were the rotated trellis quantiser that is now `dmc.cache.codecs.tcq`, unless
``backbone`` named another quantiser, and their low rank was 1 where only the backbone was given.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping

CHANGED = ("gear", "gear-4bit", "gear-2bit")
GONE = ("gear-3bit",)
_PAGE_SIZE = {"gear": 32}  # of the presets: 64
_ROTATED = "rotated"
_SAME = ("kcvt", "kivi", "token")  # backbones that version 0.1 knew by the same name
_log = logging.getLogger("dmc.cache")


def former(name: str, settings: Mapping[str, object]) -> tuple[str, dict[str, object], int | None]:
    """The current name and settings of a codec of version 0.1.

    Args:
        name: of the codec.
        settings: of the codec.

    Returns:
        Name, settings and, where it may differ from today's, the page size (else None). Other codecs are returned unchanged.
    """
    if name not in CHANGED + GONE:
        return name, dict(settings), None
    page, rest = _PAGE_SIZE.get(name, 64), dict(settings)
    if name != "gear" and "bits" not in rest:
        rest = {"bits": int(name[len("gear-")])} | rest
    backbone = rest.get("backbone", _ROTATED)
    if backbone != _ROTATED:
        if backbone == "kcvt":
            rest.pop("group", None)  # it did nothing
        rest |= {setting: value for setting, value in (("rank", 1), ("outliers", 0.02)) if setting not in rest}
        return "gear", rest, page
    for unused in ("group", "scale_dtype"):  # of the other backbones
        rest.pop(unused, None)
    if rest.get("rank") or rest.get("outliers"):
        added = {"rank": 0, "outliers": 0.0}
        return "gear", rest | {"backbone": "trellis"} | {name: value for name, value in added.items() if name not in rest}, page
    rest = {setting: value for setting, value in rest.items() if setting != "backbone"}
    if "bits" not in settings:
        rest.pop("bits", None)  # the preset of that name has it
    for unused in ("rank", "outliers", "rounds", "seed"):
        rest.pop(unused, None)
    return f"tcq{name[4:]}", rest, None


def current(name: str, settings: Mapping[str, object]) -> tuple[str, dict[str, object], int | None, str | None]:
    """The codec that a name and settings given by a user mean.

    Removed names, and settings that only the former meaning has, keep the former meaning. ``gear`` and its presets mean
    GEAR's published recipe.

    Returns:
        As `former`, and a warning for `say` if the meaning has changed (else None).
    """
    note = None
    if name in GONE or (name in CHANGED and _only_former(settings)):
        now = former(name, settings)
        return *now, f"the codec {_written(name, settings)} is now called {_written(*now[:2])}; the old name will be removed"
    if name in CHANGED and "backbone" not in settings:
        note = (
            f"the codec {name} is GEAR's published recipe (min/max codes, low rank, outliers); the trellis quantiser that had "
            f"this name is now called tcq{name[4:]}"
        )
    elif settings.get("backbone") in _SAME and name in CHANGED and "rank" not in settings:
        note = f"the codec {name} over {settings['backbone']} has rank 4, as published, unless one is given; it had 1"
    return name, dict(settings), None, note


def renamed(name: str, settings: Mapping[str, object]) -> tuple[str, dict[str, object]]:
    """Name and settings as `current` gives them, with the warning."""
    name, now, _, note = current(name, settings)
    if note:
        say(note)
    return name, now


def _only_former(settings: Mapping[str, object]) -> bool:
    """True if only the former meaning has such settings: its name of the backbone, or fractional bits without a backbone."""
    parts = (settings.get(name) for name in ("key_bits", "value_bits"))
    fractional = any(isinstance(bits, float) and not bits.is_integer() for bits in parts)
    return settings.get("backbone") == _ROTATED or ("backbone" not in settings and fractional)


def _written(name: str, settings: Mapping[str, object]) -> str:
    """Name and settings as on the command line."""
    words = ",".join(f"{setting}={value}" for setting, value in settings.items())
    return f"{name}:{words}" if words else name


@functools.cache
def say(text: str) -> None:
    """Logs a warning, each text once per process."""
    if os.environ.get("RANK", "0") == "0":
        _log.warning("dmc: %s", text)
