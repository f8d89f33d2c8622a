"""The KV memory of a model in vLLM: one layer to vLLM, in which the cache of all layers is; and attention over it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadataBuilder, CommonAttentionMetadata

from dmc.rope import Rope
from dmc_vllm.requests import Batch, Requests
from dmc_vllm.settings import Serving
from dmc_vllm.spec import ArenaSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class ArenaBackend(AttentionBackend):
    """vLLM's description of the attention: it makes the step of the cache for each batch."""

    supported_dtypes = [torch.float32, torch.bfloat16, torch.float16]

    @staticmethod
    def get_name() -> str:
        """Name in vLLM's messages."""
        return "DMC"

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        """Not used: `attend` computes attention."""
        return AttentionImpl

    @staticmethod
    def get_builder_cls() -> type[ArenaBuilder]:
        """Class that makes `Batch` of vLLM's batch."""
        return ArenaBuilder

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """False: a block holds no fixed range of tokens."""
        return False


class ArenaBuilder(AttentionMetadataBuilder):
    """See `ArenaBackend`."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.arena: Arena = self.vllm_config.compilation_config.static_forward_context[self.layer_names[0]]

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Batch | None:
        """The step of the cache over a batch."""
        batch = common_attn_metadata
        starts, lengths = batch.query_start_loc_cpu.tolist(), batch.seq_lens.tolist()
        blocks = batch.block_table_tensor[: batch.num_reqs, 0].tolist()
        return self.arena.requests.batch(
            [
                (blocks[row], starts[row], starts[row + 1], lengths[row])
                for row in range(batch.num_reqs)
                if starts[row + 1] > starts[row]
            ]
        )


class Arena(nn.Module, AttentionLayerBase):
    """The only layer with KV memory.

    Args:
        serving: what the model is served with.
        prefix: name of the layer in vLLM; it must have a layer's number.

    Attributes:
        requests: made when vLLM has allocated the memory.
    """

    def __init__(self, serving: Serving, prefix: str) -> None:
        super().__init__()
        config = get_current_vllm_config()
        self.serving, self.layer_name, self.kv_cache = serving, prefix, torch.tensor([])
        self.slots, self.device = config.scheduler_config.max_num_seqs, config.device_config.device
        self.requests: Requests | None = None
        config.compilation_config.static_forward_context[prefix] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        """See `ArenaBackend`."""
        return ArenaBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> ArenaSpec:
        """Blocks of all layers together."""
        return ArenaSpec.of(self.serving.reservation)

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Makes the cache in vLLM's memory, uint8 ``[blocks, 1, 1, block bytes]``."""
        self.kv_cache, device = kv_cache, kv_cache.device
        cache = self.serving.cache(self.slots, device, get_tensor_model_parallel_rank())
        cache.place(kv_cache.view(-1))
        rope = Rope.of(self.serving.config.rope, dtype=torch.float32, device=device)
        self.requests = Requests(cache, rope, self.serving.reservation)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor,
    omega: Tensor,
    late: Tensor | None,
    out: Tensor,
    layer: int,
    arena: str,
) -> None:
    """Attention of a layer, as an operation that torch.compile does not look into.

    Args:
        query: ``[N, Hq, D]``; key, value ``[N, H, D]``; not rotated.
        alpha, omega, late: decisions, see `dmc.model.decisions.decide`.
        out: ``[N, Hq, D]``, to be filled.
        layer: its number.
        arena: name of the `Arena`.
    """
    metadata = get_forward_context().attn_metadata
    batch: Batch | None = metadata[arena] if metadata else None
    if batch is None:  # vLLM tries the model without requests
        out.zero_()
        return
    parts = (query, key, value, alpha, omega, late)
    if batch.order is None:
        tokens = sum(end for _, end, _, _ in batch.step.chunks) + len(batch.step.slots)
        out[:tokens] = batch.step(layer, *(part if part is None else part[:tokens] for part in parts))
    else:
        out[batch.order] = batch.step(layer, *(part if part is None else part[batch.order] for part in parts))


def _attend_shapes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor,
    omega: Tensor,
    late: Tensor | None,
    out: Tensor,
    layer: int,
    arena: str,
) -> None:
    """Nothing to say about shapes: ``out`` is given."""


_LIBRARY = torch.library.Library("dmc_vllm", "FRAGMENT")
_LIBRARY.define("attend" + torch.library.infer_schema(attend, mutates_args=["out"]))
_LIBRARY.impl("attend", attend, "CompositeExplicitAutograd")
_LIBRARY._register_fake("attend", _attend_shapes)
