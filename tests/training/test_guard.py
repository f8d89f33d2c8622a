"""Bad numbers change no weight: injected into real runs, and step by step against megatron's own optimizer step."""

import json
import math

import pytest
import torch

from dmc.training import setup
from dmc.training.config import GuardConfig, load
from dmc.training.guard import Guard
from tests.training.helpers import SMALL, metrics, tiny_model, tiny_shape, tiny_text

SAMPLES = torch.arange(3)


# ------------------------------------------------------------------------------------------- one process, step by step


def student(*overrides):
    config = load(overrides=["dmc.method=none", "run.init=random", "data.sequence_length=64", *overrides])
    built = setup.build_student(config, tiny_shape(), None)
    for group in built.optimizer.param_groups:
        group["lr"] = 1e-2
    return built


def fill(built, seed, scale=1.0):
    """Gradients as backward leaves them."""
    generator = torch.Generator().manual_seed(seed)
    built.ddp[0].zero_grad_buffer()
    built.optimizer.zero_grad()
    for weight in built.chunks[0].parameters():
        weight.main_grad.copy_(scale * torch.randn(weight.shape, generator=generator))


def values(built):
    """Every weight and all of the optimizer's state."""
    found = [weight.detach().clone() for weight in built.chunks[0].parameters()]
    for part in built.optimizer.chained_optimizers:
        found += [weight.detach().clone() for weight in part.get_parameters()]
        found += [t.clone() for state in part.optimizer.state.values() for _, t in sorted(state.items())]
    return found


def same(first, second):
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def guard(built, tmp_path, **settings):
    return Guard(GuardConfig(**settings), tmp_path / "guard", built.optimizer, built.chunks)


def step(number, loss=1.0):
    return {"step": number, "loss": loss}


