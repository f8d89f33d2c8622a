"""The phases of a retrofit, its targets, its checkpoints and its learning rate."""

from collections import Counter

import pytest

from dmc.training.config import load
from dmc.training.schedule import Schedule


def schedule(*overrides):
    return Schedule(load(overrides=["dmc.decision=neuron", *overrides]))


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
    """A checkpoint saved as the ramp passes an integer ratio is usable as it is."""
    options = ("dmc.repurpose_steps=5", "dmc.ramp_steps_per_unit=4", "dmc.hold_steps=8")
    steps = plans(*options, "optim.lr=0.1", "optim.warmup_steps=0", "optim.decay_steps=6")
    assert {p.lr for p in steps if p.phase != "hold"} == {0.1}
    assert steps[-7].lr == 0.1 > steps[-6].lr > steps[-1].lr > 0
