"""The central test: five forms of one model, the same hard decisions, the same logits.

training form (megatron-core) = `dmc.functional.attention` = the paper's Algorithm 1 token by token = the serving
engine's prefill and decode = the export's `generate`; and cache lengths equal to sum(1 - alpha).
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from checkpoints import convert
from checkpoints.export_hf import export
from dmc import LLM
from dmc import functional as fn
from dmc.families import shape_of
from dmc.training import decoder, setup
from dmc.training.attention import row_info
from dmc.training.config import ParallelConfig
from dmc.training.state import LayerState, Settings
from dmc.weights import Weights
from tests.functional import reference as ref
from tests.training.helpers import ROOT, TOKENIZER, tiny_config

TOLERANCE = 1e-4
GAIN, OFFSET = 3.0, 0.5
PROMPT, NEW = 14, 8


@dataclass
class Case:
    config: LlamaConfig
    weights: dict[str, torch.Tensor]
    decision: str


def random_case(decision, **changes):
    torch.manual_seed(0)
    config = tiny_config(**changes)
    return Case(config, LlamaForCausalLM(config).state_dict(), decision)


def base_case(decision):
    config = LlamaConfig.from_pretrained(ROOT / "checkpoints" / "base")
    read = Weights(ROOT / "checkpoints" / "base")
    plain = LlamaForCausalLM(config).state_dict()
    return Case(config, {name: read(name).float() for name in plain if name != "lm_head.weight"}, decision)


def with_decisions(case):
    """Rows that merge about half of the tokens: unit-norm logits, seen through GAIN and OFFSET."""
    generator = torch.Generator().manual_seed(1)
    heads, size, hidden = case.config.num_key_value_heads, case.config.head_dim, case.config.hidden_size
    draw = lambda rows: torch.randn(rows, hidden, generator=generator) * hidden**-0.5  # noqa: E731
    for layer in range(case.config.num_hidden_layers):
        prefix = f"model.layers.{layer}.self_attn."
        if case.decision == "head":
            case.weights[prefix + "decision.weight"] = draw(2 * heads)
        else:
            for letter in "qk":
                weight = case.weights[f"{prefix}{letter}_proj.weight"] = case.weights[f"{prefix}{letter}_proj.weight"].clone()
                weight[::size] = draw(len(weight) // size)
    return case


CASES = {
    "random-gqa-neuron": lambda: random_case("neuron"),
    "random-gqa-head": lambda: random_case("head"),
    "random-mha-neuron": lambda: random_case("neuron", num_key_value_heads=4, tie_word_embeddings=False),
    "base-neuron": lambda: base_case("neuron"),
    "base-head": lambda: base_case("head"),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    made = with_decisions(CASES[request.param]())
    out = tmp_path_factory.mktemp("equality") / "hf"
    hf_config = made.config.to_dict()
    export(
        made.weights,
        hf_config,
        out=out,
        decision=made.decision,
        offset=OFFSET,
        gain=GAIN,
        target_cr=2,
        measured_cr=2,
        tokenizer_dir=TOKENIZER,
        card={},
        dtype=torch.float32,
    )
    generated = generate(out, made)
    return made, out, *generated


def generate(out, case):
    """(tokens [n], logits of the generated steps [NEW, V], lengths [L, H]) of the export's own generate()."""
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32).eval()
    prompt = torch.randint(2, case.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(2))
    done = model.generate(
        prompt, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return done.sequences[0], torch.cat(done.logits), done.past_key_values.lengths()[:, 0]


def layer_inputs(case, x, layer):
    """(query, key, value, alpha, omega) of one layer without batch, neuron zeroed; the unfolded weights and GAIN."""
    config, w = case.config, case.weights
    prefix = f"model.layers.{layer}."
    normed = F.rms_norm(x, x.shape[-1:], w[prefix + "input_layernorm.weight"].to(x), config.rms_norm_eps)
    project = lambda name: normed @ w[f"{prefix}self_attn.{name}.weight"].to(x).T  # noqa: E731
    query, key, value = (project(f"{n}_proj").unflatten(-1, (-1, config.head_dim)).transpose(0, 1) for n in "qkv")
    heads = config.num_key_value_heads
    if case.decision == "head":
        merge, weight = project("decision").T.split(heads)
    else:
        merge, weight = key[..., 0].clone(), query[..., 0].view(heads, -1, len(x)).mean(1)
        query, key = query.clone(), key.clone()
        query[..., 0] = key[..., 0] = 0
    alpha = (GAIN * merge > OFFSET).to(x)
    alpha[:, 0] = 0
    return query, key, value, alpha, torch.sigmoid(GAIN * weight + OFFSET)


def whole_model(case, tokens, attend, inputs=layer_inputs):
    """Logits [T, V] and cache lengths [L, H] of a Llama written out in fp64, with ``attend`` as its attention."""
    w, config = case.weights, case.config
    embedding = w["model.embed_tokens.weight"].double()
    x, lengths = embedding[tokens], []
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        out, held = attend(*inputs(case, x, layer))
        lengths.append(held)
        x = x + out.transpose(0, 1).flatten(1) @ w[prefix + "self_attn.o_proj.weight"].double().T
        normed = F.rms_norm(x, x.shape[-1:], w[prefix + "post_attention_layernorm.weight"].double(), config.rms_norm_eps)
        gate, up = (normed @ w[f"{prefix}mlp.{n}_proj.weight"].double().T for n in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ w[prefix + "mlp.down_proj.weight"].double().T
    x = F.rms_norm(x, x.shape[-1:], w["model.norm.weight"].double(), config.rms_norm_eps)
    return x @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).double().T, torch.stack(lengths)


def by_functional(query, key, value, alpha, omega):
    rope = ref.rope_tables(key.shape[1], key.shape[2])
    out = fn.attention(*(t[None] for t in (query, key, value, alpha, omega)), rope=rope)[0]
    return out, (1 - alpha).sum(-1).long()


def by_algorithm_1(query, key, value, alpha, omega):
    return ref.algorithm_1(query, key, value, alpha, omega, rotated=True)


@pytest.fixture(scope="module")
def expected(case):
    made, _, tokens, _, _ = case
    return whole_model(made, tokens, by_functional)


def test_both_decisions_happen(case, expected):
    made, _, tokens, _, _ = case
    share = expected[1].sum().item() / (expected[1].numel() * len(tokens))
    assert 0.15 < share < 0.9


def test_functional_is_algorithm_1(case, expected):
    made, _, tokens, _, _ = case
    logits, lengths = whole_model(made, tokens, by_algorithm_1)
    torch.testing.assert_close(logits, expected[0], rtol=1e-8, atol=1e-8)
    assert torch.equal(lengths, expected[1])


def test_training_form(case, expected, process_group):
    made, _, tokens, _, _ = case
    state = LayerState(Settings(made.decision, GAIN, OFFSET), mode="hard")
    config = shape_of(made.config.to_dict())
    model = decoder.build(config, ParallelConfig(), state, sequence_length=64, dtype=torch.float32)[0].eval()
    setup.load_weights(model, convert.loader(config, made.weights.__getitem__))
    if made.decision == "head":
        own = dict(model.named_parameters())
        for layer in range(config.num_hidden_layers):
            stacked = made.weights[f"model.layers.{layer}.self_attn.decision.weight"]
            rows = stacked.view(2, config.num_key_value_heads, -1).transpose(0, 1).flatten(0, 1)
            own[f"decoder.layers.{layer}.self_attention.decision.weight"].data.copy_(rows)
    starts = torch.zeros(1, len(tokens), dtype=torch.bool)
    starts[0, 0] = True
    with torch.no_grad():
        logits = model(tokens[None], torch.arange(len(tokens))[None], row_info(torch.zeros(1, dtype=torch.long), starts))[0]
    torch.testing.assert_close(logits.double(), expected[0], rtol=0, atol=TOLERANCE)


def test_export_generates_the_same(case, expected):
    _, _, tokens, logits, lengths = case
    torch.testing.assert_close(logits.double(), expected[0][PROMPT - 1 : -1], rtol=0, atol=TOLERANCE)
    # The last generated token is never fed back, so it is in no cache.
    made = case[0]
    assert torch.equal(lengths.long(), whole_model(made, tokens[:-1], by_functional)[1])


@pytest.mark.parametrize("prompt", [1, 5, PROMPT, PROMPT + NEW - 1])
def test_engine_prefill_and_decode(case, expected, prompt):
    made, out, tokens, _, _ = case
    score = LLM(out, codec="dense", dtype="fp32").score([tokens.tolist()], prompt_tokens=prompt)[0]
    wanted = expected[0].log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0]
    torch.testing.assert_close(score.logprobs.double(), wanted, rtol=0, atol=TOLERANCE)
    assert torch.equal(score.stats.entries, whole_model(made, tokens[:-1], by_functional)[1])
