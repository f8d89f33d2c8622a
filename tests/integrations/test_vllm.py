"""Exports, and plain models with fitted decisions, in vLLM with the plugin of integrations/vllm: the same tokens as this
project's engine, and its blocks.

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
from dmc.model.fingerprint import model_hash
from tests.cache.decisions import random_decisions
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
    "neuron": ("neuron", {}),
    "head": ("head", {}),
    "arrival": ("head", {"window": 4}),
    "late": ("head", {"window": 8, "decide": "late"}),
    "dms": ("head", {"method": "dms", "window": 8, "decide": "late"}),
}
GATE = {"gate": {}, "gate merges": {"merge": True, "power": 0.5}}  # settings of the policy; the model was not retrofitted
CODECS = {"int8": {}, "tcq": {"bits": 4}, "gear": {"bits": 4}}


def drive(cases, folder, timeout=1800):
    """Results of the cases, in one process of the other environment."""
    out, path = folder / "results.json", os.pathsep.join([str(ROOT), str(ROOT / "integrations/vllm")])
    run = subprocess.run(
        [PYTHON, str(Path(__file__).with_name("driver.py")), str(out)],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
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
    fields = tiny.config(head_dim=16, architectures=["LlamaForCausalLM"])
    made |= dict.fromkeys(GATE, tiny.write(folder / "plain", fields, tiny.weights(fields)))
    return made


@pytest.fixture(scope="module")
def decisions(models, tmp_path_factory):
    return fitted(models["gate"], tmp_path_factory.mktemp("decisions") / "decisions.safetensors")


def fitted(model, path, **settings):
    """A file of random decisions for a model; its name."""
    random_decisions(**{"window": 8, "sinks": 3, "model": model_hash(model)} | settings).save(path)
    return str(path)


def gate(file, **settings):
    """Settings of policy gate, of both engines."""
    return {"policy": "gate", "decisions": file, "target_cr": 2, "policy_settings": settings}


def settings_of(model, decisions):
    """Settings of both engines that serve the model."""
    return gate(decisions, **GATE[model]) if model in GATE else {}


def loose(**settings):
    """Arguments of vLLM's engine with which no merge is forced."""
    return {"additional_config": {"dmc": {"cap": 1} | settings}}


def own(model, **settings):
    """This project's engine."""
    params = dmc.SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    return [output.token_ids for output in dmc.LLM(model, dtype="fp32", device="cpu", **settings).generate(PROMPTS, params)]


CASES = {
    "together": {},
    "chunked": {"max_num_batched_tokens": 13},
    "alone": {"max_num_seqs": 1},
    "preempted": {"num_gpu_blocks_override": 30},
}


@pytest.fixture(scope="module")
def served(models, decisions, tmp_path_factory):
    names = [(model, case) for model in models for case in CASES]
    results = drive(
        [
            {
                "model": str(models[model]),
                "prompts": PROMPTS,
                "tokens": TOKENS,
                "engine": loose(**settings_of(model, decisions)) | CASES[case],
            }
            for model, case in names
        ],
        tmp_path_factory.mktemp("served"),
    )
    return dict(zip(names, results, strict=True))


@pytest.mark.parametrize("model", [*MODELS, *GATE])
def test_the_same_tokens_as_our_engine(models, decisions, served, model):
    want = own(models[model], **settings_of(model, decisions))
    for case in CASES:
        result = served[model, case]
        assert result["tokens"] == want, case
        assert result["stats"]["forced"] == result["stats"]["forced_in_prompts"] == 0
        assert result["free"] == result["blocks"]
        assert (result["preempted"] > 0) == (case == "preempted"), case
    assert served[model, "together"]["most_running"] == len(PROMPTS) and served[model, "alone"]["most_running"] == 1


def test_lossy_codecs(models, decisions, tmp_path):
    cases = [
        (models[model], {"codec": codec, "codec_settings": CODECS[codec]} | settings_of(model, decisions))
        for model in ("neuron", "late", "dms", "gate")
        for codec in CODECS
    ]
    _check_same(cases, tmp_path)


def test_tensor_parallel(models, families, decisions, tmp_path):
    """Two ranks with a head each: decision neurons and heads, fitted heads, a key bias; preemption, and forced merges."""
    biased = fitted(families["qwen2"], tmp_path / "biased")
    ranks, crowded = {"tensor_parallel_size": 2}, {"num_gpu_blocks_override": 30}
    cases = [
        (models["neuron"], {"codec": "tcq"}),
        (models["late"], {}),
        (models["dms"], {"codec": "int8"}),
        (models["gate merges"], gate(decisions, **GATE["gate merges"])),
        (families["qwen2"], gate(biased) | {"codec": "int8"}),
    ]
    _check_same(cases, tmp_path, ranks)
    _check_same([(models["late"], {})], tmp_path, ranks | crowded, preempted=True)
    case = {"model": str(models["late"]), "prompts": [[3 + i * 7 % 90 for i in range(149)]] * 3, "tokens": 90}
    (forced,) = drive([case | {"engine": ranks | loose(cap=8)}], tmp_path)
    assert forced["stats"]["forced"] > 0 and forced["free"] == forced["blocks"]


