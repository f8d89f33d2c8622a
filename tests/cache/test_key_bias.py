"""Keys with a bias many times longer than the rest: codecs lose what they lose without it, in every reader."""

import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from dmc import LLM
from dmc.cache import KVCache, Shape, codec, policy
from dmc.cache.codecs.without_bias import WithoutKeyBias
from dmc.functional import rotate
from dmc.kernels.backend import interpreted, using
from dmc.kernels.pages.key_bias import KeyBias
from dmc.model import read_config
from dmc.model.key_bias import key_bias
from dmc.rope import Rope
from dmc.weights import Weights
from tests.cache.stored import frequencies, stored
from tests.cache.test_onpages_cpu import POLICIES
from tests.families.models import model
from tests.training.helpers import TOKENIZER

NOBODY, LAYERS, HEADS, QUERIES, SIZE, TOKENS, START = torch.empty(0, dtype=torch.int64), 2, 2, 4, 16, 72, 30
LONG = [1, SIZE // 2 - 2, SIZE // 2 - 1, SIZE // 2 + 1, SIZE - 2, SIZE - 1]
ROPE = Rope(frequencies(SIZE, 1e6))
CODECS = {
    "int8": {},
    "fp8": {},
    "tcq-4bit": {},
    "tcq-3bit": {},
    "tcq-2bit": {},
    "gear-4bit": {},
    "gear-2bit": {},
    "kivi": {"bits": 2},
    "rotated": {},
    "svd": {},
}


def some(names, *fast):
    """Test parameters: the others are slow."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


def bias_of(length=400.0):
    """Long in two of the slowest pairs of dimensions and in one that turns once in 35 tokens: ``[L, H, D]``."""
    bias = torch.randn(LAYERS, HEADS, SIZE, generator=torch.Generator().manual_seed(5))
    bias[..., LONG] *= length
    return bias


def inputs(bias):
    g = torch.Generator().manual_seed(3)
    normal = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    layers = []
    for layer in range(LAYERS):
        query = normal(TOKENS, QUERIES, SIZE)
        query[..., LONG] /= 100  # as trained models have it: the bias decides little, it is only long
        merge = (normal(TOKENS, HEADS) > 0).float()
        layers.append(
            (
                query,
                normal(TOKENS, HEADS, SIZE) + bias[layer],
                normal(TOKENS, HEADS, SIZE),
                merge,
                normal(TOKENS, HEADS).sigmoid(),
            )
        )
    return layers


def outs(name, policy_name, bias, *, apart=True, backend="auto", page_size=8, start=START):
    """Outputs of a prompt and single steps of a sequence that is forked and swapped on the way, fp32."""
    with using(backend):
        cache = KVCache(
            Shape(LAYERS, HEADS, SIZE, torch.float32),
            policy(policy_name, **POLICIES[policy_name]),
            codec(name, **CODECS.get(name, {})),
            slots=2,
            page_size=page_size,
            sink_tokens=1,
            window=1,
            exact_dtype="fp32",
            key_bias=KeyBias(bias, ROPE) if apart else None,
        )
        prompt, found = cache.prompt(), []
        attend = cache.step(NOBODY, NOBODY, [(prompt, start)], ROPE)
        for layer, parts in enumerate(inputs(bias)):
            attend(layer, *(part[:start] for part in parts))
        slot = cache.load(prompt)
        for place in range(start, TOKENS):
            if place == start + 4:
                fork = cache.fork(slot)
                cache.close(slot)
                slot = cache.swap_in(cache.swap_out(fork))
            attend = cache.step(torch.tensor([slot]), torch.tensor([place]), [], ROPE, merges=policy_name == "dmc")
            found += [attend(layer, *(part[place : place + 1] for part in parts)) for layer, parts in enumerate(inputs(bias))]
        cache.check_integrity()
        return torch.stack(found), cache


def loss(name, policy_name, bias, **options):
    exact = outs("dense", policy_name, bias)[0]
    return float((outs(name, policy_name, bias, **options)[0] - exact).norm() / exact.norm())


@pytest.mark.parametrize("name", some(CODECS, "int8", "tcq-3bit", "gear-2bit", "rotated"))
def test_no_codec_loses_more_than_without_a_bias(name):
    """With the bias in the codes a scale for each entry is lost on it; GEAR and KIVI have scales and zero points by channel."""
    bias = bias_of()
    plain = loss(name, "dmc", torch.zeros_like(bias))
    assert loss(name, "dmc", bias) < 1.15 * plain + 1e-4
    worse = loss(name, "dmc", bias, apart=False) / plain
    assert worse > {"int8": 3, "tcq-4bit": 3, "tcq-3bit": 3, "tcq-2bit": 3, "rotated": 3, "fp8": 1.2, "svd": 1.2}.get(name, 0.9)


@pytest.mark.parametrize("name", ["kivi", "gear-2bit", "tcq-3bit", "int8"])
def test_an_evicted_slot_does_not_spoil_its_page(name):
    """Compaction fills a page up with copies of its last entry, whose position is then -1: scales of a page pass over them."""
    g = torch.Generator().manual_seed(2)
    plain, values, heads = torch.randn(1, 8, SIZE, generator=g), torch.randn(1, 8, SIZE, generator=g), torch.tensor([1])
    positions = torch.tensor([[40, 41, 43, 47, 60, 61, 61, 61]])
    evicted = torch.tensor([[40, 41, 43, 47, 60, 61, -1, -1]])
    plain[:, 6:] = plain[:, 5:6]
    lost = {}
    for length in (0.0, 400.0):
        bias = KeyBias(bias_of(length), ROPE)
        keys = rotate(plain, ROPE(positions)) + bias.keys(heads, positions)
        made = WithoutKeyBias(codec(name, **CODECS[name]), bias)
        decoded = made.decode(made.encode_at(keys, values, heads, evicted))[0] - bias.keys(heads, positions)
        lost[length] = float((decoded - rotate(plain, ROPE(positions)))[:, :6].norm())
    assert lost[400.0] < 1.5 * lost[0.0] + 1e-3


@pytest.mark.parametrize(("name", "policy_name"), [("int8", "dmc"), ("gear-4bit", "dmc"), *(("tcq-3bit", p) for p in POLICIES)])
def test_kernels_and_pytorch_read_the_same(name, policy_name):
    ours, cache = outs(name, policy_name, bias_of())
    assert all(reader.on_pages for reader in cache.readers)
    theirs, cache = outs(name, policy_name, bias_of(), backend="torch")
    assert not any(reader.on_pages for reader in cache.readers)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not interpreted(), reason="needs Triton's interpreter")
@pytest.mark.parametrize(("name", "policy_name"), [("int8", "dmc"), ("tcq-4bit", "full"), ("gear-4bit", "dmc")])
def test_triton_kernels_read_the_same(name, policy_name):
    """With the page sizes that they take; pages are encoded by PyTorch, as positions come with them."""
    settings = dict(page_size=16, start=TOKENS - 6)  # the interpreter is slow
    ours, cache = outs(name, policy_name, bias_of(), backend="triton", **settings)
    assert all(reader.on_pages and not reader.writes for reader in cache.readers)
    torch.testing.assert_close(ours, outs(name, policy_name, bias_of(), backend="torch", **settings)[0], rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("scaling", [1.0, 1.3])
def test_scores_are_those_of_rotated_keys(scaling):
    made = KeyBias(bias_of(), Rope(frequencies(SIZE, 100.0), scaling))
    g = torch.Generator().manual_seed(0)
    query, heads = torch.randn(3, 2, SIZE, generator=g), torch.tensor([0, 3, 1])
    places = torch.tensor([[0, 5, 900], [7, -1, 2], [1023, 1, 64]], dtype=torch.int32)
    bias, clamped = bias_of().view(-1, SIZE)[heads].double(), places.clamp(min=0).double()
    angles = clamped[..., None] * frequencies(SIZE, 100.0).double()
    table = torch.cat([angles, angles], dim=-1)
    keys = rotate(bias[:, None].expand(-1, 3, -1), (table.cos() * scaling, table.sin() * scaling))
    exact = query.double() @ keys.transpose(-1, -2)
    torch.testing.assert_close(made.keys(heads, places).double(), keys, rtol=1e-4, atol=0.05)  # angles of 900 rad in fp32
    torch.testing.assert_close(made.scores(query, heads, places).double(), exact, rtol=1e-4, atol=0.2)
    by_keys = query @ made.keys(heads, places).transpose(-1, -2)
    torch.testing.assert_close(made.scores(query, heads, places), by_keys, rtol=1e-5, atol=2e-3)


def test_what_is_left_as_it_is():
    """Lossless codecs have no use for it, and eigen's bases are before RoPE; its pages hold what they held."""
    assert outs("dense", "dmc", bias_of())[1].rows.packings[0].codec.name == "dense"
    eigen, shape = stored("eigen", layers=LAYERS, heads=HEADS, size=SIZE), Shape(LAYERS, HEADS, SIZE, torch.float32)
    cache = KVCache(shape, policy("full"), eigen, slots=1, page_size=8, key_bias=KeyBias(bias_of(), ROPE))
    plain = eigen.of_layer(0, LAYERS, HEADS, SIZE).layout(8, SIZE, torch.float32)
    assert cache.rows.packings[0].codec.layout(8, SIZE, torch.float32) == plain


def retrofitted(path, length, **changes):
    """A small Qwen2 whose key bias is ``length`` times as long as its other biases."""
    made = model("qwen2", hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=SIZE, rope_theta=1e6, **changes)
    made.requires_grad_(False)
    for layer in made.model.layers:
        key, query = layer.self_attn.k_proj.bias.view(-1, SIZE), layer.self_attn.q_proj
        query.weight.view(-1, SIZE, 64)[:, LONG] /= 100
        query.bias.view(-1, SIZE)[:, LONG] /= 100
        key[:, LONG] *= length
    made.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, path / name)
    return path


