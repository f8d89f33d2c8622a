"""The weights of a training checkpoint under Hugging Face names, each read when it is asked for.

The tensors are read by name through torch's own reader: no process group, model or parallel layout is needed, and
one layer's tensor is in memory at a time. megatron-core stores the layers of a kind as one tensor [L, ...].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlan, Metadata, ReadItem
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from checkpoints import names
from dmc.families import ModelShape

_STACKED, _UPDATE = "decoder.layers.", ".lora_"


class TrainedWeights(Mapping[str, Tensor]):
    """Hugging Face name → whole tensor of a training checkpoint, in the dtype of training, gain not folded.

    Every look-up reads from the disk; q, k and v (and gate and up), which megatron-core fuses, are read together and
    kept until each was asked for once.
    """

    def __init__(self, checkpoint: str | Path, hf: ModelShape, *, lora_scale: float | None = None) -> None:
        """Low-rank updates (`dmc.training.lora`) are merged into the weights by their scale; None: there are none."""
        self._hf, self._scale = hf, lora_scale
        self._reader = FileSystemReader(str(checkpoint))
        self._metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._source: dict[str, str] = {}  # Hugging Face name → megatron name
        self._meta: dict[str, Tensor] = {}
        for name, shape, dtype in _unstacked(self._metadata):
            if _UPDATE in name:
                continue
            for key, part in names.to_hf(hf, {name: torch.empty(shape, dtype=dtype, device="meta")}).items():
                if key != "lm_head.weight" or not hf.tie_word_embeddings:
                    self._source[key], self._meta[key] = name, part
        self._fused: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name; KeyError if the checkpoint has none."""
        if name not in self._fused:
            source = self._source[name]
            self._fused = names.to_hf(self._hf, {source: self._merged(source)})
        return self._fused.pop(name)

    def __iter__(self) -> Iterator[str]:
        """The names: embedding, norm and head first, then layer by layer."""
        return iter(self._source)

    def __len__(self) -> int:
        """How many tensors there are."""
        return len(self._source)

    def meta(self, name: str) -> Tensor:
        """An empty tensor on the meta device of that name's shape and dtype; reads nothing."""
        return self._meta[name]

    def updates(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(Hugging Face name of a weight, A ``[rank, inputs]``, B ``[outputs, rank]``) of every low-rank update, in fp32."""
        for name, _, _ in _unstacked(self._metadata):
            if _UPDATE in name and name.endswith(".a"):
                weight = name.removesuffix(".a").replace(_UPDATE, ".linear_") + ".weight"
                a, b = self._factors(weight)
                yield from ((key, a, part) for key, part in names.to_hf(self._hf, {weight: b}).items())

    def _merged(self, name: str) -> Tensor:
        """A tensor with its low-rank update, where it has one, added in fp32."""
        whole = self._read(name)
        if self._scale is None or not name.endswith(".weight") or self._update_of(name) not in self._metadata.state_dict_metadata:
            return whole
        a, b = self._factors(name)
        return (whole.float() + self._scale * (b @ a)).to(whole.dtype)

    def _factors(self, weight: str) -> tuple[Tensor, Tensor]:
        update = weight.removesuffix(".weight").replace(".linear_", _UPDATE)
        return self._read(f"{update}.a").float(), self._read(f"{update}.b").float().flatten(0, 1)

    @staticmethod
    def _update_of(weight: str) -> str:
        """The stored name of a weight's A."""
        layer, local = names.layer_of(weight)
        update = f"{local.removesuffix('.weight').replace('.linear_', _UPDATE)}.a"
        return update if layer is None else _STACKED + update

    def _read(self, name: str) -> Tensor:
        """The whole tensor of a megatron name with a global layer number."""
        layer, local = names.layer_of(name)
        stored = name if layer is None else _STACKED + local
        info = self._metadata.state_dict_metadata[stored]
        shape = tuple(info.size)
        origin = (0,) * len(shape)
        if layer is not None:
            shape, origin = (1, *shape[1:]), (layer, *origin[1:])
        whole = torch.empty(shape, dtype=info.properties.dtype)
        region = ChunkStorageMetadata(offsets=torch.Size(origin), sizes=torch.Size(shape))
        items = create_read_items_for_chunk_list(stored, info, [region])
        self._reader.read_data(LoadPlan(items), _Into(whole)).wait()
        return whole if layer is None else whole[0]


class _Into(DefaultLoadPlanner):
    """Gives torch's reader the part of one tensor that an item fills."""

    def __init__(self, whole: Tensor) -> None:
        super().__init__()
        self._whole = whole

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        part = self._whole
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dim, start, length)
        return part


def _unstacked(metadata: Metadata) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    """(megatron name with its global layer number, shape, dtype) of every weight of the model, layer by layer."""
    model = {
        name: info
        for name, info in metadata.state_dict_metadata.items()
        if isinstance(info, TensorStorageMetadata) and name.startswith(("embedding.", "decoder.", "output_layer."))
    }
    stacked = [name for name in model if name.startswith(_STACKED)]
    for name in [name for name in model if name not in stacked]:
        yield name, tuple(model[name].size), model[name].properties.dtype
    for layer in range(max((model[name].size[0] for name in stacked), default=0)):
        for name in stacked:
            yield name.replace(_STACKED, f"{_STACKED}{layer}."), tuple(model[name].size[1:]), model[name].properties.dtype
