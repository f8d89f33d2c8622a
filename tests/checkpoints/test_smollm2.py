"""A real model: SmolLM2-135M through megatron-core, against transformers.

DMC_SMOLLM2 names its Hugging Face directory; docs/checkpoints-hf.md says how to make one. Run with --slow.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoints import convert
from checkpoints.export_hf import export, export_plain
from checkpoints.trained import TrainedWeights
from dmc.families import read_shape
from dmc.training import decoder, setup
from dmc.training.attention import row_info
from dmc.training.config import ParallelConfig
from dmc.training.state import LayerState, Settings
from dmc.weights import Weights

SOURCE = Path(os.environ.get("DMC_SMOLLM2", "nowhere"))
PROMPT = (
    "The Standard Library of a programming language is the library that every program may use. In Python 3.12 it has "
    "more than 200 modules; the capital of France, on the other hand, is"
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (SOURCE / "config.json").is_file(), reason="DMC_SMOLLM2 names no model directory"),
]


@pytest.fixture(scope="module")
def ids():
    return AutoTokenizer.from_pretrained(SOURCE)(PROMPT, return_tensors="pt").input_ids


@pytest.fixture(scope="module")
def built(process_group):
    hf = read_shape(SOURCE)
    state = LayerState(Settings("neuron"), mode="plain")
    model = decoder.build(hf, ParallelConfig(), state, sequence_length=256, dtype=torch.float32)[0]
    setup.load_weights(model, convert.loader(hf, Weights(SOURCE)))
    return hf, model.eval()


@pytest.fixture(scope="module")
def theirs():
    return AutoModelForCausalLM.from_pretrained(SOURCE, dtype=torch.float32)


def test_logits_are_those_of_transformers(built, theirs, ids):
    starts = torch.zeros_like(ids, dtype=torch.bool)
    starts[:, 0] = True
    with torch.no_grad():
        expected = theirs(ids).logits
        got = built[1](ids, torch.arange(ids.shape[1])[None], row_info(torch.zeros(1, dtype=torch.long), starts))
    assert got.shape == expected.shape == (1, ids.shape[1], 49152)
    difference = (got - expected).abs().max().item()
    print(f"largest difference of the logits: {difference:.2e}")
    assert difference < 1e-4


def test_round_trip_is_bit_identical(built, tmp_path):
    """Hugging Face → megatron-core → checkpoint on the disk → Hugging Face directory."""
    hf, model = built
    dist_checkpointing.save(model.sharded_state_dict(), str(fresh(tmp_path / "checkpoint")))
    out = export_plain(
        TrainedWeights(tmp_path / "checkpoint", hf),
        dict(hf.fields),
        out=tmp_path / "out",
        tokenizer_dir=SOURCE,
        card="",
        dtype=torch.float32,
        max_shard_bytes=10**8,
    )
    before, after = Weights(SOURCE), Weights(out)
    assert set(before) == set(after) and len(list(out.glob("*.safetensors"))) > 4
    for name in before:
        assert torch.equal(before(name).float(), after(name)), name
    one, other = (json.loads((path / "config.json").read_text()) for path in (SOURCE, out))
    one.pop("transformers_version")
    assert {name: other[name] for name in one} == one | {"dtype": "float32"}


def test_an_untrained_head_generates_what_the_model_does(theirs, ids, tmp_path):
    """A zero decision head merges nothing: greedy tokens of the export are the plain model's."""
    hf, read = read_shape(SOURCE), Weights(SOURCE)
    state = {name: read(name) for name in read}
    for layer in range(hf.num_hidden_layers):
        head = torch.zeros(2 * hf.num_key_value_heads, hf.hidden_size)
        state[f"model.layers.{layer}.self_attn.decision.weight"] = head
    out = export(
        state,
        dict(hf.fields),
        out=tmp_path / "out",
        decision="head",
        offset=5.0,
        gain=1.0,
        target_cr=1.0,
        measured_cr=1.0,
        tokenizer_dir=SOURCE,
        card="",
        dtype=torch.float32,
    )
    ours = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
    options = dict(max_new_tokens=24, do_sample=False, return_dict_in_generate=True)
    expected = theirs.generate(ids, **options).sequences
    got = ours.generate(ids, **options)
    assert got.sequences.tolist() == expected.tolist() and got.sequences.shape[1] > ids.shape[1]
    assert got.past_key_values.compression_ratio() == 1


def test_three_heads_become_one(tmp_path):
    """9 query heads over 3 key/value heads → over 1; it loads, and says something else than before."""
    command = [sys.executable, "scripts/mha_to_gqa.py", str(SOURCE), str(tmp_path / "out"), "--kv-heads", "1"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    read, before = Weights(tmp_path / "out"), Weights(SOURCE)
    name = "model.layers.7.self_attn.k_proj.weight"
    torch.testing.assert_close(read(name), sum(before(name).split(64)) / 3, rtol=1e-6, atol=1e-6)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_key_value_heads == 1


def fresh(directory):
    directory.mkdir()
    return directory
