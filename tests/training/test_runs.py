"""Whole runs of train.py: the retrofit compresses, resumes exactly, and is the same run under other layouts."""

import json

import pytest
import torch

from checkpoints.convert import load_hf_state
from checkpoints.store import CheckpointStore
from tests.training.helpers import SMALL, assert_same_run, evaluations, metrics, small_run, train, weights


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("runs")
    return tmp, small_run(tmp, "reference", "run.save_every=4")


def test_the_retrofit_compresses_and_reports(reference):
    _, output = reference
    lines = metrics(output)
    assert [m["phase"] for m in lines] == ["ramp"] * 6 + ["hold"] * 2
    assert lines[-1]["target_cr"] == 2 and lines[-1]["measured_cr"] > 1.2
    assert lines[0]["loss"] < 0.5  # KL to the teacher: the untrained head decides nothing yet, so almost 0
    evaluations = [json.loads(x) for x in (output / "metrics.jsonl").read_text().splitlines() if "eval_cr" in x]
    assert [e["name"] for e in evaluations] == ["base", "step000004", "cr2", "final"]
    heads = torch.tensor(evaluations[-1]["eval_heads"])
    assert heads.shape == (2, 2) and evaluations[-1]["eval_cr"] == pytest.approx(1 / (1 / heads).mean().item())


def test_every_integer_ratio_leaves_a_checkpoint(reference):
    _, output = reference
    names = {p.name for p in (output / "checkpoints").iterdir()}
    assert {"cr2", "final", "step000004"} <= names
    assert CheckpointStore(output / "checkpoints").newest().name == "final"


def test_resume_is_exact(reference):
    """Continuing from step 4 gives the same last four steps and the same weights, bit for bit."""
    tmp, output = reference
    resumed = small_run(tmp, "resumed", "--resume", output / "checkpoints" / "step000004")
    assert_same_run(resumed, output, tolerance=0, steps=4)
    for name, tensor in weights(output).items():
        assert torch.equal(tensor, weights(resumed)[name]), name


def test_the_ramp_stops_at_an_integer_ratio_and_resumes_exactly_within_the_stop(reference):
    """cr2 is saved after its hold, evaluated on hard decisions; a run continued in the middle of the hold is the same run."""
    tmp, _ = reference
    options = (
        "--target-cr",
        3,
        "dmc.ramp_steps_per_unit=3",
        "dmc.hold_steps=1",
        "dmc.integer_hold_steps=3",
        "optim.decay_steps=2",
        "optim.warmup_steps=0",
    )
    output = small_run(tmp, "stops", *options, "run.save_every=4")
    lines = metrics(output)
    assert [m["phase"] for m in lines] == ["ramp"] * 3 + ["hold"] * 3 + ["ramp"] * 3 + ["hold"]
    assert [m["target_cr"] for m in lines][2:7] == pytest.approx([2, 2, 2, 2, 7 / 3])
    assert [m["lr"] for m in lines][2:7] == pytest.approx([3e-3, 3e-3, 2e-3, 1e-3, 3e-3])
    assert [(e["step"], e["name"]) for e in evaluations(output)] == [
        (0, "base"),
        (4, "step000004"),
        (6, "cr2"),
        (8, "step000008"),
        (9, "cr3"),
        (10, "final"),
    ]
    _, meta = load_hf_state(output / "checkpoints" / "cr2")
    assert meta["target_cr"] == 2 and meta["compressed"] and meta["measured_cr"] == evaluations(output)[2]["eval_cr"]
    resumed = small_run(tmp, "stops-resumed", *options, "--resume", output / "checkpoints" / "step000004")
    assert_same_run(resumed, output, tolerance=0, steps=6)
    for name, tensor in weights(output).items():
        assert torch.equal(tensor, weights(resumed)[name]), name


