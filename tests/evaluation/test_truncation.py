"""Truncated caches against a cache of Python lists that really evicts, token by token."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig

from dmc.evaluation.truncation import truncated_logits, truncated_perplexity

POLICIES = ("streaming", "h2o", "tova")


@pytest.fixture(scope="module", params=[2, 4], ids=["gqa", "mha"])
def model(request):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=request.param, head_dim=8, initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def _tokens(rows, count):
    return torch.randint(0, 40, (rows, count), generator=torch.Generator().manual_seed(1))


def _limit(t, total, cr, budget):
    return max(8, math.ceil((t + 1 if budget == "growing" else total) / cr))


class _Head:
    """The entries of one key/value head: [token, key, value, attention received, attention by the last query]."""

    def __init__(self):
        self.entries = []

    def attend(self, queries):
        """Softmax attention of the group's queries [G, D], noted on every entry. → [G, D]."""
        keys, values = torch.stack([e[1] for e in self.entries]), torch.stack([e[2] for e in self.entries])
        weights = torch.softmax(queries @ keys.T / math.sqrt(queries.shape[1]), -1)
        for entry, given in zip(self.entries, weights.T, strict=True):
            entry[3] += given.sum().item()
            entry[4] = given.sum().item()
        return weights @ values


def _make_room(heads, policy, limit, t):
    while len(heads[0].entries) >= limit:
        if policy == "tova":
            worst = min(range(len(heads[0].entries)), key=lambda i: sum(head.entries[i][4] for head in heads))
            for head in heads:
                del head.entries[worst]
            continue
        for head in heads:
            if policy == "streaming":
                old = [e for e in head.entries if e[0] >= 4][0]
            else:
                old = min((e for e in head.entries if e[0] <= t - limit // 2), key=lambda e: e[3])
            head.entries.remove(old)


@torch.no_grad()
def _brute_force(model, text, policy, cr, budget):
    """Logits [T, vocabulary] of one text, and the most entries any head held over its limit."""
    config, rows, excess = model.config, [], -math.inf
    caches = [[_Head() for _ in range(config.num_key_value_heads)] for _ in model.model.layers]
    for t, token in enumerate(text):
        hidden = model.model.embed_tokens(token)
        cos, sin = (x[0, 0] for x in model.model.rotary_emb(hidden, position_ids=torch.tensor([[t]])))

        def turn(x, cos=cos, sin=sin):
            return x * cos + torch.cat([-x[:, 4:], x[:, :4]], -1) * sin

        limit = _limit(t, len(text), cr, budget)
        for layer, heads in zip(model.model.layers, caches, strict=True):
            x = layer.input_layernorm(hidden)
            attention = layer.self_attn
            query, key, value = (p(x).view(-1, 8) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
            query, key = turn(query), turn(key)
            _make_room(heads, policy, limit, t)
            out = []
            for h, group in enumerate(query.chunk(len(heads))):
                heads[h].entries.append([t, key[h], value[h], 0.0, 0.0])
                excess = max(excess, len(heads[h].entries) - limit)
                out.append(heads[h].attend(group).flatten())
            hidden = hidden + attention.o_proj(torch.cat(out))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        rows.append(model.lm_head(model.model.norm(hidden)))
    return torch.stack(rows), excess


@pytest.mark.parametrize("budget", ["growing", "fixed"])
@pytest.mark.parametrize("policy", POLICIES)
def test_equals_a_cache_that_evicts(model, policy, budget):
    tokens, cr = _tokens(2, 45), 3.0
    brute = [_brute_force(model, text, policy, cr, budget) for text in tokens]
    assert max(excess for _, excess in brute) == 0
    logits = truncated_logits(model, tokens, policy, torch.tensor([_limit(t, 45, cr, budget) for t in range(45)]))
    expected = torch.stack([rows for rows, _ in brute])
    assert (logits - expected).abs().max() < 1e-4
    loss = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    result = truncated_perplexity(model, tokens, policy=policy, cr=cr, budget=budget)
    assert result["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-5)
    assert result["entries_per_token"] == 15 / 45
    held = [min(t + 1, _limit(t, 45, cr, budget)) for t in range(45)]
    assert result["attended_per_token"] == pytest.approx(sum(held) / sum(range(1, 46)))


@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_full_budget_is_the_model(model, policy):
    tokens = _tokens(3, 30)
    expected = math.exp(model(tokens, labels=tokens).loss)
    result = truncated_perplexity(model, tokens, policy=policy, cr=1)
    assert result["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert result["entries_per_token"] == result["attended_per_token"] == 1


def test_groups_of_sequences_do_not_matter(model, monkeypatch):
    tokens = _tokens(5, 20)
    whole = truncated_perplexity(model, tokens, policy="h2o", cr=2)
    monkeypatch.setattr("dmc.evaluation.truncation._SCORES", 2 * 4 * 20**2)
    assert truncated_perplexity(model, tokens, policy="h2o", cr=2) == pytest.approx(whole)


def test_directory_is_loaded(model, tmp_path):
    model.save_pretrained(tmp_path / "llama")
    options = dict(policy="streaming", cr=2.0)
    expected = truncated_perplexity(model, _tokens(1, 20), **options)
    assert truncated_perplexity(tmp_path / "llama", _tokens(1, 20), **options) == pytest.approx(expected)
    MistralConfig().save_pretrained(tmp_path / "mistral")
    for name in ("mistral", "nothing"):
        with pytest.raises(ValueError, match="no ordinary Llama"):
            truncated_perplexity(tmp_path / name, _tokens(1, 20), **options)


@pytest.mark.parametrize(("options", "words"), [
    ({"policy": "lru"}, "streaming, h2o, tova"), ({"budget": "none"}, "growing, fixed"), ({"cr": 0.5}, "at least 1"),
    ({"cr": math.nan}, "at least 1"), ({"tokens": torch.zeros(4, dtype=torch.long)}, r"\[N, T\]"),
    ({"tokens": torch.full((1, 4), 99)}, "vocabulary of 40"),
])
def test_bad_input_is_refused(model, options, words):
    arguments = {"tokens": _tokens(1, 20), "policy": "h2o", "cr": 2.0, **options}
    with pytest.raises(ValueError, match=words):
        truncated_perplexity(model, arguments.pop("tokens"), **arguments)
