"""`Codec`: the interface for storing the entries of a full page, and reading them in attention."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from dmc.kernels.pages.format import Field, PageFormat


@dataclass(frozen=True)
class Blocks:
    """Encoded pages. Every tensor has the same leading dimensions; each of their elements is a page of one head.

    Attributes:
        tensors: by field name, ``[..., field's own fixed shape]``.
        entries: N, entries of a page.
        head_size: D.
    """

    tensors: dict[str, Tensor]
    entries: int
    head_size: int

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The fields ``prefix_...`` without the prefix, such as those of keys, "k", or of values, "v"."""
        return {name[len(prefix) + 1 :]: tensor for name, tensor in self.tensors.items() if name.startswith(f"{prefix}_")}


POSITION = "e_position"  # field of a `Codec.needs_positions` codec


class Codec(ABC):
    """Stores the N entries of a page of one head. A codec holds settings and no data.

    Attributes:
        name: under which `dmc.cache.codec` finds it.
        lossy: whether ``decode(encode(x))`` may differ from x; then a sequence's first entries stay in full precision.
        page_size: entries of a page unless the user says otherwise.
        window: newest entries that stay in full precision unless the user says otherwise.
        needs_positions: whether it needs the head of a page and the positions of its entries. The cache then calls `encode_at`.
            The codec stores the positions in a field `POSITION`, int32 ``[..., N]``; the cache writes -1 there for entries
            that it evicts.
        compiles: CPU kernels that encoding needs, names of `dmc.kernels.ready.prepare`.
        made_for: `dmc.model.fingerprint.model_hash` of the only model that the codec was made for; None: any model.
    """

    name: ClassVar[str]
    lossy: ClassVar[bool]
    page_size: ClassVar[int]
    window: ClassVar[int] = 0
    needs_positions: ClassVar[bool] = False
    compiles: tuple[str, ...] = ()
    made_for: str | None = None

    @classmethod
    def settings(cls) -> list[str]:
        """Names of the settings that the codec is made with."""
        return [name for name in inspect.signature(cls.__init__).parameters if name != "self"]

    def of_layer(self, layer: int, layers: int, heads: int, head_size: int) -> Codec:
        """The codec of one layer of a model with L layers, H key/value heads and head size D; the same object if all layers are
        alike.

        Raises:
            ValueError: if it was made for a model of another shape.
        """
        return self

    @abstractmethod
    def encode(self, keys: Tensor, values: Tensor) -> Blocks:
        """Encodes pages: keys (rotated) and values ``[..., N, D]`` of any float dtype. Pure and seeded."""

    def encode_at(self, keys: Tensor, values: Tensor, heads: Tensor, positions: Tensor) -> Blocks:
        """`encode`, for a codec that `needs_positions`.

        Args:
            keys, values: ``[..., N, D]``; keys rotated, each to its position.
            heads: int64 ``[...]``, key/value head of each page, counted over all layers: ``layer * H + head``.
            positions: int32 ``[..., N]``, position of each entry's newest token; -1 for an entry that is never read.
        """
        return self.encode(keys, values)

    @abstractmethod
    def decode(self, blocks: Blocks) -> tuple[Tensor, Tensor]:
        """Decoded keys and values ``[..., N, D]``; fp32 if the codec is lossy."""

    def nbytes(self, blocks: Blocks) -> int:
        """Bytes of all tensors of ``blocks``, metadata included."""
        return sum(tensor.numel() * tensor.element_size() for tensor in blocks.tensors.values())

    def layout(self, entries: int, head_size: int, dtype: torch.dtype) -> dict[str, Field]:
        """Fields of one page: name → (dtype, shape without the leading dimensions).

        ``dtype`` is the dtype of the entries before encoding.
        """
        blocks = self.encode(*torch.zeros(2, entries, head_size, dtype=dtype))
        return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in blocks.tensors.items()}

    def page_format(self, entries: int, head_size: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> PageFormat:
        """The page format: storage of pages of so many entries, and kernels that read and write them. One object per page size.

        Args:
            entries: N, of a page.
            head_size: D.
            dtype: of the entries before encoding.
            device: of the format's own tensors, such as tables of levels.
        """
        return _page_format(self, entries, head_size, dtype, torch.device(device))

    def make_page_format(self, entries: int, head_size: int, fields: dict[str, Field], device: torch.device) -> PageFormat:
        """Makes the object that `page_format` returns, for a page of ``fields``. This default has no kernels: PyTorch gathers the
        pages."""
        return PageFormat(self.name, entries, head_size, fields, self.fields)

    def fields(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """The tensors of `encode`."""
        return self.encode(keys, values).tensors

    def scores(self, blocks: Blocks, query: Tensor) -> Tensor:
        """Query times encoded keys: query ``[..., G, D]`` → ``[..., G, N]``, in the query's dtype."""
        keys, _ = self.decode(blocks)
        return query @ keys.to(query.dtype).transpose(-1, -2)

    def row_scores(self, blocks: Blocks, query: Tensor) -> Tensor:
        """`scores` of whole rows: blocks with leading dimensions R, C (pages), query ``[R, G, D]`` → ``[R, G, C N]``."""
        pages = next(iter(blocks.tensors.values())).shape[1]
        return self.scores(blocks, query[:, None].expand(-1, pages, -1, -1)).transpose(1, 2).flatten(2)

    def row_combine(self, blocks: Blocks, weights: Tensor) -> Tensor:
        """`combine` of whole rows: weights ``[R, G, C N]`` → ``[R, G, D]``."""
        return self.combine(blocks, weights.unflatten(-1, (-1, blocks.entries)).transpose(1, 2)).sum(1)

    def combine(self, blocks: Blocks, weights: Tensor) -> Tensor:
        """Weighted sum of encoded values: weights ``[..., G, N]`` → ``[..., G, D]``, in the weights' dtype."""
        _, values = self.decode(blocks)
        return weights @ values.to(weights.dtype)


@lru_cache(maxsize=64)
def _page_format(codec: Codec, entries: int, head_size: int, dtype: torch.dtype, device: torch.device) -> PageFormat:
    return codec.make_page_format(entries, head_size, codec.layout(entries, head_size, dtype), device)
