"""Hugging Face → megatron-core checkpoint → Hugging Face: bit for bit, one tensor in memory at a time."""

import json
import subprocess
import sys
import weakref

import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file

from checkpoints.export_hf import export_plain
from checkpoints.files import parse_size, write_weights
from checkpoints.trained import TrainedWeights
from dmc.weights import Weights
from tests.checkpoints.tiny import tiny, write
from tests.training.models import hf_config, megatron

SHAPES = [dict(heads=2), dict(heads=4), dict(heads=2, tied=True)]


def saved(model, directory, dtype=torch.float32):
    directory.mkdir()
    dist_checkpointing.save(megatron(model, "plain").to(dtype).sharded_state_dict(), str(directory))
    return TrainedWeights(directory, hf_config(model))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("decision", ["neuron", "head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_holds_the_tensors_that_went_in(process_group, tmp_path, shape, decision, dtype):
    model = tiny(decision, **shape)
    read = saved(model, tmp_path / "checkpoint", dtype)
    assert set(read) == set(model.state) and len(read) == len(model.state)
    for name in [*read, *sorted(read, reverse=True)]:  # in the order of the file, and in another
        assert torch.equal(read[name], model.state[name].to(dtype)) and read[name].is_contiguous(), name
        assert (read.meta(name).shape, read.meta(name).dtype) == (model.state[name].shape, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_exported_files_hold_them_too(process_group, tmp_path, shape):
    model = tiny("neuron", **shape)
    tokenizer = write(model, tmp_path).parent / "tokenizer"
    read = saved(model, tmp_path / "checkpoint")
    out = export_plain(
        read, model.config, out=tmp_path / "out", tokenizer_dir=tokenizer, card="", dtype=torch.float32, max_shard_bytes=20_000
    )
    sizes = [sum(x.numel() * 4 for x in load_file(file).values()) for file in out.glob("*.safetensors")]
    assert len(sizes) > 4 and max(sizes) <= 20_000
    assert all(torch.equal(Weights(out)(name), tensor) for name, tensor in model.state.items())
    assert {file.stat().st_mode & 0o444 for file in out.iterdir()} == {0o444}


def test_each_tensor_is_asked_for_once_and_not_kept(tmp_path):
    """A shard's tensors are gone before the next shard's are made."""
    plan = {f"t{i}": torch.empty(100, device="meta") for i in range(6)}
    alive, most = set(), []

    class Tracked(torch.Tensor):
        pass

    def fetch(name):
        tensor = torch.zeros(100).as_subclass(Tracked)
        alive.add(name)
        weakref.finalize(tensor, alive.discard, name)
        most.append(len(alive))
        return tensor

    write_weights(tmp_path, plan, fetch, 800)
    assert len(most) == 6 and max(most) <= 2 and len(list(tmp_path.glob("*.safetensors"))) == 3


def test_a_tensor_of_another_shape_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"t has shape \(3,\), and \(4,\) is to be written"):
        write_weights(tmp_path, {"t": torch.empty(4, device="meta")}, lambda _: torch.ones(3), 100)


@pytest.mark.parametrize(
    ("text", "size"), [("1", 1), ("4GB", 4 * 10**9), ("500 mb", 5 * 10**8), ("2GiB", 2**31), ("1.5kB", 1500), ("3T", 3 * 10**12)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "GB", "4 XB", "1e9", "0.5"])
def test_no_sizes(text):
    with pytest.raises(ValueError, match="is not a size: give bytes"):
        parse_size(text)


# A model of 108 MB, most of it layers; in a process of its own, where the peak of every part can be read.
_MEMORY = """
import ctypes, gc, json, sys
from pathlib import Path
import torch
import dmc.training
from megatron.core import dist_checkpointing
from checkpoints import convert, gqa
from checkpoints.export_hf import export_plain
from checkpoints.files import write_weights
from checkpoints.trained import TrainedWeights
from dmc.families import shape_of
from dmc.weights import Weights
from dmc.training import config, decoder, setup
from dmc.training.config import ParallelConfig
from dmc.training.state import LayerState, Settings

tmp = Path(sys.argv[1])
torch.set_num_threads(1)
sizes = dict(vocab_size=4096, hidden_size=256, intermediate_size=1024, num_hidden_layers=24, num_attention_heads=4,
             num_key_value_heads=4, tie_word_embeddings=True)
hf = shape_of(dict(model_type="llama", **sizes))
source = tmp / "in"
source.mkdir()
(source / "config.json").write_text(json.dumps(dict(model_type="llama", **sizes)))
(source / "tokenizer.json").write_text("{}")
plan = {"model.embed_tokens.weight": (4096, 256), "model.norm.weight": (256,)}
for i in range(24):
    for name in "qkvo":
        plan[f"model.layers.{i}.self_attn.{name}_proj.weight"] = (256, 256)
    for name, shape in dict(gate=(1024, 256), up=(1024, 256), down=(256, 1024)).items():
        plan[f"model.layers.{i}.mlp.{name}_proj.weight"] = shape
    for name in ("input_layernorm", "post_attention_layernorm"):
        plan[f"model.layers.{i}.{name}.weight"] = (256,)
plan = {name: torch.empty(shape, device="meta") for name, shape in plan.items()}
weights = sum(x.numel() * 4 for x in plan.values())
write_weights(source, plan, lambda name: torch.randn(plan[name].shape), 4_000_000)


def resident(kind):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(kind))


def peak(work):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free but still held would hide what is taken
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    work()
    return (resident("VmHWM") - before) / weights


def built(tensor=1):
    return decoder.build(hf, ParallelConfig(), LayerState(Settings("neuron")), sequence_length=64, dtype=torch.float32)[0]


def quarter():
    names = [name for name, _ in model.named_parameters()]
    for name, part in convert.loader(hf, Weights(source))(names, 0, 1, 4):
        held[name] = part.clone()
    assert held["decoder.layers.0.self_attention.linear_qkv.weight"].shape == (192, 256)


held = {}
setup.init_distributed(config.load(overrides=["run.threads=1"]))
model = built()
out = {"import": peak(lambda: setup.load_weights(model, convert.loader(hf, Weights(source))))}
out["a quarter"] = peak(quarter)
(tmp / "checkpoint").mkdir()
dist_checkpointing.save(model.sharded_state_dict(), str(tmp / "checkpoint"))
del model, held
out["export"] = peak(lambda: export_plain(
    TrainedWeights(tmp / "checkpoint", hf), dict(hf.fields), out=tmp / "hf", tokenizer_dir=source, card="",
    dtype=torch.float32, max_shard_bytes=4_000_000))
(tmp / "gqa").mkdir()
out["gqa"] = peak(lambda: gqa.convert(source, tmp / "gqa", 2, dtype=None, limit=4_000_000))
print(json.dumps(out))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_weights_stream(tmp_path):
    """Peak memory beyond what was held before, in sizes of the model, whose largest tensor is 0.04 of it."""
    done = subprocess.run([sys.executable, "-c", _MEMORY, str(tmp_path)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout.splitlines()[-1])
    assert peaks["import"] < 0.3 and peaks["export"] < 0.5 and peaks["gqa"] < 0.3, peaks  # a second copy were 1
    assert 0.25 < peaks["a quarter"] < 0.4, peaks  # the quarter itself is kept