def _check_same(cases, folder, engine=None, *, preempted=False):
    """Both engines generate the same tokens from a model with some settings."""
    results = drive(
        [
            {
                "model": str(model),
                "prompts": PROMPTS,
                "tokens": TOKENS,
                "engine": {"max_num_batched_tokens": 50} | loose(**settings) | (engine or {}),
            }
            for model, settings in cases
        ],
        folder,
    )
    for (model, settings), result in zip(cases, results, strict=True):
        assert result["tokens"] == own(model, **settings), settings
        assert result["free"] == result["blocks"] and result["stats"]["forced"] == 0 and (result["preempted"] > 0) == preempted


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """A model of each family: retrofitted, and plain."""
    folder, made = tmp_path_factory.mktemp("families"), {}
    for family, title, decision in (("mistral", "Mistral", "head"), ("qwen2", "Qwen2", "neuron"), ("qwen3", "Qwen3", "head")):
        for kind, name in (("dmc_", "Dmc"), ("", "")):
            fields = tiny.config(
                decision if kind else None, head_dim=16, architectures=[f"{name}{title}ForCausalLM"], model_type=kind + family
            )
            tensors = tiny.weights(fields)
            for layer in range(fields["num_hidden_layers"]):
                prefix, generator = f"model.layers.{layer}.self_attn", torch.Generator().manual_seed(layer)
                for part in "qkv" if family == "qwen2" else "":
                    outputs = len(tensors[f"{prefix}.{part}_proj.weight"])
                    tensors[f"{prefix}.{part}_proj.bias"] = torch.randn(outputs, generator=generator)
                for part in "qk" if family == "qwen3" else "":
                    tensors[f"{prefix}.{part}_norm.weight"] = 1 + torch.randn(16, generator=generator) / 5
            made[kind + family] = tiny.write(folder / (kind + family), fields, tensors, tokenizer=False)
    return made


def test_other_families(families, tmp_path):
    cases = []
    for name, path in families.items():
        plain = not name.startswith("dmc_")
        cases.append((path, gate(fitted(path, tmp_path / f"{name}.safetensors")) if plain else {}))
    _check_same(cases, tmp_path)


def test_other_settings_of_fitted_decisions(models, families, tmp_path):
    """Decided at arrival; more sinks than a page holds; a bound on entries, which bounds the reservation too; a key bias; 8 bits
    outside pages."""
    plain, qwen = models["gate"], families["qwen2"]
    arrival, sinks, biased = (
        fitted(model, tmp_path / name, **settings)
        for name, model, settings in (("arrival", plain, {"ahead": False}), ("sinks", plain, {"sinks": 40}), ("biased", qwen, {}))
    )
    _check_same(
        [
            (plain, gate(arrival)),
            (plain, gate(arrival, merge=True)),
            (plain, gate(sinks)),
            (plain, gate(sinks, merge=True)),
            (plain, gate(arrival) | {"max_entries": 20}),
            (models["late"], {"max_entries": 20}),
            (qwen, gate(biased) | {"codec": "int8"}),
            (models["late"], {"codec": "tcq", "exact_dtype": "int8"}),
            (plain, gate(arrival) | {"codec": "int8", "exact_dtype": "int8"}),
        ],
        tmp_path,
    )


def test_requests_stay_within_their_reservation(models, decisions, tmp_path):
    """A cap above the CR: heads are forced to merge, in prompts and after them. 200 requests, of which some are aborted."""
    many = [[3 + (n * 7 + i * i) % 90 for i in range(1 + n * 37 % 150)] for n in range(200)]
    long, blocks = many[4:5] * 3, {"num_gpu_blocks_override": 40, "max_num_batched_tokens": 40}
    results = drive(
        [
            {
                "model": str(models[name]),
                "engine": loose(cap=8, **settings_of(name, decisions)) | engine,
                "prompts": prompts,
                "tokens": tokens,
                "abort": abort,
            }
            for name in ("neuron", "late", "dms", *GATE)
            for engine, prompts, tokens, abort in (({}, long, 90, 0), (blocks, many, 30, 20))
        ],
        tmp_path,
    )
    for few, with_aborts in zip(results[::2], results[1::2], strict=True):
        assert few["stats"]["forced"] > 0 and few["stats"]["forced_in_prompts"] > 0
        assert [len(tokens) for tokens in few["tokens"]] == [90] * len(long) and len(long[0]) == 149
        assert few["free"] == few["blocks"] and with_aborts["free"] == with_aborts["blocks"]
        lengths = [len(tokens) for tokens in with_aborts["tokens"]]
        assert len(lengths) == 200 and 10 < sum(length < 30 for length in lengths) < 150 and max(lengths) == 30


