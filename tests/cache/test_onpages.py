"""The cache read by the serving kernels, where its pages lie, against the same cache read by PyTorch."""

import pytest
import torch

from dmc.cache import CODECS, codec
from dmc.kernels.backend import interpreted, using
from tests.cache.test_rows import feed, make, tokens

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not interpreted(), reason="needs Triton's interpreter; tests/engine/test_gpu.py is for GPUs")
READ = ("dense", "int8", "fp8", "kivi", "gear", "gear-4bit", "gear-2bit", "tcq", "tcq-4bit", "tcq-2bit")
# Not tcq-3bit: on these heads of 8 it has chunks of 2.


def outs(name, layers, prompt, chunk, backend, **settings):
    with using(backend):
        cache = make(name, page_size=16, window=3, slots=1, **settings)
        assert cache.readers[0].on_pages == (backend == "triton")
        return feed(cache, layers, prompt, chunk)[1]


def test_entries_outside_pages_in_8_bits():
    layers = tokens(40, seed=5)
    for ours, theirs in zip(*(outs("int8", layers, 34, 19, b, exact_dtype="int8") for b in ("triton", "torch")), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5)


SLOW = [pytest.param(name, policy, marks=pytest.mark.slow) for name in READ for policy in ("dmc", "full")]


@pytest.mark.parametrize(
    ("name", "policy_name"), [("dense", "dmc"), ("gear-4bit", "dmc"), ("tcq-4bit", "dmc"), ("int8", "full"), *SLOW]
)
def test_prompts_and_generated_tokens_come_out_the_same(name, policy_name):
    """Chunks of a prompt (some of whose queries see merged entries) and tokens after it, pages closed on the way."""
    layers = tokens(40, seed=5)
    for ours, theirs in zip(*(outs(name, layers, 34, 19, b, policy_name=policy_name) for b in ("triton", "torch")), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    "settings",
    [
        dict(backbone="kivi"),
        *(pytest.param(dict(backbone=name, bits=2, outliers=0.1), marks=pytest.mark.slow) for name in ("kcvt", "token")),
    ],
)
def test_every_backbone_of_gear(settings, monkeypatch):
    monkeypatch.setattr("tests.cache.test_rows.stored", lambda name, **_: codec(name, **settings))
    layers = tokens(36, seed=6)
    for ours, theirs in zip(*(outs("gear", layers, 32, None, b) for b in ("triton", "torch")), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5)


def test_what_no_kernel_reads_stays_in_pytorch():
    others = [name for name in CODECS if name not in READ]
    with using("triton"):
        assert others and not any(c.readers[0].on_pages for c in (make(n, page_size=16) for n in others))
        for settings in (dict(page_size=12), dict(policy_name="tova", policy_settings={"budget": 12})):
            cache = make("gear", **({"page_size": 16} | settings))
            assert not cache.readers[0].on_pages


def test_triton_runs_on_a_cpu_only_where_it_is_asked_for():
    with using("auto"):
        assert make("int8").backend == "cpu"
    with using("triton"):
        assert make("int8").backend == "triton"
