"""What the export writes, what it refuses, and that it loads where only torch and transformers can be imported."""

import dataclasses
import importlib
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from checkpoints.export_hf import folding
from checkpoints.hf_model.configuration_dmc_llama import DmcLlamaConfig
from checkpoints.hf_model.modeling_dmc_llama import DmcLlamaForCausalLM
from dmc.training.config import Config
from tests.checkpoints.tiny import GAIN, OFFSET, SIZE, reference, tiny, write

ROOT = Path(__file__).parents[2]

_LOAD = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("dmc", "checkpoints", "megatron", "data", "tests"):
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked())
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

print(transformers.__version__)
source, resaved = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=True)
prompts = tokenizer(["w1 w2 w3 w4 w5 w6", "w7 w8"], padding=True, return_tensors="pt", return_token_type_ids=False)
assert prompts.attention_mask.tolist()[1] == [0, 0, 0, 0, 1, 1]
model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
model.save_pretrained(resaved)
for model in (model, AutoModelForCausalLM.from_pretrained(resaved, trust_remote_code=True)):
    out = model.generate(**prompts, max_new_tokens=20, eos_token_id=None, do_sample=False, return_dict_in_generate=True)
    print(out.sequences.tolist(), out.past_key_values.compression_ratio())
assert not {"dmc", "checkpoints", "megatron"} & set(sys.modules)
"""


@pytest.fixture
def exported(tmp_path):
    return write(tiny("neuron", heads=2), tmp_path)


def test_directory_is_complete(exported):
    assert {path.name for path in exported.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "README.md",
        "tokenizer.json",
        "tokenizer_config.json",
        "configuration_dmc_llama.py",
        "cache_dmc_llama.py",
        "entries_dmc_llama.py",
        "eviction_dmc_llama.py",
        "late_dmc_llama.py",
        "step_dmc_llama.py",
        "modeling_dmc_llama.py",
    }
    config = json.loads((exported / "config.json").read_text())
    assert config["model_type"] == "dmc_llama" and config["architectures"] == ["DmcLlamaForCausalLM"]
    assert config["dmc"] == {"method": "dmc", "decision": "neuron", "offset": OFFSET, "target_cr": 1.5, "measured_cr": 1.4}
    assert config["auto_map"] == {
        "AutoConfig": "configuration_dmc_llama.DmcLlamaConfig",
        "AutoModelForCausalLM": "modeling_dmc_llama.DmcLlamaForCausalLM",
    }
    assert (config["dtype"], config["head_dim"]) == ("float32", SIZE)
    assert config["rope_parameters"] == {"rope_theta": 1e4, "rope_type": "default"}
    assert json.loads((exported / "generation_config.json").read_text())["eos_token_id"] == 2
    assert exported.stat().st_mode & 0o777 == exported.parent.stat().st_mode & 0o777 | 0o055
    assert [path.name for path in exported.parent.iterdir() if path.name.startswith(".")] == []


def test_card_holds_the_numbers(exported):
    card = (exported / "README.md").read_text()
    assert card.startswith("---\n") and "trust_remote_code=True" in card
    assert "| base | 12.35 |" in card and "| compression ratio | 1.5 | 1.4 |" in card


def test_card_with_everything(tmp_path):
    card = {
        "base_model": "some/llama",
        "license": "apache-2.0",
        "summary": "Trained on prose.",
        "step": 300,
        "measured": {"a | b": 2},
        "rows": [{"name": "x"}, {"name": "y", "perplexity": 3.0}],
    }
    text = (write(tiny("head", heads=2), tmp_path, card=card) / "README.md").read_text()
    lines = ("license: apache-2.0", "`some/llama`", "Trained on prose.", "300 steps", "| a \\| b | 2 |", "| x |  |")
    assert all(line in text for line in lines)


def test_gain_is_folded_into_the_decision_rows_only(exported):
    before, after = tiny("neuron", heads=2).state, load_file(exported / "model.safetensors")
    for name, tensor in before.items():
        expected = tensor.clone()
        if "q_proj" in name or "k_proj" in name:
            expected[::SIZE] *= GAIN
        assert torch.equal(after[name], expected)
    head = tiny("head", heads=2)
    fold = folding(DmcLlamaConfig(dmc={"decision": "head"}), GAIN)
    for name, tensor in head.state.items():
        assert torch.equal(fold(name, tensor), tensor * GAIN if "decision" in name else tensor)


def test_shards_load_like_one_file(tmp_path):
    model = tiny("neuron", heads=2)
    out = write(model, tmp_path, max_shard_bytes=30_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2 and not (out / "model.safetensors").exists()
    assert index["metadata"]["total_size"] == sum(x.numel() * 4 for x in model.state.values())
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        logits = DmcLlamaForCausalLM.from_pretrained(out)(ids).logits
    assert (logits - reference(model, ids)[0]).abs().max() < 1e-4


def test_generation_config_of_the_base_is_kept(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    out = write(tiny("neuron", heads=2), tmp_path)
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": [2, 5]}


def _without(model, name):
    model.state.pop(name)


@pytest.mark.parametrize(
    ("spoil", "options", "words"),
    [
        (lambda m: _without(m, "model.norm.weight"), {}, "lacks model.norm.weight"),
        (lambda m: m.state.update(extra=torch.ones(1)), {}, "does not know extra"),
        (lambda m: m.state.update({"model.norm.weight": torch.ones(3)}), {}, r"model.norm.weight has shape \(3,\)"),
        (lambda m: m.config.update(tie_word_embeddings=True), {}, "ties them"),
        (lambda m: m.config.update(model_type="gpt2"), {}, "gpt2"),
        (None, {"gain": 0.0}, "gain"),
        (None, {"decision": "both"}, "decision"),
        (None, {"offset": float("nan")}, "offset"),
        (None, {"tokenizer_dir": "nowhere"}, "holds no tokenizer"),
        (None, {"card": {"loss": 1}}, "card knows no 'loss'"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(tmp_path, spoil, options, words):
    model = tiny("neuron", heads=2)
    if spoil:
        spoil(model)
    with pytest.raises(ValueError, match=words):
        write(model, tmp_path, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def test_existing_directory_is_left_alone(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        write(tiny("neuron", heads=2), tmp_path)
    assert list((tmp_path / "model").iterdir()) == []


def test_failure_midway_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("checkpoints.export_hf._write_rest", fail)
    with pytest.raises(OSError, match="disk full"):
        write(tiny("neuron", heads=2), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def _load_elsewhere(out, directory, **environment):
    """Run _LOAD in an own process. → its lines: the version, what the export generated, what its saved copy did."""
    environment |= {"HF_HOME": str(directory / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    run = subprocess.run(
        [sys.executable, "-c", _LOAD, str(out), str(directory / "again")],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_loads_with_torch_and_transformers_alone(tmp_path):
    out = write(tiny("head", heads=2, tied=True, rope="llama3"), tmp_path)
    _, first, second = _load_elsewhere(out, tmp_path)
    assert first == second
    sequences = json.loads(first[: first.rindex("]") + 1])
    again = DmcLlamaForCausalLM.from_pretrained(out).generate(
        torch.tensor(sequences)[:, :6],
        attention_mask=torch.tensor([[1] * 6, [0, 0, 0, 0, 1, 1]]),
        max_new_tokens=20,
        eos_token_id=None,
        do_sample=False,
    )
    assert again.tolist() == sequences


@pytest.mark.slow
def test_loads_on_the_oldest_transformers(tmp_path):
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tmp_path / "old")]
    subprocess.run([*install, "transformers==5.0.0"], check=True)
    out = write(tiny("neuron", heads=2, rope="linear"), tmp_path)
    _, newest, _ = _load_elsewhere(out, tmp_path)
    shutil.rmtree(tmp_path / "again")
    assert _load_elsewhere(out, tmp_path, PYTHONPATH=str(tmp_path / "old")) == ["5.0.0", newest, newest]


@pytest.fixture
def cli(monkeypatch):
    """`dmc export`, over a checkpoint store of this test's making."""
    store = types.ModuleType("checkpoints.convert")
    monkeypatch.setitem(sys.modules, "checkpoints.convert", store)
    monkeypatch.delitem(sys.modules, "dmc.commands.export", raising=False)
    store.load_hf_state = None
    export = importlib.import_module("dmc.commands.export")
    yield lambda state, *arguments: (
        monkeypatch.setattr(export, "load_hf_state", state),
        export.main([str(a) for a in arguments]),
    )[1]
    sys.modules.pop("dmc.commands.export")


