"""Rotated Lloyd-Max quantisation, after TurboQuant (Zandieh et al., arXiv 2504.19874), without its one-bit residual."""

from __future__ import annotations

from torch import Tensor

from dmc.cache.codecs.base import Blocks, Codec
from dmc.cache.codecs.lloyd import LloydMax
from dmc.cache.codecs.rotated import ROTATIONS, Rotated

BITS = (1, 2, 3, 4, 5, 6)


class RotatedCodec(Codec):
    """A vector is turned by a random rotation, and each coordinate takes the nearest level of the optimal scalar codebook.

    After the rotation a coordinate follows one known law whatever the vector was, so the codebook
    (`dmc.cache.codecs.lloyd`) needs no data. The vector's length is kept as the gain that fits its levels best, in 8 bits
    on a logarithmic scale below the page's largest, where the paper keeps the norm in 16. `dmc.cache.codecs.gear` is
    the same with a trellis in the place of the scalar codebook, and closer per bit.

    Bits per element of a page of N entries and heads of size D: ``bits + 8/D + 16/(N D)``; with the keys' mean
    ``4/N + 8/(N D)`` more.

    Args:
        bits: 1 to 6.
        mean: whether the mean of each key channel over the page is taken off before and kept in 8 bits; not in the paper.
        rotation: "hadamard" (random signs, then Hadamard: fast) or "orthogonal" (uniformly random, as in the paper).
        seed: of the signs or of the matrix.

    Raises:
        ValueError: if a setting is out of range.
    """

    name = "rotated"
    lossy = True
    page_size = 32

    def __init__(self, bits: int = 4, *, mean: bool = False, rotation: str = "hadamard", seed: int = 0) -> None:
        for setting, value, known in (("bits", bits, BITS), ("mean", mean, (0, 1)), ("rotation", rotation, ROTATIONS)):
            if value not in known:
                raise ValueError(f"rotated codec: {setting} must be one of {', '.join(map(str, known))}, got {value!r}")
        if not isinstance(seed, int) or seed < 0:
            raise ValueError(f"rotated codec: seed must be a whole number of at least 0, got {seed!r}")
        self.bits, self.mean, self.rotation, self.seed = bits, bool(mean), rotation, seed

    def encode(self, keys: Tensor, values: Tensor) -> Blocks:
        """See `Codec.encode`."""
        tensors = {}
        for part, x in (("k", keys), ("v", values)):
            coded = self._coder(part, x.shape[-1]).encode(x.float())
            tensors |= {f"{part}_{name}": field for name, field in coded.items()}
        return Blocks(tensors, *keys.shape[-2:])

    def decode(self, blocks: Blocks) -> tuple[Tensor, Tensor]:
        """See `Codec.decode`."""
        keys, values = (
            self._coder(part, blocks.head_size).decode(blocks.part(part), blocks.entries, blocks.head_size) for part in "kv"
        )
        return keys, values

    def scores(self, blocks: Blocks, query: Tensor) -> Tensor:
        """See `Codec.scores`; the query is turned, not the keys back."""
        return self._coder("k", blocks.head_size).scores(blocks.part("k"), blocks.entries, query)

    def combine(self, blocks: Blocks, weights: Tensor) -> Tensor:
        """See `Codec.combine`; the sum is turned back, not the values."""
        return self._coder("v", blocks.head_size).combine(blocks.part("v"), blocks.head_size, weights)

    def _coder(self, part: str, head_size: int) -> Rotated:
        mean = self.mean and part == "k"
        return Rotated(self.bits, mean, coder=LloydMax(head_size), rotation=self.rotation, seed=self.seed)
