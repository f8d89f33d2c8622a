"""Qwen2: biases on queries, keys and values."""

from dmc.families.base import Family

FAMILY = Family("qwen2", "Qwen2", ("Qwen2", "Qwen2.5", "DeepSeek-R1-Distill-Qwen"), qkv_bias=True, sliding=True)