def test_a_compressed_cache_admits_more(models, tmp_path):
    """By vLLM's scheduler, in the same memory: requests of 256 tokens."""
    prompts = [[3 + i % 90 for i in range(200)]] * 40
    engine = {"max_num_seqs": 40, "kv_cache_memory_bytes": 1 << 20}
    caps = drive(
        [{"model": str(models["neuron"]), "engine": engine | loose(cap=cap), "prompts": prompts, "tokens": 40} for cap in (1, 2)],
        tmp_path,
    )
    assert caps[1]["most_running"] > 1.6 * caps[0]["most_running"]


def test_settings_that_are_refused(models, decisions, tmp_path):
    newer, other, damaged = (tmp_path / name for name in ("newer", "other", "damaged"))
    fields = tiny.config("head", head_dim=16, architectures=["DmcLlamaForCausalLM"])
    tiny.write(newer, fields | {"dmc": fields["dmc"] | {"layers": 3}}, tiny.weights(fields))
    tiny.write(other, fields | {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, tiny.weights(fields))
    content = bytearray(Path(decisions).read_bytes())
    content[-20] ^= 1
    damaged.write_bytes(content)
    draft = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    export, plain = models["neuron"], models["gate"]
    expected = [
        (export, {"enable_prefix_caching": True}, "prefix caching shares blocks"),
        (export, {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "KV connectors move blocks"),
        (export, {"speculative_config": draft}, "speculative decoding takes tokens back"),
        (export, loose(cap=0.5), "cap=0.5 reserves more than one entry per token"),
        (export, loose(cap="4"), "cap='4' must be a number"),
        (export, loose(caps=4), "unknown setting dmc.caps; known: cap, codec"),
        (export, {"block_size": 32}, "leave out --block-size"),
        (export, {"tensor_parallel_size": 4}, "tensor_parallel 4 does not divide the model's 2 key/value heads"),
        (export, {"pipeline_parallel_size": 2}, "with tensor parallelism alone"),
        (newer, {}, "dmc.layers, which this version of dmc does not know"),
        (export, loose(codec="kivi"), "codec='kivi' is not supported in vLLM; supported: dense, int8"),
        (export, loose(exact_dtype="int4"), "exact_dtype must be one of fp32, bf16, fp16, int8, got 'int4'"),
        (export, loose(exact_dtype=8), "exact_dtype=8 must be a name such as bf16 or int8"),
        (export, loose(policy="h2o"), "policy='h2o' is not supported in vLLM; supported: dmc, dms, gate"),
        (export, loose(**gate(decisions)), "was retrofitted with dmc and makes decisions of its own"),
        (plain, loose(**gate(decisions)) | {"enable_prefix_caching": True}, "prefix caching shares blocks"),
        (plain, loose(), "was not retrofitted: give policy gate with decisions and target_cr in additional_config"),
        (plain, {"additional_config": {"dmc": 4}}, "additional_config has dmc=4, which must be a JSON object"),
        (plain, loose(policy="gate", target_cr=2), "policy gate needs decisions: give a file"),
        (plain, loose(policy="gate", decisions=decisions), "policy gate needs target_cr"),
        (plain, loose(**gate(decisions) | {"policy_settings": 3}), 'policy_settings=3 must be a JSON object such as {"merge"'),
        (plain, loose(**gate(str(tmp_path / "none"))), "none is missing"),
        (plain, loose(**gate(str(damaged))), "damaged is damaged: its content does not match its digest"),
        (plain, loose(**gate(fitted(newer, tmp_path / "fitted"))), "these decisions were fitted for another model or window"),
        (other, loose(**gate(decisions)), "additional_config has dmc, and dmc-vllm does not serve GPT2LMHeadModel"),
    ]
    said = drive([{"model": str(model), "engine": engine, "fails": True} for model, engine, _ in expected], tmp_path)
    pairs = [(sentence, found or "") for (*_, sentence), found in zip(expected, said, strict=True)]
    assert [pair for pair in pairs if pair[0] not in pair[1]] == []


def test_another_version_of_vllm(models, decisions, tmp_path):
    cases = [(models["neuron"], {}), (models["gate"], loose(**gate(decisions)))]
    said = drive([{"model": str(model), "engine": engine, "fails": True, "version": "0.31"} for model, engine in cases], tmp_path)
    assert all("dmc-vllm is made for vLLM 0.31, and 0.32" in (found or "") for found in said), said
