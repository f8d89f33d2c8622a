"""The phases of a retrofit, its targets, its checkpoints and its learning rate."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmc.training.config import load
from dmc.training.schedule import Schedule


def schedule(*overrides):
    """The schedule without holds at integer ratios, unless ``overrides`` ask for them."""
    return Schedule(load(overrides=["dmc.decision=neuron", "dmc.integer_hold_steps=0", *overrides]))


def plans(*overrides):
    run = schedule(*overrides)
    return [run(step) for step in range(run.steps)]


def test_phases_follow_each_other():
    steps = plans("dmc.repurpose_steps=5", "dmc.target_cr=3", "dmc.ramp_steps_per_unit=4", "dmc.hold_steps=2")
    assert [p.phase for p in steps] == ["repurpose"] * 5 + ["ramp"] * 8 + ["hold"] * 2
    assert [p.target_cr for p in steps] == [1.0] * 5 + [1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0] + [3.0] * 2


def test_a_decision_head_needs_no_repurposing():
    run = schedule("dmc.decision=head", "dmc.repurpose_steps=5", "dmc.target_cr=2", "dmc.ramp_steps_per_unit=3")
    assert (run.ramp_start, run.ramp_steps, run.phase(0)) == (0, 3, "ramp")


def test_a_plain_run_has_one_phase():
    steps = plans("dmc.method=none", "run.steps=4", "dmc.repurpose_steps=9")
    assert [(p.phase, p.target_cr, p.neuron_scale) for p in steps] == [("plain", 1.0, 1.0)] * 4
    assert [p.saves for p in steps] == [(), (), (), ("final",)]


@pytest.mark.parametrize("target", [1.5, 2.0, 2.5, 4.0, 8.0])
@pytest.mark.parametrize("per_unit", [1, 7, 100])
def test_the_target_is_a_straight_line_to_the_last_step_of_the_ramp(target, per_unit):
    options = ("dmc.repurpose_steps=3", f"dmc.target_cr={target}", f"dmc.ramp_steps_per_unit={per_unit}", "dmc.hold_steps=2")
    run = schedule(*options)
    ramp = [run.target_cr(s) for s in range(run.ramp_start, run.hold_start)]
    assert len(ramp) == -(-per_unit * (target - 1) // 1)
    slopes = [b - a for a, b in zip([1.0, *ramp], ramp, strict=False)]
    assert slopes == pytest.approx([(target - 1) / len(ramp)] * len(ramp))
    assert ramp[-1] == run.target_cr(run.steps - 1) == pytest.approx(target, abs=1e-12)


@pytest.mark.parametrize("target", [1.5, 2.0, 2.5, 3.3, 4.0, 8.0])
@pytest.mark.parametrize("per_unit", [0.3, 1, 7, 100])
@pytest.mark.parametrize("hold", [0, 3])
@pytest.mark.parametrize("decision", ["neuron", "head"])
def test_every_integer_ratio_is_saved_once_when_it_is_reached(target, per_unit, hold, decision):
    options = (f"dmc.decision={decision}", f"dmc.target_cr={target}", f"dmc.ramp_steps_per_unit={per_unit}")
    run = schedule(*options, f"dmc.hold_steps={hold}")
    saves = {step: run(step).saves for step in range(run.steps)}
    counts = Counter(name for names in saves.values() for name in names)
    assert counts == Counter(["final", *(f"cr{n}" for n in range(2, int(target) + 1))])
    assert "final" in saves[run.steps - 1]
    for step, names in saves.items():
        for number in (int(name[2:]) for name in names if name != "final"):
            assert run.target_cr(step - 1) < number - 1e-9 and run.target_cr(step) >= number - 1e-9


def test_without_a_ramp_the_target_holds_at_once():
    steps = plans("dmc.target_cr=4", "dmc.ramp_steps_per_unit=0", "dmc.repurpose_steps=2", "dmc.hold_steps=3")
    assert [(p.phase, p.target_cr) for p in steps] == [("repurpose", 1.0)] * 2 + [("hold", 4.0)] * 3


def test_target_one_compresses_nothing():
    steps = plans("dmc.target_cr=1", "dmc.repurpose_steps=2", "dmc.hold_steps=3")
    assert [(p.phase, p.target_cr) for p in steps] == [("repurpose", 1.0)] * 2 + [("hold", 1.0)] * 3


def test_resume_points_come_at_their_interval_beside_the_others():
    options = ("dmc.repurpose_steps=0", "dmc.target_cr=2", "dmc.ramp_steps_per_unit=6", "dmc.hold_steps=6", "run.save_every=3")
    saves = {step + 1: p.saves for step, p in enumerate(plans(*options)) if p.saves}
    assert saves == {3: ("step000003",), 6: ("cr2", "step000006"), 9: ("step000009",), 12: ("final",)}


def test_the_neuron_is_gone_after_four_fifths_of_repurposing():
    """The paper: max(0, 1 - step / 200) over 250 steps."""
    steps = plans("dmc.repurpose_steps=250", "dmc.target_cr=2", "dmc.ramp_steps_per_unit=2", "dmc.hold_steps=1")
    assert [p.neuron_scale for p in steps[:250]] == pytest.approx([max(0, 1 - s / 200) for s in range(250)])
    assert [p.neuron_scale for p in steps[250:]] == [1.0] * 3


@pytest.mark.parametrize("length", [1, 2, 5])
def test_short_repurposing_starts_with_the_whole_neuron(length):
    scales = [p.neuron_scale for p in plans(f"dmc.repurpose_steps={length}")[:length]]
    assert scales[0] == 1.0 and scales == sorted(scales, reverse=True) and min(scales) >= 0


def rates(*overrides, steps=20):
    return [p.lr for p in plans("dmc.method=none", f"run.steps={steps}", "optim.lr=0.1", *overrides)]


def test_the_learning_rate_is_constant_without_warm_up_and_decay():
    assert rates("optim.warmup_steps=0", "optim.decay_steps=0") == [0.1] * 20


def test_it_warms_up_from_the_first_step():
    assert rates("optim.warmup_steps=4", "optim.decay_steps=0") == pytest.approx([0.025, 0.05, 0.075] + [0.1] * 17)


def test_it_decays_over_the_last_steps_towards_its_minimum():
    got = rates("optim.warmup_steps=0", "optim.decay_steps=4", "optim.min_lr=0.05", steps=10)
    assert got == pytest.approx([0.1] * 6 + [0.09, 0.08, 0.07, 0.06])  # the step after the last would have 0.05


def test_one_step_of_decay_is_one_step():
    assert rates("optim.warmup_steps=0", "optim.decay_steps=1", steps=3) == pytest.approx([0.1, 0.1, 0.05])


def test_a_decay_longer_than_the_run_begins_below_the_peak():
    got = rates("optim.warmup_steps=0", "optim.decay_steps=9", steps=4)
    assert got == pytest.approx([0.04, 0.03, 0.02, 0.01])


def test_warm_up_and_decay_multiply():
    got = rates("optim.warmup_steps=4", "optim.decay_steps=4", steps=4)
    assert got == pytest.approx([0.1 * w * d for w, d in zip([0.25, 0.5, 0.75, 1], [0.8, 0.6, 0.4, 0.2], strict=True)])


def test_it_stays_constant_over_repurposing_and_ramp():
    options = ("dmc.repurpose_steps=5", "dmc.ramp_steps_per_unit=4", "dmc.hold_steps=8")
    steps = plans(*options, "optim.lr=0.1", "optim.warmup_steps=0", "optim.decay_steps=6")
    assert {p.lr for p in steps if p.phase != "hold"} == {0.1}
    assert steps[-7].lr == 0.1 > steps[-6].lr > steps[-1].lr > 0


# ------------------------------------------------------------------------------------------- holds at integer ratios

STOPS = ("dmc.decision=head", "dmc.ramp_steps_per_unit=4", "dmc.hold_steps=3", "optim.lr=0.1", "optim.warmup_steps=0")


def test_the_ramp_stops_at_each_integer_ratio_below_the_last():
    steps = plans(*STOPS, "dmc.target_cr=3", "dmc.integer_hold_steps=2")
    assert [p.phase for p in steps] == ["ramp"] * 4 + ["hold"] * 2 + ["ramp"] * 4 + ["hold"] * 3
    assert [p.target_cr for p in steps] == [1.25, 1.5, 1.75, 2, 2, 2, 2.25, 2.5, 2.75, 3, 3, 3, 3]
    assert {step: p.saves for step, p in enumerate(steps) if p.saves} == {5: ("cr2",), 9: ("cr3",), 12: ("final",)}


def test_a_hold_at_an_integer_ratio_decays_the_rate_which_the_ramp_restores():
    steps = plans(*STOPS, "dmc.target_cr=3", "dmc.integer_hold_steps=4", "optim.decay_steps=3", "optim.min_lr=0.02")
    decay = [0.08, 0.06, 0.04]  # as at the end of the run: the step after would have the minimum
    assert [p.lr for p in steps] == pytest.approx([0.1] * 4 + [0.1, *decay] + [0.1] * 4 + decay)


def test_a_hold_shorter_than_the_decay_decays_from_its_first_step():
    steps = plans(*STOPS, "dmc.target_cr=3", "dmc.integer_hold_steps=4", "optim.decay_steps=30", "dmc.hold_steps=100")
    assert [p.lr for p in steps[3:9]] == pytest.approx([0.1, 0.08, 0.06, 0.04, 0.02, 0.1])


def test_a_constant_rate_stays_constant_in_a_hold():
    steps = plans(*STOPS, "dmc.target_cr=3", "dmc.integer_hold_steps=4", "optim.decay_steps=0")
    assert {p.lr for p in steps} == {0.1}


def test_the_hold_at_an_integer_ratio_is_on_by_default_and_its_steps_are_counted():
    config = load(overrides=["dmc.target_cr=4"])
    run, n = Schedule(config), config.dmc.integer_hold_steps
    assert n > 0 and run.steps == 240 + 2 * n + 160
    assert run.phase_steps() == {"ramp": 240, "integer hold": 2 * n, "hold": 160}
    assert [step + 1 for step in range(run.steps) for name in run(step).saves if name in ("cr2", "cr3")] == [80 + n, 160 + 2 * n]


@settings(max_examples=200, deadline=None)
@given(
    target=st.sampled_from([1.0, 1.5, 2.0, 2.0000001, 2.5, 3.0, 3.3, 4.0, 8.0]),
    per_unit=st.sampled_from([0, 0.3, 1, 7, 33.3]),
    length=st.integers(1, 9),
    final=st.integers(0, 5),
    repurpose=st.integers(0, 4),
)
def test_holds_leave_the_ramp_as_it_is(target, per_unit, length, final, repurpose):
    """Without the steps of the holds the targets are those without holds; each integer ratio is saved once, at its hold's end."""
    options = (
        f"dmc.target_cr={target}",
        f"dmc.ramp_steps_per_unit={per_unit}",
        f"dmc.hold_steps={final}",
        f"dmc.repurpose_steps={repurpose}",
    )
    if not (final or repurpose or per_unit * (target - 1)):
        return
    plain, run = schedule(*options), schedule(*options, f"dmc.integer_hold_steps={length}")
    held = [step for s in run.segments if s.integer for step in range(s.start, s.end)]
    others = [step for step in range(run.steps) if step not in held]
    assert run.steps == plain.steps + len(held)
    assert [run.target_cr(s) for s in others] == [plain.target_cr(s) for s in range(plain.steps)]
    assert [run.phase(s) for s in others] == [plain.phase(s) for s in range(plain.steps)]
    targets = [run.target_cr(s) for s in range(run.steps)]
    assert targets == sorted(targets)
    below = [n for n in range(2, 9) if n < target - 1e-9 and plain.ramp_steps]
    assert [s.cr for s in run.segments if s.integer] == below
    saved = {name: step for step in range(run.steps) for name in run(step).saves}
    assert set(saved) == {name for step in range(plain.steps) for name in plain(step).saves}
    for n in below:
        assert [run.target_cr(step) for step in range(saved[f"cr{n}"] - length + 1, saved[f"cr{n}"] + 1)] == [n] * length


def test_a_resumed_run_sees_the_same_plans():
    """A plan is a function of configuration and step alone: asked for in any order, from any schedule, it is the same."""
    first, second = (schedule("dmc.target_cr=3", "dmc.integer_hold_steps=5") for _ in range(2))
    in_order = [first(step) for step in range(first.steps)]
    assert [second(step) for step in reversed(range(second.steps))] == in_order[::-1]
