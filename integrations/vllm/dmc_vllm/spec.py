"""What vLLM's scheduler knows: one KV cache group of blocks that are reserved by `dmc_vllm.reservation.Reservation`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from dmc_vllm.reservation import Reservation

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_utils import KVCacheBlock


class ArenaManager(FullAttentionManager):
    """Gives a request the blocks of its reservation. Which pages of the KV memory it uses, the cache decides."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self._record_new_block_ids = False  # blocks are counted only: zeroing one would clear pages of other requests

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, new_computed_blocks: Sequence[KVCacheBlock], *args: object, **kwargs: object
    ) -> int:
        """Blocks that a request of ``num_tokens`` tokens needs and does not have."""
        return super().get_num_blocks_to_allocate(request_id, self._counted(num_tokens), new_computed_blocks, *args, **kwargs)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, *args: object, **kwargs: object) -> list[KVCacheBlock]:
        """Gives a request of ``num_tokens`` tokens the blocks that it does not have."""
        return super().allocate_new_blocks(request_id, self._counted(num_tokens), *args, **kwargs)

    def _counted(self, tokens: int) -> int:
        """Tokens for which vLLM counts as many blocks as the reservation has."""
        return self.kv_cache_spec.reservation.blocks(tokens) * self.block_size


@dataclass(frozen=True, kw_only=True)
class ArenaSpec(FullAttentionSpec):
    """Blocks of all layers together.

    Attributes:
        reservation: of a request.
    """

    reservation: Reservation

    @classmethod
    def of(cls, reservation: Reservation) -> ArenaSpec:
        """The blocks of a reservation: to vLLM, one state of bytes."""
        return cls(
            block_size=reservation.tokens_per_block,
            num_kv_heads=1,
            head_size=reservation.block_bytes,
            head_size_v=0,
            dtype=torch.uint8,
            tokens_per_state=reservation.tokens_per_block,
            dcp_sharded=False,
            reservation=reservation,
        )

    @property
    def prefix_cacheable(self) -> bool:
        """False: a block holds no fixed range of tokens."""
        return False

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes of the longest request."""
        return self.reservation.blocks(vllm_config.model_config.max_model_len) * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        """Blocks of the longest request."""
        return self.reservation.blocks(max_len)

    @classmethod
    def merge(cls, specs: list[ArenaSpec]) -> ArenaSpec:
        """The spec of a group; a model has one."""
        return KVCacheSpec.merge.__func__(cls, specs)


def register() -> None:
    """Registers the spec; may be called again."""
    KVCacheSpecRegistry._ensure_registered()  # the first registration of another spec would hide vLLM's own
    KVCacheSpecRegistry.register(ArenaSpec, ArenaManager, FullAttentionSpec)
