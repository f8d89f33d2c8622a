"""Rotated Lloyd-Max quantisation, after TurboQuant (Zandieh et al., arXiv 2504.19874), without its one-bit residual."""

from __future__ import annotations

from dmc.cache.codecs.lloyd import LloydMax
from dmc.cache.codecs.rotated import ROTATIONS, Rotated, RotatedPages

BITS = (1, 2, 3, 4, 5, 6)


class RotatedCodec(RotatedPages):
    """A random rotation of each vector, and for each coordinate the nearest level of the optimal scalar codebook.

    After the rotation a coordinate has the same known distribution for every vector, so the codebook
    (`dmc.cache.codecs.lloyd`) needs no data. The vector's length is stored as the gain that fits its levels best, in 8 bits
    on a logarithmic scale below the page's largest; the paper stores the norm in 16 bits. `dmc.cache.codecs.tcq` uses a
    trellis instead of the scalar codebook, and is closer per bit.

    Bits per element of a page of N entries and heads of size D: ``bits + 8/D + 16/(N D)``; with the keys' mean
    ``4/N + 8/(N D)`` more.

    Args:
        bits: 1 to 6.
        mean: whether the mean of each key channel over the page is subtracted first and stored in 8 bits; not in the paper.
        rotation: "hadamard" (random signs, then Hadamard: fast) or "orthogonal" (uniformly random, as in the paper).
        seed: of the signs or of the matrix.

    Raises:
        ValueError: if a setting is out of range.
    """

    name = "rotated"
    page_size = 32

    def __init__(self, bits: int = 4, *, mean: bool = False, rotation: str = "hadamard", seed: int = 0) -> None:
        for setting, value, known in (("bits", bits, BITS), ("mean", mean, (0, 1)), ("rotation", rotation, ROTATIONS)):
            if value not in known:
                raise ValueError(f"rotated codec: {setting} must be one of {', '.join(map(str, known))}, got {value!r}")
        if not isinstance(seed, int) or seed < 0:
            raise ValueError(f"rotated codec: seed must be a whole number of at least 0, got {seed!r}")
        self.bits, self.mean, self.rotation, self.seed = bits, bool(mean), rotation, seed

    def part(self, part: str, head_size: int) -> Rotated:
        """See `RotatedPages.part`."""
        mean = self.mean and part == "k"
        return Rotated(self.bits, mean, coder=LloydMax(head_size), rotation=self.rotation, seed=self.seed)
