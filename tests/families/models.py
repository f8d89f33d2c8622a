"""Random small models of every family, by transformers' own classes."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import transformers

from dmc.families import families
from tests.training.helpers import TOKENIZER

SIZES = dict(
    vocab_size=2048,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    initializer_range=0.2,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=1,
)
OWN = {  # what sets a family's models apart
    "llama": {},
    "mistral": {"head_dim": 16, "sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
}
FAMILIES = list(OWN)


def model(family: str, *, seed: int = 0, **changes):
    """A model with biases and norms that are not those of a fresh one."""
    title = families()[family].title
    config = getattr(transformers, f"{title}Config")(**SIZES | OWN[family] | changes)
    torch.manual_seed(seed)
    made = getattr(transformers, f"{title}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if name.endswith(".bias"):
                weight.copy_(torch.randn(weight.shape, generator=generator))
            elif "norm" in name:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.2)
    return made


def directory(path: Path, family: str, **changes) -> Path:
    """A model's directory, with the base model's tokenizer."""
    model(family, **changes).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, path / name)
    return path
