"""The sizing table of docs/serve-on-a-gpu.md: bytes of a sequence's cache, from the cache's own layout.

`scripts/make_reference.py` writes the table between the marks of the page.
"""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import torch

from dmc.cache import Codec, KVCache, Policy, Shape, policy
from dmc.cache.codecs import make
from dmc.families import ModelShape, count, read_shape
from dmc.training.flops import GPUS
from scripts.reference_text import table

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "serve-on-a-gpu.md"
BEGIN, END = "<!-- sizing: written by scripts/make_reference.py -->", "<!-- end of sizing -->"
MODEL, GPU, TOKENS = "llama3.1-8b", "h100", 8192
GIB, MIB = 2**30, 2**20
FREE_SHARE = 0.9  # what `--kv-memory auto` takes of the free memory
CHOICES = (
    ("dense", {}, "full", {}, 1),
    ("int8", {}, "full", {}, 1),
    ("gear", {"bits": 4}, "full", {}, 1),
    ("tcq-4bit", {}, "full", {}, 1),
    ("tcq-2bit", {}, "full", {}, 1),
    ("dense", {}, "dmc", {"window": 256}, 4),
    ("tcq-4bit", {}, "dmc", {"window": 256}, 4),
    ("tcq-4bit", {}, "dmc", {}, 4),
    ("tcq-2bit", {}, "dmc", {}, 4),
    ("tcq-4bit", {}, "dmc", {}, 8),
)


def held(made: Codec, rule: Policy, shape: Shape, tokens: int, cr: float) -> int:
    """Bytes of a sequence's cache, of all layers and heads, block tables left out (8 bytes per row and 4 per page).

    Args:
        made, rule: the codec and the policy.
        shape: of the model.
        tokens: of the sequence.
        cr: tokens / entries of the tokens behind the policy's window, the same in every head.
    """
    with mock.patch.dict(os.environ, {"DMC_KERNELS": "torch"}):  # nothing is run: do not compile kernels for it
        cache = KVCache(Shape(1, 1, shape.head_size, shape.dtype), rule, made, slots=1)
    recent = min(tokens, rule.ring or 0)
    pages = cache.likely_pages(torch.tensor([[recent + (tokens - recent) / cr]], dtype=torch.float64))
    return (pages * cache.page_bytes + cache.held(0)["tail"]) * shape.layers * shape.heads


def sizes(model: ModelShape) -> Shape:
    """The cache's shape of a model in bf16."""
    head = model.head_dim or model.hidden_size // model.num_attention_heads
    return Shape(model.num_hidden_layers, model.num_key_value_heads, head, torch.bfloat16)


def rows() -> list[tuple[str, ...]]:
    """Rows of the table."""
    model = read_shape(ROOT / "configs" / "shapes" / MODEL)
    shape, weights = sizes(model), 2 * count(model)
    free = FREE_SHARE * (GPUS[GPU].memory_gib * GIB - weights)
    found = []
    for name, settings, rule, own, cr in CHOICES:
        made, decides = make(name, settings), policy(rule, **own)
        bytes_ = held(made, decides, shape, TOKENS, cr)
        dense = 4 * shape.layers * shape.heads * shape.head_size * TOKENS
        words = {1: "every token"}.get(cr, f"DMC at CR {cr}" + (f", window {decides.ring}" if decides.ring else ""))
        label = name if not settings else f"{name}:bits={settings['bits']}"
        found.append(
            (words, f"`{label}`", str(made.page_size), f"{bytes_ / MIB:,.0f}", f"{dense / bytes_:.1f}", f"{free // bytes_:,.0f}")
        )
    return found


def filled(text: str) -> str:
    """A page with today's table between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{PAGE.name} lacks the marks {BEGIN} and {END}")
    head = ("entries", "codec", "entries per page", "MiB per sequence", "dense / this", f"sequences of {TOKENS:,} tokens")
    return f"{before}{BEGIN}\n\n{table(head, rows())}\n\n{END}{after}"
