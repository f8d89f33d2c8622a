"""The bias of the key projections of a model, for the cache (`dmc.kernels.pages.key_bias`)."""

from __future__ import annotations

import torch

from dmc.kernels.pages.key_bias import KeyBias
from dmc.model.config import ModelConfig
from dmc.rope import Rope
from dmc.weights import Weights


def key_bias(
    config: ModelConfig, weights: Weights, *, dtype: torch.dtype, device: torch.device | str, rank: int = 0, ranks: int = 1
) -> KeyBias | None:
    """Key bias of one rank's key/value heads; None if keys have no bias, or a norm after it, which does not let it apart.

    Where decisions come from a neuron of the keys, that neuron's bias is 0, as the model sets the neuron to 0.

    Args:
        config, weights: of the whole model.
        dtype: that the model is served in.
        device: of what is made.
        rank, ranks: tensor parallel.

    Raises:
        ValueError: if a tensor is missing or has another shape.
    """
    if not config.qkv_bias or config.qk_norm:
        return None
    heads, size = config.num_key_value_heads, config.head_dim
    own = slice(rank * (heads // ranks) * size, (rank + 1) * (heads // ranks) * size)
    names = [f"model.layers.{layer}.self_attn.k_proj.bias" for layer in range(config.num_hidden_layers)]
    bias = torch.stack([weights.part(name, (heads * size,), 0, own) for name in names])
    bias = bias.view(len(names), -1, size).to(device, dtype).float()  # rounded as the model's
    if config.decision == "neuron" and config.method == "dmc":
        bias = torch.cat([torch.zeros_like(bias[..., :1]), bias[..., 1:]], dim=-1)
    return KeyBias(bias, Rope.of(config.rope, dtype=torch.float32, device=device))
