"""Bytes that the engine holds at a forced compression ratio, everything counted, next to a dense bf16 cache.

    python scripts/bench_bytes.py --tokens 2000 8000 --codec tcq-4bit --cr 4

A small random model of multi-head attention with head size 128 generates through `dmc.LLM`; whether a token is merged is
drawn at random, so that each head reaches the ratio. Bytes are those of `Output.stats`: encoded pages, full-precision
entries with the unused slots of their pages, accumulating entries and block tables. They depend on head
size, ratio and length, not on the number of layers and heads.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dmc import LLM, SamplingParams
from dmc.cache.policies.dmc import DmcPolicy

LAYERS, HEADS, VOCABULARY = 2, 4, 256


class Forced(DmcPolicy):
    """Merges each token with one probability, whatever the model decides."""

    def __init__(self, cr: float) -> None:
        self._merged, self._source = 1 - 1 / cr, torch.Generator().manual_seed(0)

    def decide(self, alpha: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
        """See `Policy.decide`."""
        return (torch.rand(alpha.shape, generator=self._source) < self._merged).to(alpha.dtype), omega


def main() -> None:
    """Prints one line a length."""
    options = _options()
    torch.set_num_threads(1)
    print("| tokens | codec | CR | bytes held | of pages, exact, accumulating entries, tables | dense bf16 / held |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        _write(Path(directory), options.head_size, max(options.tokens) + options.new)
        for tokens in options.tokens:
            llm = LLM(directory, policy=Forced(options.cr), codec=options.codec, max_batch=1, device="cpu", dtype="fp32")
            prompt = torch.randint(VOCABULARY, (tokens - options.new,), generator=torch.Generator().manual_seed(1)).tolist()
            (output,) = llm.generate([prompt], SamplingParams(max_tokens=options.new, temperature=0, ignore_eos=True))
            stats = output.stats
            parts = ", ".join(f"{stats.held[part]:,}" for part in ("pages", "exact", "tail", "tables"))
            print(
                f"| {stats.cached_tokens} | {options.codec} | {stats.cr:.2f} | {stats.held_bytes:,} | {parts} | "
                f"{stats.ratio:.2f} x |",
                flush=True,
            )


def _write(directory: Path, size: int, positions: int) -> None:
    """A random retrofitted Llama."""
    hidden, inner = HEADS * size, 2 * size
    config = {
        "model_type": "dmc_llama",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": size,
        "max_position_embeddings": positions,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "dmc": {"decision": "neuron", "offset": 5.0, "target_cr": 1.0, "measured_cr": 1.0},
    }
    (directory / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    tensors = {"model.embed_tokens.weight": torch.randn(VOCABULARY, hidden), "model.norm.weight": torch.ones(hidden)}
    for number in range(LAYERS):
        shapes = {
            **{f"self_attn.{part}_proj": (hidden, hidden) for part in "qkvo"},
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        layer = {name: torch.randn(shape) * hidden**-0.5 for name, shape in shapes.items()}
        layer |= {name: torch.ones(hidden) for name in ("input_layernorm", "post_attention_layernorm")}
        tensors |= {f"model.layers.{number}.{name}.weight": tensor for name, tensor in layer.items()}
    save_file(tensors, directory / "model.safetensors")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2000, 8000], help="of a text, generated ones included")
    parser.add_argument("--codec", default="tcq-4bit", help="of pages")
    parser.add_argument("--cr", type=float, default=4.0, help="tokens per entry")
    parser.add_argument("--head-size", type=int, default=128, help="D")
    parser.add_argument("--new", type=int, default=64, help="tokens generated after the prompt")
    options = parser.parse_args()
    if not min(options.tokens) > options.new >= 1 or options.cr < 1:
        parser.error("--new must be at least 1 and below every --tokens, and --cr at least 1")
    return options


if __name__ == "__main__":
    main()
