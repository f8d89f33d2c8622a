"""Where a run's numbers go: JSONL, the terminal, tensorboard and wandb."""

import json
import os
import subprocess
import sys

import pytest
import torch

from dmc.training import flops
from dmc.training import metrics as metrics_module
from dmc.training.config import LogConfig, load
from dmc.training.metrics import Meter, Reporter, progress_line
from tests.training.helpers import ROOT, SMALL, tiny_config, tiny_model, tiny_shape, tiny_text

PLAIN = {
    "step": 3,
    "phase": "plain",
    "lr": 1e-3,
    "loss": 2.34567,
    "lm_loss": 2.34567,
    "grad_norm": 0.5,
    "tokens_per_s": 3120.4,
    "memory_gib": 1.26,
    "eta_s": 161.2,
}
RAMP = PLAIN | {
    "step": 4,
    "phase": "ramp",
    "target_cr": 2.104,
    "measured_cr": 2.0666,
    "soft_cr": 2.0,
    "mfu": 0.4217,
    "cr_layer": [2.5, 1.75],
}
EVALUATION = {"step": 4, "name": "cr2", "eval_perplexity": 5.43216, "eval_cr": 1.98765, "eval_heads": [[2.0, 1.9]]}


def reporter(output, *, rank=0, **settings):
    return Reporter(LogConfig(**settings), output, {"run": {"seed": 3}}, rank=rank, steps=450)


def lines(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------- lines


def test_every_step_and_evaluation_is_a_line_of_json(tmp_path, capsys):
    run = reporter(tmp_path)
    run.step(PLAIN, shown=False)
    run.step(RAMP, shown=True)
    run.evaluation(EVALUATION)
    written = lines(tmp_path)  # before it is closed: a run that is killed keeps them
    run.close()
    assert [line.pop("time") > 1.6e9 for line in written] == [True] * 3
    assert written == [PLAIN, RAMP, EVALUATION] == [{k: v for k, v in x.items() if k != "time"} for x in lines(tmp_path)]
    shown, evaluated = capsys.readouterr().out.splitlines()
    assert shown == progress_line(RAMP, 450)
    assert "[cr2]" in evaluated and "held-out perplexity 5.4322" in evaluated and "measured CR 1.988" in evaluated


def test_a_second_reporter_writes_behind_the_first(tmp_path):
    for metrics in (PLAIN, RAMP):
        run = reporter(tmp_path)
        run.step(metrics, shown=False)
        run.close()
    assert [line["step"] for line in lines(tmp_path)] == [3, 4]


def test_progress_lines_hold_what_one_wants_to_know():
    assert progress_line(PLAIN, 450).split() == "step 3/450 plain loss 2.3457 3120 tokens/s 1.3 GiB ETA 2:41".split()
    assert progress_line(RAMP, 450).split() == (
        "step 4/450 ramp loss 2.3457 target CR 2.10 measured CR 2.07 3120 tokens/s MFU 42.2 % 1.3 GiB ETA 2:41".split()
    )


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0:00"), (0.4, "0:00"), (59.6, "1:00"), (61, "1:01"), (3599.4, "59:59"), (3599.6, "1:00:00"), (90061, "25:01:01")],
)
def test_the_time_left_is_a_clock(seconds, shown):
    assert progress_line(PLAIN | {"eta_s": seconds}, 450).endswith(f"ETA {shown}")


def test_other_ranks_write_and_say_nothing(tmp_path, capsys):
    run = reporter(tmp_path, rank=1, tensorboard=True, wandb="project")
    run.step(PLAIN, shown=True)
    run.evaluation(EVALUATION)
    run.say("words")
    run.resumed(0)
    run.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


# ------------------------------------------------------------------------------------------- resumed


def test_lines_after_the_checkpoint_are_cut_off(tmp_path, capsys):
    run = reporter(tmp_path)
    for step in range(1, 7):
        run.step(PLAIN | {"step": step}, shown=False)
        if step % 2 == 0:
            run.evaluation(EVALUATION | {"step": step})
    run.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"time": 1, "step": 7, "lo')  # the crash
    again = reporter(tmp_path)
    capsys.readouterr()
    again.resumed(4)
    again.step(PLAIN | {"step": 5, "loss": 9.0}, shown=False)
    again.close()
    written = lines(tmp_path)
    assert [(line["step"], "eval_cr" in line) for line in written] == [
        (1, False),
        (2, False),
        (2, True),
        (3, False),
        (4, False),
        (4, True),
        (5, False),
    ]
    assert written[-1]["loss"] == 9.0 and capsys.readouterr().out == "resumed at step 4\n"


