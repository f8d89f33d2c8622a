"""Mean-pooled key/value heads against a loop over heads, transformers' logits, and one run of the usual command."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from checkpoints.convert import load_hf_state
from dmc import LLM
from dmc.families import read_shape
from dmc.weights import Weights
from scripts import export_hf, mha_to_gqa
from tests.training.helpers import metrics, small_run, tiny_config, tiny_model

SIZE = 16  # head size of the tiny model


def convert(source, out, heads, *options):
    assert mha_to_gqa.main([str(source), str(out), "--kv-heads", str(heads), *map(str, options)]) == 0
    return out


def logits(directory):
    ids = torch.randint(2048, (2, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory)(ids).logits


@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (4, 1), (2, 1)])
def test_every_head_is_the_mean_of_its_group(tmp_path, heads, groups):
    source = tiny_model(tmp_path / "in", num_key_value_heads=heads)
    out = convert(source, tmp_path / "out", groups)
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys() and read_shape(out).num_key_value_heads == groups
    for name, tensor in before.items():
        if "k_proj" not in name and "v_proj" not in name:
            assert torch.equal(after[name], tensor), name
            continue
        for group in range(groups):
            members = range(group * heads // groups, (group + 1) * heads // groups)
            for row in range(SIZE):
                mean = sum(tensor[head * SIZE + row].double() for head in members) / len(members)
                torch.testing.assert_close(after[name][group * SIZE + row].double(), mean, rtol=0, atol=1e-7)
    assert not torch.equal(logits(out), logits(source))


@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (4, 1), (2, 1)])
def test_heads_that_are_equal_within_a_group_lose_nothing(tmp_path, heads, groups):
    """Query heads must go on reading the heads they read before."""
    torch.manual_seed(5)
    model = LlamaForCausalLM(tiny_config(num_key_value_heads=heads))
    for name, weight in model.named_parameters():
        if "k_proj" in name or "v_proj" in name:
            kept = weight.data.view(groups, heads // groups, SIZE, -1)[:, :1]
            weight.data.copy_(kept.expand(-1, heads // groups, -1, -1).reshape(weight.shape))
    source = tiny_model(tmp_path / "in", num_key_value_heads=heads)
    model.save_pretrained(source)
    torch.testing.assert_close(logits(convert(source, tmp_path / "out", groups)), logits(source), rtol=0, atol=1e-6)


def test_two_steps_are_one(tmp_path):
    """4 → 2 → 1 heads is 4 → 1; bf16 weights stay bf16, and shards are written as asked."""
    source = tiny_model(tmp_path / "in", num_key_value_heads=4)
    half = convert(source, tmp_path / "half", 2, "--max-shard-size", "50KB", "--dtype", "bfloat16")
    assert (half / "model.safetensors.index.json").is_file() and read_shape(half).fields["dtype"] == "bfloat16"
    twice, once = convert(half, tmp_path / "twice", 1), convert(source, tmp_path / "once", 1)
    read = Weights(twice)
    for name in Weights(once):
        assert read(name).dtype == torch.bfloat16
        torch.testing.assert_close(read(name).float(), Weights(once)(name), rtol=1e-2, atol=2e-3)
    for name in ("tokenizer.json", "generation_config.json"):
        assert (twice / name).read_bytes() == (source / name).read_bytes()


def test_the_usual_command_trains_and_exports_it(tmp_path):
    source = tiny_model(tmp_path / "in", num_key_value_heads=4)
    start = convert(source, tmp_path / "start", 1)
    (tmp_path / "model").mkdir()  # what small_run makes its text beside
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": "a b c d e f g h " * 60}) for _ in range(20)))
    run = small_run(tmp_path, "run", "--model", start, "dmc.method=none", "run.steps=3")
    losses = [line["lm_loss"] for line in metrics(run)]
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert export_hf.main([str(run / "checkpoints" / "final"), str(tmp_path / "hf"), "--max-shard-size", "40KB"]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(model) is LlamaForCausalLM and model.config.num_key_value_heads == 1
    state = load_hf_state(run / "checkpoints" / "final")[0]
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    assert not torch.equal(state["model.norm.weight"], load_file(start / "model.safetensors")["model.norm.weight"])


def test_the_engine_serves_it_with_half_the_bytes(tmp_path):
    source = tiny_model(tmp_path / "in", num_key_value_heads=2)
    out = convert(source, tmp_path / "out", 1)
    ids = torch.randint(3, 2048, (40,), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(out)(ids[None]).logits[0].log_softmax(-1)
    before, after = (
        LLM(model, policy="full", device="cpu", dtype="fp32").score([ids.tolist()], prompt_tokens=25)[0]
        for model in (source, out)
    )
    torch.testing.assert_close(after.logprobs, expected[:-1].gather(1, ids[1:, None])[:, 0], rtol=0, atol=1e-4)
    assert after.stats.dense_bytes * 2 == before.stats.dense_bytes
    assert all(after.stats.held[part] * 2 == before.stats.held[part] for part in ("pages", "exact", "tail"))


def _without_tokenizer(directory):
    (directory / "tokenizer.json").unlink()


def _of_other_heads(directory):
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(settings | {"num_key_value_heads": 2}))


def _quantised(directory):
    tensors = load_file(directory / "model.safetensors")
    save_file({name: tensor.to(torch.int8) for name, tensor in tensors.items()}, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "heads", "words"),
    [
        (None, 3, "has 4 key/value heads, which cannot become 3: possible are 1, 2$"),
        (None, 4, "cannot become 4"),
        (None, 8, "cannot become 8"),
        (None, 0, "cannot become 0"),
        (None, -2, "cannot become -2"),
        (_of_other_heads, 1, "has 64 rows, not the 2 heads of 16 of its config.json: they do not belong together"),
        (_without_tokenizer, 2, "holds no tokenizer"),
        (_quantised, 2, "is stored as I8: .* take the checkpoint that was not quantised"),
        (lambda directory: (directory / "model.safetensors").unlink(), 2, "has no model.safetensors"),
        (lambda directory: (directory / "config.json").write_text('{"model_type": "gpt2"}'), 2, "model of type 'gpt2'"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, capsys, spoil, heads, words):
    source = tiny_model(tmp_path / "in", num_key_value_heads=4)
    if spoil:
        spoil(source)
    capsys.readouterr()
    assert mha_to_gqa.main([str(source), str(tmp_path / "out"), "--kv-heads", str(heads)]) == 2
    said = capsys.readouterr().err.removesuffix("\n")
    assert re.search(words, said) and "\n" not in said and [p.name for p in tmp_path.iterdir()] == ["in"]
