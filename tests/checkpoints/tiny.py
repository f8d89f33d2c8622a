"""Random tiny Llamas that merge, and the whole model again in plain torch over `dmc.functional`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from checkpoints.export_hf import export
from dmc import functional

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
OFFSET, GAIN, SIZE, HIDDEN, VOCAB, LAYERS = 5.0, 4.0, 16, 48, 61, 3


@dataclass
class Tiny:
    """An unfolded model: its tensors, config.json fields and kind of decision."""

    state: dict
    config: dict
    decision: str
    inverse_frequencies: torch.Tensor
    scaling: float = 1.0  # of cos and sin


def tiny(decision, *, heads, tied=False, rope="default", seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, std):
        return torch.randn(*shape, generator=generator) * std

    config = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": heads,
        "head_dim": SIZE,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "architectures": ["LlamaForCausalLM"],
        "torch_dtype": "float32",
    }
    state = {"model.embed_tokens.weight": normal(VOCAB, HIDDEN, std=0.5), "model.norm.weight": torch.ones(HIDDEN)}
    if not tied:
        state["lm_head.weight"] = normal(VOCAB, HIDDEN, std=0.3)
    for i in range(LAYERS):
        layer = {
            "self_attn.q_proj": normal(4 * SIZE, HIDDEN, std=0.2),
            "self_attn.k_proj": normal(heads * SIZE, HIDDEN, std=0.2),
            "self_attn.v_proj": normal(heads * SIZE, HIDDEN, std=0.2),
            "self_attn.o_proj": normal(HIDDEN, 4 * SIZE, std=0.2),
            "mlp.gate_proj": normal(64, HIDDEN, std=0.2),
            "mlp.up_proj": normal(64, HIDDEN, std=0.2),
            "mlp.down_proj": normal(HIDDEN, 64, std=0.2),
            "input_layernorm": 1 + normal(HIDDEN, std=0.1),
            "post_attention_layernorm": 1 + normal(HIDDEN, std=0.1),
        }
        # Logits of a spread of about 10 around 0: with an offset of 5 a third of the tokens merges.
        rows = 10 / GAIN / math.sqrt(HIDDEN)
        if decision == "head":
            layer["self_attn.decision"] = normal(2 * heads, HIDDEN, std=rows)
        else:
            layer["self_attn.k_proj"][::SIZE] = normal(heads, HIDDEN, std=rows)
            layer["self_attn.q_proj"][::SIZE] = normal(4, HIDDEN, std=rows)
        state.update({f"model.layers.{i}.{name}.weight": tensor for name, tensor in layer.items()})
    inverse = 10000.0 ** (-torch.arange(0, SIZE, 2, dtype=torch.float64) / SIZE)
    if rope == "linear":  # as configurations were written before transformers 5
        config.update(rope_theta=10000.0, rope_scaling={"type": "linear", "factor": 2.0})
        inverse = inverse / 2
    elif rope == "llama3":
        config["rope_parameters"] = {"rope_theta": 10000.0, **LLAMA3}
        inverse = torch.stack([_llama3(f) for f in inverse])
    elif rope == "yarn":
        config["rope_parameters"] = {"rope_theta": 10000.0, **YARN}
        inverse, scaling = ROPE_INIT_FUNCTIONS["yarn"](LlamaConfig(**config))
        return Tiny(state, config, decision, inverse.double(), scaling)
    else:
        config["rope_parameters"] = {"rope_theta": 10000.0, "rope_type": "default"}
    return Tiny(state, config, decision, inverse)


def _llama3(frequency):
    turns = LLAMA3["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * frequency / LLAMA3["factor"] + smooth * frequency


def write(model, directory, **changes):
    """Export the model beside a tokenizer made up for it. → the exported directory."""
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(VOCAB - 3))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    source = directory / "tokenizer"
    source.mkdir(exist_ok=True)
    tokenizer.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "bos_token": "<s>", '
        '"eos_token": "</s>", "padding_side": "left"}'
    )
    options = dict(
        out=directory / "model",
        decision=model.decision,
        offset=OFFSET,
        gain=GAIN,
        target_cr=1.5,
        measured_cr=1.4,
        tokenizer_dir=source,
        card={"rows": [{"name": "base", "perplexity": 12.3456789}]},
        dtype=torch.float32,
    )
    return export(model.state, model.config, **{**options, **changes})


def reference(model, ids):
    """fp64 logits `[B, T, V]` of the unfolded model, and every layer's alpha `[B, H, T]`; no padding."""
    weights = {name: tensor.double() for name, tensor in model.state.items()}
    heads = model.config["num_key_value_heads"]
    angles = torch.outer(torch.arange(ids.shape[1]).double(), model.inverse_frequencies).repeat(1, 2)
    hidden, alphas = weights["model.embed_tokens.weight"][ids], []
    for i in range(LAYERS):
        prefix = f"model.layers.{i}."
        w = {n.removeprefix(prefix).removesuffix(".weight"): x for n, x in weights.items() if n.startswith(prefix)}
        x = _norm(hidden, w["input_layernorm"])
        query, key, value = ((x @ w[f"self_attn.{n}_proj"].T).unflatten(-1, (-1, SIZE)).transpose(1, 2) for n in "qkv")
        if model.decision == "neuron":
            merge, weight = key[..., 0].clone(), query[..., 0].unflatten(1, (heads, -1)).mean(2)
            query[..., 0] = 0
            key[..., 0] = 0
        else:
            merge, weight = (x @ w["self_attn.decision"].T).transpose(1, 2).split(heads, 1)
        alpha = functional.mask_starts(functional.round_alpha(GAIN * merge, offset=OFFSET), None)
        omega = functional.importance(GAIN * weight, offset=OFFSET)
        rope = (angles.cos() * model.scaling, angles.sin() * model.scaling)
        out = functional.attention(query, key, value, alpha, omega, rope=rope)
        hidden = hidden + out.transpose(1, 2).flatten(2) @ w["self_attn.o_proj"].T
        x = _norm(hidden, w["post_attention_layernorm"])
        gated = torch.nn.functional.silu(x @ w["mlp.gate_proj"].T) * (x @ w["mlp.up_proj"].T)
        hidden = hidden + gated @ w["mlp.down_proj"].T
        alphas.append(alpha)
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return _norm(hidden, weights["model.norm.weight"]) @ head.T, alphas


def _norm(x, weight):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight
