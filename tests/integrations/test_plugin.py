"""Parts of the vLLM plugin that need no vLLM."""

import pickle
from types import SimpleNamespace

import pytest
import torch

from dmc.cache import KVCache, Shape, codec, policy
from dmc.cache.reading.prompt import NONE
from dmc.functional import rotate
from dmc.rope import Rope
from dmc_vllm import config, wrong_version
from dmc_vllm.prompt import fitted
from dmc_vllm.reservation import Reservation
from dmc_vllm.settings import read
from tests.model import tiny

LAYERS, HEADS, SIZE = 2, 2, 8
ROPE = Rope([1.0, 0.3, 0.1, 0.03], dtype=torch.float32)


@pytest.mark.parametrize(
    ("found", "right"), [("0.32.0", True), ("0.32", True), ("0.32.1+cpu", True), ("0.33.0", False), ("0.3", False)]
)
def test_version(found, right):
    assert (wrong_version(found) is None) == right


def test_configurations(monkeypatch):
    own = next(one for one in config.CLASSES if one.model_type == "dmc_qwen3")
    made = own(dmc={"decision": "head"}, hidden_size=32)
    assert made.dmc == {"decision": "head"} and made.hidden_size == 32
    assert pickle.loads(pickle.dumps(made)).to_dict() == made.to_dict()
    monkeypatch.setattr(config, "WRONG", wrong_version("0.33.0"))
    with pytest.raises(ValueError, match=r"made for vLLM 0\.32, and 0\.33\.0 is installed"):
        own(dmc={"decision": "head"})


def test_an_export_of_a_later_version():
    with pytest.raises(ValueError, match=r"dmc\.blocks, which this version of dmc does not know"):
        config.check_fields({"decision": "head", "blocks": 3})


