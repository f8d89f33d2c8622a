"""GEAR (Kang et al., arXiv 2403.05527): quantised backbone + low-rank residual + sparse outliers.

A page of one head is ``X ≈ D + S + A Bᵀ``, built in this order: outliers are taken out (for keys those of each
channel over the page's entries, for values those of each entry over the channels), the rest is quantised to
D, S holds the residual at the indices of the outliers, and A Bᵀ approximates the rest of the residual.

The defaults are the published recipe: KCVT backbone from 4 bits up and KIVI below, rank 4, 2 % outliers. A page is the
block of the paper, and the page that fills is its streaming buffer: the newest 0 to 63 entries are in full precision.
The differences to the paper are in docs/methods/gear.md. Bits per element of the min/max backbones, everything stored, for
pages of N entries and heads of size D (16-bit scales, zeros, factors and outliers; 8-bit indices; c outliers per vector of n
values):

    bits + 32 / group + 16 rank (1/D + 1/N) + 24 c / n
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmc.cache.codecs.backbones import BACKBONES, BITS, GROUP, MIN_MAX, SCALE_DTYPES, Backbone, widths
from dmc.cache.codecs.base import Blocks, Codec, Field
from dmc.cache.codecs.lowrank import low_rank
from dmc.cache.codecs.outliers import find, index_dtype, outlier_count
from dmc.kernels.pages.format import PageFormat

_GROUPED = tuple(name for name, parts in MIN_MAX.items() if any(grouped for _, grouped in parts))


class GearCodec(Codec):
    """GEAR and its parts: ``outliers=0`` is GEAR-L; ``rank=0`` and ``outliers=0`` is the backbone alone, and has its name.

    Args:
        bits: 2, 3, 4 or 8, of keys and values on average.
        backbone: one of `dmc.cache.codecs.backbones.BACKBONES`; see `Backbone`. None: "kcvt" from 4 bits up, else "kivi".
        key_bits, value_bits: of keys and of values; None: as ``bits`` says, which the trellis divides between them.
            Whole bits from 1 to 8 ("lloyd": to 6); the trellis takes quarters of a bit.
        group: most values that share a scale, of "kivi" and "token" alone; None: 64.
        rank: of the residual's approximation.
        outliers: share of each vector kept in 16 bits, rounded to a whole number and at least one; half of them its
            highest values and half its lowest.
        rounds: of the power iteration.
        seed: of the power iteration's start.
        scale_dtype: "bf16" or "fp32", of scales and zeros of the min/max backbones alone; None: "bf16".

    Raises:
        ValueError: if a setting is not one of these; the message names it and the allowed values.
    """

    name = "gear"
    lossy = True
    page_size = 64

    def __init__(
        self,
        bits: int = 4,
        *,
        backbone: str | None = None,
        key_bits: float | None = None,
        value_bits: float | None = None,
        group: int | None = None,
        rank: int = 4,
        outliers: float = 0.02,
        rounds: int = 3,
        seed: int = 0,
        scale_dtype: str | None = None,
    ) -> None:
        for setting, value, known in (
            ("bits", bits, BITS),
            ("backbone", backbone, (None, *BACKBONES)),
            ("scale_dtype", scale_dtype, (None, *SCALE_DTYPES)),
        ):
            if value not in known:
                words = ", ".join(str(one) for one in known if one is not None)
                raise ValueError(f"gear codec: {setting} must be one of {words}, got {value!r}")
        backbone = backbone or ("kcvt" if bits >= 4 else "kivi")
        for setting, value, takes in (("group", group, _GROUPED), ("scale_dtype", scale_dtype, tuple(MIN_MAX))):
            if value is not None and backbone not in takes:
                raise ValueError(
                    f"gear codec: {setting}={value} is a setting of the backbones {', '.join(takes)}: leave it out with "
                    f"{backbone}, or choose one of these"
                )
        group, scale_dtype = GROUP if group is None else group, scale_dtype or "bf16"
        if group < 1 or rank < 0 or rounds < 1 or not 0 <= outliers < 0.5:
            raise ValueError(
                f"gear codec: group={group} and rounds={rounds} must be at least 1, rank={rank} at least 0 and "
                f"outliers={outliers} from 0 to below 0.5"
            )
        self.bits, self.backbone, self.rank, self.outliers, self.rounds, self.seed = bits, backbone, rank, outliers, rounds, seed
        self.group, self.scale_dtype = group if backbone in _GROUPED else None, scale_dtype if backbone in MIN_MAX else None
        self.key_bits, self.value_bits = widths("gear", backbone, bits, key_bits, value_bits)
        if not rank and not outliers:
            self.name = f"bare {backbone}"  # so that reports do not show it as GEAR
        self.compiles = ("trellis",) if backbone == "trellis" else ()
        self.parts = Backbone(backbone, self.key_bits, self.value_bits, group, SCALE_DTYPES[scale_dtype])

    def encode(self, keys: Tensor, values: Tensor) -> Blocks:
        """See `Codec.encode`; arithmetic in fp32."""
        tensors = {}
        for part, x in (("k", keys), ("v", values)):
            tensors |= {f"{part}_{name}": tensor for name, tensor in self._encode(part, x.float()).items()}
        return Blocks(tensors, *keys.shape[-2:])

    def decode(self, blocks: Blocks) -> tuple[Tensor, Tensor]:
        """See `Codec.decode`; adds up all three parts."""
        keys, values = self._base(blocks, "k"), self._base(blocks, "v")
        if self.rank:
            (k_left, k_right), (v_left, v_right) = self._factors(blocks, "k"), self._factors(blocks, "v")
            keys, values = keys + k_left @ k_right.transpose(-1, -2), values + v_left @ v_right.transpose(-1, -2)
        return keys, values

    def make_page_format(self, entries: int, head_size: int, fields: dict[str, Field], device: torch.device) -> PageFormat:
        """See `Codec.make_page_format`."""
        if self.backbone not in MIN_MAX and (self.rank or self.outliers):
            return super().make_page_format(entries, head_size, fields, device)
        return self.parts.page_format(self, entries, head_size, fields, device)

    def scores(self, blocks: Blocks, query: Tensor) -> Tensor:
        """See `Codec.scores`. The low-rank part is ``(q B) Aᵀ``, so A Bᵀ is not computed."""
        if self.outliers:
            scores = query @ self._base(blocks, "k").to(query.dtype).transpose(-1, -2)
        else:
            scores = self.parts.part("k", blocks.head_size).scores(blocks.part("k"), blocks.entries, query)
        if self.rank:
            left, right = (factor.to(query.dtype) for factor in self._factors(blocks, "k"))
            scores += (query @ right) @ left.transpose(-1, -2)
        return scores

    def combine(self, blocks: Blocks, weights: Tensor) -> Tensor:
        """See `Codec.combine`. The low-rank part is ``(w A) Bᵀ``, so A Bᵀ is not computed."""
        if self.outliers:
            out = weights @ self._base(blocks, "v").to(weights.dtype)
        else:
            out = self.parts.part("v", blocks.head_size).combine(blocks.part("v"), blocks.head_size, weights)
        if self.rank:
            left, right = (factor.to(weights.dtype) for factor in self._factors(blocks, "v"))
            out += (weights @ left) @ right.transpose(-1, -2)
        return out

    def _encode(self, part: str, x: Tensor) -> dict[str, Tensor]:
        entries, head_size = x.shape[-2:]
        backbone, rest, where = self.parts.part(part, head_size), x, None
        vectors = _vectors(part, x)
        count = outlier_count(self.outliers, vectors.shape[-1])
        if count:
            where, rest = find(vectors, count)
            rest = _vectors(part, rest)
        fields = backbone.encode(rest)
        if where is None and not self.rank:
            return fields
        residual = x - backbone.decode(fields, entries, head_size)
        if where is not None:
            missing = _vectors(part, residual)
            fields["outliers"] = missing.gather(-1, where).bfloat16()
            fields["indices"] = where.to(index_dtype(vectors.shape[-1]))
            residual = _vectors(part, missing.scatter(-1, where, 0.0))
        if self.rank:
            rank = min(self.rank, entries, head_size)
            left, right = low_rank(residual, rank, rounds=self.rounds, seed=self.seed)
            fields["left"], fields["right"] = left.bfloat16(), right.bfloat16()
        return fields

    def _base(self, blocks: Blocks, part: str) -> Tensor:
        """D + S in fp32, ``[..., N, D]``."""
        fields = blocks.part(part)
        base = self.parts.part(part, blocks.head_size).decode(fields, blocks.entries, blocks.head_size)
        if "outliers" in fields:
            _vectors(part, base).scatter_add_(-1, fields["indices"].long(), fields["outliers"].float())
        return base

    def _factors(self, blocks: Blocks, part: str) -> tuple[Tensor, Tensor]:
        return blocks.tensors[f"{part}_left"].float(), blocks.tensors[f"{part}_right"].float()


def _vectors(part: str, x: Tensor) -> Tensor:
    """Moves the dimension that outliers are counted over to the end: entries of a channel for keys, channels of an entry for
    values. Its own inverse."""
    return x.transpose(-1, -2) if part == "k" else x
