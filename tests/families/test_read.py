"""What config.json says of a family, and what is refused."""

import json
import math

import pytest
from transformers import AutoConfig

from dmc.families import check_names, count, families, read_shape, shape_of, tensors
from dmc.model import Decoder, read_config
from tests.families.models import FAMILIES, SIZES, directory, model

SHAPES = {  # published sizes, and the number of parameters that the model's name or card gives
    "mistral-7b": (
        dict(
            model_type="mistral",
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=32000,
            max_position_embeddings=32768,
            sliding_window=None,
        ),
        7.24e9,
    ),
    "mistral-nemo": (
        dict(
            model_type="mistral",
            hidden_size=5120,
            intermediate_size=14336,
            num_hidden_layers=40,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=131072,
            max_position_embeddings=131072,
            sliding_window=None,
        ),
        12.2e9,
    ),
    "qwen2.5-7b": (
        dict(
            model_type="qwen2",
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            vocab_size=152064,
            use_sliding_window=False,
            sliding_window=131072,
        ),
        7.62e9,
    ),
    "qwen3-0.6b": (
        dict(
            model_type="qwen3",
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=151936,
            tie_word_embeddings=True,
        ),
        0.6e9,
    ),
    "qwen3-8b": (
        dict(
            model_type="qwen3",
            hidden_size=4096,
            intermediate_size=12288,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=151936,
            use_sliding_window=False,
        ),
        8.19e9,
    ),
    "llama3.2-1b": (
        dict(
            model_type="llama",
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=64,
            vocab_size=128256,
            tie_word_embeddings=True,
        ),
        1.24e9,
    ),
}


def test_the_families():
    assert list(families()) == FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tensors_are_those_of_transformers(family, tmp_path):
    made = model(family)
    made.save_pretrained(tmp_path)
    shape = read_shape(tmp_path)
    wanted = {name: tuple(x.shape) for name, x in made.state_dict().items()}
    if made.config.tie_word_embeddings:
        wanted.pop("lm_head.weight")
    assert tensors(shape) == wanted and count(shape) == sum(map(math.prod, wanted.values()))
    assert read_config(tmp_path).head_dim == shape.head_dim == made.model.layers[0].self_attn.head_dim
    assert dict(shape.fields) == AutoConfig.from_pretrained(tmp_path).to_dict() | {"_name_or_path": ""}


@pytest.mark.parametrize(("fields", "parameters"), SHAPES.values(), ids=SHAPES)
def test_published_models_have_as_many_parameters(fields, parameters):
    assert count(shape_of(fields)) == pytest.approx(parameters, rel=0.01)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "qwen3_moe"}, "of type 'qwen3_moe'; known: llama, mistral, qwen2, qwen3"),
        ({"model_type": "mixtral"}, "of type 'mixtral'"),
        ({"model_type": "dmc_qwen3"}, "name the model that it was made from"),
        (
            {"model_type": "mistral"},
            "sliding_window 4096 is active below max_position_embeddings 131072",
        ),  # transformers' defaults
        ({"model_type": "mistral", "sliding_window": 256, "max_position_embeddings": 512}, "sliding_window 256 is active"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 256, "max_window_layers": 1},
            "sliding_window 256",
        ),
        ({"model_type": "qwen3", "quantization_config": {"quant_method": "awq"}}, "quantised weights .quantization_config, awq"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq.*was not quantised"),
        ({"model_type": "qwen3", "hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"model_type": "qwen3", "num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"model_type": "qwen2", "num_hidden_layers": None}, "does not give num_hidden_layers as a whole number"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(fields, words, tmp_path):
    given = {name: value for name, value in SIZES.items() if name != "max_position_embeddings"} | fields
    (tmp_path / "config.json").write_text(json.dumps(given))
    with pytest.raises(ValueError, match=words) as caught:
        read_shape(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "mistral", "sliding_window": 512},
        {"model_type": "mistral", "sliding_window": None},
        {
            "model_type": "qwen2",
            "use_sliding_window": True,
            "sliding_window": 256,
            "max_window_layers": 2,
        },  # no layer is above it
        {"model_type": "llama", "sliding_window": 16},  # which transformers' Llama has not
    ],
)
def test_a_window_that_hides_nothing_is_read(fields):
    assert shape_of(SIZES | fields).num_hidden_layers == 2


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("qwen3", lambda t: t.pop("model.layers.1.self_attn.q_norm.weight"), "lacks the tensor model.layers.1.self_attn.q_norm"),
        (
            "qwen2",
            lambda t: t.pop("model.layers.0.self_attn.k_proj.bias"),
            "lacks the tensor model.layers.0.self_attn.k_proj.bias",
        ),
        ("llama", lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": t["model.norm.weight"].clone()}), "beyond those"),
    ],
)
def test_weights_of_another_model_are_refused_by_name(family, change, words, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    directory(tmp_path, family)
    held = load_file(tmp_path / "model.safetensors")
    change(held)
    save_file(held, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=words):
        Decoder.load(tmp_path, dtype=torch.float32)
    with pytest.raises(ValueError, match=words):
        check_names(read_shape(tmp_path), held, tmp_path)


def test_buffers_and_tied_heads_in_the_file_are_no_surplus():
    shape = shape_of(SIZES | {"model_type": "llama", "tie_word_embeddings": True})
    check_names(shape, [*tensors(shape), "lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"], "here")
