"""Rows of a frontier that version 0.1 wrote, whose codecs of the name ``gear`` are called something else now."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from dmc.cache.codecs.former import CHANGED, GONE, former
from dmc.evaluation.grid import CACHE_SETTINGS, choose
from dmc.evaluation.spec import named

_PRESETS = {
    "gear-4bit": {"bits": 4, "backbone": "kcvt", "rank": 4, "outliers": 0.02, "page_size": 64},
    "gear-2bit": {"bits": 2, "backbone": "kivi", "rank": 4, "outliers": 0.02, "page_size": 64},
}
"""What version 0.1 had to spell out and is a preset now."""


def renamed(row: dict, device: str, dtype: str) -> dict:
    """The row with the name that its codec has today; rows of other codecs and of today come back as they are.

    Args:
        row: with a key, as `dmc.evaluation.frontier.run` writes them.
        device, dtype: as given to the run that reads the row: its key is that of the same measurement today where they
            were the same. Otherwise the key is one that no measurement has.
    """
    result = row.get("result")
    if result is None or result["codec"] not in CHANGED + GONE or "backbone" in result["settings"]["codec"]:
        return row
    name, settings = named(row["codec"])
    own: dict = {setting: value for setting, value in settings.items() if setting not in CACHE_SETTINGS}
    rest = {setting: value for setting, value in settings.items() if setting in CACHE_SETTINGS}
    name, own, page = former(name, own)
    if name == "gear" and page is not None:
        rest = {"page_size": page} | rest
    label = str(choose(name, **own | rest))
    for preset, spelt in _PRESETS.items():
        if name == "gear" and own | rest == spelt:
            name = label = preset
    parts = [result["model_hash"], row["policy"], row["codec"], result["windows_hash"], result["base_hash"], device, dtype]
    same = key(parts) == row["key"]
    made = row | {"key": key([*parts[:2], label, *parts[3:]]) if same else f"{row['key']}-0.1", "codec": label}
    settings = result["settings"]
    if name.startswith("gear"):  # by the backbone a row of today is known
        settings = settings | {"codec": {"bits": own.get("bits", 4), "backbone": own["backbone"]} | settings["codec"]}
    if name == "gear" and not own["rank"] and not own["outliers"]:
        name = f"bare {own['backbone']}"
    return made | {"result": result | {"codec": name, "settings": settings}}


def key(parts: Sequence[str | None]) -> str:
    """Key of a row: a hash of the things that it depends on."""
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()[:16]
