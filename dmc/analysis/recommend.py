"""Which layers to give more bits or rank: settings of a codec for each layer, at the bytes of one setting for all.

Each layer is encoded alone at several values of a setting, and the KL of the exact predictions to these is measured.
Losses of layers are taken to add up, and the bytes are divided by `allocate`. Then both, one setting for all layers and
the divided ones, are measured with all layers encoded, on windows that no choice was made on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from dmc.analysis.allocate import allocate
from dmc.analysis.sensitivity import Probe
from dmc.cache import Codec, KVCache
from dmc.cache.codecs import make
from dmc.cache.codecs.former import renamed
from dmc.cache.codecs.layers import FORMAT
from dmc.model import Decoder

SCORED_SHARE = 4  # of a window's tokens one in so many is scored
_STEP, _AROUND = 0.25, 1.0  # bits between choices, and from the setting for all to the least and most
_LEAST_KL = 1e-9  # nats/token; below it is rounding


def recommend(
    model: Decoder,
    cache: KVCache,
    name: str,
    settings: Mapping[str, object],
    windows: Sequence[Sequence[int]],
    held_out: Sequence[Sequence[int]],
    *,
    vary: Mapping[str, Sequence[float]] | None = None,
    progress: Callable[[int], object] = lambda passes: None,
) -> dict:
    """Settings for each layer, and what they are worth.

    Args:
        model, cache: see `Probe`.
        name, settings: of a codec for all layers, whose bytes are the budget.
        windows: token ids that the layers are measured on.
        held_out: others for the comparison; may be empty.
        vary: settings and the values at which each layer is measured. None: the codec's key_bits and value_bits, one bit
            less and more, with every value that the codec takes between. A setting that begins with "key" or "value"
            is of these alone, others are of both.
        progress: called with 1 after each of `passes`.

    Returns:
        What goes into reports; "layers" is the file that the codecs read. KL in nats/token.

    Raises:
        ValueError: if the codec loses nothing, has no such setting, or a value is not allowed.
    """
    name, settings = renamed(name, settings)
    vary = choices(name, settings, vary)
    probe = _probe(model, cache, windows)
    if not isinstance(cache.page_size, int):
        raise ValueError("the layers of this cache differ already: give one codec for all of them to divide its bytes")
    pages = _Pages(name, dict(settings), cache.page_size, cache.shape.head_size)
    measured = {
        setting: {"values": values, "kl": _measured(probe, pages, setting, values, progress)} for setting, values in vary.items()
    }
    layers, predicted = _divided(pages, measured, probe.entries)
    uniform, divided = pages.made({}), [pages.made(own) for own in layers]
    bytes_each = [pages.entry_bytes(own) for own in layers]
    return {
        "layers": {"format": FORMAT, "codec": name, "layers": [dict(settings) | own for own in layers]},
        "codec": name,
        "settings": dict(settings),
        "base": {setting: getattr(uniform, setting) for setting in vary},
        "page_size": pages.size,
        "measured": measured,
        "predicted_kl": predicted,
        "bits_per_element": {
            "uniform": 4 * pages.entry_bytes({}) / pages.head_size,
            "recommended": 4
            * sum(map(math.prod, zip(bytes_each, probe.entries, strict=True)))
            / (pages.head_size * max(1, sum(probe.entries))),
        },
        "chosen_on": _compare(probe, uniform, divided, pages.size, progress),
        "held_out": _compare(_probe(model, cache, held_out), uniform, divided, pages.size, progress) if held_out else None,
    }


def passes(layers: int, vary: Mapping[str, Sequence[float]], held_out: bool) -> int:
    """How often `recommend` reports progress."""
    return layers * sum(map(len, vary.values())) + 2 * (1 + held_out)


def choices(name: str, settings: Mapping[str, object], vary: Mapping[str, Sequence[float]] | None) -> dict[str, list[float]]:
    """What is varied and at which values each layer is measured; see `recommend`.

    Raises:
        ValueError: if the codec loses nothing, or a setting or value is not one of its own.
    """
    name, settings = renamed(name, settings)
    pages = _Pages(name, dict(settings), 1, 1)
    uniform = pages.made({})
    if not uniform.lossy:
        raise ValueError(f"the {name} codec loses nothing, so there is nothing to divide: choose another --codec")
    if vary is None:
        bits = {setting: getattr(uniform, setting) for setting in ("key_bits", "value_bits") if hasattr(uniform, setting)}
        if not bits:
            others = [own for own in uniform.settings() if isinstance(getattr(uniform, own, None), int | float)]
            raise ValueError(
                f"the {name} codec has no bits of keys and values to divide: "
                + (f"say what to vary with --vary, of {', '.join(others)}" if others else "choose another --codec")
            )
        around = {setting: map(_plain, (base - _AROUND, base + _AROUND)) for setting, base in bits.items()}
        vary = {
            setting: [value for value in values if pages.allows({setting: value})] or [bits[setting]]
            for setting, values in around.items()
        }
    for setting, values in vary.items():
        if not hasattr(uniform, setting):
            raise ValueError(
                f"the {name} codec has no setting {setting} that can be varied; it has: {', '.join(uniform.settings())}"
            )
        for value in values:
            pages.made({setting: value})
    return {setting: sorted(values) for setting, values in vary.items()}


def _probe(model: Decoder, cache: KVCache, windows: Sequence[Sequence[int]]) -> Probe:
    return Probe(model, cache, windows, scored=max(1, len(windows[0]) // SCORED_SHARE), sinks=cache.sink_tokens)


@dataclass(frozen=True)
class _Pages:
    """A codec by name, its settings for all layers, entries of a page, head size."""

    name: str
    settings: dict[str, object]
    size: int
    head_size: int

    def made(self, own: dict[str, object]) -> Codec:
        return make(self.name, self.settings | own)

    def allows(self, own: dict[str, object]) -> bool:
        try:
            self.made(own)
        except ValueError:
            return False
        return True

    def entry_bytes(self, own: dict[str, object]) -> float:
        """Bytes of one entry's key and value in a page, everything in it counted."""
        one = self.made(own)
        return one.nbytes(one.encode(*torch.zeros(2, self.size, self.head_size))) / self.size


