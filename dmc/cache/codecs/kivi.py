"""KIVI (Liu et al., arXiv 2402.02750): keys quantised by channel, values by token, asymmetrically, in groups."""

from __future__ import annotations

import torch
from torch import Tensor

from dmc.cache.codecs.base import Blocks, Codec, Field
from dmc.cache.codecs.quantise import Quantiser
from dmc.kernels.formats.minmax.format import MinMaxFormat
from dmc.kernels.pages.format import PageFormat

BITS = (2, 3, 4, 8)


class KiviCodec(Codec):
    """``x ≈ code * scale + zero``; a group is ``group`` tokens of one channel (keys) or ``group`` channels of one token (values).

    Bits per element: ``bits + 32 / group``, scales and zeros in bf16. The paper keeps the newest values (R = 128) and up
    to as many of the newest keys in full precision; here keys and values of a row's newest 96 to 127 entries are in full
    precision (``window`` and the page that is filling), and so are its first 4 entries.

    Args:
        bits: 2, 3, 4 or 8; the paper has 2 and 4.
        group: tokens of a channel, and channels of a token, that share a scale.

    Raises:
        ValueError: if a setting is out of range.
    """

    name = "kivi"
    lossy = True
    page_size = 32
    window = 96

    def __init__(self, bits: int = 2, *, group: int = 32) -> None:
        if bits not in BITS:
            raise ValueError(f"kivi codec: bits must be one of {', '.join(map(str, BITS))}, got {bits!r}")
        if not isinstance(group, int) or group < 1:
            raise ValueError(f"kivi codec: group must be a whole number of at least 1, got {group!r}")
        self.bits, self.group = bits, group
        self._keys = Quantiser(bits, "channel", group, torch.bfloat16)
        self._values = Quantiser(bits, "token", group, torch.bfloat16)

    def encode(self, keys: Tensor, values: Tensor) -> Blocks:
        """See `Codec.encode`; arithmetic in fp32."""
        tensors = {f"k_{name}": field for name, field in self._keys.encode(keys.float()).items()}
        tensors |= {f"v_{name}": field for name, field in self._values.encode(values.float()).items()}
        return Blocks(tensors, *keys.shape[-2:])

    def decode(self, blocks: Blocks) -> tuple[Tensor, Tensor]:
        """See `Codec.decode`."""
        shape = blocks.entries, blocks.head_size
        return self._keys.decode(blocks.part("k"), *shape), self._values.decode(blocks.part("v"), *shape)

    def make_page_format(self, entries: int, head_size: int, fields: dict[str, Field], device: torch.device) -> PageFormat:
        """See `Codec.make_page_format`."""
        return MinMaxFormat(self.name, entries, head_size, fields, self.fields, self.bits, True, False, self.group)

    def scores(self, blocks: Blocks, query: Tensor) -> Tensor:
        """See `Codec.scores`."""
        return self._keys.scores(blocks.part("k"), blocks.entries, query)

    def combine(self, blocks: Blocks, weights: Tensor) -> Tensor:
        """See `Codec.combine`."""
        return self._values.combine(blocks.part("v"), blocks.head_size, weights)
