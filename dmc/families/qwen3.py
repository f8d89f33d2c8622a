"""Qwen3, dense: queries and keys are normed before they are rotated, and the head size is its own."""

from dmc.families.base import Family

FAMILY = Family("qwen3", "Qwen3", ("Qwen3 0.6B to 32B",), qkv_bias=None, output_bias=None, qk_norm=True, sliding=True)
