"""Late merging, five forms of one model, the same hard decisions, the same logits.

training form (megatron-core) = `dmc.functional.attention` with a window = ring, accumulating and final entries token by
token = the serving engine's prefill and decode = the export's forward and `generate`. Then the export against itself:
padded, packed, in chunks.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from checkpoints import convert
from checkpoints.export_hf import export
from dmc import LLM
from dmc import functional as fn
from dmc.families import shape_of
from dmc.training import decoder, setup
from dmc.training.attention import row_info
from dmc.training.config import ParallelConfig
from dmc.training.state import LayerState, Settings
from tests.equality.test_equality import base_case, generate, random_case, whole_model
from tests.functional import reference as ref
from tests.functional.late_reference import late_cache
from tests.training.helpers import TOKENIZER

TOLERANCE = 1e-4
GAIN, OFFSET, WINDOW = 3.0, 0.2, 5
PROMPT, NEW = 14, 8  # of tests.equality.test_equality


def with_decisions(case, ahead):
    """Rows that merge about half of the tokens, seen through GAIN and OFFSET."""
    generator = torch.Generator().manual_seed(1)
    heads, size, hidden = case.config.num_key_value_heads, case.config.head_dim, case.config.hidden_size
    case.ahead = ahead
    for layer in range(case.config.num_hidden_layers):
        rows = torch.randn(2 + ahead, heads, hidden, generator=generator) * hidden**-0.5
        prefix = f"model.layers.{layer}.self_attn."
        if case.decision == "head":
            case.weights[prefix + "decision.weight"] = rows.flatten(0, 1)
            if ahead:
                case.weights[prefix + "decision.bias"] = 0.1 * torch.randn(3 * heads, generator=generator)
        else:
            for name, part in zip("kq", rows, strict=True):
                weight = case.weights[f"{prefix}{name}_proj.weight"] = case.weights[f"{prefix}{name}_proj.weight"].clone()
                weight.view(heads, -1, size, hidden)[:, :, 0] = part[:, None]
    return case


CASES = {
    "random-gqa-neuron": lambda: with_decisions(random_case("neuron"), False),
    "random-gqa-head": lambda: with_decisions(random_case("head"), False),
    "random-gqa-ahead": lambda: with_decisions(random_case("head"), True),
    "base-ahead": lambda: with_decisions(base_case("head"), True),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    made = CASES[request.param]()
    out = export(
        made.weights,
        made.config.to_dict(),
        out=tmp_path_factory.mktemp("equality") / "hf",
        window=WINDOW,
        looks_ahead=made.ahead,
        decision=made.decision,
        offset=OFFSET,
        gain=GAIN,
        target_cr=2,
        measured_cr=2,
        tokenizer_dir=TOKENIZER,
        card={},
        dtype=torch.float32,
    )
    return made, out, *generate(out, made)


def layer_inputs(case, x, layer):
    """(query, key, value, alpha, omega) of one layer without batch, neuron zeroed; the unfolded weights and GAIN."""
    config, w, prefix = case.config, case.weights, f"model.layers.{layer}."
    heads = config.num_key_value_heads
    normed = F.rms_norm(x, x.shape[-1:], w[prefix + "input_layernorm.weight"].to(x), config.rms_norm_eps)
    project = lambda name: normed @ w[f"{prefix}self_attn.{name}.weight"].to(x).T  # noqa: E731
    query, key, value = (project(f"{n}_proj").unflatten(-1, (-1, config.head_dim)).transpose(0, 1) for n in "qkv")
    if case.decision == "head":
        bias = w[f"{prefix}self_attn.decision.bias"].to(x) if case.ahead else 0
        merge, weight, *late = (GAIN * (project("decision") + bias)).T.split(heads)
        if late:
            merge = merge + F.pad(late[0][:, WINDOW:], (0, min(WINDOW, len(x))))
    else:
        query, key = query.clone(), key.clone()
        merge, weight = GAIN * key[..., 0], GAIN * query[..., 0].unflatten(0, (heads, -1)).mean(1)
        query[..., 0] = key[..., 0] = 0
    return query, key, value, (merge > OFFSET).to(x), torch.sigmoid(weight + OFFSET)


def undecided(alpha):
    starts = torch.zeros(1, alpha.shape[-1], dtype=torch.bool)
    return alpha.masked_fill(fn.undecided(starts, WINDOW), 0.0)


def by_functional(query, key, value, alpha, omega):
    rope = ref.rope_tables(key.shape[1], key.shape[2])
    out = fn.attention(*(t[None] for t in (query, key, value, alpha, omega)), window=WINDOW, rope=rope)[0]
    return out, (1 - undecided(alpha)).sum(-1).long()


def by_cache(query, key, value, alpha, omega):
    return late_cache(query, key, value, alpha, omega, window=WINDOW, rotated=True)


def dense(case, tokens, attend=by_functional):
    return whole_model(case, tokens, attend, layer_inputs)


@pytest.fixture(scope="module")
def expected(case):
    return dense(case[0], case[2])


def test_tokens_are_merged_and_kept(case, expected):
    share = (expected[1].double() - WINDOW).mean().item() / (len(case[2]) - WINDOW)
    assert 0.2 < share < 0.9


def test_functional_is_the_cache(case, expected):
    logits, lengths = dense(case[0], case[2], by_cache)
    torch.testing.assert_close(logits, expected[0], rtol=1e-8, atol=1e-8)
    assert torch.equal(lengths, expected[1])


def test_training_form(case, expected, process_group):
    made, _, tokens, _, _ = case
    state = LayerState(Settings(made.decision, GAIN, OFFSET, window=WINDOW, looks_ahead=made.ahead), mode="hard")
    config = shape_of(made.config.to_dict())
    model = decoder.build(config, ParallelConfig(), state, sequence_length=64, dtype=torch.float32)[0].eval()
    setup.load_weights(model, convert.loader(config, made.weights.__getitem__))
    heads = config.num_key_value_heads
    for name, weight in model.named_parameters():
        if ".decision." in name:  # interleaved by head in training, by kind in the export
            rows = made.weights[f"model.layers.{name.split('.')[2]}.self_attn.decision.{name.split('.')[-1]}"]
            weight.data.copy_(rows.unflatten(0, (-1, heads)).transpose(0, 1).flatten(0, 1))
    starts = torch.zeros(1, len(tokens), dtype=torch.bool)
    starts[0, 0] = True
    with torch.no_grad():
        logits = model(tokens[None], torch.arange(len(tokens))[None], row_info(torch.zeros(1, dtype=torch.long), starts))[0]
    torch.testing.assert_close(logits.double(), expected[0], rtol=0, atol=TOLERANCE)


def test_export_generates_the_same(case, expected):
    made, _, tokens, logits, lengths = case
    torch.testing.assert_close(logits.double(), expected[0][PROMPT - 1 : -1], rtol=0, atol=TOLERANCE)
    # The last generated token is never fed back, so it is in no cache.
    assert torch.equal(lengths.long(), dense(made, tokens[:-1])[1])


@pytest.mark.parametrize("prompt", [1, 7, PROMPT, PROMPT + NEW - 1])
@pytest.mark.parametrize("chunk", [512, 4])
def test_engine_prefill_and_decode(case, expected, prompt, chunk):
    made, out, tokens, _, _ = case
    llm = LLM(out, codec="dense", dtype="fp32", prefill_tokens=chunk)
    assert llm.cache.policy.name == "dmc" and llm.cache.policy.window == WINDOW
    score = llm.score([tokens.tolist()], prompt_tokens=prompt)[0]
    wanted = expected[0].log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0]
    torch.testing.assert_close(score.logprobs.double(), wanted, rtol=0, atol=TOLERANCE)
    # Between steps the engine has already taken the oldest token out of the ring: at most one entry fewer in a head.
    difference = dense(made, tokens[:-1])[1] - score.stats.entries
    assert ((difference == 0) | (difference == 1)).all()


# ------------------------------------------------------------------------------------------- the export against itself


@pytest.fixture(scope="module")
def exported(case):
    return AutoModelForCausalLM.from_pretrained(case[1], trust_remote_code=True, dtype=torch.float32).eval()


def texts(*lengths):
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(2, 2000, (1, n), generator=generator) for n in lengths]


@torch.no_grad()
def test_packed_documents_are_each_alone(exported):
    """Documents in one row by position_ids, shorter and longer than the window, and generation goes on with the last."""
    rows = texts(3, 17, 9, 26)
    alone = [exported(row).logits for row in rows]
    ids = torch.cat(rows, 1)
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    packed = exported(ids, position_ids=positions, use_cache=True)
    torch.testing.assert_close(packed.logits, torch.cat(alone, 1), rtol=1e-4, atol=1e-4)
    last = exported(rows[-1], use_cache=True)
    assert torch.equal(packed.past_key_values.lengths(), last.past_key_values.lengths())
    token = torch.tensor([[5]])
    place = torch.tensor([[26]])
    after = [exported(token, past_key_values=out.past_key_values, position_ids=place).logits for out in (packed, last)]
    torch.testing.assert_close(*after, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(1,) * 40, (3, 20, 1, 16), (39, 1), (6, 34)])
def test_chunks_are_the_whole(exported, cuts):
    (row,) = texts(40)
    whole, cache, parts = exported(row), None, []
    for part in row.split(cuts, 1):
        out = exported(part, past_key_values=cache, use_cache=True)
        cache, parts = out.past_key_values, [*parts, out.logits]
    torch.testing.assert_close(torch.cat(parts, 1), whole.logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_padded_rows_generate_what_they_generate_alone(exported):
    rows = texts(4, 30, 13)
    width = max(row.shape[1] for row in rows)
    ids = torch.cat([F.pad(row, (width - row.shape[1], 0), value=1) for row in rows])
    mask = torch.cat([F.pad(torch.ones_like(row), (width - row.shape[1], 0)) for row in rows])
    settings = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=1)
    together = exported.generate(ids, attention_mask=mask, **settings)[:, width:]
    for row, got in zip(rows, together, strict=True):
        assert torch.equal(exported.generate(row, **settings)[0, row.shape[1] :], got)
