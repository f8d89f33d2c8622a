"""The central test for DMS: five forms of one model, the same hard decisions, the same logits.

training form (megatron-core) = `dmc.functional_dms.attention` = a list from which marked tokens are removed, token by
token = the serving engine's prefill and decode = the export's `generate`; and cache lengths as the formula says. Then the
engine against itself: alone, in a batch, in chunks, preempted, and with a lossy codec on top. One model decides late.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from checkpoints import convert
from checkpoints.export_hf import export
from dmc import LLM, SamplingParams
from dmc import functional_dms as dms
from dmc.engine.predict import Predictor
from dmc.engine.runner import Chunk
from dmc.families import shape_of
from dmc.training import decoder, setup
from dmc.training.attention import row_info
from dmc.training.config import ParallelConfig
from dmc.training.state import LayerState, Settings
from tests.equality.test_equality import base_case, generate, random_case, whole_model
from tests.functional import reference as ref
from tests.training.helpers import TOKENIZER

TOLERANCE = 1e-4
GAIN, OFFSET, WINDOW = 3.0, 0.2, 5
PROMPT, NEW = 14, 8  # of tests.equality.test_equality


def with_decisions(case, ahead=False):
    """Rows that mark about half of the tokens, seen through GAIN and OFFSET."""
    case.ahead = ahead
    generator = torch.Generator().manual_seed(1)
    heads, size, hidden = case.config.num_key_value_heads, case.config.head_dim, case.config.hidden_size
    draw = torch.randn(case.config.num_hidden_layers, heads * (1 + ahead), hidden, generator=generator) * hidden**-0.5
    for layer, rows in enumerate(draw):
        prefix = f"model.layers.{layer}.self_attn."
        if case.decision == "head":
            case.weights[prefix + "decision.weight"] = rows
            if ahead:
                case.weights[prefix + "decision.bias"] = 0.1 * torch.randn(2 * heads, generator=generator)
        else:
            weight = case.weights[prefix + "q_proj.weight"] = case.weights[prefix + "q_proj.weight"].clone()
            weight.view(heads, -1, size, hidden)[:, 0, 0] = rows
    return case


CASES = {
    "random-gqa-neuron": lambda: random_case("neuron"),
    "random-gqa-head": lambda: random_case("head"),
    "random-mha-neuron": lambda: random_case("neuron", num_key_value_heads=4, tie_word_embeddings=False),
    "base-head": lambda: base_case("head"),
    "random-gqa-ahead": lambda: random_case("head"),
}


def write(made, out):
    return export(
        made.weights,
        made.config.to_dict(),
        out=out,
        method="dms",
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


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    made = with_decisions(CASES[request.param](), request.param.endswith("ahead"))
    out = write(made, tmp_path_factory.mktemp("equality") / "hf")
    return made, out, *generate(out, made)


def layer_inputs(case, x, layer):
    """(query, key, value, alpha) of one layer without batch, neuron zeroed; the unfolded weights and GAIN."""
    config, w, prefix = case.config, case.weights, f"model.layers.{layer}."
    heads = config.num_key_value_heads
    normed = F.rms_norm(x, x.shape[-1:], w[prefix + "input_layernorm.weight"].to(x), config.rms_norm_eps)
    project = lambda name: normed @ w[f"{prefix}self_attn.{name}.weight"].to(x).T  # noqa: E731
    query, key, value = (project(f"{n}_proj").unflatten(-1, (-1, config.head_dim)).transpose(0, 1) for n in "qkv")
    if case.decision == "head":
        bias = w[f"{prefix}self_attn.decision.bias"].to(x) if case.ahead else 0
        logits, *late = (project("decision") + bias).T.split(heads)
        if late:  # decided when the token WINDOW later comes; the first token is kept
            logits = F.pad(logits[:, 1:-WINDOW] + late[0][:, WINDOW + 1 :], (1, WINDOW), value=-1.0)
    else:
        query = query.clone()
        read = query.unflatten(0, (heads, -1))[:, 0, :, 0]
        logits = read.clone()
        read.zero_()
    return query, key, value, (GAIN * logits > OFFSET).to(x)


def by_functional(query, key, value, alpha):
    rope = ref.rope_tables(key.shape[1], key.shape[2])
    out = dms.attention(*(t[None] for t in (query, key, value, alpha)), window=WINDOW, rope=rope)[0]
    return out, dms.cache_lengths(alpha, WINDOW)


def by_eviction(query, key, value, alpha):
    return ref.evicting_cache(query, key, value, alpha, window=WINDOW, rotated=True)


def dense(case, tokens, attend=by_functional):
    return whole_model(case, tokens, attend, layer_inputs)


@pytest.fixture(scope="module")
def expected(case):
    return dense(case[0], case[2])


def test_tokens_are_marked_and_kept(case, expected):
    old = len(case[2]) - WINDOW
    share = (expected[1].double() - WINDOW).mean().item() / old
    assert 0.2 < share < 0.8


def test_functional_is_a_cache_that_evicts(case, expected):
    logits, lengths = dense(case[0], case[2], by_eviction)
    torch.testing.assert_close(logits, expected[0], rtol=1e-8, atol=1e-8)
    assert torch.equal(lengths, expected[1])


def test_training_form(case, expected, process_group):
    made, _, tokens, _, _ = case
    state = LayerState(Settings(made.decision, GAIN, OFFSET, method="dms", window=WINDOW, looks_ahead=made.ahead), mode="hard")
    config = shape_of(made.config.to_dict())
    model = decoder.build(config, ParallelConfig(), state, sequence_length=64, dtype=torch.float32)[0].eval()
    setup.load_weights(model, convert.loader(config, made.weights.__getitem__))
    if made.decision == "head":
        for name, weight in model.named_parameters():
            if ".decision." in name:  # interleaved by head in training, by kind in the export
                rows = made.weights[f"model.layers.{name.split('.')[2]}.self_attn.decision.{name.split('.')[-1]}"]
                weight.data.copy_(rows.unflatten(0, (-1, config.num_key_value_heads)).transpose(0, 1).flatten(0, 1))
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
    assert llm.cache.policy.name == "dms" and llm.cache.policy.window == WINDOW and llm.cache.policy.sinks == made.ahead
    score = llm.score([tokens.tolist()], prompt_tokens=prompt)[0]
    wanted = expected[0].log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0]
    torch.testing.assert_close(score.logprobs.double(), wanted, rtol=0, atol=TOLERANCE)
    assert torch.equal(score.stats.entries, dense(made, tokens[:-1])[1])


# ------------------------------------------------------------------------------------------- the engine against itself


@pytest.fixture(scope="module", params=[False, True], ids=["arrival", "late"])
def exported(request, tmp_path_factory):
    made = with_decisions(random_case("head"), request.param)
    return made, write(made, tmp_path_factory.mktemp("served") / "hf")


def prompts():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(2, 2048, (n,), generator=generator).tolist() for n in (40, 3, 71, 23)]


def generated(out, **settings):
    llm = LLM(out, **settings)
    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    outputs = llm.generate(prompts(), params)
    llm.cache.check_integrity()
    assert llm.cache.rows.pool.used == 0
    return llm, outputs


@pytest.fixture(scope="module")
def alone(exported):
    llm = LLM(exported[1], page_size=4)
    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    return [llm.generate([prompt], params)[0] for prompt in prompts()]


@pytest.mark.parametrize(
    "settings",
    [{}, {"prefill_tokens": 7}, {"max_batch": 2}, {"page_size": 16, "window": 3, "sink_tokens": 2}],
    ids=["batched", "chunked", "two", "layout"],
)
def test_alone_is_batched_and_chunked(exported, alone, settings):
    _, outputs = generated(exported[1], **({"page_size": 4} | settings))
    for mine, other in zip(outputs, alone, strict=True):
        assert mine.token_ids == other.token_ids
        assert torch.equal(mine.stats.entries, other.stats.entries)


def test_preempted(exported, alone, monkeypatch):
    """A pool that just holds the largest, and a prediction far too low: sequences go to host memory and come back."""
    most = max(out.stats.held["pages"] + out.stats.held["exact"] for out in alone)
    monkeypatch.setattr(Predictor, "pages", lambda self, tokens: 1)
    page_bytes = LLM(exported[1], page_size=4).cache.rows.pool.page_bytes
    llm, outputs = generated(exported[1], page_size=4, kv_memory=most + 16 * page_bytes)
    assert llm.engine.preemptions > 0
    assert [out.token_ids for out in outputs] == [out.token_ids for out in alone]


def test_pages_are_freed_in_prefill_and_decode(exported):
    """The bytes of pages after a prompt, and after as many generated tokens, follow the entries that are left."""
    made, out = exported
    tokens = torch.randint(2, 2048, (150,), generator=torch.Generator().manual_seed(4)).tolist()
    held = {}
    for policy in ("dms", "full"):
        for prompt in (1, 149):
            stats = LLM(out, policy=policy, page_size=4).score([tokens], prompt_tokens=prompt)[0].stats
            held[policy, prompt] = stats.held["pages"] + stats.held["exact"]
            assert (stats.cr > 1.5) == (policy == "dms")
    for prompt in (1, 149):
        assert held["dms", prompt] < 0.75 * held["full", prompt]


def test_a_prompt_forgets_while_it_is_read(exported):
    """What a prompt holds outside the pool until it is done: chunk by chunk only what a later query sees."""
    tokens = torch.randint(2, 2048, (160,), generator=torch.Generator().manual_seed(5)).split(20)
    held = {}
    for policy in ("dms", "full"):
        llm = LLM(exported[1], policy=policy)
        prompt = llm.cache.prompt()
        held[policy] = [llm.engine.runner.step([], [], [], [Chunk(prompt, part.tolist())]) and prompt.nbytes for part in tokens]
    assert all(ours < theirs for ours, theirs in zip(held["dms"][1:], held["full"][1:], strict=True))
    assert held["dms"][-1] < 0.75 * held["full"][-1]


def test_a_lossy_codec_on_top(exported, alone):
    _, outputs = generated(exported[1], codec="tcq", codec_settings={"bits": 4})
    assert all(out.stats.cr > 1.3 for out in outputs)


# ------------------------------------------------------------------------------------------- what does not go together


def test_policies_that_do_not_fit_the_model_are_refused(exported, tmp_path):
    from tests.training.helpers import tiny_model

    with pytest.raises(ValueError, match="retrofitted with dms.*policy dmc would merge"):
        LLM(exported[1], policy="dmc")
    with pytest.raises(ValueError, match="is a plain Llama.*policy dms needs a model retrofitted with dms"):
        LLM(tiny_model(tmp_path / "plain"), policy="dms")
    if exported[0].ahead:
        with pytest.raises(ValueError, match="leaves a window of 5, and the policy has one of 9: leave out"):
            LLM(exported[1], policy="dms", policy_settings={"window": 9})
    else:
        assert LLM(exported[1], policy="dms", policy_settings={"window": 9}).cache.policy.window == 9
    assert LLM(tmp_path / "plain").cache.policy.name == "full"
