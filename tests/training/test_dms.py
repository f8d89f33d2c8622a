"""DMS retrofits of the tiny model: they compress, resume, export, and are the same run under every layout."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from dmc.training.config import load
from tests.training.helpers import (
    ROOT,
    arguments,
    assert_same_run,
    evaluations,
    metrics,
    small_run,
    tiny_model,
    tiny_text,
    train,
    weights,
)

WINDOW = 6
STEPS = ("--method", "dms", f"dmc.window={WINDOW}", "dmc.hold_steps=14", "optim.lr=3e-4")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("dms")
    tiny_model(tmp / "model", num_hidden_layers=4)
    tiny_text(tmp / "text.jsonl", words=40)
    tiny_text(tmp / "held.jsonl", documents=4)
    return tmp, run(tmp, "one")


def run(tmp, name, *extra, processes=1):
    return small_run(tmp, name, *STEPS, f"data.held_out={tmp / 'held.jsonl'}", "run.save_every=10", *extra, processes=processes)


def same(reference, name, *layout, processes=1):
    tmp, one = reference
    output = run(tmp, name, *layout, processes=processes)
    assert_same_run(output, one, tolerance=2e-4, absolute=1e-5)
    assert evaluations(output)[-1]["eval_perplexity"] == pytest.approx(evaluations(one)[-1]["eval_perplexity"], rel=2e-4)
    for key, tensor in weights(one).items():
        torch.testing.assert_close(weights(output)[key], tensor, rtol=1e-3, atol=2e-4, msg=lambda m, k=key: f"{k}: {m}")
    return output


def test_it_compresses_as_the_target_says(reference):
    lines = metrics(reference[1])
    assert len(lines) == 20 and lines[-1]["measured_cr"] > 1.5
    reached = [m["soft_cr"] >= m["target_cr"] for m in lines]
    assert True in reached and False in reached
    assert lines[-1]["measured_cr"] <= 64 / WINDOW  # the window is always held, and counted


def test_a_resumed_run_is_the_run_bit_for_bit(reference):
    tmp, one = reference
    again = run(tmp, "again", "--resume", one / "checkpoints" / "step000010")
    assert_same_run(again, one, tolerance=0, steps=10)
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, weights(again)[name]), name


@pytest.mark.slow
def test_another_window_is_another_run(reference):
    tmp, one = reference
    done = train(
        *arguments(tmp, tmp / "other"),
        *STEPS,
        "dmc.window=7",
        f"data.held_out={tmp / 'held.jsonl'}",
        "--resume",
        one / "checkpoints" / "step000010",
        check=False,
    )
    assert done.returncode == 2 and "dmc.window=6, here it is 7" in done.stderr


@pytest.mark.slow
def test_tensor_and_sequence_parallel(reference):
    same(reference, "tensor-sequence", "parallel.tensor=2", "parallel.sequence=true", processes=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        (),
        ("parallel.tensor=2",),
        ("parallel.context=2",),
        ("parallel.pipeline=2",),
        ("parallel.pipeline=2", "parallel.virtual=2"),
        ("parallel.distributed_optimizer=true", "parallel.overlap=true"),
        ("parallel.context=2", "parallel.recompute=selective"),
    ],
    ids=lambda layout: "-".join(part.split(".")[1] for part in layout) or "data",
)
def test_other_layouts(reference, layout):
    same(reference, "-".join(part.split(".")[1] for part in layout) + "-", *layout, processes=2)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation(reference, recompute):
    same(reference, recompute, f"parallel.recompute={recompute}")


@pytest.mark.slow
def test_an_adapter_leaves_the_base_as_it_is(reference):
    tmp, _ = reference
    output = run(tmp, "adapter", "dmc.train=decision", "optim.lr=1e-3")
    from dmc.weights import Weights

    original = Weights(tmp / "model")
    for name, tensor in weights(output).items():
        assert name.endswith("decision.weight") or torch.equal(tensor, original(name)), name
    assert metrics(output)[-1]["measured_cr"] > 1.3


@pytest.mark.parametrize("decision", ["head", *(pytest.param(other, marks=pytest.mark.slow) for other in ("neuron", "late"))])
def test_the_export_reaches_what_training_measured(reference, tmp_path, decision):
    """Perplexity and CR of the last evaluation again, from the exported model alone on the same held-out rows."""
    tmp, output = reference
    if decision == "neuron":
        output = run(tmp, "neuron", "dmc.decision=neuron", "dmc.repurpose_steps=4")
    elif decision == "late":
        output = run(tmp, "late", "dmc.decide=late")
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "export_hf.py", output / "checkpoints" / "final", tmp_path / "hf"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["dmc"]["method"] == "dms" and config["dmc"]["window"] == WINDOW
    assert "arXiv 2506.05345" in (tmp_path / "hf" / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True, dtype=torch.float32).eval()
    rows = held_out_rows(tmp, 64)
    with torch.no_grad():
        out = model(rows[:, :-1])
    loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), rows[:, 1:].flatten())
    last = evaluations(output)[-1]
    assert loss.exp().item() == pytest.approx(last["eval_perplexity"], rel=1e-3)
    assert out.past_key_values.compression_ratio() == pytest.approx(last["eval_cr"], rel=1e-3)


def held_out_rows(tmp, length):
    """The evaluation's sequences: the first four runs of tokens of the held-out text, each of one document."""
    from data import batches, tokens

    config = load(
        overrides=[
            f"data.text={tmp / 'text.jsonl'}",
            f"data.held_out={tmp / 'held.jsonl'}",
            f"data.cache={tmp / 'cache'}",
            f"data.sequence_length={length}",
            "log.eval_sequences=4",
            "optim.micro_batch=1",
            "optim.global_batch=4",
            "run.seed=0",
        ]
    )
    tokenizer = tokens.load_tokenizer(tmp / "model", 2048)
    training, held = tokens.corpora(config.data.text, config.data.held_out, tokenizer, config.data.cache)
    source = batches.Source(training, held, length, config.optim, config.log, 0)
    found = source.evaluation(rank=0, ranks=1)
    assert not any(batch.starts[:, 1:].any() for batch in found), "documents shorter than a row"
    return torch.cat([torch.cat([b.tokens, b.labels[:, -1:]], 1) for b in found])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["dmc.window=0"], "dmc.window is 0: it must be at least 1"),
        (
            ["dmc.window=256"],
            "dmc.window 256 keeps at least 256 of data.sequence_length 1024 tokens, so the largest possible CR is "
            "1024 / 256 = 4 and dmc.target_cr 4 is out of reach: set dmc.window to at most 255",
        ),
        (["run.init=random"], "run.init=random with dmc.method=dms: DMS retrofits a pretrained model"),
    ],
)
def test_settings_that_cannot_work_are_one_sentence(overrides, words):
    with pytest.raises(ValueError) as caught:
        load(overrides=["dmc.method=dms", *overrides])
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_recipe():
    config = load(ROOT / "configs" / "dms-quickstart.yaml")
    at_once = load(ROOT / "configs" / "merge-at-once.yaml")
    assert (config.dmc.method, config.dmc.ramp_steps_per_unit, config.distill.weight) == ("dms", 100, 1)
    assert config.optim == at_once.optim and config.data == at_once.data
