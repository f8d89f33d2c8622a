"""Llama and what is built like it."""

from dmc.families.base import Family

FAMILY = Family(
    "llama",
    "Llama",
    ("Llama 2", "Llama 3, 3.1, 3.2", "SmolLM2", "TinyLlama", "DeepSeek-R1-Distill-Llama"),
    qkv_bias=None,
    output_bias=None,
    mlp_bias=None,
)
