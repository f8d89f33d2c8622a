"""GEAR (Kang et al., arXiv 2403.05527): quantised backbone + low-rank residual + sparse outliers.

A page of one head is ``X ≈ D + S + A Bᵀ``, built in this order: outliers are taken out (for keys those of each
channel over the page's entries, for values those of each entry over the channels), the rest is quantised to
D, S holds what D lacks at the outliers' places, and A Bᵀ approximates what is still missing.

The paper's backbones are "kivi", "kcvt" and "token". Bits per element, everything stored, for pages of N entries and
heads of size D (16-bit scales, zeros, factors and outliers; 8-bit places; c outliers a vector of n values):

    bits + 32 / group + 16 rank (1/D + 1/N) + 24 c / n

The backbone "rotated" (`dmc.cache.codecs.rotated`) is what the presets of `dmc.cache.codecs.presets` use: per bit it
is closer than these three with their low rank and outliers (docs/results/gear.md), and needs neither:

    (key_bits + value_bits) / 2 + 8/D + 4/N + 24/(N D)

With 4 bits, N = 32 and D = 64 an entry of 64 + 64 values takes 68 bytes, against 256 in bf16. Longer pages share the
keys' mean among more entries, but more entries then wait for a full page.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmc.cache.codecs import trellis
from dmc.cache.codecs.base import Blocks, Codec
from dmc.cache.codecs.lowrank import low_rank
from dmc.cache.codecs.outliers import find, index_dtype, outlier_count
from dmc.cache.codecs.quantise import Quantiser
from dmc.cache.codecs.rotated import Rotated, TrellisCoder, rotation
from dmc.kernels.pages.paged import Gear, Trellis

BITS = (2, 3, 4, 8)
BACKBONES = {
    # name: ((axis of keys, grouped), (axis of values, grouped)); ungrouped takes the whole vector
    "token": (("token", True), ("token", True)),
    "kcvt": (("channel", False), ("token", False)),
    "kivi": (("channel", True), ("token", True)),
    "rotated": None,
}
SPLIT = {2: (2, 2), 3: (3.25, 2.5), 4: (4.5, 3.5), 8: (8, 8)}  # bits → best (key bits, value bits) if rotated
SCALE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class GearCodec(Codec):
    """GEAR, and its parts: ``outliers=0`` is GEAR-L; ``rank=0`` and ``outliers=0`` the bare backbone.

    Args:
        bits: 2, 3, 4 or 8, of keys and values on average.
        backbone: "rotated" (channels mixed, trellis-coded), "kivi" (keys by channel, values by token, in groups),
            "kcvt" (the same over whole vectors) or "token" (both by token, in groups).
        key_bits, value_bits: of keys and values apart; None: as ``bits`` says, and for "rotated" divided between
            them as was measured best (`SPLIT`). "rotated" takes quarters of a bit from 1 to 8, the others whole bits.
        group: values that share a scale; "rotated" has one scale a token.
        rank: of the residual's approximation; None: 0 for "rotated", 1 for the others.
        outliers: share of each vector kept in 16 bits, rounded to a whole number and at least one; None: 0 for
            "rotated", 0.02 for the others.
        rounds: of the power iteration.
        seed: of the power iteration's start.
        scale_dtype: "bf16" or "fp32", of scales and zeros of all but "rotated".

    Raises:
        ValueError: if a setting is not one of these; the sentence names it and what is allowed.
    """

    name = "gear"
    lossy = True
    page_size = 32

    def __init__(
        self, bits: int = 4, *, backbone: str = "rotated", key_bits: float | None = None,
        value_bits: float | None = None, group: int = 64, rank: int | None = None, outliers: float | None = None,
        rounds: int = 3, seed: int = 0, scale_dtype: str = "bf16",
    ) -> None:
        for setting, value, known in (
            ("bits", bits, BITS), ("backbone", backbone, BACKBONES), ("scale_dtype", scale_dtype, SCALE_DTYPES),
        ):
            if value not in known:
                raise ValueError(f"gear codec: {setting} must be one of {', '.join(map(str, known))}, got {value!r}")
        rotated = backbone == "rotated"
        rank = (0 if rotated else 1) if rank is None else rank
        outliers = (0.0 if rotated else 0.02) if outliers is None else outliers
        if group < 1 or rank < 0 or rounds < 1 or not 0 <= outliers < 0.5:
            raise ValueError(
                f"gear codec: group={group} and rounds={rounds} must be at least 1, rank={rank} at least 0 and "
                f"outliers={outliers} from 0 to below 0.5"
            )
        self.rank, self.outliers, self.rounds, self.seed = rank, outliers, rounds, seed
        split = SPLIT[bits] if rotated else (bits, bits)
        self.key_bits, self.value_bits = (
            _checked(name, default if value is None else value, rotated)
            for name, value, default in zip(("key_bits", "value_bits"), (key_bits, value_bits), split, strict=True)
        )
        if rotated:
            self._parts = {"k": Rotated(self.key_bits, mean=True), "v": Rotated(self.value_bits, mean=False)}
        else:
            self._parts = {
                part: Quantiser(width, axis, group if grouped else None, SCALE_DTYPES[scale_dtype])
                for part, width, (axis, grouped) in zip(
                    ("k", "v"), (self.key_bits, self.value_bits), BACKBONES[backbone], strict=True
                )
            }

    @property
    def parts(self) -> tuple[Rotated | Quantiser, Rotated | Quantiser]:
        """Backbones of keys and of values."""
        return self._parts["k"], self._parts["v"]

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

    def scores(self, blocks: Blocks, query: Tensor) -> Tensor:
        """See `Codec.scores`. The low-rank part is ``(q B) Aᵀ``, so A Bᵀ is never formed."""
        if self.outliers or not isinstance(self._parts["k"], Rotated):
            scores = query @ self._base(blocks, "k").to(query.dtype).transpose(-1, -2)
        else:
            scores = self._parts["k"].scores(blocks.part("k"), blocks.entries, query)
        if self.rank:
            left, right = (factor.to(query.dtype) for factor in self._factors(blocks, "k"))
            scores += (query @ right) @ left.transpose(-1, -2)
        return scores

    def combine(self, blocks: Blocks, weights: Tensor) -> Tensor:
        """See `Codec.combine`. The low-rank part is ``(w A) Bᵀ``, so A Bᵀ is never formed."""
        if self.outliers or not isinstance(self._parts["v"], Rotated):
            out = weights @ self._base(blocks, "v").to(weights.dtype)
        else:
            out = self._parts["v"].combine(blocks.part("v"), blocks.head_size, weights)
        if self.rank:
            left, right = (factor.to(weights.dtype) for factor in self._factors(blocks, "v"))
            out += (weights @ left) @ right.transpose(-1, -2)
        return out

    def _encode(self, part: str, x: Tensor) -> dict[str, Tensor]:
        entries, head_size = x.shape[-2:]
        rest, where = x, None
        vectors = _vectors(part, x)
        count = outlier_count(self.outliers, vectors.shape[-1])
        if count:
            where, rest = find(vectors, count)
            rest = _vectors(part, rest)
        fields = self._parts[part].encode(rest)
        if where is None and not self.rank:
            return fields
        residual = x - self._parts[part].decode(fields, entries, head_size)
        if where is not None:
            missing = _vectors(part, residual)
            fields["outliers"] = missing.gather(-1, where).bfloat16()
            fields["places"] = where.to(index_dtype(vectors.shape[-1]))
            residual = _vectors(part, missing.scatter(-1, where, 0.0))
        if self.rank:
            rank = min(self.rank, entries, head_size)
            left, right = low_rank(residual, rank, rounds=self.rounds, seed=self.seed)
            fields["left"], fields["right"] = left.bfloat16(), right.bfloat16()
        return fields

    def _base(self, blocks: Blocks, part: str) -> Tensor:
        """D + S in fp32, ``[..., N, D]``."""
        fields = blocks.part(part)
        base = self._parts[part].decode(fields, blocks.entries, blocks.head_size)
        if "outliers" in fields:
            _vectors(part, base).scatter_add_(-1, fields["places"].long(), fields["outliers"].float())
        return base

    def _factors(self, blocks: Blocks, part: str) -> tuple[Tensor, Tensor]:
        return blocks.tensors[f"{part}_left"].float(), blocks.tensors[f"{part}_right"].float()


def _checked(name: str, value: float, rotated: bool) -> float:
    if value not in (trellis.RATES if rotated else range(1, 9)):
        known = "quarters of a bit from 1 to 8" if rotated else "whole bits from 1 to 8"
        raise ValueError(f"gear codec: {name} must be {known} with this backbone, got {value!r}")
    return value


def _vectors(part: str, x: Tensor) -> Tensor:
    """What outliers are counted over, last: channels' entries for keys, entries' channels for values. An involution."""
    return x.transpose(-1, -2) if part == "k" else x


def codes_trellises(codec: Codec) -> bool:
    """True if the codec chooses codes of a trellis."""
    parts = codec.parts if isinstance(codec, GearCodec) else ()
    return any(isinstance(part, Rotated) and isinstance(part.coder, TrellisCoder) for part in parts)


def min_max_layout(key: Quantiser, value: Quantiser, page: int, size: int) -> tuple[str, Gear] | None:
    """Kind and layout of pages of ``page`` entries with a backbone of min/max groups; None if no kernel reads them."""
    alike = key.bits == value.bits and key.group == value.group and {key.scale_dtype, value.scale_dtype} == {torch.bfloat16}
    if not alike or key.bits not in (2, 3, 4, 8) or page > 256:  # places of outliers are bytes
        return None
    return "gear", Gear(key.bits, page, size, key.axis == "channel", value.axis == "channel", key.group)


def trellis_layout(codec: GearCodec, page: int, size: int, device: torch.device) -> tuple[str, Trellis] | None:
    """Kind and layout of pages of ``page`` entries with the rotated backbone; None if no kernel reads them."""
    key, value = codec.parts
    trellises = all(isinstance(one.coder, TrellisCoder) and one.rotation == "hadamard" and one.seed == 0 for one in (key, value))
    sides = [tuple(trellis.stretches(one.rate, size)) for one in (key, value)]
    if not trellises or codec.rank or codec.outliers or value.mean:
        return None
    levels = {bits: trellis.levels(bits).to(device) for side in sides for _, bits in side}
    return "trellis", Trellis(page, size, *sides, levels, rotation(size, torch.zeros(1)).to(device))
