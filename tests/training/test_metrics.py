"""Where a run's numbers go: JSONL, the terminal, tensorboard and wandb."""

import json
import sys

import pytest

from dmc.training.config import LogConfig
from dmc.training.metrics import Reporter, progress_line

PLAIN = {"step": 3, "phase": "plain", "lr": 1e-3, "loss": 2.34567, "lm_loss": 2.34567, "grad_norm": 0.5,
         "tokens_per_s": 3120.4, "eta_s": 161.2}
RAMP = PLAIN | {"step": 4, "phase": "ramp", "target_cr": 2.104, "measured_cr": 2.0666, "soft_cr": 2.0}
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
    assert progress_line(PLAIN, 450).split() == "step 3/450 plain loss 2.3457 3120 tokens/s ETA 2:41".split()
    assert progress_line(RAMP, 450).split() == (
        "step 4/450 ramp loss 2.3457 target CR 2.10 measured CR 2.07 3120 tokens/s ETA 2:41".split()
    )


@pytest.mark.parametrize(("seconds", "shown"), [
    (0, "0:00"), (0.4, "0:00"), (59.6, "1:00"), (61, "1:01"), (3599.4, "59:59"), (3599.6, "1:00:00"), (90061, "25:01:01"),
])
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
        (1, False), (2, False), (2, True), (3, False), (4, False), (4, True), (5, False),
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


@pytest.mark.parametrize(("settings", "module", "package"), [
    ({"tensorboard": True}, "torch.utils.tensorboard", "tensorboard"), ({"wandb": "project"}, "wandb", "wandb"),
])
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
    numbers = {k: v for k, v in RAMP.items() if k not in ("step", "phase")}
    evaluated = {"eval_perplexity": 5.43216, "eval_cr": 1.98765}
    scalars = [(key, value, 4) for key, value in (numbers | evaluated).items()]
    assert run._tensorboard.calls == [*(("add_scalar", x, {}) for x in scalars), ("close", (), {})]
    assert run._wandb.calls == [
        ("log", (numbers,), {"step": 4}), ("log", (evaluated,), {"step": 4}), ("finish", (), {}),
    ]


def test_tensorboard_can_be_read_back(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = reporter(tmp_path, tensorboard=True)
    run.step(RAMP, shown=False)
    run.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (point,) = events.Scalars("measured_cr")
    assert (point.step, point.value) == (4, pytest.approx(2.0666))


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
