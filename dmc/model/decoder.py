"""The decoder as served: plain PyTorch, with the decisions of DMC or DMS, and attention left to the cache.

One class for all families (`dmc.families`), which differ in sizes, biases and norms of queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dmc.families import check_names
from dmc.model.config import ModelConfig, read_config
from dmc.model.decisions import decide
from dmc.model.fitted_heads import FittedHeads
from dmc.model.linear import Linear
from dmc.model.ops import rms_norm, swiglu
from dmc.rope import Rope
from dmc.weights import Weights

Attend = Callable[..., Tensor]
"""(layer, query [N, Hq, D], key and value [N, H, D], alpha and omega [N, H]) → [N, Hq, D], for N tokens of whichever
sequences. Query and key are not rotated: the cache merges keys first. Alpha and omega are fp32 (fp64 in an fp64 model).

Of a model with a window alpha is a logit, above 0 to merge or evict the token once it leaves the window; if the model looks
ahead, ``late`` [N, H] follows: what each token adds to the logit of the one ``window`` before it.

With an attribute ``reads_hidden`` that is True it also gets ``hidden`` [N, hidden]: the input of the attention projections."""


@dataclass
class Layer:
    """Weights of one block. ``qkv`` gives queries, keys, values; ``decision`` is there in the head variant only, the norms of
    queries and keys in families that have them."""

    input_norm: Tensor
    qkv: Linear
    query_norm: Tensor | None
    key_norm: Tensor | None
    decision: Tensor | None
    decision_bias: Tensor | None
    output: Linear
    post_norm: Tensor
    gate_up: Linear
    down: Linear


class Decoder:
    """A model of any family, plain or with the decisions of DMC or DMS, for inference.

    Args:
        config: its sizes.
        weights: Hugging Face names → tensors.
        dtype, device: of the weights and of the arithmetic.

    Attributes:
        config: sizes of the whole model.
        part: sizes of what is computed here: of the whole model, or of a rank's heads (`dmc.model.sharded`).
        fitted: heads of fitted decisions, which a plain model then makes as a model with a window does; None: no decisions.

    Raises:
        ValueError: if a tensor is missing, has the wrong shape, or is one that the model has not.
    """

    def __init__(self, config: ModelConfig, weights: Weights, *, dtype: torch.dtype, device: torch.device | str) -> None:
        self.config, self.dtype, self.device = config, dtype, torch.device(device)
        self.part = config
        check_names(config, list(weights), weights.directory, added=_decision_names(config))
        self.fitted: FittedHeads | None = None
        self.rope = Rope.of(config.rope, dtype=_work(dtype), device=device)

        def tensor(name: str, *shape: int) -> Tensor:
            return weights.get(name, shape).to(device=device, dtype=dtype)

        self.embedding = tensor("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
        self.layers = [_layer(config, tensor, f"model.layers.{i}") for i in range(config.num_hidden_layers)]
        self.norm = tensor("model.norm.weight", config.hidden_size)
        head = self.embedding
        if not config.tie_word_embeddings:
            head = tensor("lm_head.weight", config.vocab_size, config.hidden_size)
        self._predict = Linear(head)
        self._plain = torch.tensor([[0.0], [1.0]], dtype=_work(dtype), device=device)  # alpha and omega without decisions

    @classmethod
    def load(cls, directory: str | Path, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Decoder:
        """Reads a Hugging Face directory.

        Raises:
            ValueError: if it is not a complete model; see `read_config` and `Weights`.
        """
        return cls(read_config(directory), Weights(directory), dtype=dtype, device=device)

    def hidden(self, tokens: Tensor, attend: Attend) -> Tensor:
        """Last hidden states, normed: tokens int64 ``[N]`` → ``[N, hidden]``.

        The tokens may be of several sequences, without padding: which belong together and where they stand is the
        business of ``attend``.
        """
        return self.finish(self.embedding[tokens], 0, attend)

    def finish(self, x: Tensor, first: int, attend: Attend) -> Tensor:
        """`hidden` from block ``first`` on, given what goes into it: ``[N, hidden]`` → the same."""
        for index in range(first, len(self.layers)):
            x = self.block(x, index, attend)
        return rms_norm(x, self.norm, self.config.rms_norm_eps)

    def block(self, x: Tensor, index: int, attend: Attend) -> Tensor:
        """One block: ``[N, hidden]`` → the same."""
        layer = self.layers[index]
        x = x + self._attention(index, layer, self.normed(x, index), attend)
        normed = rms_norm(x, layer.post_norm, self.config.rms_norm_eps)
        return x + layer.down(swiglu(layer.gate_up(normed)))

    def normed(self, x: Tensor, index: int) -> Tensor:
        """Input of the attention projections of block ``index``: ``[N, hidden]`` → the same."""
        return rms_norm(x, self.layers[index].input_norm, self.config.rms_norm_eps)

    @property
    def head(self) -> Tensor:
        """What makes logits of hidden states, ``[vocabulary, hidden]``."""
        return self._predict.dense()

    def logits(self, hidden: Tensor) -> Tensor:
        """``[..., hidden] → [..., vocabulary]``, in fp32 at least."""
        return self._predict(hidden).to(_work(self.dtype))

    def _attention(self, index: int, layer: Layer, x: Tensor, attend: Attend) -> Tensor:
        config = self.part
        query_heads, heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        states = layer.qkv(x).unflatten(-1, (-1, size))  # [N, Hq + 2H, D]
        query, key, value = states.split([query_heads, heads, heads], dim=1)
        if layer.query_norm is not None:
            query, key = (
                rms_norm(part, weight, config.rms_norm_eps) for part, weight in ((query, layer.query_norm), (key, layer.key_norm))
            )
        read = {"hidden": x} if getattr(attend, "reads_hidden", False) else {}
        out = attend(index, query, key, value, *self._decide(index, layer, x, query, key), **read)
        return layer.output(out.flatten(1))

    def _decide(self, index: int, layer: Layer, x: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        """What `Attend` takes after the value, ``[N, H]`` each, with DMS omega 1; in the neuron variant also zeroes what it
        read, in place."""
        config = self.part
        if self.fitted is not None:
            return self.fitted.decide(index, x)
        if config.decision is None:
            shape = key.shape[:2]
            return self._plain[0].expand(shape), self._plain[1].expand(shape)
        return decide(config, layer.decision, layer.decision_bias, x, query, key)


def _work(dtype: torch.dtype) -> torch.dtype:
    """What decisions, norms and logits are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _decision_names(config: ModelConfig) -> list[str]:
    """Tensors that a retrofit with decision heads has in addition to those of its shape."""
    kinds = () if config.decision != "head" else ("weight", "bias") if config.looks_ahead else ("weight",)
    return [f"model.layers.{i}.self_attn.decision.{kind}" for i in range(config.num_hidden_layers) for kind in kinds]


