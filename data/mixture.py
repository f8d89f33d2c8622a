"""What a run reads: one corpus, or several with their shares."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from fractions import Fraction

from data.corpus import Corpus


@dataclass(frozen=True)
class Mixture:
    """Corpora and their shares of the sequences, which sum to 1."""

    corpora: tuple[Corpus, ...]
    shares: tuple[Fraction, ...] = (Fraction(1),)

    @property
    def hash(self) -> str:
        """Hash of the only corpus; of a blend 16 hex digits over the hashes and shares of all, in their order."""
        if len(self.corpora) == 1:
            return self.corpora[0].hash
        parts = [f"{share}:{corpus.hash}" for corpus, share in zip(self.corpora, self.shares, strict=True)]
        return hashlib.sha256(",".join(parts).encode()).hexdigest()[:16]

    @property
    def tokens(self) -> int:
        """Number of tokens of all corpora."""
        return sum(map(len, self.corpora))

    @property
    def characters_per_token(self) -> float:
        """Mean characters of text per token over all corpora."""
        return sum(c.characters for c in self.corpora) / max(1, self.tokens)


def describe(mixture: Mixture) -> list[dict]:
    """``{name, hash, share, tokens}`` of every corpus, for checkpoints and logs; shares as exact fractions."""
    return [
        {"name": corpus.name, "hash": corpus.hash, "share": str(share), "tokens": len(corpus)}
        for corpus, share in zip(mixture.corpora, mixture.shares, strict=True)
    ]