@pytest.mark.parametrize("rest", ["", "\n", "3\n", "[1]\n", "null\n", '{"loss": 1}\n', '{"step": 3', "\0\0\0"])
def test_what_is_no_line_of_a_step_is_cut_off(tmp_path, rest):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + rest)
    run = reporter(tmp_path)
    run.resumed(2)
    run.step(PLAIN, shown=False)
    run.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 3]


def test_a_new_output_directory_has_nothing_to_cut(tmp_path):
    reporter(tmp_path).resumed(4)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------- other sinks


@pytest.mark.parametrize(
    ("settings", "module", "package"),
    [({"tensorboard": True}, "torch.utils.tensorboard", "tensorboard"), ({"wandb": "project"}, "wandb", "wandb")],
)
def test_a_package_that_is_missing_is_one_sentence(tmp_path, monkeypatch, settings, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError) as caught:
        reporter(tmp_path, **settings)
    assert str(caught.value) == f"log.{package} needs the package {package}: pip install {package}"


class Writer:
    """Stands for tensorboard's SummaryWriter and for a run of wandb."""

    def __init__(self, *_):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


def test_numbers_go_to_tensorboard_and_wandb_by_their_step(tmp_path):
    run = reporter(tmp_path)
    run._tensorboard, run._wandb = Writer(), Writer()
    run.step(RAMP, shown=False)
    run.evaluation(EVALUATION)
    run.close()
    numbers = {k: v for k, v in RAMP.items() if k not in ("step", "phase", "cr_layer")}
    numbers |= {"cr_layer/00": 2.5, "cr_layer/01": 1.75}
    evaluated = {"eval_perplexity": 5.43216, "eval_cr": 1.98765}
    scalars = [(key, value, 4) for key, value in (numbers | evaluated).items()]
    assert run._tensorboard.calls == [*(("add_scalar", x, {}) for x in scalars), ("close", (), {})]
    assert run._wandb.calls == [("log", (numbers,), {"step": 4}), ("log", (evaluated,), {"step": 4}), ("finish", (), {})]


def test_tensorboard_can_be_read_back(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = reporter(tmp_path, tensorboard=True)
    run.step(RAMP, shown=False)
    run.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (point,) = events.Scalars("measured_cr")
    assert (point.step, point.value) == (4, pytest.approx(2.0666))
    assert events.Scalars("cr_layer/01")[0].value == 1.75


def test_tensorboard_drops_what_a_resumed_run_writes_again(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, last, loss in ((1, 6, 1.0), (5, 7, 2.0)):
        run = reporter(tmp_path, tensorboard=True)
        if first > 1:
            run.resumed(first - 1)
        for step in range(first, last + 1):
            run.step(PLAIN | {"step": step, "loss": loss}, shown=False)
        run.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    points = [(p.step, p.value) for p in events.Scalars("loss")]
    assert points == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2), (7, 2)]


