"""The quantisers that GEAR can have as its backbone, by name; `dmc.cache.codecs.tcq` is one of them on its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from dmc.cache.codecs import trellis
from dmc.cache.codecs.base import Codec, Field
from dmc.cache.codecs.lloyd import LloydMax
from dmc.cache.codecs.quantise import Quantiser
from dmc.cache.codecs.rotated import Rotated, rotation
from dmc.kernels.formats.minmax.format import MinMaxFormat
from dmc.kernels.formats.trellis.format import TrellisFormat
from dmc.kernels.pages.format import PageFormat

BITS = (2, 3, 4, 8)
MIN_MAX = {
    # name: ((axis of keys, grouped), (axis of values, grouped)); an ungrouped vector has one scale
    "kcvt": (("channel", False), ("token", False)),
    "kivi": (("channel", True), ("token", True)),
    "token": (("token", True), ("token", True)),
}
WIDTHS: dict[str, tuple[Iterable[float], str]] = {
    # name: (bits of a code, the same in words)
    **dict.fromkeys(MIN_MAX, (range(1, 9), "whole bits from 1 to 8")),
    "trellis": (trellis.RATES, "quarters of a bit from 1 to 8"),
    "lloyd": (range(1, 7), "whole bits from 1 to 6"),
}
BACKBONES = tuple(WIDTHS)
SPLIT = {2: (2, 2), 3: (3.25, 2.5), 4: (4.5, 3.5), 8: (8, 8)}  # bits → best (key bits, value bits) of the trellis
GROUP = 64
_MOST_INDICES = 256  # indices of outliers are bytes
SCALE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Backbone:
    """A quantiser of keys and one of values.

    Attributes:
        name: one of `BACKBONES`: "kcvt" (min/max; keys by channel, values by token, over whole vectors), "kivi" (the same
            in groups), "token" (min/max; both by token, in groups), "trellis" (rotated, then trellis-coded; the mean of
            keys is stored separately) or "lloyd" (rotated, then the scalar Lloyd-Max codebook).
        key_bits, value_bits: of a code; see `widths`.
        group: most values that share a scale in "kivi" and "token".
        scale_dtype: of the scales and zeros of the min/max backbones.
    """

    name: str
    key_bits: float
    value_bits: float
    group: int = GROUP
    scale_dtype: torch.dtype = torch.bfloat16

    def part(self, part: str, head_size: int) -> Any:
        """The `Quantiser` or `Rotated` of keys ("k") or of values ("v") of heads of size D."""
        bits = self.key_bits if part == "k" else self.value_bits
        if self.name == "trellis":
            return Rotated(bits, mean=part == "k")
        if self.name == "lloyd":
            return Rotated(bits, mean=False, coder=LloydMax(head_size))
        axis, grouped = MIN_MAX[self.name][part == "v"]
        return Quantiser(bits, axis, self.group if grouped else None, self.scale_dtype)

    def page_format(self, codec: Codec, page: int, head_size: int, fields: dict[str, Field], device: torch.device) -> PageFormat:
        """See `Codec.page_format`, for a codec that stores ``fields``. The format has no kernels if none reads such codes."""
        given = codec.name, page, head_size, fields, codec.fields
        key, value = self.part("k", head_size), self.part("v", head_size)
        if self.name == "trellis":
            sides = [tuple(trellis.chunks(one.rate, head_size)) for one in (key, value)]
            levels = {bits: trellis.levels(bits).to(device) for side in sides for _, bits in side}
            return TrellisFormat(*given, *sides, levels, rotation(head_size, torch.zeros(1)).to(device))
        if self.name not in MIN_MAX or key.bits != value.bits or key.bits not in BITS or page > _MOST_INDICES:
            return PageFormat(*given)
        if key.group != value.group or self.scale_dtype != torch.bfloat16:
            return PageFormat(*given)
        return MinMaxFormat(*given, key.bits, key.axis == "channel", value.axis == "channel", key.group)


def widths(codec: str, backbone: str, bits: int, key_bits: float | None, value_bits: float | None) -> tuple[float, float]:
    """Bits of a code of keys and of values.

    Args:
        codec: name, for errors.
        backbone: one of `BACKBONES`.
        bits: of both on average; the trellis divides them by the best measured bit allocation (`SPLIT`).
        key_bits, value_bits: of each; None: from ``bits``.

    Raises:
        ValueError: if the backbone has no codes of that width; the message names the widths that it has.
    """
    split = SPLIT[bits] if backbone == "trellis" else (bits, bits)
    known, words = WIDTHS[backbone]
    chosen = []
    for name, value, default in zip(("key_bits", "value_bits"), (key_bits, value_bits), split, strict=True):
        width = default if value is None else value
        if width not in known:
            said = name if value is not None else "bits"
            raise ValueError(f"{codec} codec: {said} must be {words} with the backbone {backbone}, got {width!r}")
        chosen.append(width)
    return chosen[0], chosen[1]
