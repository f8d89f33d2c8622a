"""Exports in vLLM with the plugin of integrations/vllm: the same tokens as this project's engine, and its blocks.

The environment is one of its own: DMC_VLLM_PYTHON names its interpreter (integrations/vllm/make_env.sh makes it).
"""

import json
import os
import random
import subprocess
from pathlib import Path

import pytest
import torch

import dmc
from tests.model import tiny

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("DMC_VLLM_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="DMC_VLLM_PYTHON names no interpreter with vLLM (integrations/vllm/make_env.sh)"),
]
TOKENS = 24
PROMPTS = [[random.Random(n).randrange(3, 97) for _ in range(n)] for n in (1, 7, 30, 64, 100, 3)]
MODELS = {
    "neuron": ("neuron", {}), "head": ("head", {}), "arrival": ("head", {"window": 4}),
    "late": ("head", {"window": 8, "decide": "late"}), "dms": ("head", {"method": "dms", "window": 8, "decide": "late"}),
}
CODECS = {"int8": {}, "tcq": {"bits": 4}, "gear": {"bits": 4}}
LOOSE = {"additional_config": {"dmc": {"cap": 1}}}


def drive(cases, folder, timeout=600):
    """Results of the cases, in one process of the other environment."""
    out, path = folder / "results.json", os.pathsep.join([str(ROOT), str(ROOT / "integrations/vllm")])
    run = subprocess.run(
        [PYTHON, str(Path(__file__).with_name("driver.py")), str(out)], input=json.dumps(cases), capture_output=True, text=True,
        timeout=timeout, cwd=folder, env=os.environ | {"PYTHONPATH": path},
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("models"), {}
    for name, (decision, settings) in MODELS.items():
        fields = tiny.config(decision, head_dim=16, architectures=["DmcLlamaForCausalLM"])
        fields["dmc"] |= settings
        made[name] = tiny.write(folder / name, fields, tiny.weights(fields))
    return made


def own(model, **settings):
    """This project's engine."""
    params = dmc.SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    return [output.token_ids for output in dmc.LLM(model, dtype="fp32", device="cpu", **settings).generate(PROMPTS, params)]


CASES = {
    "together": {}, "chunked": {"max_num_batched_tokens": 13}, "alone": {"max_num_seqs": 1},
    "preempted": {"num_gpu_blocks_override": 30},
}


@pytest.fixture(scope="module")
def served(models, tmp_path_factory):
    names = [(model, case) for model in MODELS for case in CASES]
    results = drive([
        {"model": str(models[model]), "engine": LOOSE | CASES[case], "prompts": PROMPTS, "tokens": TOKENS}
        for model, case in names
    ], tmp_path_factory.mktemp("served"))
    return dict(zip(names, results, strict=True))


@pytest.mark.parametrize("model", MODELS)
def test_the_same_tokens_as_our_engine(models, served, model):
    want = own(models[model])
    for case in CASES:
        result = served[model, case]
        assert result["tokens"] == want, case
        assert result["stats"]["forced"] == result["stats"]["forced_in_prompts"] == 0
        assert result["free"] == result["blocks"]
        assert (result["preempted"] > 0) == (case == "preempted"), case
    assert served[model, "together"]["most_running"] == len(PROMPTS) and served[model, "alone"]["most_running"] == 1


def test_lossy_codecs(models, tmp_path):
    names = [(model, codec) for model in ("neuron", "late", "dms") for codec in CODECS]
    results = drive([
        {"model": str(models[model]), "prompts": PROMPTS, "tokens": TOKENS, "engine": {
            "max_num_batched_tokens": 50,
            "additional_config": {"dmc": {"cap": 1, "codec": codec, "codec_settings": CODECS[codec]}},
        }} for model, codec in names
    ], tmp_path)
    for (model, codec), result in zip(names, results, strict=True):
        assert result["tokens"] == own(models[model], codec=codec, codec_settings=CODECS[codec]), (model, codec)
        assert result["free"] == result["blocks"] and result["stats"]["forced"] == 0


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("families"), {}
    for family, title, decision in (("mistral", "Mistral", "head"), ("qwen2", "Qwen2", "neuron"), ("qwen3", "Qwen3", "head")):
        fields = tiny.config(decision, head_dim=16, architectures=[f"Dmc{title}ForCausalLM"], model_type=f"dmc_{family}")
        tensors = tiny.weights(fields)
        for layer in range(fields["num_hidden_layers"]):
            prefix, generator = f"model.layers.{layer}.self_attn", torch.Generator().manual_seed(layer)
            for part in "qkv" if family == "qwen2" else "":
                outputs = len(tensors[f"{prefix}.{part}_proj.weight"])
                tensors[f"{prefix}.{part}_proj.bias"] = torch.randn(outputs, generator=generator)
            for part in "qk" if family == "qwen3" else "":
                tensors[f"{prefix}.{part}_norm.weight"] = 1 + torch.randn(16, generator=generator) / 5
        made[family] = tiny.write(folder / family, fields, tensors, tokenizer=False)
    return made


def test_other_families(families, tmp_path):
    results = drive([
        {"model": str(path), "engine": LOOSE, "prompts": PROMPTS, "tokens": TOKENS} for path in families.values()
    ], tmp_path)
    for (family, path), result in zip(families.items(), results, strict=True):
        assert result["tokens"] == own(path), family


def test_requests_stay_within_their_reservation(models, tmp_path):
    """A cap above the CR: heads are forced to merge, in prompts and after them. 200 requests, of which some are aborted."""
    tight = {"additional_config": {"dmc": {"cap": 8}}}
    many = [[3 + (n * 7 + i * i) % 90 for i in range(1 + n * 37 % 150)] for n in range(200)]
    long, blocks = many[4:5] * 3, {"num_gpu_blocks_override": 40, "max_num_batched_tokens": 40}
    results = drive([
        {"model": str(models[name]), "engine": tight | engine, "prompts": prompts, "tokens": tokens, "abort": abort}
        for name in ("neuron", "late", "dms")
        for engine, prompts, tokens, abort in (({}, long, 90, 0), (blocks, many, 30, 20))
    ], tmp_path)
    for few, with_aborts in (results[:2], results[2:4], results[4:]):
        assert few["stats"]["forced"] > 0 and few["stats"]["forced_in_prompts"] > 0
        assert [len(tokens) for tokens in few["tokens"]] == [90] * len(long) and len(long[0]) == 149
        assert few["free"] == few["blocks"] and with_aborts["free"] == with_aborts["blocks"]
        lengths = [len(tokens) for tokens in with_aborts["tokens"]]
        assert len(lengths) == 200 and 10 < sum(length < 30 for length in lengths) < 150 and max(lengths) == 30


def test_a_compressed_cache_admits_more(models, tmp_path):
    """By vLLM's scheduler, in the same memory: requests of 256 tokens."""
    prompts = [[3 + i % 90 for i in range(200)]] * 40
    engine = {"max_num_seqs": 40, "kv_cache_memory_bytes": 1 << 20}
    caps = drive([
        {"model": str(models["neuron"]), "engine": engine | {"additional_config": {"dmc": {"cap": cap}}}, "prompts": prompts,
         "tokens": 40} for cap in (1, 2)
    ], tmp_path)
    assert caps[1]["most_running"] > 1.6 * caps[0]["most_running"]


def test_settings_that_are_refused(models, tmp_path):
    newer = tmp_path / "newer"
    fields = tiny.config("head", head_dim=16, architectures=["DmcLlamaForCausalLM"])
    tiny.write(newer, fields | {"dmc": fields["dmc"] | {"layers": 3}}, tiny.weights(fields))
    draft = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    expected = [
        ({"enable_prefix_caching": True}, "prefix caching shares blocks"),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "KV connectors move blocks"),
        ({"speculative_config": draft}, "speculative decoding takes tokens back"),
        ({"additional_config": {"dmc": {"cap": 0.5}}}, "cap=0.5 reserves more than one entry per token"),
        ({"additional_config": {"dmc": {"cap": "4"}}}, "cap='4' must be a number"),
        ({"additional_config": {"dmc": {"caps": 4}}}, "unknown setting dmc.caps; known: cap, codec"),
        ({"block_size": 32}, "leave out --block-size"), ({"tensor_parallel_size": 2}, "on one device"),
        ({"model": str(newer)}, "dmc.layers, which this version of dmc does not know"),
        ({"additional_config": {"dmc": {"codec": "kivi"}}}, "codec='kivi' is not supported in vLLM; supported: dense, int8"),
    ]
    said = drive([
        {"model": engine.pop("model", str(models["neuron"])), "engine": engine, "fails": True} for engine, _ in expected
    ], tmp_path)
    assert [sentence for (_, sentence), found in zip(expected, said, strict=True) if sentence not in (found or "")] == []
