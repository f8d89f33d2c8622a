"""Entries outside encoded pages as 8-bit codes: their error, moving them, and what is rejected."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import dmc
from dmc.cache import KVCache, Shape, codec, policy
from dmc.cache.reading.onpages import OnPages
from dmc.cache.storage.full import full_layout, read, rounded, stored
from dmc.cache.storage.packing import Storage
from dmc.kernels.pages.key_bias import KeyBias
from dmc.model.fingerprint import model_hash
from dmc.rope import Rope
from tests.cache.decisions import random_decisions
from tests.cache.stored import frequencies
from tests.model import tiny

CODES = Storage(4, 0, torch.int8)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 80), st.floats(-25, 25))
def test_what_was_read_is_stored_as_the_same_codes(seed, size, exponent):
    """Entries are moved by reading and writing them, as often as a policy evicts."""
    x = torch.randn(5, size, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    fields = stored("k", x, CODES)
    again = stored("k", read("k", fields), CODES)
    assert fields["k"].dtype == torch.int8 and fields["k_scale"].dtype == torch.bfloat16
    assert all(torch.equal(fields[name], again[name]) for name in fields)
    step = x.abs().amax(-1, keepdim=True) / 127
    assert ((rounded(x, CODES) - x).abs() <= 0.502 * step).all()  # half a step of a scale that is rounded by 1/512 at most


def test_zeros_and_a_single_large_number():
    x = torch.zeros(3, 8)
    x[1, 2] = 3e38
    torch.testing.assert_close(rounded(x, CODES), x, rtol=4e-3, atol=0)


def test_bytes_of_an_entry():
    """Two vectors of D bytes with a scale of 2 bytes each; half of bf16's."""
    assert CODES.entry_bytes(64) == 2 * (64 + 2) and Storage(4, 0, torch.bfloat16).entry_bytes(64) == 4 * 64
    assert full_layout(CODES, 7, 64).nbytes == -(-7 * CODES.entry_bytes(64) // 8) * 8


@pytest.mark.parametrize("name", ["tcq", "gear", "int8"])
def test_kernels_read_them_and_pytorch_writes_them(name):
    cache = KVCache(Shape(1, 2, 16, torch.float32), policy("dmc"), codec(name), slots=1, exact_dtype="int8")
    reader = cache.readers[0]
    assert isinstance(reader, OnPages) and not reader.writes and cache.exact_dtype == torch.int8


@pytest.mark.parametrize(("settings_", "sentence"), [
    ({"codec": codec("dense")}, "exact_dtype int8 is for lossy codecs: with codec dense give bf16, or take codec int8"),
    ({"codec": codec("tcq"), "key_bias": KeyBias(torch.ones(1, 2, 16), Rope(frequencies(16, 100.0)))},
     "exact_dtype int8 is not for keys with a bias"),
    ({"codec": codec("tcq"), "exact_dtype": "int4"}, "exact_dtype must be one of fp32, bf16, fp16, int8, got 'int4'"),
])  # fmt: skip
def test_what_is_rejected(settings_, sentence):
    with pytest.raises(ValueError, match=sentence):
        KVCache(Shape(1, 2, 16, torch.float32), policy("full"), slots=1, **{"exact_dtype": "int8"} | settings_)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    fields = tiny.config(head_dim=16)
    return tiny.write(tmp_path_factory.mktemp("plain"), fields, tiny.weights(fields))


@pytest.mark.parametrize("settings_", [
    {"policy": "full"}, {"policy": "h2o", "policy_settings": {"share": 0.5}}, {"policy": "gate", "target_cr": 2},
])  # fmt: skip
def test_a_model_generates_with_fewer_bytes(plain, settings_, tmp_path):
    """Against bf16: the first tokens and their probabilities, and the entries outside pages take about half."""
    if settings_["policy"] == "gate":
        random_decisions(window=8, sinks=3, model=model_hash(plain)).save(tmp_path / "decisions.safetensors")
        settings_ = settings_ | {"decisions": str(tmp_path / "decisions.safetensors")}
    found = {}
    for exact in ("bf16", "int8"):
        llm = dmc.LLM(plain, codec="tcq-4bit", exact_dtype=exact, dtype="fp32", device="cpu", **settings_)
        params = dmc.SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True, logprobs=1)
        outputs = llm.generate([[3 + i * 7 % 90 for i in range(90)], [5, 9, 4]], params)
        found[exact] = outputs
        llm.cache.check_integrity()
    for few, wide in zip(found["int8"], found["bf16"], strict=True):
        assert len(few.token_ids) == 40 and few.token_ids[:3] == wide.token_ids[:3]
        near, far = ([token.logprob for token in output.logprobs[:3]] for output in (few, wide))
        assert near == pytest.approx(far, abs=0.05)
        assert few.stats.held["exact"] <= wide.stats.held["exact"]  # whole pages: a short text may need as many
    assert found["int8"][0].stats.held["exact"] < 0.7 * found["bf16"][0].stats.held["exact"]
