"""The configuration of a run: `dmc.training.settings` from YAML and dotted overrides, checked.

``load(path, overrides)`` reads a YAML file, applies ``section.key=value`` strings and checks the result. An unknown key is
rejected with a list of the known keys.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Mapping
from pathlib import Path

import yaml

from dmc.training.checks import check
from dmc.training.settings import (
    DMS_WINDOW,
    Config,
    DataConfig,
    DistillConfig,
    DmcConfig,
    GuardConfig,
    LogConfig,
    OptimConfig,
    ParallelConfig,
    PlanConfig,
    RunConfig,
)

__all__ = [
    "DMS_WINDOW",
    "Config",
    "DataConfig",
    "DistillConfig",
    "DmcConfig",
    "GuardConfig",
    "LogConfig",
    "OptimConfig",
    "ParallelConfig",
    "PlanConfig",
    "RunConfig",
    "check",
    "describe",
    "keys",
    "load",
    "recorded",
    "to_dict",
]


def load(path: str | Path | None = None, overrides: list[str] | None = None) -> Config:
    """Defaults, then the YAML file, then ``section.key=value`` strings; checked.

    Raises:
        ValueError: one sentence naming the field, the value and the remedy.
    """
    config = Config()
    if path is not None:
        for section, values in _read_yaml(Path(path)).items():
            for key, value in _section_items(section, values):
                _assign(config, f"{section}.{key}", value)
    for override in overrides or []:
        name, sign, text = override.partition("=")
        if not sign:
            raise ValueError(f"{override!r} is not an override: write section.key=value, e.g. optim.lr=1e-4")
        try:
            _assign(config, name, yaml.safe_load(text) if text else "")
        except yaml.YAMLError:
            raise ValueError(f"the value of {override!r} is not readable: quote it as in YAML") from None
    check(config)
    return config


def to_dict(config: Config) -> dict:
    """Nested plain dictionary, as in the YAML files."""
    return dataclasses.asdict(config)


def describe() -> str:
    """Every field with its default and its comment in `settings`, for ``--help``."""
    lines = []
    for section, owner in _types(Config).items():
        lines.append(f"  {section}.   {inspect.getdoc(owner)}")
        for name, _, default, comment in keys(owner):
            lines.append(f"    {name:<22}{default:<20}{comment}".rstrip())
    return "\n".join(lines)


def keys(section: type) -> list[tuple[str, str, str, str]]:
    """(name, type, default, comment next to it) of each field of a section's dataclass."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(section), flags=re.MULTILINE))
    return [
        (item.name, str(item.type), _shown(item.default), comments.get(item.name, "")) for item in dataclasses.fields(section)
    ]


def recorded(settings: Mapping) -> DmcConfig:
    """The retrofit's settings from the ``dmc`` section that a checkpoint records, as they were in force.

    Checkpoints from before late merging record a window for every method, and only DMS used it.
    """
    known = {item.name for item in dataclasses.fields(DmcConfig)}
    found = DmcConfig(**{name: value for name, value in settings.items() if name in known})
    if "decide" not in settings:
        found.decide = "arrival"
        found.window = found.window if found.method == "dms" else None
    return found


def _read_yaml(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"no config file at {path}: see configs/ for the ones that exist")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold sections such as `optim:`, found {type(values).__name__}")
    return values


def _section_items(section: str, values: object) -> list[tuple[str, object]]:
    if section not in _types(Config):
        raise ValueError(f"unknown config section {section!r}; known: {_names(Config)}")
    if not isinstance(values, dict):
        raise ValueError(f"section {section!r} must hold keys, found {values!r}; known sections: {_names(Config)}")
    return list(values.items())


def _assign(config: Config, name: str, value: object) -> None:
    section, _, key = name.partition(".")
    if section not in _types(Config):
        raise ValueError(f"unknown config section {section!r} in {name!r}; known: {_names(Config)}")
    owner = getattr(config, section)
    types = _types(type(owner))
    if key not in types:
        raise ValueError(f"unknown config key {name!r}; known in {section}: {_names(type(owner))}")
    setattr(owner, key, _cast(name, value, types[key]))


def _cast(name: str, value: object, kind: type) -> object:
    if isinstance(value, str) and kind in (int, float):
        try:
            value = float(value)  # YAML reads 1e-3 as a string
        except ValueError:
            raise ValueError(f"{name} is {value!r}: it must be a number") from None
    if kind == bool | str:
        value = {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value
        kind = bool if isinstance(value, bool) else str
    if kind == str | list:
        kind = list if isinstance(value, list) else str
    if kind == int | None:
        if value is None or value == "":
            return None
        kind = int
        if isinstance(value, str):
            value = _cast(name, value, float)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is str and value is not None and not isinstance(value, str | bool | dict | list):
        value = str(value)
    if type(value) is not kind:
        raise ValueError(f"{name} is {value!r}: it must be of type {kind.__name__}")
    return value


def _types(owner: type) -> dict[str, type]:
    return typing.get_type_hints(owner)


def _names(owner: type) -> str:
    return ", ".join(_types(owner))


def _shown(default: object) -> str:
    return repr(default) if isinstance(default, str) else str(default)
