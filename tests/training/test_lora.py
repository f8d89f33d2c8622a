"""Low-rank updates of a frozen model: what learns, every layout, resuming, the merged export and its adapter."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dmc import LLM
from dmc.commands.export import main as export
from dmc.families import read_shape
from dmc.training import planning, setup
from dmc.training.config import load
from dmc.training.planning import Layout
from dmc.weights import Weights
from tests.training.helpers import assert_same_run, metrics, small_run, tiny_model, tiny_shape, tiny_text, weights
from tests.training.plans import held

LORA = ("dmc.train=lora", "dmc.lora_rank=4", "dmc.lora_mlp=true", "dmc.hold_steps=4", "optim.lr=1e-3", "dmc.window=8")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("lora")
    tiny_model(tmp / "model")
    tiny_text(tmp / "text.jsonl", words=40)
    tiny_text(tmp / "held.jsonl", documents=4)
    return tmp, small_run(tmp, "one", *LORA, f"data.held_out={tmp / 'held.jsonl'}")


def same(run, name, *layout, processes=1, tolerance=2e-5):
    """The run of one process, to rounding: it ends before rounding changes a decision."""
    tmp, one = run
    output = small_run(tmp, name, *LORA, f"data.held_out={tmp / 'held.jsonl'}", *layout, processes=processes)
    assert_same_run(output, one, tolerance=tolerance, absolute=1e-6)
    ours, theirs = weights(output), weights(one)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-3, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
    return output


def test_what_is_low_rank_changes_and_nothing_else(run):
    tmp, output = run
    before, after = Weights(tmp / "model"), weights(output)
    for name in before:
        change = (after[name] - before(name)).float()
        if name.endswith("_proj.weight"):
            values = torch.linalg.svdvals(change)
            assert values[0] > 1e-3 and values[4:].max() < 1e-4 * values[0], name
        else:
            assert torch.equal(after[name], before(name)), name
    assert sum(name.endswith("decision.weight") for name in after) == 2 and metrics(output)[-1]["measured_cr"] > 1.2


def test_its_teacher_is_the_frozen_model_itself(run):
    """The same run as with the original model loaded a second time."""
    same(run, "twice", f"distill.teacher={run[0] / 'model'}", tolerance=1e-6)


@pytest.mark.parametrize(
    ("layout", "processes"),
    [
        (("parallel.tensor=2", "parallel.sequence=true"), 2),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in [
                (("parallel.tensor=2",), 2),
                (("parallel.pipeline=2",), 2),
                (("parallel.context=2",), 2),
                ((), 2),
                (("parallel.distributed_optimizer=true", "parallel.overlap=true"), 2),
                (("parallel.recompute=full",), 1),
                (("parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"), 4),
            ]
        ),
    ],
)
def test_layouts_are_the_run_of_one_process(run, layout, processes):
    same(run, "-".join(layout) or "data", *layout, processes=processes)


@pytest.mark.slow
def test_a_resumed_run_is_the_run_bit_for_bit(run):
    tmp, _ = run
    settings = (*LORA, "run.save_every=6", f"data.held_out={tmp / 'held.jsonl'}")
    whole = small_run(tmp, "saved", *settings)
    again = small_run(tmp, "again", *settings, "--resume", whole / "checkpoints" / "step000006")
    assert_same_run(again, whole, tolerance=0, steps=len(metrics(again)))
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(again)[name]), name


def test_the_export_is_merged_and_the_adapter_is_the_change(run, tmp_path):
    """W + alpha / rank * B A, by peft's names and formula, is the exported weight; the engine computes what training measured."""
    tmp, output = run
    assert export([str(output / "checkpoints" / "final"), str(tmp_path / "out")]) == 0
    settings = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert settings["target_modules"] == sorted(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    factors = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    before, after = Weights(tmp / "model"), Weights(tmp_path / "out")
    changed = [name for name in before if name.endswith("_proj.weight")]
    assert len(factors) == 2 * len(changed) == 28
    for name in changed:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (factors[f"{module}.lora_{kind}.weight"] for kind in "AB")
        merged = before(name) + settings["lora_alpha"] / settings["r"] * b @ a
        torch.testing.assert_close(after(name), merged, rtol=0, atol=1e-5)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    tokens = torch.randint(3, 2048, (1, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens).logits[0].log_softmax(-1)[:-1].gather(1, tokens[0, 1:, None])[:, 0]
    score = LLM(tmp_path / "out", device="cpu", dtype="fp32").score(tokens.tolist(), prompt_tokens=20)[0]
    torch.testing.assert_close(score.logprobs, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_plan_counts_the_updates(process_group, precision):
    config = load(overrides=["data.sequence_length=64", "dmc.train=lora", "dmc.lora_mlp=true", f"run.precision={precision}"])
    plan = planning.memory(config, tiny_shape(), Layout.of(config, 1), 0, on_gpu=False)
    student = setup.build_student(config, tiny_shape(), None)
    assert plan.weights == sum(weight.nbytes for weight in student.chunks[0].parameters())
    assert plan.teacher == 0 and [plan.gradients, plan.optimizer] == held(student)[1:]


def test_what_it_cannot_go_with_is_one_sentence():
    for more, words in (
        (["dmc.method=none"], "dmc.train=lora trains the added decision heads of a frozen model, and dmc.method=none"),
        (["dmc.decision=neuron"], "dmc.decision=neuron has none"),
        (["dmc.lora_rank=0"], "dmc.lora_rank is 0"),
        (["dmc.lora_alpha=0"], "dmc.lora_alpha is 0"),
        (["dmc.train=adapter"], "dmc.train is 'adapter'"),
    ):
        with pytest.raises(ValueError, match=words):
            load(overrides=["dmc.train=lora", *more])


def test_families_with_biases_and_norms(process_group, tmp_path):
    """Updates of Qwen2's and Qwen3's layers: biases stay, logits are those of the base until B learns."""
    from tests.families.models import directory
    from tests.training.models import logits

    tokens = torch.randint(3, 2048, (1, 30), generator=torch.Generator().manual_seed(0))
    from checkpoints import convert

    for family in ("qwen2", "qwen3"):
        path = directory(tmp_path / family, family)
        config = load(overrides=["data.sequence_length=64", "dmc.train=lora"])
        student = setup.build_student(config, read_shape(path), convert.loader(read_shape(path), Weights(path)))
        chunk, student.state.mode = student.chunks[0].eval(), "plain"
        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens).logits
            assert (logits(chunk, tokens) - expected).abs().max() < 1e-4
            for name, weight in chunk.named_parameters():
                if ".lora_" in name and name.endswith(".b"):
                    weight.fill_(0.1)
            assert (logits(chunk, tokens) - expected).abs().max() > 0.1
            student.state.adapted = False
            assert (logits(chunk, tokens) - expected).abs().max() < 1e-4
