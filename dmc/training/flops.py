"""How many floating-point operations training takes, and how fast known GPUs do them: for MFU and ETA."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dmc.families import ModelShape
from dmc.training.config import Config


@dataclass(frozen=True)
class Gpu:
    """A data-centre GPU: usable memory in GiB, and its dense bf16 peak in TFLOP/s by the maker's data sheet."""

    pattern: str  # part of the name that CUDA reports, lower case
    memory_gib: float
    bf16_tflops: float


# The order matters where one pattern holds another.
GPUS = {
    "a100-40gb": Gpu("a100-sxm4-40gb", 39, 312),
    "a100-80gb": Gpu("a100", 79, 312),
    "h100-pcie": Gpu("h100 pcie", 79, 756),
    "h100": Gpu("h100", 79, 989),
    "h200": Gpu("h200", 139, 989),
    "b200": Gpu("b200", 178, 2250),
    "l40s": Gpu("l40s", 44, 362),
    "l4": Gpu("nvidia l4", 22, 121),
    "a10": Gpu("nvidia a10", 22, 125),
}


def find_gpu(name: str) -> Gpu | None:
    """The GPU of a key of `GPUS` or of a name that CUDA reports; None if it is not known."""
    lowered = name.lower()
    return GPUS.get(lowered) or next((gpu for gpu in GPUS.values() if gpu.pattern in lowered), None)


def peak_tflops(config: Config, gpu: str = "") -> float | None:
    """Peak of one rank in TFLOP/s: ``log.peak_tflops``, else that of the GPU in bf16; None if not known.

    Args:
        config: of the run; an fp32 run has no known peak, since whether it may use TF32 is not ours to say.
        gpu: name of the GPU; "" takes this machine's.
    """
    if config.log.peak_tflops:
        return config.log.peak_tflops
    if not gpu and torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
    known = find_gpu(gpu)
    return known.bf16_tflops if known and config.run.precision == "bf16" else None


def layer_matrices(hf: ModelShape) -> int:
    """Weights of one layer that every token is multiplied with (norms and decision head not counted)."""
    attention = 2 * hf.hidden_size * hf.head_dim * (hf.num_attention_heads + hf.num_key_value_heads)
    return attention + 3 * hf.hidden_size * hf.intermediate_size


def layer_vectors(hf: ModelShape, tensor: int) -> int:
    """Biases of one layer and norms of its queries and keys, on one of ``tensor`` tensor-parallel ranks."""
    rows = hf.head_dim * (hf.num_attention_heads + 2 * hf.num_key_value_heads) // tensor
    return hf.qkv_bias * rows + hf.qk_norm * 2 * hf.head_dim


def layer_updates(config: Config, hf: ModelShape, tensor: int) -> int:
    """Weights of one layer's low-rank updates (`dmc.training.lora`), on one of ``tensor`` tensor-parallel ranks."""
    if config.dmc.train != "lora":
        return 0
    hidden, inner, queries = hf.hidden_size, hf.intermediate_size, hf.num_attention_heads * hf.head_dim
    cut = [(hidden, queries + 2 * hf.num_key_value_heads * hf.head_dim)]  # inputs, outputs; the outputs are cut
    whole = [(queries, hidden)]  # the inputs are cut
    if config.dmc.lora_mlp:
        cut, whole = [*cut, (hidden, 2 * inner)], [*whole, (inner, hidden)]
    numbers = sum(i + o // tensor for i, o in cut) + sum(i // tensor + o for i, o in whole)
    return config.dmc.lora_rank * numbers


def attention_flops(hf: ModelShape, tokens: int) -> int:
    """Scores and weighted values of one layer, per token: the causal half of a sequence of ``tokens``."""
    return 2 * hf.num_attention_heads * hf.head_dim * tokens


def forward_flops(hf: ModelShape, tokens: int) -> int:
    """Operations of one token's forward pass in a sequence of ``tokens``: matrices, causal attention and logits.

    Norms, rotation, the merge scan and the decisions are not counted: this is the model's work, by which MFU
    measures, and they are overhead.
    """
    return hf.num_hidden_layers * (2 * layer_matrices(hf) + attention_flops(hf, tokens)) + 2 * hf.vocab_size * hf.hidden_size


def distils(config: Config) -> bool:
    """Whether a run of this configuration holds a teacher."""
    return bool(config.dmc.compresses and config.distill.weight or config.distill.teacher)


def model_flops(config: Config, hf: ModelShape) -> int:
    """Per trained token: forward, backward (twice the forward) and a teacher's forward; nothing recomputed."""
    return (4 if distils(config) else 3) * forward_flops(hf, config.data.sequence_length)
