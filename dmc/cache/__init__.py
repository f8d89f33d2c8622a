"""The KV cache: which entries exist (policies), how they are stored (codecs), and the pages under both.

All bytes of a cache, for a model of head size 64 at CR 4 after 1,000 tokens, with all settings at their defaults and
``codec("tcq", bits=4)``. A head has 250 entries on average. Dense bf16 has 1,000 entries of 256 bytes, which are 256,000
bytes:

    encoded pages   32 entries of 68 bytes = 2,184 bytes each, 7.2 on average          15,700 bytes
    full precision  4 sinks and 16 waiting entries of 256 bytes on average, 8 per
                    page of 2,184 bytes, so 2.9 pages on average                        6,200
    accumulating    2 x 64 numerators and z in fp32                                       516
    tables          a page number or count takes 4 bytes                                   60
                                                                                       22,500: 11.4 x less

The ratio is 12.9 x at 2,000 tokens. With pages of 64 entries, as in the preset ``tcq-4bit``, the ratios are 9.7 and 11.8 x:
more entries share the keys' mean, but twice as many entries wait for a full page.
"""

from dmc.cache.codecs import CODECS, Blocks, Codec, codec, codec_class
from dmc.cache.kv import KVCache
from dmc.cache.policies import POLICIES, Entries, Policy, PromptEntries, PromptPolicy, policy, policy_class
from dmc.cache.reading.late_prompt import LatePrompt
from dmc.cache.reading.prompt import Prompt
from dmc.cache.reading.step import Step
from dmc.cache.storage.packing import Packing, Storage
from dmc.cache.storage.pages import PagePool, PoolExhausted
from dmc.cache.storage.rows import Rows, Shape
from dmc.cache.storage.swap import Swapped

__all__ = [
    "CODECS",
    "POLICIES",
    "Blocks",
    "Codec",
    "Entries",
    "KVCache",
    "LatePrompt",
    "Packing",
    "PagePool",
    "Policy",
    "PoolExhausted",
    "Prompt",
    "PromptEntries",
    "PromptPolicy",
    "Rows",
    "Shape",
    "Step",
    "Storage",
    "Swapped",
    "codec",
    "codec_class",
    "policy",
    "policy_class",
]