def _measured(
    probe: Probe, pages: _Pages, setting: str, values: Sequence[float], progress: Callable[[int], object]
) -> list[list[float]]:
    """KL with one layer encoded, at each value: ``[L][values]``."""
    part = next((part for part in ("key", "value") if setting.startswith(part)), "both")
    made = [pages.made({setting: value}) for value in values]
    found = []
    for layer in range(len(probe.entries)):
        found.append([])
        for one in made:
            found[-1].append(float(probe.kl({layer: probe.encoded(layer, one, pages.size)}, part).mean()))
            progress(1)
    return found


def _divided(pages: _Pages, measured: Mapping[str, dict], entries: Sequence[int]) -> tuple[list[dict], dict[str, float]]:
    """Settings that differ from layer to layer, and the sums of KL as predicted, for one setting and for these."""
    uniform, items, same, names = pages.made({}), [], [], []
    for setting, found in measured.items():
        base = getattr(uniform, setting)
        offered = _between(pages, setting, found["values"], base)
        cost = [pages.entry_bytes({setting: value}) - pages.entry_bytes({}) for value in offered]
        for layer, losses in enumerate(found["kl"]):
            kl = [_loss(found["values"], losses, value) for value in offered]
            items.append([(own * entries[layer], loss) for own, loss in zip(cost, kl, strict=True)])
            same.append(offered.index(base))
            names.append((layer, setting, offered))
    taken = allocate(items, 0.0)
    predicted = {"uniform": _total(items, same), "recommended": _total(items, taken)}
    if predicted["uniform"] < predicted["recommended"]:  # what is left of the budget can make the difference
        taken, predicted["recommended"] = same, predicted["uniform"]
    layers: list[dict] = [{} for _ in entries]
    for (layer, setting, offered), choice in zip(names, taken, strict=True):
        layers[layer][setting] = offered[choice]
    return layers, predicted


def _compare(probe: Probe, uniform: Codec, divided: Sequence[Codec], page: int, progress: Callable[[int], object]) -> dict:
    """KL with all layers encoded, of each window and their mean."""
    found: dict[str, object] = {"windows": 0, "tokens": 0}
    for kind, codecs in (("uniform", [uniform] * len(divided)), ("recommended", divided)):
        kl = probe.kl({layer: probe.encoded(layer, one, page) for layer, one in enumerate(codecs)})
        found |= {kind: float(kl.mean()), f"{kind}_by_window": kl.tolist(), "windows": len(kl), "tokens": len(kl) * probe.scored}
        progress(1)
    return found


def _between(pages: _Pages, setting: str, values: Sequence[float], base: float) -> list[float]:
    """Values to choose from: the measured ones and the one for all; of bits also what the codec takes between them."""
    offered = {*values, base}
    if setting.endswith("bits"):
        steps = int((max(offered) - min(offered)) / _STEP)
        between = (_plain(min(offered) + step * _STEP) for step in range(1, steps))
        offered |= {value for value in between if pages.allows({setting: value})}
    return sorted(offered)


def _plain(value: float) -> float:
    """3.0 → 3: codecs of whole bits take no others."""
    return int(value) if value == int(value) else value


def _loss(values: Sequence[float], losses: Sequence[float], value: float) -> float:
    """KL at a value: log-linear between measured ones (an error halves with each bit), beyond them that of the nearest."""
    known = sorted(zip(values, losses, strict=True))
    before = [pair for pair in known if pair[0] <= value] or known[:1]
    after = [pair for pair in known if pair[0] >= value] or known[-1:]
    (low, first), (high, second) = before[-1], after[0]
    first, second = max(first, _LEAST_KL), max(second, _LEAST_KL)
    place = (value - low) / (high - low) if high != low else 0.0
    return math.exp(math.log(first) * (1 - place) + math.log(second) * place)


def _total(items: Sequence[Sequence[tuple[float, float]]], taken: Sequence[int]) -> float:
    return sum(choices[choice][1] for choices, choice in zip(items, taken, strict=True))
