"""Policies and codecs of other packages: found by entry point, or by ``module:Class``.

A package names its classes in its own metadata, and its users then write the name as they write those of this project:

    [project.entry-points."dmc.policies"]
    newest = "mypackage.policies:NewestPolicy"
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from importlib import metadata
from typing import TypeVar

T = TypeVar("T")
_RENAMED = {"watches": "statistics", "placed": "needs_positions"}  # of policies, of codecs
_CLASS = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)")


def find(kind: str, name: str, known: Mapping[str, type[T]], base: type[T]) -> type[T]:
    """The class of a name: one of this project, else that of an entry point of group ``dmc.policies`` or ``dmc.codecs``, or
    the class itself as ``module:Class``.

    Args:
        kind: "policy" or "codec".
        name: as it is written on a command line.
        known: classes of this project by their names.
        base: `Policy` or `Codec`.

    Raises:
        ValueError: if the name is unknown (the known ones are listed), or its class cannot be imported or is none.
    """
    if name in known:
        return known[name]
    installed = {point.name: point for point in metadata.entry_points(group=f"dmc.{_plural(kind)}")}
    direct = _CLASS.fullmatch(name)
    if name in installed:
        where, found = f"{name} ({installed[name].value})", installed[name].load
    elif direct:
        where, found = name, lambda: getattr(importlib.import_module(direct[1]), direct[2])
    else:
        raise ValueError(f"unknown {kind} {name!r}; known: {', '.join([*known, *installed])}; or module:Class of your own")
    try:
        made = found()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"the {kind} {where} cannot be imported: {type(error).__name__}: {error}") from None
    if not (isinstance(made, type) and issubclass(made, base)):
        raise ValueError(f"the {kind} {where} is not a subclass of {base.__module__}.{base.__name__}")
    return made


def check_names(*things: object) -> None:
    """Raises ValueError if a policy or codec sets an attribute under the name of version 0.1, which nothing reads any more."""
    for thing in things:
        for old, new in _RENAMED.items():
            if hasattr(thing, old):
                raise ValueError(f"{type(thing).__name__} sets {old}, which is called {new} now: rename it")


def _plural(kind: str) -> str:
    return {"policy": "policies", "codec": "codecs"}[kind]