def test_same_seed_same_run_other_seed_other_run(reference):
    tmp, output = reference
    again, other = small_run(tmp, "again", "run.async_save=true", "run.save_every=1"), small_run(tmp, "other", "run.seed=1")
    assert_same_run(again, output, tolerance=0)
    kept = {p.name for p in (again / "checkpoints").iterdir()}
    assert kept == {"cr2", "final", "newest", "step000005", "step000006", "step000007"}  # run.keep_last is 3
    for name, tensor in weights(output).items():  # written while training went on
        assert torch.equal(tensor, weights(again)[name]), name
    assert metrics(other)[0]["lm_loss"] != metrics(output)[0]["lm_loss"]


def test_neuron_run_with_repurposing(reference):
    tmp, _ = reference
    output = small_run(tmp, "neuron", "dmc.decision=neuron", "dmc.repurpose_steps=5", "distill.lm_weight=0.5")
    lines = metrics(output)
    assert [m["phase"] for m in lines] == ["repurpose"] * 5 + ["ramp"] * 6 + ["hold"] * 2
    assert "measured_cr" not in lines[4] and lines[5]["measured_cr"] == 1.0  # rows set to 0: nothing merges yet
    assert lines[5]["loss"] == pytest.approx(0.5 * lines[5]["lm_loss"] + lines[5]["distill_loss"])


def test_control_run_has_no_compression(reference):
    tmp, _ = reference
    output = small_run(tmp, "control", "dmc.method=none", "run.steps=3")
    assert [m["phase"] for m in metrics(output)] == ["plain"] * 3
    assert not load_hf_state(output / "checkpoints" / "final")[1]["compressed"]


def test_bf16_and_muon_run(reference):
    tmp, _ = reference
    lines = metrics(small_run(tmp, "muon", "optim.name=muon", "run.precision=bf16"))
    assert lines[-1]["measured_cr"] > 1.2


REFUSED = [
    (["--target-crr", "4"], "unknown flag --target-crr"),
    (["dmc.tau=1"], "unknown config key 'dmc.tau'; known in dmc: method, target_cr"),
    (["--target-cr", "0.5"], "dmc.target_cr is 0.5"),
    (["--target-cr", "four"], "dmc.target_cr is 'four': it must be a number"),
    (["optim.global_batch=3", "optim.micro_batch=2"], "optim.global_batch 3 is not a multiple"),
    (["parallel.tensor=2"], "does not divide the 1 processes"),
    (["data.sequence_length=100000"], "exceeds the model's max_position_embeddings"),
    (["data.text=missing.txt"], "no text file or prepared corpus at missing.txt"),
    (["--resume", "nowhere"], "no checkpoint at nowhere"),
    (["--config", "nothing.yaml"], "no config file at nothing.yaml"),
    (["--model", "nothing"], "no config.json"),
]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            *one, marks=() if one[0][0] in ("--target-crr", "data.sequence_length=100000", "--resume") else pytest.mark.slow
        )
        for one in REFUSED  # each a process; test_train.py has more of them in one
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(reference, arguments, message):
    tmp, _ = reference
    base = ["--output", tmp / "never", f"data.text={tmp / 'text.jsonl'}", f"data.cache={tmp / 'cache'}", *SMALL]
    model = [] if "--model" in arguments else ["--model", tmp / "model"]
    done = train(*base, *model, *arguments, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert message in done.stderr and len(done.stderr.strip().splitlines()[-1]) < 600
    assert not (tmp / "never" / "metrics.jsonl").exists()


def test_an_output_directory_that_holds_a_run_is_refused(reference):
    tmp, output = reference
    before = (output / "metrics.jsonl").read_text()
    done = train(
        "--model",
        tmp / "model",
        "--output",
        output,
        f"data.text={tmp / 'text.jsonl'}",
        f"data.cache={tmp / 'cache'}",
        *SMALL,
        check=False,
    )
    assert done.returncode == 2 and "holds a run" in done.stderr
    assert (output / "metrics.jsonl").read_text() == before