@pytest.mark.parametrize("name", some(("int8", "tcq-4bit", "tcq-3bit", "tcq-2bit", "gear-4bit", "gear-2bit"), "tcq-3bit"))
def test_a_model_with_such_a_bias_loses_no_more_than_without_it(name, tmp_path):
    """The engine's log-probabilities, on average over five texts, against the same model's with a dense cache."""
    tokens = torch.randint(3, 2048, (5, 160), generator=torch.Generator().manual_seed(0))

    def lost(path):
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)(tokens[:, :-1]).logits
        exact = logits.log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
        llm = LLM(path, device="cpu", dtype="fp32", codec=name, page_size=16, sink_tokens=1)
        found = torch.stack([score.logprobs.double() for score in llm.score(tokens.tolist(), prompt_tokens=20)])
        return float((found - exact[:, -found.shape[1] :]).abs().mean())

    plain, long = lost(retrofitted(tmp_path / "plain", 0)), lost(retrofitted(tmp_path / "long", 400))
    assert 0 < long < 1.2 * plain


@pytest.mark.parametrize(("decision", "ranks"), [(None, 1), ("neuron", 1), (None, 2)])
def test_the_bias_is_that_of_the_model(decision, ranks, tmp_path):
    path = retrofitted(tmp_path, 400)
    config = replace(read_config(path), decision=decision, method=decision and "dmc")
    weights = Weights(path)
    parts = [key_bias(config, weights, dtype=torch.bfloat16, device="cpu", rank=rank, ranks=ranks) for rank in range(ranks)]
    found = torch.cat([part.bias.view(2, -1, SIZE) for part in parts], dim=1)
    for layer in range(2):
        whole = weights.get(f"model.layers.{layer}.self_attn.k_proj.bias", (2 * SIZE,)).view(2, SIZE).bfloat16().float()
        assert torch.equal(found[layer, :, 1:], whole[:, 1:])
        assert torch.equal(found[layer, :, 0], torch.zeros(2) if decision else whole[:, 0])
    assert key_bias(replace(config, qkv_bias=False), weights, dtype=torch.float32, device="cpu") is None
    assert key_bias(replace(config, qk_norm=True), weights, dtype=torch.float32, device="cpu") is None


def test_positions_cost_four_bytes_an_entry():
    inner = codec("tcq-4bit").layout(8, SIZE, torch.bfloat16)
    outer = outs("tcq-4bit", "dmc", bias_of())[1].rows.packings[0].codec.layout(8, SIZE, torch.bfloat16)
    extra = sum(kind.itemsize * torch.Size(shape).numel() for name, (kind, shape) in outer.items() if name not in inner)
    assert extra == 4 * 8 + 4