@pytest.mark.slow
def test_wandb_works_offline_and_a_resumed_run_keeps_its_name(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for step in (3, 4):
        run = reporter(tmp_path, wandb="project")
        run.step(PLAIN | {"step": step}, shown=False)
        run.close()
    name = (tmp_path / "wandb_run_id").read_text().strip()
    runs = [p.name for p in (tmp_path / "wandb").glob("offline-run-*")]
    assert runs and all(run.endswith(name) for run in runs)
    assert [line["step"] for line in lines(tmp_path)] == [3, 4]


# ------------------------------------------------------------------------------------------- speed, memory, MFU


class Clock:
    """Stands for `time.perf_counter`."""

    now = 100.0

    def perf_counter(self):
        return self.now


def test_the_meter_tells_speed_memory_and_the_time_left(process_group, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(metrics_module, "time", clock)
    config = load(overrides=["optim.global_batch=4", "data.sequence_length=64", "log.peak_tflops=2e-3"])
    meter = Meter(config, tiny_shape(), steps=13, world=2)
    clock.now = 160.0  # a minute of loading, of which the ETA must know nothing
    first = meter(4, 2.0)  # resumed at step 3
    assert first["tokens_per_s"] == 128 and first["eta_s"] == 18
    assert first["mfu"] == pytest.approx(128 * flops.model_flops(config, tiny_shape()) / (2e9 * 2))
    assert 0.05 < first["memory_gib"] < 64
    clock.now = 166.0  # two steps of 1 s, and 4 s of evaluation between them
    assert meter(5, 1.0)["eta_s"] == pytest.approx(8 * 8 / 2)


def test_without_a_known_peak_there_is_no_mfu(process_group, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "mfu" not in Meter(load(), tiny_shape(), steps=3, world=1)(1, 1.0)


def test_peaks_come_from_the_setting_or_from_the_gpus_name():
    bf16 = load(overrides=["run.precision=bf16"])
    for name, peak in (
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA H200", 989),
        ("h200", 989),
        ("Tesla T4", None),
        ("NVIDIA GeForce RTX 4090", None),
    ):
        assert flops.peak_tflops(bf16, name) == peak, name
    assert flops.peak_tflops(load(), "h100") is None  # fp32
    assert flops.peak_tflops(load(overrides=["log.peak_tflops=60"]), "h100") == 60


def test_model_flops_are_those_that_torch_counts(process_group):
    """Forward and backward of transformers' Llama under torch's own counter, but for the causal half."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaForCausalLM

    hf = tiny_shape(tie_word_embeddings=False)
    model, tokens = LlamaForCausalLM(tiny_config(tie_word_embeddings=False, attn_implementation="eager")), 64
    ids = torch.zeros(1, tokens, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(ids).logits.sum().backward()
    # Whole scores instead of the causal half, and embeddings need no gradient to their inputs.
    ours = tokens * 3 * (flops.forward_flops(hf, tokens) + hf.num_hidden_layers * flops.attention_flops(hf, tokens))
    assert counter.get_total_flops() == pytest.approx(ours, rel=0.01)


def test_a_teacher_adds_a_forward_pass():
    hf = tiny_shape()
    plain, distilled = load(overrides=["dmc.method=none"]), load()
    assert 3 * flops.model_flops(distilled, hf) == 4 * flops.model_flops(plain, hf)


# ------------------------------------------------------------------------------------------- whole runs


FAILS_ON_RANK_1 = """
import os
from dmc.commands import train

def step(self, plan):
    if os.environ["RANK"] == "1" and self.step == 5:
        raise ArithmeticError("the reason why rank 1 failed")
    return take_step(self, plan)

if __name__ == "__main__":
    take_step, train.Trainer.train_step = train.Trainer.train_step, step
    train.main()
"""


def test_two_processes_write_every_number_once_and_the_traceback_of_the_one_that_fails(tmp_path):
    pytest.importorskip("tensorboard")
    tiny_model(tmp_path / "model")
    tiny_text(tmp_path / "text.jsonl")
    (tmp_path / "fails.py").write_text(FAILS_ON_RANK_1)
    output = tmp_path / "run"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--master-port",
            str(20000 + os.getpid() % 20000),
            tmp_path / "fails.py",
            "--model",
            tmp_path / "model",
            "--output",
            output,
            f"data.text={tmp_path / 'text.jsonl'}",
            f"data.cache={tmp_path / 'cache'}",
            *SMALL,
            "log.tensorboard=true",
            "log.peak_tflops=0.1",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    summary = done.stderr[done.stderr.index("Root Cause") :]
    assert done.returncode == 1 and "rank      : 1" in summary
    assert "Traceback" in summary and "ArithmeticError: the reason why rank 1 failed" in summary
    steps = [line for line in lines(output) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5]
    for line in steps:
        assert {
            "loss",
            "lm_loss",
            "distill_loss",
            "cr_loss",
            "target_cr",
            "measured_cr",
            "soft_cr",
            "grad_norm",
            "lr",
            "tokens_per_s",
            "mfu",
            "memory_gib",
            "eta_s",
            "cr_layer",
        } <= line.keys()
        # all layers have as many heads: the whole ratio is their harmonic mean
        assert len(line["cr_layer"]) == 2 and line["measured_cr"] == pytest.approx(2 / sum(1 / x for x in line["cr_layer"]))
        assert 0 < line["mfu"] < 1 and line["memory_gib"] > 0.05
    assert len(list((output / "tensorboard").iterdir())) == 1  # rank 1 opened none
