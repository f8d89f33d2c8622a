"""The KV cache: which entries exist (policies), how they are stored (codecs), and the pages under both.

What it holds, everything counted, for a model of head size 64 at CR 4 after 1,000 tokens, with all settings at
their defaults and ``codec("gear", bits=4)``. A head has 250 entries on average, where dense bf16 has 1,000 of 256
bytes, that is 256,000 bytes:

    encoded pages   32 entries of 97 bytes = 3,104 bytes each, 7.2 on average          22,300 bytes
    exact pages     4 sinks and 16 waiting entries of 256 bytes on average, 12 to a
                    page of 3,104 bytes, so 2.1 pages on average                        6,500
    tail            2 x 64 numerators and z in fp32                                       516
    tables          a page number or count takes 4 bytes                                   60
                                                                                       29,400: 8.7 x less

The same sum gives 7.4 x at 500 tokens, 9.6 x at 2,000 and 10.3 x at 8,000. Pages of 64 entries with rank 2 give
6.1, 7.8, 9.1 and 10.4 x: they share scales and factors among more entries, but twice as many wait for a full page.
"""

from dmc.cache.codecs import CODECS, Blocks, Codec, codec
from dmc.cache.kv import KVCache
from dmc.cache.pages import PagePool, PoolExhausted
from dmc.cache.policies import POLICIES, Entries, Policy, policy
from dmc.cache.prompt import Prompt
from dmc.cache.rows import Rows, Shape, Storage
from dmc.cache.step import Step
from dmc.cache.swap import Swapped

__all__ = [
    "CODECS", "POLICIES", "Blocks", "Codec", "Entries", "KVCache", "PagePool", "Policy", "PoolExhausted", "Prompt",
    "Rows", "Shape", "Step", "Storage", "Swapped", "codec", "policy",
]
