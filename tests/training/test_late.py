"""Retrofits with late merging of the tiny model: they compress, resume, export, and are the same run under every layout."""

import pytest
import torch

from tests.training.helpers import (
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
STEPS = (f"dmc.window={WINDOW}", "dmc.hold_steps=14", "optim.lr=3e-4")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("late")
    tiny_model(tmp / "model", num_hidden_layers=4)
    tiny_text(tmp / "text.jsonl", words=40)  # documents are packed: some are shorter than a sequence
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


def test_it_compresses_as_the_target_says(reference):
    lines = metrics(reference[1])
    assert len(lines) == 20 and lines[-1]["measured_cr"] > 1.5
    reached = [m["soft_cr"] >= m["target_cr"] for m in lines]
    assert True in reached and False in reached
    assert lines[-1]["measured_cr"] <= 64 / (WINDOW + 1)  # the window is always held, and counted


def test_the_head_has_a_late_part(reference):
    """Rows of alpha, omega and the late part for each of 2 heads, and a bias; all of them are trained."""
    for name, tensor in weights(reference[1]).items():
        if "decision" in name:
            assert tensor.shape[0] == 6
            assert all(part.abs().max() > 0 for part in tensor.chunk(3)), name


def test_a_resumed_run_is_the_run_bit_for_bit(reference):
    tmp, one = reference
    again = run(tmp, "again", "--resume", one / "checkpoints" / "step000010")
    assert_same_run(again, one, tolerance=0, steps=10)
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, weights(again)[name]), name


@pytest.mark.parametrize(("changed", "words"), [
    ("dmc.window=7", "dmc.window=6, here it is 7"), ("dmc.decide=arrival", "dmc.decide=late, here it is arrival"),
    ("dmc.window=null", "dmc.window=6, here it is None"),
])
@pytest.mark.slow
def test_another_window_is_another_run(reference, changed, words):
    tmp, one = reference
    done = train(
        *arguments(tmp, tmp / changed), *STEPS, changed, f"data.held_out={tmp / 'held.jsonl'}",
        "--resume", one / "checkpoints" / "step000010", check=False,
    )
    assert done.returncode == 2 and words in done.stderr


def test_context_parallel(reference):
    """The band crosses the borders of the ranks' chunks, and so does the look ahead."""
    same(reference, "context", "parallel.context=2", processes=2)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [
    (), ("parallel.tensor=2",), ("parallel.tensor=2", "parallel.sequence=true"), ("parallel.pipeline=2",),
    ("parallel.pipeline=2", "parallel.virtual=2"), ("parallel.distributed_optimizer=true", "parallel.overlap=true"),
    ("parallel.context=2", "parallel.recompute=selective"),
], ids=lambda layout: "-".join(part.split(".")[1] for part in layout) or "data")
def test_other_layouts(reference, layout):
    same(reference, "-".join(part.split(".")[1] for part in layout) + "-", *layout, processes=2)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation(reference, recompute):
    same(reference, recompute, f"parallel.recompute={recompute}")


@pytest.mark.slow
@pytest.mark.parametrize("settings", [
    ("dmc.decide=arrival",), ("dmc.decision=neuron", "dmc.repurpose_steps=4"), ("dmc.window=0",),
    ("--method", "dms", "dmc.decide=late"), ("dmc.train=decision", "optim.lr=1e-3"),
], ids=lambda settings: settings[0])
def test_other_settings_compress(reference, settings):
    assert metrics(run(reference[0], "-".join(settings).replace("/", "-"), *settings))[-1]["measured_cr"] > 1.2
