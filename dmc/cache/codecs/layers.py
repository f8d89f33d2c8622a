"""The codec of each layer: one for all, or settings of each from a file such as `dmc inspect` recommends one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from dmc.cache.codecs import codec, make
from dmc.cache.codecs.base import Codec
from dmc.cache.codecs.former import former, say

FORMAT = "dmc-layers-2"
FORMER = "dmc-layers-1"
"""The format of version 0.1, with the codec names of that version."""
_KEYS = {"format", "codec", "layers"}


def read_layers(path: str | Path) -> list[Codec]:
    """One codec per layer; layers with equal settings share an object.

    The file is JSON: ``{"format": "dmc-layers-2", "codec": "tcq", "layers": [{"bits": 4}, {"bits": 2}, ...]}``, an
    element of "layers" for each layer of the model, with settings of the codec. Further keys
    that begin with "_" are notes and are ignored.

    Args:
        path: of the file.

    Raises:
        ValueError: if the file cannot be read, is not such a file, or a layer's settings are rejected; the message
            names the layer.
    """
    try:
        read = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(read, dict) or read.get("format") not in (FORMAT, FORMER):
        raise ValueError(f'{path} is not a file of layers: it needs "format": "{FORMAT}"')
    unknown = [key for key in read if key not in _KEYS and not key.startswith("_")]
    if unknown or not isinstance(read.get("codec"), str) or not isinstance(read.get("layers"), list) or not read["layers"]:
        wrong = f"has an unknown key {unknown[0]!r}" if unknown else "lacks a codec's name or a list of layers"
        raise ValueError(f'{path} {wrong}; its keys are "format", "codec" and "layers"')
    made: dict[str, Codec] = {}
    out = []
    for number, settings in enumerate(read["layers"]):
        if not isinstance(settings, dict):
            raise ValueError(f'{path}, layer {number}: settings must be an object such as {{"bits": 4}}, got {settings!r}')
        key = json.dumps(settings, sort_keys=True)
        if key not in made:
            try:
                made[key] = _made(path, read, settings)
            except (ValueError, TypeError) as error:  # of another JSON type than the setting's
                raise ValueError(f"{path}, layer {number}: {error}") from error
        out.append(made[key])
    return out


def per_layer(codec: Codec | Sequence[Codec], layers: int, heads: int, head_size: int) -> list[Codec]:
    """The codec of each of a model's layers, from one codec for all of them or one for each.

    Raises:
        ValueError: if there are not as many codecs as layers.
    """
    if isinstance(codec, Codec):
        return [codec.of_layer(layer, layers, heads, head_size) for layer in range(layers)]
    if len(codec) != layers:
        raise ValueError(f"{len(codec)} codecs were given, one per layer, but the model has {layers} layers")
    return [one.of_layer(layer, layers, heads, head_size) for layer, one in enumerate(codec)]


def _made(path: str | Path, read: dict, settings: dict) -> Codec:
    """A codec of the file. In the former format, names have the meaning of version 0.1."""
    name = read["codec"]
    if read["format"] == FORMAT:
        return codec(name, **settings)
    now = former(name, settings)
    if now[0] != name:
        say(
            f'{path} was written by version 0.1, whose codec {name} is now called {now[0]}; write "format": "{FORMAT}" and that '
            "name, as the next version reads no other"
        )
    return make(*now)
