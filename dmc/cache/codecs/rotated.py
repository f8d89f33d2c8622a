"""Rotated quantisation: channels are mixed by an orthogonal matrix, then coded with one scale per token.

After the rotation every channel of a token looks normal with the same variance, whatever channels were large before,
so one scale per token is enough and there are no outliers. Most of the energy of keys is in each channel's mean over the
page: the mean is subtracted first and stored in 8 bits. Attention uses rotated queries (``q·k = qR·kR``), so entries are
not rotated back one by one.

Bits per element of a page of N entries and heads of size D: ``rate + 8/D + 16/(N D)``, and with a mean
``8/N + 16/(N D)`` more.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from dmc.cache.codecs import trellis
from dmc.cache.codecs.base import Blocks, Codec
from dmc.cache.codecs.bits import pack, packed_bytes, unpack
from dmc.kernels.cpu.runs import runs_on_cpu
from dmc.kernels.pages.layout import NO_SCALE, SCALE_STEPS

Fields = dict[str, Tensor]


class Coder(Protocol):
    """Converts values of about variance 1 to codes and back, as the functions of `dmc.cache.codecs.trellis` do."""

    def chunks(self, rate: float, length: int, /) -> list[tuple[int, int]]:
        """(values, bits) of each chunk of a vector."""

    def choose(self, x: Tensor, rate: float, /) -> Tensor:
        """Codes of values."""

    def read(self, codes: Tensor, rate: float, /) -> Tensor:
        """Values of codes."""


class TrellisCoder:
    """The functions of `dmc.cache.codecs.trellis`, as an object: a module cannot be sent to another process."""

    chunks = staticmethod(trellis.chunks)
    choose = staticmethod(trellis.choose)
    read = staticmethod(trellis.read)


_LARGEST = torch.finfo(torch.bfloat16).max


@dataclass(frozen=True)
class Rotated:
    """``x ≈ (levels * scale + mean) Rᵀ``; see the head of this file.

    Attributes:
        rate: bits per code, one that the coder supports: of the trellis `trellis.RATES`.
        mean: whether each channel's mean over the page is stored separately.
        coder: of the values; the trellis.
        rotation: a name of `ROTATIONS`.
        seed: of the rotation.
    """

    rate: float
    mean: bool
    coder: Coder = TrellisCoder()
    rotation: str = "hadamard"
    seed: int = 0

    def encode(self, x: Tensor) -> Fields:
        """Quantises fp32 ``[..., N, D]``.

        Returns:
            "codes" uint8 (packed); "scale" uint8 ``[..., N]``, on a logarithmic scale below "top" bf16 ``[..., 1]``;
            with a mean "mean" int8 ``[..., D]`` in units of "unit" bf16 ``[..., 1]``.
        """
        if runs_on_cpu(x) and isinstance(self.coder, TrellisCoder):
            from dmc.kernels.formats.trellis import cpu as rotated_cpu

            parts = trellis.chunks(self.rate, x.shape[-1])
            tables = {bits: trellis.levels(bits) for _, bits in parts}
            turn, hadamard = self._turn(x.shape[-1], x[..., :0].double()), self.rotation == "hadamard"
            return rotated_cpu.encode(x, turn, parts, tables, mean=self.mean, hadamard=hadamard)
        x = x.double()  # rounding that depends on the batch size must not change the codes
        size = x.abs().amax((-2, -1), keepdim=True)
        size = torch.where(size > 0, size, 1.0)
        y = (x / size) @ self._turn(x.shape[-1], x)
        fields = {}
        if self.mean:
            mean, unit = y.mean(-2), size[..., 0]
            fields["unit"] = (mean.abs().amax(-1, keepdim=True) / 127 * unit).bfloat16()
            step = fields["unit"] / unit
            fields["mean"] = (mean / torch.where(step > 0, step, 1.0)).round_().clamp_(-127, 127).to(torch.int8)
            y = y - (fields["mean"] * step)[..., None, :]
        scale = _decode_scales(*_encode_scales(y.square().mean(-1).sqrt(), 1.0))[..., None]
        codes = self.coder.choose((y / torch.where(scale > 0, scale, 1.0)).float(), self.rate)
        levels = self.coder.read(codes, self.rate).double()
        gain = (y * levels).sum(-1) / levels.square().sum(-1)  # the least-squares one for these levels
        fields["scale"], fields["top"] = _encode_scales(gain.clamp_(min=0), size[..., 0])
        return fields | {"codes": self._pack(codes)}

    def decode(self, fields: Fields, entries: int, head_size: int) -> Tensor:
        """Decodes the fields of `encode`: fp32 ``[..., N, D]`` within bf16's range."""
        levels, scale, mean = self._parts(fields, entries, head_size)
        size = scale.amax(-1)[..., None, None]
        if mean is not None:
            size = torch.maximum(size, mean.abs().amax(-1)[..., None, None])
        size = torch.where(size > 0, size, 1.0)
        y = levels * (scale[..., None] / size)
        if mean is not None:
            y = y + mean[..., None, :] / size
        return (y @ self._turn(head_size, y).T).mul_(size).clamp_(-_LARGEST, _LARGEST)

    def scores(self, fields: Fields, entries: int, query: Tensor) -> Tensor:
        """Query ``[..., G, D]`` times what `decode` gives → ``[..., G, N]``, in the query's dtype."""
        levels, scale, mean = self._parts(fields, entries, query.shape[-1])
        query = query @ self._turn(query.shape[-1], query)
        scores = (query @ levels.to(query.dtype).transpose(-1, -2)) * scale.to(query.dtype)[..., None, :]
        return scores if mean is None else scores + query @ mean.to(query.dtype)[..., None]

    def combine(self, fields: Fields, head_size: int, weights: Tensor) -> Tensor:
        """Weights ``[..., G, N]`` times what `decode` gives → ``[..., G, D]``, in the weights' dtype."""
        levels, scale, mean = self._parts(fields, weights.shape[-1], head_size)
        out = (weights * scale.to(weights.dtype)[..., None, :]) @ levels.to(weights.dtype)
        if mean is not None:
            out = out + weights.sum(-1, keepdim=True) * mean.to(weights.dtype)[..., None, :]
        return out @ self._turn(head_size, out).T

    def _turn(self, size: int, like: Tensor) -> Tensor:
        return rotation(size, like, kind=self.rotation, seed=self.seed)

    def _parts(self, fields: Fields, entries: int, head_size: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Levels ``[..., N, D]``, scales ``[..., N]`` and mean ``[..., D]`` or None, all rotated, fp32."""
        levels = self.coder.read(self._unpack(fields["codes"], entries, head_size), self.rate)
        mean = fields["mean"] * fields["unit"].float() if self.mean else None
        return levels, _decode_scales(fields["scale"], fields["top"]), mean

    def _pack(self, codes: Tensor) -> Tensor:
        parts, start = [], 0
        for count, bits in self.coder.chunks(self.rate, codes.shape[-1]):
            parts.append(pack(codes[..., start : start + count].flatten(-2), bits))
            start += count
        return torch.cat(parts, dim=-1)

    def _unpack(self, packed: Tensor, entries: int, head_size: int) -> Tensor:
        parts, start = [], 0
        for count, bits in self.coder.chunks(self.rate, head_size):
            size = packed_bytes(entries * count, bits)
            codes = unpack(packed[..., start : start + size], bits, entries * count)
            parts.append(codes.unflatten(-1, (entries, count)))
            start += size
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class RotatedPages(Codec):
    """A codec whose pages hold only the fields of `Rotated` quantisers."""

    lossy = True

    @abstractmethod
    def part(self, part: str, head_size: int) -> Rotated:
        """The quantiser of keys ("k") or of values ("v") of heads of size D."""

    def encode(self, keys: Tensor, values: Tensor) -> Blocks:
        """See `Codec.encode`."""
        tensors = {}
        for part, x in (("k", keys), ("v", values)):
            coded = self.part(part, x.shape[-1]).encode(x.float())
            tensors |= {f"{part}_{name}": field for name, field in coded.items()}
        return Blocks(tensors, *keys.shape[-2:])

    def decode(self, blocks: Blocks) -> tuple[Tensor, Tensor]:
        """See `Codec.decode`."""
        keys, values = (
            self.part(part, blocks.head_size).decode(blocks.part(part), blocks.entries, blocks.head_size) for part in "kv"
        )
        return keys, values

    def scores(self, blocks: Blocks, query: Tensor) -> Tensor:
        """See `Codec.scores`; the query is rotated, the keys are not rotated back."""
        return self.part("k", blocks.head_size).scores(blocks.part("k"), blocks.entries, query)

    def combine(self, blocks: Blocks, weights: Tensor) -> Tensor:
        """See `Codec.combine`; the sum is rotated back, the values are not."""
        return self.part("v", blocks.head_size).combine(blocks.part("v"), blocks.head_size, weights)


def rotation(size: int, like: Tensor, *, kind: str = "hadamard", seed: int = 0) -> Tensor:
    """The orthogonal matrix R ``[D, D]`` in the dtype and on the device of ``like``; any D.

    "hadamard": random signs, then Hadamard. "orthogonal": uniformly random, by QR of normal numbers.

    A Hadamard matrix as built here exists for powers of 2. The remaining factor of D (3 of 96, 5 of 80, D itself if odd)
    is mixed by the cosine transform of that length.
    """
    return _rotation(size, like.dtype, kind, seed).to(like.device)


@lru_cache
def _rotation(size: int, dtype: torch.dtype, kind: str, seed: int) -> Tensor:
    return ROTATIONS[kind](size, torch.Generator().manual_seed(seed)).to(dtype)


def _orthogonal(size: int, generator: torch.Generator) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()  # the sign makes it uniform (Mezzadri 2007)


def _hadamard(size: int, generator: torch.Generator) -> Tensor:
    matrix, rest = torch.ones(1, 1, dtype=torch.float64), size
    while rest % 2 == 0:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / math.sqrt(2)
        rest //= 2
    index = torch.arange(rest, dtype=torch.float64)
    cosines = torch.cos(math.pi / rest * (index[:, None] + 0.5) * index) * math.sqrt(2 / rest)
    cosines[:, 0] /= math.sqrt(2)
    signs = torch.randint(0, 2, (size, 1), generator=generator) * 2 - 1
    return signs * torch.kron(cosines, matrix)


ROTATIONS = {"hadamard": _hadamard, "orthogonal": _orthogonal}


def _encode_scales(scale: Tensor, unit: Tensor | float) -> tuple[Tensor, Tensor]:
    """Scales ``[..., N]``, in units of ``unit`` → (code uint8 ``[..., N]``, the largest bf16 ``[..., 1]``, not in them)."""
    top = (scale.amax(-1, keepdim=True) * unit).clamp(max=_LARGEST).bfloat16()
    code = torch.log2(top.float() / unit / scale) * SCALE_STEPS  # inf for 0, nan where all are 0
    code = code.nan_to_num_(nan=NO_SCALE, posinf=NO_SCALE, neginf=0).round_().clamp_(0, NO_SCALE)
    return code.to(torch.uint8), top


def _decode_scales(code: Tensor, top: Tensor) -> Tensor:
    scale = torch.exp2(code.float() / -SCALE_STEPS) * top.float()
    return scale.masked_fill_(code == NO_SCALE, 0.0)