def _meta(model, tokenizer, **changes):
    """What the checkpoint store tells of a checkpoint."""
    return (
        dict(
            hf_config=model.config,
            tokenizer_dir=tokenizer,
            method="dmc",
            window=None,
            looks_ahead=False,
            decision=model.decision,
            offset=OFFSET,
            gain=GAIN,
            target_cr=2.0,
            measured_cr=1.9,
            step=7,
            results={"rows": [{"name": "base", "perplexity": 3.0}]},
            compressed=True,
            perplexity=12.3,
            corpus_hash="c0",
            held_out_hash="4e",
            config=dataclasses.asdict(Config()),
        )
        | changes
    )


def test_command_exports_and_says_what_is_wrong(tmp_path, cli, capsys):
    model = tiny("neuron", heads=2)
    meta = _meta(model, write(model, tmp_path).parent / "tokenizer")

    def broken(_):
        raise ValueError("no complete checkpoint here")

    assert cli(lambda _: (model.state, meta), "checkpoint", tmp_path / "cli") == 0
    expected, written = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "cli"))
    assert expected.keys() == written.keys() and all(torch.equal(written[name], x) for name, x in expected.items())
    assert cli(lambda _: (model.state, meta), "checkpoint", tmp_path / "half", "--dtype", "bfloat16") == 0
    assert load_file(tmp_path / "half" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert cli(lambda _: (model.state, meta), "checkpoint", tmp_path / "cli") == 2
    assert "exists already" in capsys.readouterr().err
    assert cli(broken, "checkpoint", tmp_path / "other") == 2
    assert capsys.readouterr().err == "dmc export: no complete checkpoint here\n"


def test_uncompressed_checkpoint_becomes_an_ordinary_llama(tmp_path, cli):
    model = tiny("neuron", heads=2)
    meta = _meta(model, write(model, tmp_path).parent / "tokenizer", compressed=False)
    assert cli(lambda _: (model.state, meta), "checkpoint", tmp_path / "plain") == 0
    assert not list((tmp_path / "plain").glob("*.py"))
    assert "12.3" in (tmp_path / "plain" / "README.md").read_text()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(plain) is LlamaForCausalLM
    assert all(torch.equal(plain.state_dict()[name], tensor) for name, tensor in model.state.items())


@pytest.mark.parametrize("rope", ["default", "linear", "llama3"])
def test_an_ordinary_llama_tells_its_rotation_to_old_readers_too(tmp_path, cli, rope):
    """transformers 4 reads rope_theta and rope_scaling, and takes defaults without a word where they are missing."""
    model = tiny("neuron", heads=2, rope=rope)
    meta = _meta(model, write(model, tmp_path).parent / "tokenizer", compressed=False)
    assert cli(lambda _: (model.state, meta), "checkpoint", tmp_path / "plain") == 0
    written = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert written["rope_theta"] == 10000.0
    assert (written["rope_scaling"] or {}).get("factor") == {"default": None, "linear": 2.0, "llama3": 8.0}[rope]
    old = {name: value for name, value in written.items() if name != "rope_parameters"}
    wanted = LlamaConfig(**model.config).rope_parameters
    assert LlamaConfig(**old).rope_parameters == LlamaConfig(**written).rope_parameters == wanted
