"""The KV cache: which entries exist (policies), how they are stored (codecs), and the pages under both."""

from dmc.cache.codecs import CODECS, Blocks, Codec, codec
from dmc.cache.kv import Decode, KVCache, Prefill
from dmc.cache.pages import PagePool, PoolExhausted
from dmc.cache.policies import POLICIES, Policy, policy
from dmc.cache.rows import Rows, Shape, Storage

__all__ = [
    "CODECS", "POLICIES", "Blocks", "Codec", "Decode", "KVCache", "PagePool", "Policy", "PoolExhausted", "Prefill",
    "Rows", "Shape", "Storage", "codec", "policy",
]