KINDS = [
    (),
    ("optim.name=muon",),
    ("run.precision=bf16",),
    ("optim.name=muon", "run.precision=bf16"),
    ("parallel.distributed_optimizer=true",),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_a_sound_step_is_megatrons_own(process_group, tmp_path, kind, scale):
    """Clipped or not."""
    ours, theirs = student(*kind), student(*kind)
    guarded = guard(ours, tmp_path)
    for number in range(1, 4):
        fill(ours, number, scale)
        fill(theirs, number, scale)
        measured = step(number)
        assert guarded.step(measured, SAMPLES)
        assert theirs.optimizer.step()[1] == measured["grad_norm"]
        assert same(values(ours), values(theirs))
    assert (measured["grad_norm"] > 1) == (scale == 1.0)
    assert not (tmp_path / "guard").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(process_group, tmp_path, kind, value):
    built = student(*kind)
    guarded = guard(built, tmp_path, action="skip")
    fill(built, 1)
    assert guarded.step(step(1), SAMPLES)
    before = values(built)
    fill(built, 2)
    dict(built.chunks[0].named_parameters())["decoder.layers.1.mlp.linear_fc1.weight"].main_grad[3, 2] = value
    assert not guarded.step(step(2), SAMPLES)
    assert same(values(built), before)
    fill(built, 3)
    assert guarded.step(step(3), SAMPLES) and not same(values(built), before)


def test_the_report_says_where(process_group, tmp_path, capsys):
    built = student()
    guarded = guard(built, tmp_path, action="skip")
    fill(built, 1)
    weights = dict(built.chunks[0].named_parameters())
    weights["decoder.layers.1.mlp.linear_fc1.weight"].main_grad[3, 2] = math.nan
    guarded.step({"step": 7, "loss": 1.5, "lm_loss": math.inf}, SAMPLES)
    path = tmp_path / "guard" / "step000007.json"
    report = json.loads(path.read_text(), parse_constant=pytest.fail)  # strict JSON
    assert f"warning: step 7 skipped: the gradient norm is not finite; report in {path}" in capsys.readouterr().out
    assert (report["step"], report["loss"], report["lm_loss"], report["grad_norm"]) == (7, 1.5, "inf", "nan")
    assert (report["outcome"], report["samples"], report["refused_in_a_row"]) == ("skipped", [0, 1, 2], 1)
    assert report["nonfinite"] == {"gradients": ["decoder.layers.1.mlp.linear_fc1.weight"], "weights": []}
    norms = report["gradient_norms"]
    assert norms.pop("decoder.layers.1.mlp") == "nan" and "decoder.layers.1.self_attention" in norms
    weights["decoder.layers.1.mlp.linear_fc1.weight"].main_grad[3, 2] = 0
    own = math.sqrt(sum(w.main_grad.double().square().sum() for n, w in weights.items() if "decoder.layers.0.mlp" in n))
    assert norms["decoder.layers.0.mlp"] == pytest.approx(own)


def test_the_norms_of_the_report_add_up(process_group, tmp_path):
    built = student()
    guarded = guard(built, tmp_path, action="skip")
    fill(built, 1)
    measured = step(1, loss=math.nan)
    assert not guarded.step(measured, SAMPLES)
    report = json.loads((tmp_path / "guard" / "step000001.json").read_text())
    assert report["reason"] == "the loss is nan" and report["nonfinite"] == {"gradients": [], "weights": []}
    assert math.hypot(*report["gradient_norms"].values()) == pytest.approx(measured["grad_norm"], rel=1e-5)


def test_outliers_are_told_by_the_running_median(process_group, tmp_path):
    built = student()
    guarded = guard(built, tmp_path, action="skip", max_norm_ratio=3.0, window=4)
    fill(built, 0, 50.0)
    assert guarded.step(step(1), SAMPLES)  # nothing to compare with yet
    for number in range(2, 6):
        fill(built, number)
        assert guarded.step(step(number), SAMPLES)
    before = values(built)
    fill(built, 6, 3.2)
    assert not guarded.step(step(6), SAMPLES) and same(values(built), before)
    assert "above guard.max_norm_ratio 3 times the running median" in (tmp_path / "guard" / "step000006.json").read_text()
    fill(built, 7, 2.8)
    assert guarded.step(step(7), SAMPLES)
    other = guard(built, tmp_path, action="skip", max_norm_ratio=3.0, window=4)
    other.load_state(json.loads(json.dumps(guarded.state())))
    fill(built, 8, 3.4)
    assert not other.step(step(8), SAMPLES)


def test_stopping_and_too_many_skips(process_group, tmp_path):
    built = student()
    before = values(built)
    for settings, allowed in (({"action": "stop"}, 0), ({"action": "skip", "max_skips": 2}, 2)):
        guarded = guard(built, tmp_path, **settings)
        for number in range(1, allowed + 1):
            fill(built, number, math.nan)
            assert not guarded.step(step(number), SAMPLES)
        fill(built, 9, math.nan)
        with pytest.raises(FloatingPointError, match="step 9.*the weights are as before it, the report is .*step000009.json"):
            guarded.step(step(9), SAMPLES)
        assert same(values(built), before)
    assert json.loads((tmp_path / "guard" / "step000009.json").read_text())["outcome"] == "stopped"


def test_a_report_that_cannot_be_written_hides_nothing(process_group, tmp_path, capsys):
    (tmp_path / "guard").write_text("in the way")
    built = student()
    fill(built, 1, math.nan)
    with pytest.raises(FloatingPointError, match="the gradient norm is not finite"):
        guard(built, tmp_path).step(step(1), SAMPLES)
    assert "was not written" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("guard")
    tiny_model(tmp / "model")
    tiny_text(tmp / "text.jsonl")
    return tmp


def poisoned(ground, tmp_path, rank_server, *extra, ranks=1, **settings):
    """A run with a poisoned gradient, its exit codes and the hash of all state after each step on each rank."""
    run = rank_server.start(
        tmp_path,
        [
            "--model",
            ground / "model",
            "--output",
            tmp_path / "run",
            f"data.text={ground / 'text.jsonl'}",
            f"data.cache={ground / 'cache'}",
            *SMALL,
            *extra,
        ],
        ranks=ranks,
        hook="poison",
        settings={"log": str(tmp_path), **settings},
    )
    codes = run.wait()
    return run, codes, [(tmp_path / f"hashes{rank}").read_text().split() for rank in range(ranks)]


@pytest.mark.parametrize(
    ("ranks", "value", "extra"),
    [
        (1, "nan", ()),
        (2, "inf", ("parallel.distributed_optimizer=true",)),
        (2, "1e9", ("guard.max_norm_ratio=100", "guard.window=2", "parallel.tensor=2")),
    ],
)
def test_a_poisoned_step_is_skipped_on_every_rank(ground, tmp_path, rank_server, ranks, value, extra):
    """Only the last rank's gradient is bad."""
    run, codes, hashes = poisoned(
        ground,
        tmp_path,
        rank_server,
        "guard.action=skip",
        *extra,
        ranks=ranks,
        steps=[4],
        poisoned_ranks=[ranks - 1],
        value=value,
    )
    assert codes == [0] * ranks, run.said()
    for states in hashes:
        assert len(states) == 8
        changed = [states[i] != states[i - 1] for i in range(1, 8)]
        assert changed == [True, True, False, True, True, True, True]  # step 4 alone left everything as it was
        drawn = (tmp_path / "generators0").read_text().split()
        assert len(drawn) == 8 and len(set(drawn)) == 1  # no step draws from a generator: a checkpoint need not hold its state
    lines = metrics(tmp_path / "run")
    assert [bool(m.get("skipped")) for m in lines] == [m["step"] == 4 for m in lines]
    report = json.loads((tmp_path / "run" / "guard" / "step000004.json").read_text())
    assert len(report["samples"]) == 4 and report["samples"] == sorted(set(report["samples"]))  # optim.global_batch
    if value != "1e9":
        assert report["nonfinite"]["gradients"] == ["decoder.layers.1.mlp.linear_fc2.weight"]
    assert all(math.isfinite(m["loss"]) for m in lines)


def test_a_poisoned_step_stops_the_run_with_a_report(ground, tmp_path, rank_server):
    run, codes, (states,) = poisoned(
        ground, tmp_path, rank_server, "run.save_every=2", steps=[4], poisoned_ranks=[0], value="nan"
    )
    assert codes == [1] and "Traceback" not in run.said()
    assert "error: step 4: the gradient norm is not finite; the weights are as before it" in run.said()
    assert len(states) == 4 and states[3] == states[2]
    assert json.loads((tmp_path / "run" / "guard" / "step000004.json").read_text())["outcome"] == "stopped"
    assert (tmp_path / "run" / "checkpoints" / "newest").read_text() == "step000002\n"
