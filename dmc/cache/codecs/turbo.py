"""Rotated Lloyd-Max quantisation, after TurboQuant (Zandieh et al., arXiv 2504.19874), without its one-bit residual."""

from __future__ import annotations

from dmc.cache.codecs.lloyd import LloydMax
from dmc.cache.codecs.rotated import ROTATIONS, Rotated, RotatedPages

BITS = (1, 2, 3, 4, 5, 6)


class RotatedCodec(RotatedPages):
    """A vector is turned by a random rotation, and each coordinate takes the nearest level of the optimal scalar codebook.

    After the rotation a coordinate follows one known law whatever the vector was, so the codebook
    (`dmc.cache.codecs.lloyd`) needs no data. The vector's length is kept as the gain that fits its levels best, in 8 bits
    on a logarithmic scale below the page's largest, where the paper keeps the norm in 16. `dmc.cache.codecs.tcq` is
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
