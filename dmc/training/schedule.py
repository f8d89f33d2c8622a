"""What a step does: the phases of a retrofit, its target compression ratio and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dmc.training.config import Config

_EXACT = 1e-9  # a target this close to an integer has reached it


@dataclass(frozen=True)
class StepPlan:
    """The plan of one step: ``phase`` is ``plain``, ``repurpose``, ``ramp`` or ``hold``."""

    phase: str
    target_cr: float
    neuron_scale: float  # of q[0] and k[0] while they are unlearnt; 1 elsewhere
    lr: float
    saves: tuple[str, ...]  # names of the checkpoints due after this step


@dataclass(frozen=True)
class Segment:
    """Consecutive steps of one phase.

    ``cr`` is the target of the last step. ``integer`` is True for the hold at an integer ratio below the final one.
    """

    phase: str
    start: int
    steps: int
    cr: float
    integer: bool = False

    @property
    def end(self) -> int:
        """The first step after the segment."""
        return self.start + self.steps


class Schedule:
    """Maps a step to its `StepPlan`; a pure function of the configuration.

    The target rises in equal steps. Where it reaches an integer below the final target, it stays there for
    ``dmc.integer_hold_steps`` steps, so that the checkpoint of that ratio is usable.
    """

    def __init__(self, config: Config) -> None:
        self._dmc, self._optim, self._run = config.dmc, config.optim, config.run
        compresses, repurposes = self._dmc.compresses, self._dmc.decision == "neuron"
        self.ramp_start = self._dmc.repurpose_steps if compresses and repurposes else 0
        self.ramp_steps = math.ceil(self._dmc.ramp_steps_per_unit * (self._dmc.target_cr - 1)) if compresses else 0
        self.segments = tuple(self._segments() if compresses else [Segment("plain", 0, self._run.steps, 1.0)])
        self.steps = self.segments[-1].end
        self.hold_start = self.segments[-1].start if compresses else self.steps

    def target_cr(self, step: int) -> float:
        """The target of step ``step``: linear from 1 to the final one over the ramp."""
        segment = self._segment(step)
        if segment is None or segment.phase != "ramp":
            return segment.cr if segment else 1.0
        return self._ramp_target(step + 1 - self.ramp_start - self._held_before(segment))

    def phase(self, step: int) -> str:
        """The phase of step ``step``."""
        if self._dmc.method == "none":
            return "plain"
        segment = self._segment(step)
        return segment.phase if segment else "repurpose"

    def phase_steps(self) -> dict[str, int]:
        """Steps of each phase in order; the holds at integer ratios are counted as ``integer hold``."""
        counts: dict[str, int] = {}
        for segment in self.segments:
            name = "integer hold" if segment.integer else segment.phase
            counts[name] = counts.get(name, 0) + segment.steps
        return {name: count for name, count in counts.items() if count}

    def __call__(self, step: int) -> StepPlan:
        """The plan of step ``step``, counted from 0."""
        phase = self.phase(step)
        scale = 1.0
        if phase == "repurpose":  # gone after 80 % of the phase, as in the paper (200 of 250 steps)
            scale = max(0.0, 1 - step / max(1.0, 0.8 * self.ramp_start))
        return StepPlan(phase, self.target_cr(step), scale, self._lr(step), self._saves(step))

    def _segments(self) -> Iterator[Segment]:
        """The segments of a retrofit; the last one is the final hold, which may have no steps."""
        d, start, done = self._dmc, self.ramp_start, 0
        if start:
            yield Segment("repurpose", 0, start, 1.0)
        for ratio in self._integers() if d.integer_hold_steps else ():
            made = math.floor(self.ramp_steps * (ratio - 1) / (d.target_cr - 1) + _EXACT)  # ramp steps with a target up to it
            if made > done:
                yield Segment("ramp", start, made - done, self._ramp_target(made))
            yield Segment("hold", start + made - done, d.integer_hold_steps, float(ratio), integer=True)
            start, done = start + made - done + d.integer_hold_steps, made
        if self.ramp_steps > done:
            yield Segment("ramp", start, self.ramp_steps - done, self._ramp_target(self.ramp_steps))
        yield Segment("hold", start + self.ramp_steps - done, d.hold_steps, d.target_cr)

    def _integers(self) -> range:
        """The integer ratios that the ramp passes on the way to a larger one."""
        return range(2, math.ceil(self._dmc.target_cr - _EXACT)) if self.ramp_steps else range(0)

    def _ramp_target(self, made: int) -> float:
        """The target of the ramp's step number ``made``, counted from 1."""
        return 1.0 + made / self.ramp_steps * (self._dmc.target_cr - 1.0)

    def _held_before(self, segment: Segment) -> int:
        return sum(other.steps for other in self.segments if other.integer and other.start < segment.start)

    def _segment(self, step: int) -> Segment | None:
        """The segment of ``step``; the last one after the end, None before the start."""
        return next((s for s in reversed(self.segments) if step >= s.start), None)

    def _lr(self, step: int) -> float:
        optim = self._optim
        warm = min(1.0, (step + 1) / optim.warmup_steps) if optim.warmup_steps else 1.0
        rate = self._decayed(self.steps - step, optim.decay_steps)
        segment = self._segment(step)
        if segment and segment.integer:  # a decay of its own, as long as the hold has steps for it; the ramp restores the rate
            rate = min(rate, self._decayed(segment.end - step, min(optim.decay_steps, segment.steps)))
        return warm * rate

    def _decayed(self, left: int, over: int) -> float:
        """The learning rate with ``left`` steps to go, of which the last ``over`` decay."""
        if left > over:
            return self._optim.lr
        return self._optim.min_lr + left / (over + 1) * (self._optim.lr - self._optim.min_lr)

    def _saves(self, step: int) -> tuple[str, ...]:
        names = []
        segment, held = self._segment(step), set(self._integers()) if self._dmc.integer_hold_steps else set()
        if segment and segment.phase == "ramp":
            before, after = self.target_cr(step - 1), self.target_cr(step)
            first = max(2, math.floor(before + _EXACT) + 1)
            names += [f"cr{n}" for n in range(first, math.floor(after + _EXACT) + 1) if n not in held]
        elif segment and segment.integer and step + 1 == segment.end:
            names.append(f"cr{segment.cr:g}")
        last = step + 1 == self.steps
        if last:
            names.append("final")
        if not last and self._run.save_every and (step + 1) % self._run.save_every == 0:
            names.append(f"step{step + 1:06d}")
        return tuple(names)
