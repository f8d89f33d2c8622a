"""Perplexity of an ordinary Llama whose cache is cut down to a budget: StreamingLLM, H2O, TOVA.

A simulation for the tables of results: the whole text is scored at once (teacher-forced), and what an evicting
cache would not hold any more is masked out of full attention. It says what such a cache costs in quality and
saves nothing; policies that really evict belong to the serving cache.

A query sees its own token and what the cache kept of the earlier ones, `budget` entries together at most. What
was evicted stays evicted, and its keys and values went into later layers as the truncated attention gave them.

Dimension letters: N sequences, T tokens, H key/value heads, G query heads per key/value head, D head size.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

BUDGETS = ("growing", "fixed")
SINKS = 4  # first tokens that the streaming policy keeps
_FLOOR = 8  # entries that every budget allows
_SCORES = 2**25  # attention scores held at once: sequences are taken in groups that fit


def truncated_perplexity(
    model: str | Path | LlamaForCausalLM, tokens: Tensor, *, policy: str, cr: float, budget: str = "growing",
) -> dict[str, float]:
    """Perplexity with the cache truncated to the number of entries of a compression ratio.

    Args:
        model: a loaded Llama, or its Hugging Face directory (loaded in fp32).
        tokens: `[N, T]` token ids, each row a text of its own.
        policy: "streaming" keeps the first 4 tokens and the newest; "h2o" gives half of the budget to the newest,
            half to those older ones that got most attention so far, per key/value head; "tova" drops the token to
            which the last query, averaged over the heads of the layer, attended least.
        cr: tokens per entry, at least 1.
        budget: "growing" allows ceil((t + 1) / cr) entries at token t, as many as a cache of that ratio holds there;
            "fixed" allows ceil(T / cr) everywhere. Either allows at least 8.

    Returns:
        `perplexity`; `entries_per_token`, entries held at the end over T; `attended_per_token`, entries that all
        queries together saw over those that they see with no truncation.

    Raises:
        ValueError: on an unknown policy or budget, a ratio below 1, tokens of another shape or outside the
            vocabulary, or a model that is no Llama.
    """
    model = model if isinstance(model, LlamaForCausalLM) else _load(Path(model))
    _check(model, tokens, policy, cr, budget)
    allowed = _budgets(tokens.shape[1], cr, budget)
    group = max(1, _SCORES // (model.config.num_attention_heads * tokens.shape[1] ** 2))
    total = 0.0
    for rows in tokens.split(group):
        logits = truncated_logits(model, rows, policy, allowed)
        total += F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="sum").item()
    held = torch.minimum(allowed, torch.arange(1, len(allowed) + 1))
    return {
        "perplexity": math.exp(total / (tokens.numel() - len(tokens))),
        "entries_per_token": held[-1].item() / len(held),
        "attended_per_token": held.sum().item() / (len(held) * (len(held) + 1) / 2),
    }


@torch.no_grad()
def truncated_logits(model: LlamaForCausalLM, tokens: Tensor, policy: str, allowed: Tensor) -> Tensor:
    """Logits `[N, T, vocabulary]` for tokens `[N, T]`, with at most `allowed` [T] entries at each token."""
    body = model.model
    hidden = body.embed_tokens(tokens)
    rope = body.rotary_emb(hidden, position_ids=torch.arange(tokens.shape[1], device=tokens.device)[None])
    for layer in body.layers:
        hidden = hidden + _attention(layer.self_attn, layer.input_layernorm(hidden), rope, policy, allowed)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(body.norm(hidden))


def _attention(module: torch.nn.Module, x: Tensor, rope: tuple[Tensor, Tensor], policy: str, allowed: Tensor) -> Tensor:
    query, key, value = (
        project(x).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        for project in (module.q_proj, module.k_proj, module.v_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *rope)
    query = query.unflatten(1, (key.shape[1], -1)).float() * module.head_dim**-0.5
    scores = query @ key[:, :, None].float().mT  # [N, H, G, T, T]
    weights = _POLICIES[policy](scores, allowed)
    out = weights @ value[:, :, None].float()
    return module.o_proj(out.flatten(1, 2).transpose(1, 2).flatten(2).to(x.dtype))


# Every policy turns scores [N, H, G, T, T] into attention weights, in place.


def _streaming(scores: Tensor, allowed: Tensor) -> Tensor:
    token = torch.arange(len(allowed))
    oldest = (token - allowed + SINKS)[:, None]  # the newest that the window has dropped
    visible = ((token < SINKS) | (token > oldest)) & (token <= token[:, None])
    return scores.masked_fill_(~visible.to(scores.device), -math.inf).softmax(-1)


def _h2o(scores: Tensor, allowed: Tensor) -> Tensor:
    received = scores.new_zeros(*scores.shape[:2], len(allowed))  # [N, H, T]: attention so far; inf: evicted
    gone = torch.zeros_like(received)  # -inf: evicted
    for t, (entries, full) in enumerate(_evictions(allowed)):
        if full:
            older = received[..., : t + 1 - entries // 2]
            _evict(older.argmin(-1, keepdim=True), received, gone)
        row = scores[..., t, : t + 1]
        row.copy_((row + gone[:, :, None, : t + 1]).softmax(-1))
        received[..., : t + 1] += row.sum(2)
    return scores.tril_()


def _tova(scores: Tensor, allowed: Tensor) -> Tensor:
    last = scores.new_zeros(len(scores), len(allowed))  # [N, T]: attention of the last query; inf: evicted
    gone = torch.zeros_like(last)
    for t, (_, full) in enumerate(_evictions(allowed)):
        if full:
            _evict(last[:, :t].argmin(-1, keepdim=True), last, gone)
        row = scores[..., t, : t + 1]
        row.copy_((row + gone[:, None, None, : t + 1]).softmax(-1))
        last[:, : t + 1] = row.mean((1, 2)) - gone[:, : t + 1]
    return scores.tril_()


_POLICIES = {"streaming": _streaming, "h2o": _h2o, "tova": _tova}


def _evictions(allowed: Tensor) -> list[tuple[int, bool]]:
    """Of each token (entries allowed, whether one has to go before it comes in); budgets never shrink."""
    held, steps = 0, []
    for entries in allowed.tolist():
        steps.append((entries, held == entries))
        held = min(held + 1, entries)
    return steps


def _evict(index: Tensor, ranking: Tensor, gone: Tensor) -> None:
    ranking.scatter_(-1, index, math.inf)
    gone.scatter_(-1, index, -math.inf)


def _budgets(tokens: int, cr: float, budget: str) -> Tensor:
    seen = torch.arange(1, tokens + 1) if budget == "growing" else torch.full((tokens,), tokens)
    return (seen / cr).ceil().long().clamp(min=_FLOOR)


def _load(directory: Path) -> LlamaForCausalLM:
    config = directory / "config.json"
    kind = json.loads(config.read_text()).get("model_type") if config.is_file() else None
    if kind != "llama":
        raise ValueError(f"{directory} is no ordinary Llama (model_type {kind!r}): truncation is for the base model")
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def _check(model: LlamaForCausalLM, tokens: Tensor, policy: str, cr: float, budget: str) -> None:
    if policy not in _POLICIES:
        raise ValueError(f"unknown policy {policy!r}: known are {', '.join(_POLICIES)}")
    if budget not in BUDGETS:
        raise ValueError(f"unknown budget {budget!r}: known are {', '.join(BUDGETS)}")
    if not (math.isfinite(cr) and cr >= 1):
        raise ValueError(f"cr must be a finite number of at least 1, got {cr}")
    if tokens.dim() != 2 or tokens.shape[1] < 2 or not len(tokens):
        raise ValueError(f"tokens must be [N, T] with T of at least 2, got {tuple(tokens.shape)}")
    if tokens.min() < 0 or tokens.max() >= model.config.vocab_size:
        raise ValueError(f"tokens reach outside the model's vocabulary of {model.config.vocab_size}")
