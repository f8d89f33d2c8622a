"""Random tiny Llama directories, written by hand, and the whole model again token by token."""

from __future__ import annotations

import json
import math

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.functional.reference import algorithm_1

VOCAB, HIDDEN, INNER, LAYERS, QUERY_HEADS, SIZE = 97, 32, 48, 2, 4, 8
OFFSET = 5.0


def config(decision=None, *, heads=2, **changes):
    fields = {
        "model_type": "llama" if decision is None else "dmc_llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": QUERY_HEADS,
        "num_key_value_heads": heads,
        "head_dim": SIZE,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        "hidden_act": "silu",
    }
    if decision is not None:
        fields["dmc"] = {"decision": decision, "offset": OFFSET, "target_cr": 2.0, "measured_cr": 1.9}
    return fields | changes


def weights(fields, seed=0):
    """Decision rows are scaled so that about half of the tokens merge."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, std=0.2):
        return torch.randn(*shape, generator=generator) * std

    heads, size, hidden, inner = (
        fields[name] for name in ("num_key_value_heads", "head_dim", "hidden_size", "intermediate_size")
    )
    query_heads, decision = fields["num_attention_heads"], fields.get("dmc", {}).get("decision")
    tensors = {
        "model.embed_tokens.weight": normal(fields["vocab_size"], hidden, std=0.5),
        "model.norm.weight": 1 + normal(hidden),
    }
    if not fields["tie_word_embeddings"]:
        tensors["lm_head.weight"] = normal(fields["vocab_size"], hidden, std=0.5)
    for i in range(fields["num_hidden_layers"]):
        layer = {
            "self_attn.q_proj": normal(query_heads * size, hidden),
            "self_attn.k_proj": normal(heads * size, hidden),
            "self_attn.v_proj": normal(heads * size, hidden),
            "self_attn.o_proj": normal(hidden, query_heads * size),
            "mlp.gate_proj": normal(inner, hidden),
            "mlp.up_proj": normal(inner, hidden),
            "mlp.down_proj": normal(hidden, inner),
            "input_layernorm": 1 + normal(hidden),
            "post_attention_layernorm": 1 + normal(hidden),
        }
        spread = 20 / math.sqrt(hidden)
        if decision == "neuron":
            layer["self_attn.k_proj"][::size] = normal(heads, hidden, std=spread)
            layer["self_attn.q_proj"][::size] = normal(query_heads, hidden, std=spread)
        elif decision == "head":
            ahead = fields["dmc"].get("decide") == "late"
            logits = (1 if fields["dmc"].get("method") == "dms" else 2) + ahead
            layer["self_attn.decision"] = normal(logits * heads, hidden, std=spread)
            if ahead:
                tensors[f"model.layers.{i}.self_attn.decision.bias"] = normal(logits * heads)
        tensors |= {f"model.layers.{i}.{name}.weight": tensor for name, tensor in layer.items()}
    return tensors


def write(directory, fields, tensors, *, tokenizer=True):
    """A model directory; → its path."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(fields))
    save_file(tensors, str(directory / "model.safetensors"), metadata={"format": "pt"})
    if tokenizer:
        write_tokenizer(directory, fields["vocab_size"])
    return directory


def write_tokenizer(directory, entries):
    """Single characters: codes 3 to 94 stand for the printable ones, the rest is filled up."""
    words = ["<pad>", "<s>", "</s>", *(chr(33 + i) for i in range(94))][:entries]
    words += [f"<{i}>" for i in range(len(words), entries)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"})
    )


def token_by_token(fields, tensors, tokens):
    """One sequence through the whole model in fp64, attention by Algorithm 1 → (logits [T, V], lengths [L, H])."""
    w = {name: tensor.double() for name, tensor in tensors.items()}
    heads, size, decision = fields["num_key_value_heads"], fields["head_dim"], fields.get("dmc", {}).get("decision")
    hidden, lengths = w["model.embed_tokens.weight"][torch.tensor(tokens)], []
    for i in range(fields["num_hidden_layers"]):

        def part(name, x, prefix=f"model.layers.{i}."):
            return x @ w[f"{prefix}{name}.weight"].T

        x = _norm(hidden, w[f"model.layers.{i}.input_layernorm.weight"])
        query, key, value = (part(f"self_attn.{n}_proj", x).unflatten(-1, (-1, size)).transpose(0, 1) for n in "qkv")
        if decision == "neuron":
            merge, weight = key[..., 0].clone(), query[..., 0].unflatten(0, (heads, -1)).mean(1)
            query[..., 0], key[..., 0] = 0, 0
        elif decision == "head":
            merge, weight = part("self_attn.decision", x).T.split(heads)
        else:
            merge, weight = torch.full((2, heads, len(tokens)), -99.0).double()
        alpha = (merge > OFFSET).double()
        out, held = algorithm_1(query, key, value, alpha, torch.sigmoid(weight + OFFSET), rotated=True)
        alpha[:, 0] = 0
        assert torch.equal(held, (1 - alpha).sum(-1).long())
        lengths.append(held)
        hidden = hidden + part("self_attn.o_proj", out.transpose(0, 1).flatten(1))
        x = _norm(hidden, w[f"model.layers.{i}.post_attention_layernorm.weight"])
        hidden = hidden + part("mlp.down_proj", F.silu(part("mlp.gate_proj", x)) * part("mlp.up_proj", x))
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return _norm(hidden, w["model.norm.weight"]) @ head.T, torch.stack(lengths)


def _norm(x, weight):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
