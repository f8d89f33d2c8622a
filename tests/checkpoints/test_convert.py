"""Weights between Hugging Face's names and megatron-core's: bit for bit, whole and cut, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from checkpoints import convert
from dmc.families import count, read_shape, shape_of
from dmc.training import decoder, setup
from dmc.weights import Weights
from tests.checkpoints.tiny import LLAMA3, tiny
from tests.training.models import hf_config, megatron, weights

SHAPES = [dict(heads=2), dict(heads=4), dict(heads=2, tied=True)]


def llama_directory(directory, **changes):
    model = tiny("neuron", heads=2, **changes)
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(model.config))
    save_file(model.state, directory / "model.safetensors")
    return directory, model


def sharded_directory(directory):
    directory, model = llama_directory(directory)
    (directory / "model.safetensors").unlink()
    names = sorted(model.state)
    files = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: model.state[name] for name in names if files[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return directory, model


# ------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("decision", ["neuron", "head"])
def test_there_and_back_is_bit_identical(process_group, shape, decision):
    model = tiny(decision, **shape)
    built = megatron(model, "plain")
    back = convert.to_hf(hf_config(model), weights(built))
    assert back.keys() == model.state.keys()
    for name, tensor in model.state.items():
        assert torch.equal(back[name], tensor) and back[name].is_contiguous(), name


def test_a_new_decision_head_is_not_asked_of_a_llama():
    names = ["decoder.layers.0.self_attention.decision.weight"]
    assert list(convert.loader(hf_config(tiny("neuron", heads=2)), lambda _: 1 / 0)(names, 0, 0, 1)) == []


# How Megatron-LM cuts a Llama: q, k, v, gate and up and the vocabulary by rows, o and down by columns.
CUTS = {
    "q_proj": 0,
    "k_proj": 0,
    "v_proj": 0,
    "gate_proj": 0,
    "up_proj": 0,
    "embed_tokens": 0,
    "lm_head": 0,
    "o_proj": 1,
    "down_proj": 1,
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_parts_of_two_tensor_ranks_are_halves_of_every_tensor(process_group, shape):
    """Rank r of 2 gets a Llama of half the heads, half the intermediate size and half the vocabulary."""
    model = tiny("neuron", **shape)
    model.state = {n: x[:60] if x.shape[0] == 61 else x for n, x in model.state.items()}
    model.config["vocab_size"] = 60
    hf = hf_config(model)
    names = [name for name, _ in megatron(model, "plain").named_parameters()]
    half = shape_of(
        model.config
        | dict(num_attention_heads=2, num_key_value_heads=hf.num_key_value_heads // 2, intermediate_size=32, vocab_size=30)
    )
    load = convert.loader(hf, model.state.__getitem__)
    for rank in range(2):
        part = convert.to_hf(half, dict(load(names, 0, rank, 2)))
        assert part.keys() == model.state.keys()
        for name, tensor in model.state.items():
            dim = next((d for key, d in CUTS.items() if key in name), None)
            assert torch.equal(part[name], tensor if dim is None else tensor.chunk(2, dim)[rank]), (rank, name)


def test_layers_of_a_later_pipeline_stage_are_counted_from_the_first():
    model = tiny("neuron", heads=2)
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    for first in range(3):
        got = dict(convert.loader(hf_config(model), model.state.__getitem__)([name], first, 0, 1))[name]
        assert torch.equal(got, model.state[f"model.layers.{first}.mlp.down_proj.weight"])


def test_the_last_stage_of_a_tied_model_takes_the_embedding():
    """Its file has no lm_head, but the stage holds a copy of the embedding as its output layer."""
    model = tiny("neuron", heads=2, tied=True)
    got = dict(convert.loader(hf_config(model), model.state.__getitem__)(["output_layer.weight"], 0, 0, 1))
    assert torch.equal(got["output_layer.weight"], model.state["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("name", "rows"),
    [("self_attn.q_proj", 32), ("self_attn.k_proj", 64), ("mlp.up_proj", 32), ("self_attn.o_proj", 47), ("input_layernorm", 47)],
)
def test_weights_of_another_shape_are_named(process_group, name, rows):
    model = tiny("neuron", heads=2)
    built = megatron(model, "plain")
    name = f"model.layers.1.{name}.weight"
    model.state[name] = torch.zeros(rows, *model.state[name].shape[1:])
    with pytest.raises(ValueError, match="do not belong together") as caught:
        setup.load_weights(built, convert.loader(hf_config(model), model.state.__getitem__))
    assert f"({rows}," in str(caught.value) and "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------- directories


@pytest.mark.parametrize("write", [llama_directory, sharded_directory])
def test_tensors_are_read_by_name(tmp_path, write):
    directory, model = write(tmp_path / "model")
    read = Weights(directory)
    assert all(torch.equal(read(name), tensor) for name, tensor in model.state.items())
    with pytest.raises(ValueError, match="has no tensor 'model.norm.bias'"):
        read("model.norm.bias")


def test_a_directory_without_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} has no model.safetensors"):
        Weights(tmp_path)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("pytorch_model.bin", "only pytorch_model.bin, which is a pickle and not read here: convert it once with"),
        ("pytorch_model.bin.index.json", "is a pickle"),
        ("model.Q4_1.gguf", "convert it once with scripts/gguf_to_hf.py"),
    ],
)
def test_other_forms_of_weights_are_refused_with_the_remedy(tmp_path, file, words):
    (tmp_path / file).touch()
    with pytest.raises(ValueError, match=words):
        Weights(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_quantised_weights_are_refused(tmp_path, dtype):
    save_file({"model.norm.weight": torch.ones(4).to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="model.norm.weight .* is stored as .* take the checkpoint that was not quantised"):
        Weights(tmp_path)("model.norm.weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_every_float_are_read(tmp_path, process_group, dtype):
    directory, model = llama_directory(tmp_path / "model")
    state = {name: tensor.to(dtype) for name, tensor in model.state.items()}
    save_file(state, directory / "model.safetensors")
    built = megatron(model, "plain")
    setup.load_weights(built, convert.loader(read_shape(directory), Weights(directory)))
    for name, tensor in convert.to_hf(hf_config(model), weights(built)).items():
        assert torch.equal(tensor, state[name].float()), name


def test_a_missing_shard_is_named(tmp_path):
    directory, _ = sharded_directory(tmp_path / "model")
    (directory / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks model-1.safetensors"):
        Weights(directory)


@pytest.mark.parametrize("write", [llama_directory, sharded_directory])
@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_a_truncated_file_is_named(tmp_path, write, keep):
    directory, _ = write(tmp_path / "model")
    path = max(directory.glob("*.safetensors"))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match="truncated") as caught:
        Weights(directory)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": ["a"]}', "\x00"])
def test_a_broken_index_is_named(tmp_path, text):
    directory, _ = sharded_directory(tmp_path / "model")
    (directory / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="index.json is not an index of weights"):
        Weights(directory)


def test_the_configuration_is_read(tmp_path):
    directory, model = llama_directory(tmp_path / "model", rope="llama3")
    assert read_shape(directory) == hf_config(model)


V5 = LLAMA3 | {"rope_theta": 10000.0}
BY_TYPE = {name: value for name, value in LLAMA3.items() if name != "rope_type"} | {"type": "llama3"}


@pytest.mark.parametrize(
    "fields",
    [
        dict(rope_parameters=V5),
        dict(rope_theta=10000.0, rope_scaling=LLAMA3),
        dict(rope_theta=10000.0, rope_scaling=BY_TYPE),
        dict(rope_theta=10000.0, rope_scaling=LLAMA3, rope_parameters=V5),
    ],
    ids=["transformers 5", "transformers 4", "older", "both"],
)
def test_rope_scaling_of_llama_3_is_read_in_every_form(tmp_path, fields):
    model = tiny("neuron", heads=2, rope="llama3")
    del model.config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(model.config | fields))
    cos, sin = decoder.rope_tables(read_shape(tmp_path), 200)
    angles = torch.outer(torch.arange(200).double(), model.inverse_frequencies).repeat(1, 2)
    torch.testing.assert_close(cos.cpu().double(), angles.cos(), rtol=0, atol=2e-5)
    torch.testing.assert_close(sin.cpu().double(), angles.sin(), rtol=0, atol=2e-5)


def _json(**changes):
    return json.dumps(tiny("neuron", heads=2).config | changes)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not valid JSON"),
        ("", "is not valid JSON"),
        (b"\xff{}", "is not valid JSON"),
        ('{"model_type": "gpt2"}', "model of type 'gpt2'; known: llama, mistral, qwen2, qwen3"),
        ("{}", "model of type None"),
        ("[1]", "does not hold a JSON object"),
        (_json(hidden_size="wide"), "does not give hidden_size as a whole number"),
        (_json(hidden_size=50), "does not describe a Llama.*50"),
        (_json(rope_parameters={"rope_type": "llama3"}), "does not describe a Llama.*llama3"),
        (_json(rope_parameters={"rope_type": "spiral"}), "rope_type 'spiral': known are default, "),
        (_json(dtype="float99"), "does not describe a Llama.*float99"),
    ],
)
def test_bad_configurations_are_one_sentence(tmp_path, text, words):
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=words) as caught:
        read_shape(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("directory", ["", "nowhere"])
def test_no_configuration_is_said(tmp_path, directory):
    with pytest.raises(ValueError, match="is not a model directory: it has no config.json"):
        read_shape(tmp_path / directory)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parameters_are_counted(shape):
    hf = hf_config(tiny("neuron", **shape))
    assert count(hf) == sum(p.numel() for p in LlamaForCausalLM(LlamaConfig(**hf.fields)).parameters())