def _layer(config: ModelConfig, tensor: Callable[..., Tensor], name: str) -> Layer:
    hidden, inner, size = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size

    def linear(bias: bool, inputs: int, **outputs: int) -> Linear:
        weight = torch.cat([tensor(f"{name}.{part}.weight", rows, inputs) for part, rows in outputs.items()])
        if not bias:
            return Linear(weight, None)
        return Linear(weight, torch.cat([tensor(f"{name}.{part}.bias", rows) for part, rows in outputs.items()]))

    decision = decision_bias = None
    if config.decision == "head":
        decision = tensor(f"{name}.self_attn.decision.weight", config.logits_per_head * config.num_key_value_heads, hidden)
        decision = decision.to(_work(decision.dtype))  # decisions are made in fp32 whatever the model's dtype
        if config.looks_ahead:
            decision_bias = tensor(f"{name}.self_attn.decision.bias", decision.shape[0]).to(decision.dtype)
    return Layer(
        input_norm=tensor(f"{name}.input_layernorm.weight", hidden),
        qkv=linear(config.qkv_bias, hidden, **{"self_attn.q_proj": queries, "self_attn.k_proj": keys, "self_attn.v_proj": keys}),
        query_norm=tensor(f"{name}.self_attn.q_norm.weight", size) if config.qk_norm else None,
        key_norm=tensor(f"{name}.self_attn.k_norm.weight", size) if config.qk_norm else None,
        decision=decision,
        decision_bias=decision_bias,
        output=linear(config.output_bias, queries, **{"self_attn.o_proj": hidden}),
        post_norm=tensor(f"{name}.post_attention_layernorm.weight", hidden),
        gate_up=linear(config.mlp_bias, hidden, **{"mlp.gate_proj": inner, "mlp.up_proj": inner}),
        down=linear(config.mlp_bias, inner, **{"mlp.down_proj": hidden}),
    )
