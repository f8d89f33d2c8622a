"""TCQ: rotated, trellis-coded quantisation, the closest codec of this project per bit (docs/results/tcq.md).

A rotation spreads each vector over all channels (`dmc.cache.codecs.rotated`), then a trellis codes it
(`dmc.cache.codecs.trellis`). It has no low-rank part and no outliers, so it is not GEAR; GEAR can use it as its
backbone (`dmc.cache.codecs.gear`). Bits per element, everything stored, for pages of N entries and heads of size D:

    (key_bits + value_bits) / 2 + 8/D + 4/N + 24/(N D)

With 4 bits, N = 32 and D = 64 an entry of 64 + 64 values takes 68 bytes, against 256 in bf16. In longer pages
more entries share the keys' mean, but more entries wait for a full page.
"""

from __future__ import annotations

import torch

from dmc.cache.codecs.backbones import BITS, Backbone, widths
from dmc.cache.codecs.base import Field
from dmc.cache.codecs.rotated import Rotated, RotatedPages
from dmc.kernels.pages.format import PageFormat


class TcqCodec(RotatedPages):
    """Rotated, trellis-coded quantisation with one 8-bit scale per token; the keys' mean over the page is stored
    separately.

    Args:
        bits: 2, 3, 4 or 8, of keys and values on average; divided between them by the best measured bit
            allocation (`dmc.cache.codecs.backbones.SPLIT`).
        key_bits, value_bits: of keys and of values, in quarters of a bit from 1 to 8; None: as ``bits`` says.

    Raises:
        ValueError: if a setting is not one of these; the message names it and the allowed values.
    """

    name = "tcq"
    page_size = 32
    compiles = ("trellis",)

    def __init__(self, bits: int = 4, *, key_bits: float | None = None, value_bits: float | None = None) -> None:
        if bits not in BITS:
            raise ValueError(f"tcq codec: bits must be one of {', '.join(map(str, BITS))}, got {bits!r}")
        self.bits = bits
        self.key_bits, self.value_bits = widths("tcq", "trellis", bits, key_bits, value_bits)
        self.parts = Backbone("trellis", self.key_bits, self.value_bits)

    def part(self, part: str, head_size: int) -> Rotated:
        """See `RotatedPages.part`."""
        return self.parts.part(part, head_size)

    def make_page_format(self, entries: int, head_size: int, fields: dict[str, Field], device: torch.device) -> PageFormat:
        """See `Codec.make_page_format`."""
        return self.parts.page_format(self, entries, head_size, fields, device)
