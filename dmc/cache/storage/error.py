"""What a codec loses, measured while it works."""

from __future__ import annotations

from torch import Tensor

from dmc.cache.codecs import Blocks, Codec

_SAMPLED = 97  # one page in so many: decoding one costs as much as encoding thirty; a prime, so that layers and heads take turns


class CodecError:
    """What a codec loses, measured on a sample of the pages that it encodes.

    Attributes:
        pages: sampled so far.
    """

    def __init__(self) -> None:
        self.pages, self._seen, self._asked = 0, 0, 0
        self._lost, self._all = {"k": 0.0, "v": 0.0}, {"k": 0.0, "v": 0.0}

    def sample(self, codec: Codec, encoded: Blocks, keys: Tensor, values: Tensor) -> None:
        """Looks at every 97th page that a lossy codec encodes, at one of a call at most: pages ``[n, P, D]``."""
        if not codec.lossy:
            return
        at = -self._seen % _SAMPLED
        self._seen += len(keys)
        if at >= len(keys):
            return
        page = Blocks({name: x[at : at + 1] for name, x in encoded.tensors.items()}, encoded.entries, encoded.head_size)
        self.compare(codec, page, keys[at], values[at])

    def compare(self, codec: Codec, page: Blocks, keys: Tensor, values: Tensor) -> None:
        """Adds one page to the sample: encoded, with a leading dimension of 1, and as it was, ``[P, D]``."""
        self.pages += 1
        for part, exact, got in zip("kv", (keys, values), codec.decode(page), strict=True):
            self._lost[part] += float((got[0].double() - exact.double()).square().sum())
            self._all[part] += float(exact.double().square().sum())

    def due(self) -> bool:
        """Every 97th time, from the first on: for layers whose pages kernels encode, whose number the host does not know.

        One page of such a layer is compared at most, so of big batches the sample is a smaller part.
        """
        self._asked += 1
        return self._asked % _SAMPLED == 1

    @property
    def sums(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Squared error of keys and values, and their squares, over all sampled pages."""
        return tuple(self._lost.values()), tuple(self._all.values())

    @property
    def relative(self) -> tuple[float, float]:
        """Of keys and values: Frobenius norm of the error / of the entries, over all sampled pages; 0 before any."""
        return tuple((self._lost[part] / self._all[part]) ** 0.5 if self._all[part] else 0.0 for part in "kv")
