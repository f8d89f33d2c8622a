"""A codec's error, measured during operation."""

from __future__ import annotations

from torch import Tensor

from dmc.cache.codecs import Blocks, Codec

_SAMPLED = 97  # one page of so many: decoding one costs as much as encoding thirty; a prime, so that heads and layers alternate


class CodecError:
    """A codec's error, measured on a sample of the pages that it encodes.

    Attributes:
        pages: sampled so far.
    """

    def __init__(self) -> None:
        self.pages, self._seen, self._asked = 0, 0, 0
        self._lost, self._all = {"k": 0.0, "v": 0.0}, {"k": 0.0, "v": 0.0}

    def sample(self, codec: Codec, encoded: Blocks, keys: Tensor, values: Tensor) -> None:
        """Adds every 97th page that a lossy codec encodes to the sample, at most one per call: pages ``[n, P, D]``."""
        if not codec.lossy:
            return
        at = -self._seen % _SAMPLED
        self._seen += len(keys)
        if at >= len(keys):
            return
        page = Blocks({name: x[at : at + 1] for name, x in encoded.tensors.items()}, encoded.entries, encoded.head_size)
        self.compare(codec, page, keys[at], values[at])

    def compare(self, codec: Codec, page: Blocks, keys: Tensor, values: Tensor) -> None:
        """Adds one page to the sample: encoded, with a leading dimension of 1, and the entries before encoding, ``[P, D]``."""
        self.pages += 1
        for part, exact, got in zip("kv", (keys, values), codec.decode(page), strict=True):
            self._lost[part] += float((got[0].double() - exact.double()).square().sum())
            self._all[part] += float(exact.double().square().sum())

    def due(self) -> bool:
        """True every 97th time, the first call included. For layers whose pages kernels encode: the host has no count of them.

        At most one page of such a layer is compared, so large batches have a smaller sample.
        """
        self._asked += 1
        return self._asked % _SAMPLED == 1

    @property
    def sums(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Sums of squared errors of keys and values, and of their squares, over all sampled pages."""
        return (self._lost["k"], self._lost["v"]), (self._all["k"], self._all["v"])

    @property
    def relative(self) -> tuple[float, float]:
        """Relative error of keys and of values: Frobenius norm of the error / of the entries, over sampled pages; 0 at first."""
        keys, values = ((self._lost[part] / self._all[part]) ** 0.5 if self._all[part] else 0.0 for part in "kv")
        return keys, values
