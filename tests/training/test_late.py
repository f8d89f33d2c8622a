"""Retrofits with late merging of the tiny model: they compress, resume, export, and are the same run under every layout."""

import pytest
import torch

from dmc.fitted import FittedDecisions
from dmc.training import setup
from dmc.training.config import load
from tests.training.helpers import (
    arguments,
    assert_same_run,
    evaluations,
    metrics,
    small_run,
    tiny_model,
    tiny_shape,
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


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ("dmc.window=7", "dmc.window=6, here it is 7"),
        ("dmc.decide=arrival", "dmc.decide=late, here it is arrival"),
        ("dmc.window=null", "dmc.window=6, here it is None"),
    ],
)
@pytest.mark.slow
def test_another_window_is_another_run(reference, changed, words):
    tmp, one = reference
    done = train(
        *arguments(tmp, tmp / changed),
        *STEPS,
        changed,
        f"data.held_out={tmp / 'held.jsonl'}",
        "--resume",
        one / "checkpoints" / "step000010",
        check=False,
    )
    assert done.returncode == 2 and words in done.stderr


def test_context_parallel(reference):
    """The band crosses the borders of the ranks' chunks, and so does the look ahead."""
    same(reference, "context", "parallel.context=2", processes=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        (),
        ("parallel.tensor=2",),
        ("parallel.tensor=2", "parallel.sequence=true"),
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
@pytest.mark.parametrize(
    "settings",
    [
        ("dmc.decide=arrival",),
        ("dmc.decision=neuron", "dmc.repurpose_steps=4"),
        ("dmc.window=0",),
        ("--method", "dms", "dmc.decide=late"),
        ("dmc.train=decision", "optim.lr=1e-3"),
    ],
    ids=lambda settings: settings[0],
)
def test_other_settings_compress(reference, settings):
    assert metrics(run(reference[0], "-".join(settings).replace("/", "-"), *settings))[-1]["measured_cr"] > 1.2


def fitted_for(config, hf, window=WINDOW):
    g = torch.Generator().manual_seed(4)
    layers, heads, hidden = hf.num_hidden_layers, hf.num_key_value_heads, hf.hidden_size
    weights = [torch.randn(layers, heads, hidden, generator=g) for _ in range(2)]
    return FittedDecisions(
        *weights,
        torch.randn(layers, heads, generator=g),
        window=window,
        sinks=1,
        quantiles=torch.linspace(-9, 3, 101),
        model="m",
        meta={},
    )


@pytest.mark.parametrize("method", ["dmc", "dms"])
def test_a_start_from_fitted_decisions_decides_as_they_do(process_group, method):
    """The logit of every layer and head is above the offset where the fitted score is below the threshold, by its scale."""
    overrides = [f"dmc.window={WINDOW}", "data.sequence_length=64", "dmc.target_cr=2", "dmc.init=F", "run.threads=1"]
    overrides += [f"dmc.method={method}", "dmc.decide=late"]
    config, hf = load(overrides=overrides), tiny_shape(num_hidden_layers=3)
    student, fitted = setup.build_student(config, hf, None), fitted_for(config, hf)
    setup.start_from(config, student, fitted)
    hidden = torch.randn(20, 1, hf.hidden_size, generator=torch.Generator().manual_seed(1))
    threshold = fitted.threshold(2, 64)
    for layer in range(3):
        rows, _ = student.chunks[0].decoder.layers[layer].self_attention.decision(hidden)
        rows = config.dmc.gain * rows[:, 0].unflatten(-1, (hf.num_key_value_heads, -1))
        logits = rows[: 20 - WINDOW, :, 0] + rows[WINDOW:, :, -1]
        inside = fitted.scores(layer, hidden[:, 0])[1 : 19 - WINDOW]
        expected = config.dmc.init_scale * (threshold - inside) + config.dmc.offset
        torch.testing.assert_close(logits[1 : 19 - WINDOW], expected, rtol=1e-4, atol=1e-3)
        assert not rows[..., 1:-1].any()  # omega as from zero


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["dmc.init=F"], "dmc.window=null"),
        (["dmc.init=F", "dmc.window=4", "dmc.decide=arrival"], "set dmc.window to that of the file"),
        (["dmc.init=F", "dmc.window=4", "dmc.init_scale=0"], "dmc.init_scale is 0.0: it must be a positive number"),
    ],
)
def test_starts_that_cannot_work_are_one_sentence(overrides, words):
    with pytest.raises(ValueError) as caught:
        load(overrides=overrides)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_of_another_model_or_window_ends_before_anything_is_written(reference, tmp_path):
    tmp, _ = reference
    made = fitted_for(None, tiny_shape(num_hidden_layers=4))
    made.save(tmp_path / "other.safetensors")
    held = f"data.held_out={tmp / 'held.jsonl'}"
    done = train(*arguments(tmp, tmp / "started"), *STEPS, held, f"dmc.init={tmp_path / 'other.safetensors'}", check=False)
    assert done.returncode == 2 and "fitted for another model or window (model fingerprint m, not" in done.stderr
    assert not (tmp / "started" / "checkpoints").exists()
    done = train(*arguments(tmp, tmp / "none"), *STEPS, held, f"dmc.init={tmp_path / 'none'}", check=False)
    assert done.returncode == 2 and "is missing" in done.stderr and not (tmp / "none").exists()
