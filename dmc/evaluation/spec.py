"""How a policy or codec with its settings is written on a command line."""

from __future__ import annotations


def named(text: str) -> tuple[str, dict[str, float | int | str]]:
    """``name:setting=value,...`` → (name, settings); a name may be ``module:Class``, with a capital."""
    name, _, rest = text.partition(":")
    if rest[:1].isupper():
        kind, _, rest = rest.partition(":")
        name = f"{name}:{kind}"
    settings = {}
    for part in rest.split(",") if rest else ():
        setting, equals, value = part.partition("=")
        if not (setting and equals and value):
            raise ValueError(f"{text!r}: {part!r} is not SETTING=VALUE")
        settings[setting] = _value(value)
    return name, settings


def _value(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
