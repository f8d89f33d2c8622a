"""Directories that cannot be served say so in one sentence."""

import json

import pytest
import torch
from safetensors.torch import save_file

from dmc import LLM
from dmc.model import Decoder, read_config
from tests.model import tiny


@pytest.fixture
def parts():
    fields = tiny.config("head")
    return fields, tiny.weights(fields)


def refusal(directory):
    with pytest.raises(ValueError) as error:
        Decoder.load(directory, dtype=torch.float32)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_no_directory(tmp_path):
    assert "has no config.json" in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"model_type": "gpt2"}, "'gpt2'; known: llama, mistral, qwen2, qwen3, dmc_llama, dmc_mistral"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"dmc": {"decision": "oracle"}}, "neuron, head"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "default, dynamic, linear, llama3, longrope"),
        ({"rope_parameters": {"rope_type": "linear"}}, "'factor'"),
    ],
)
def test_config(parts, tmp_path, changes, said):
    fields, tensors = parts
    assert said in refusal(tiny.write(tmp_path, fields | changes, tensors))


def test_config_that_is_no_json(parts, tmp_path):
    tiny.write(tmp_path, *parts)
    (tmp_path / "config.json").write_text("{")
    assert "not valid JSON" in refusal(tmp_path)


def test_missing_weights(parts, tmp_path):
    tiny.write(tmp_path, *parts)
    (tmp_path / "model.safetensors").unlink()
    assert "has no model.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize("keep", [4, 200, -10])
def test_truncated_weights(parts, tmp_path, keep):
    file = tiny.write(tmp_path, *parts) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "truncated" in refusal(tmp_path)


def test_missing_tensor(parts, tmp_path):
    fields, tensors = parts
    del tensors["model.layers.1.self_attn.decision.weight"]
    assert "model.layers.1.self_attn.decision.weight" in refusal(tiny.write(tmp_path, fields, tensors))


def test_wrong_shape(parts, tmp_path):
    fields, tensors = parts
    tensors["model.norm.weight"] = torch.ones(5)
    message = refusal(tiny.write(tmp_path, fields, tensors))
    assert "[5]" in message and "[32]" in message


def test_missing_shard(parts, tmp_path):
    fields, tensors = parts
    tiny.write(tmp_path, fields, tensors)
    names = list(tensors)
    save_file({name: tensors[name] for name in names[:5]}, str(tmp_path / "a.safetensors"))
    where = {name: "a.safetensors" if name in names[:5] else "b.safetensors" for name in names}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    assert "lacks b.safetensors" in refusal(tmp_path)
    index.write_text("[]")
    assert "not an index" in refusal(tmp_path)


def test_end_tokens(parts, tmp_path):
    tiny.write(tmp_path, *parts)
    assert read_config(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, 5]}')
    assert read_config(tmp_path).eos_token_ids == (4, 5)


def test_tokenizer_larger_than_vocabulary(parts, tmp_path):
    tiny.write(tmp_path, *parts)
    tiny.write_tokenizer(tmp_path, tiny.VOCAB + 3)
    with pytest.raises(ValueError, match="100 entries, but the model's vocabulary has 97"):
        LLM(tmp_path, device="cpu").generate("abc")


def test_no_tokenizer(parts, tmp_path):
    tiny.write(tmp_path, *parts, tokenizer=False)
    llm = LLM(tmp_path, device="cpu")
    with pytest.raises(ValueError, match="token ids"):
        llm.generate("abc")
    assert llm.generate([[5, 6]])[0].text == ""


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"policy": "lru"}, "known: full, dmc"),
        ({"codec": "zip"}, "known: dense, int8, fp8, kivi, rotated, svd, eigen, gear, gear-4bit, gear-2bit, tcq, tcq-4bit"),
        ({"codec": "gear", "codec_settings": {"bit": 4}}, "no setting bit"),
        ({"dtype": "int8"}, "fp32, bf16"),
        ({"device": "abacus"}, "'abacus'"),
        ({"kv_memory": 10}, "10 bytes"),
        ({"page_size": 0}, "page_size must be at least 1"),
        ({"exact_dtype": "int4"}, "exact_dtype"),
    ],
)
def test_settings(parts, tmp_path, settings, said):
    tiny.write(tmp_path, *parts)
    with pytest.raises(ValueError, match=said):
        LLM(tmp_path, **{"device": "cpu"} | settings)
