"""Twenty DMC steps under every parallel layout are the run of one process: same losses, gradient norms, measured
CR (one hinge over everything, also where no rank sees all layers, heads or tokens) and final weights."""

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

# Four layers (two stages of two chunks), four micro-batches, documents of less than a sequence, 6 + 14 steps.
STEPS = ("dmc.hold_steps=14", "optim.micro_batch=1", "optim.global_batch=4", "optim.lr=3e-4")
RELATIVE, ABSOLUTE = 1e-3, 2e-4  # fp32 sums in another order, through twenty steps of Adam


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("layouts")
    tiny_model(tmp / "model", num_hidden_layers=4)
    tiny_text(tmp / "text.jsonl", words=40)
    tiny_text(tmp / "held.jsonl", documents=4)
    return tmp, small_run(tmp, "one", *STEPS, f"data.held_out={tmp / 'held.jsonl'}")


def same(reference, *layout, processes):
    tmp, one = reference
    name = "-".join(str(part).replace("parallel.", "").replace("=", ".") for part in layout) or "data"
    output = small_run(tmp, f"{name}-{processes}", *STEPS, f"data.held_out={tmp / 'held.jsonl'}", *layout, processes=processes)
    assert_same_run(output, one, tolerance=2e-4, absolute=1e-5)
    for mine, other in zip(evaluations(output), evaluations(one), strict=True):
        assert mine["name"] == other["name"]
        assert mine["eval_perplexity"] == pytest.approx(other["eval_perplexity"], rel=2e-4)
        assert mine["eval_heads"] == [pytest.approx(heads, rel=1e-2) for heads in other["eval_heads"]]  # of 256 decisions a head
    ours, theirs = weights(output), weights(one)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=RELATIVE, atol=ABSOLUTE, msg=lambda m, k=key: f"{k}: {m}")
    return output


def test_the_reference_is_a_retrofit_worth_comparing(reference):
    """The hinge opens and closes, merging is real, the weights move."""
    lines = metrics(reference[1])
    assert len(lines) == 20 and lines[-1]["measured_cr"] > 1.5
    reached = [m["soft_cr"] >= m["target_cr"] for m in lines]
    assert True in reached and False in reached


@pytest.mark.parametrize(
    "layout",
    [
        ("optim.micro_batch=4", "parallel.recompute=full"),
        *(
            pytest.param(one, marks=pytest.mark.slow)
            for one in [("optim.micro_batch=4",), ("parallel.recompute=full",), ("parallel.recompute=selective",)]
        ),
    ],
)
def test_one_process(reference, layout):
    same(reference, *layout, processes=1)


@pytest.mark.parametrize(
    "layout",
    [
        ("parallel.tensor=2", "parallel.sequence=true"),
        ("parallel.pipeline=2", "parallel.virtual=2"),
        ("parallel.distributed_optimizer=true", "parallel.overlap=true"),
        ("parallel.context=2", "parallel.recompute=selective"),
        *(
            pytest.param(one, marks=pytest.mark.slow)
            for one in [
                (),
                ("parallel.tensor=2",),
                ("parallel.pipeline=2",),
                ("parallel.context=2",),
                ("parallel.distributed_optimizer=true",),
            ]
        ),
    ],
    ids=lambda layout: "-".join(part.split(".")[1] for part in layout) or "data",
)
def test_two_processes(reference, layout):
    same(reference, *layout, processes=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        ("parallel.tensor=2", "parallel.pipeline=2"),
        ("parallel.tensor=2", "parallel.pipeline=2", "parallel.virtual=2", "parallel.sequence=true"),
        ("parallel.tensor=2", "parallel.context=2", "parallel.sequence=true"),
        ("parallel.pipeline=2", "parallel.context=2"),
        ("parallel.pipeline=2", "parallel.distributed_optimizer=true", "parallel.overlap=true"),
        ("parallel.pipeline=2", "parallel.virtual=2", "parallel.distributed_optimizer=true", "parallel.overlap=true"),
        ("parallel.context=2", "parallel.distributed_optimizer=true", "parallel.recompute=full"),
    ],
    ids=lambda layout: "-".join(part.split(".")[1] for part in layout),
)
def test_four_processes(reference, layout):
    same(reference, *layout, processes=4)


@pytest.mark.slow
def test_the_distributed_optimizers_checkpoint_resumes_exactly_and_on_one_process(reference):
    """Bit for bit on the same ranks; on one process to rounding. Turning it off for a resumed run is refused."""
    tmp, _ = reference
    whole = ("parallel.distributed_optimizer=true", *STEPS, f"data.held_out={tmp / 'held.jsonl'}")
    output = small_run(tmp, "sharded", *whole, "run.save_every=10", processes=2)
    halfway = output / "checkpoints" / "step000010"
    again = small_run(tmp, "sharded-again", *whole, "--resume", halfway, processes=2)
    assert_same_run(again, output, tolerance=0, steps=10)
    for name, tensor in weights(output).items():
        assert torch.equal(tensor, weights(again)[name]), name
    alone = small_run(tmp, "sharded-alone", *whole, "--resume", halfway)
    assert_same_run(alone, output, tolerance=2e-4, absolute=1e-5, steps=10)
    done = train(*arguments(tmp, tmp / "plain"), *STEPS, f"data.held_out={tmp / 'held.jsonl'}", "--resume", halfway, check=False)
    assert done.returncode == 2 and "parallel.distributed_optimizer=True, here it is False" in done.stderr