def test_reservation():
    held = Reservation.of(heads=12, full_precision_pages=5, page_size=16, page_bytes=64, window=64, cap=4.2)
    assert (held.block_bytes, held.tokens_per_block) == (12 * 64, 67)
    assert [held.blocks(tokens) for tokens in (1, 64, 65, 131, 132)] == [6, 6, 7, 7, 8]
    assert held.pages(65) == 7 * 12
    bound = Reservation.of(
        heads=12, full_precision_pages=5, page_size=16, page_bytes=64, window=64, cap=1, sinks=40, max_entries=50
    )
    assert [bound.blocks(tokens) for tokens in (1, 65, 112, 113, 129, 10**6)] == [8, 9, 11, 12, 12, 12]
    for cap in (0.99, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite number of at least 1"):
            Reservation.of(heads=12, full_precision_pages=5, page_size=16, page_bytes=64, window=64, cap=cap)


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    """A retrofitted Qwen2, whose keys have a bias: lossy codecs store an entry's position with it."""
    fields = tiny.config("neuron", head_dim=16, architectures=["DmcQwen2ForCausalLM"], model_type="dmc_qwen2")
    tensors = tiny.weights(fields)
    for layer in range(fields["num_hidden_layers"]):
        for part in "qkv":
            name = f"model.layers.{layer}.self_attn.{part}_proj"
            tensors[f"{name}.bias"] = torch.ones(len(tensors[f"{name}.weight"]))
    return tiny.write(tmp_path_factory.mktemp("biased") / "model", fields, tensors)


def asked(path, ranks=1, **settings):
    """vLLM's configuration, as far as the plugin reads it."""
    return SimpleNamespace(
        additional_config={"dmc": {"cap": 2} | settings},
        model_config=SimpleNamespace(model=str(path), dtype=torch.float32),
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
    )


@pytest.mark.parametrize("codec_name", ["dense", "int8", "tcq", "gear"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_reserved_is_what_the_cache_takes(biased, codec_name, ranks):
    serving = read(asked(biased, ranks, codec=codec_name))
    for rank in range(ranks):
        cache = serving.cache(3, "cpu", rank)
        heads = cache.shape.layers * cache.shape.heads
        assert serving.reservation.page_bytes == cache.page_bytes and serving.reservation.block_pages == heads
        assert serving.reservation.fixed_blocks == cache.full_precision_pages + 1


def test_8_bits_for_keys_with_a_bias_are_refused_before_the_engine_starts(biased):
    with pytest.raises(ValueError, match="exact_dtype int8 is not for keys with a bias"):
        read(asked(biased, codec="int8", exact_dtype="int8"))


def test_ranks_that_do_not_divide_the_heads(biased):
    with pytest.raises(ValueError, match="tensor_parallel 3 does not divide the model's 2 key/value heads"):
        read(asked(biased, 3))


def filled(kind, tokens, window=None):
    """A cache and a prompt of random tokens; a third of them merge (or are dropped)."""
    shape, generator = Shape(LAYERS, HEADS, SIZE, torch.float32), torch.Generator().manual_seed(tokens)
    cache = KVCache(shape, policy(kind, **{} if window is None else {"window": window}), codec("dense"), slots=2, page_size=4)
    prompt = cache.prompt()
    step = cache.step(torch.tensor([], dtype=torch.int64), torch.tensor([], dtype=torch.int64), [(prompt, tokens)], ROPE)
    for layer in range(LAYERS):
        query, key, value = (torch.randn(tokens, HEADS, SIZE, generator=generator) for _ in range(3))
        chosen = torch.rand(tokens, HEADS, generator=generator) < 1 / 3
        alpha = chosen.float() if window is None else torch.where(chosen, 1.0, -1.0)
        step(layer, query, key, value, alpha, torch.ones(tokens, HEADS))
    return cache, prompt


@pytest.mark.parametrize(("kind", "window"), [("dmc", None), ("dmc", 6), ("dms", 6)])
def test_a_prompt_is_fitted_into_its_pages(kind, window):
    cache, prompt = filled(kind, 60, window)
    before = torch.stack([prompt.final(layer)[1] for layer in range(LAYERS)])
    same, gone = fitted(prompt, cache, ROPE, cache.pages_of(before))
    assert gone == 0 and all(same.final(layer)[0] is not None for layer in range(LAYERS))
    limit = cache.pages_of(before) - 10
    made, gone = fitted(prompt, cache, ROPE, limit)
    after = torch.stack([made.final(layer)[1] for layer in range(LAYERS)])
    assert gone == int((before - after).sum()) > 0
    assert limit - 2 * LAYERS * HEADS <= cache.pages_of(after) <= limit
    lead = 0 if window is None else window + 1
    for layer in range(LAYERS):
        old, new = prompt.final(layer)[0], made.final(layer)[0]
        for head in range(HEADS):
            had, kept = int(before[layer, head]), int(after[layer, head])
            assert torch.equal(new.keys[head, :lead], old.keys[head, :lead])
            positions, former = new.positions[head, lead:kept].tolist(), old.positions[head, lead:had].tolist()
            assert positions == sorted(set(positions) & set(former)) and positions[-1] == former[-1]
            assert (new.positions[head, kept:] == NONE).all()
            for number, newest in enumerate(positions):  # each entry is the mean of the old ones that end in its run
                start = positions[number - 1] if number else -1
                run = [i for i, position in enumerate(former) if start < position <= newest]
                if kind == "dms":
                    run = run[-1:]
                weight = torch.tensor([float(former[i] - ([-1] + former)[i]) for i in run])
                table = ROPE(torch.tensor([former[i] for i in run]))
                plain = rotate(old.keys[head, lead:had][run], (table[0], -table[1]))
                mean = (plain * weight[:, None]).sum(0) / weight.sum()
                want = rotate(mean[None], ROPE(torch.tensor([newest])))[0]
                assert torch.allclose(new.keys[head, lead + number], want, atol=1e-5)
                value = (old.values[head, lead:had][run] * weight[:, None]).sum(0) / weight.sum()
                assert torch.allclose(new.values[head, lead + number], value, atol=1e-5)
    slot = cache.load(made)
    cache.check_integrity()
    assert cache.used_pages == cache.pages_of(after) and slot == 0
