"""What a step does: the phases of a retrofit, its target compression ratio and its learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dmc.training.config import Config


@dataclass(frozen=True)
class StepPlan:
    """The plan of one step: ``phase`` is ``plain``, ``repurpose``, ``ramp`` or ``hold``."""

    phase: str
    target_cr: float
    neuron_scale: float  # of q[0] and k[0] while they are unlearnt; 1 elsewhere
    lr: float
    saves: tuple[str, ...]  # names of the checkpoints due after this step


class Schedule:
    """Maps a step to its `StepPlan`; a pure function of the configuration."""

    def __init__(self, config: Config) -> None:
        self._dmc, self._optim, self._run = config.dmc, config.optim, config.run
        repurposed = self._dmc.repurpose_steps if self._dmc.decision == "neuron" else 0
        compresses = self._dmc.compresses
        self.ramp_start = repurposed if compresses else 0
        self.ramp_steps = math.ceil(self._dmc.ramp_steps_per_unit * (self._dmc.target_cr - 1)) if compresses else 0
        self.hold_start = self.ramp_start + self.ramp_steps
        self.steps = self.hold_start + self._dmc.hold_steps if compresses else self._run.steps

    def target_cr(self, step: int) -> float:
        """The target of step ``step``: linear from 1 to the final one over the ramp."""
        if self.phase(step) in ("plain", "repurpose"):
            return 1.0
        done = min(1.0, (step + 1 - self.ramp_start) / max(1, self.ramp_steps))  # no ramp: all of it at once
        return 1.0 + done * (self._dmc.target_cr - 1.0)

    def phase(self, step: int) -> str:
        """The phase of step ``step``."""
        if self._dmc.method == "none":
            return "plain"
        if step < self.ramp_start:
            return "repurpose"
        return "ramp" if step < self.hold_start else "hold"

    def __call__(self, step: int) -> StepPlan:
        """The plan of step ``step``, counted from 0."""
        phase = self.phase(step)
        scale = 1.0
        if phase == "repurpose":  # gone after 80 % of the phase, as in the paper (200 of 250 steps)
            scale = max(0.0, 1 - step / max(1.0, 0.8 * self.ramp_start))
        return StepPlan(phase, self.target_cr(step), scale, self._lr(step), self._saves(step))

    def _lr(self, step: int) -> float:
        optim = self._optim
        warm = min(1.0, (step + 1) / optim.warmup_steps) if optim.warmup_steps else 1.0
        left = self.steps - step
        if left > optim.decay_steps:
            return optim.lr * warm
        share = left / (optim.decay_steps + 1)
        return warm * (optim.min_lr + share * (optim.lr - optim.min_lr))

    def _saves(self, step: int) -> tuple[str, ...]:
        names = []
        if self.phase(step) == "ramp":
            before, after = self.target_cr(step - 1), self.target_cr(step)
            first = math.floor(before + 1e-9) + 1
            names += [f"cr{n}" for n in range(first, math.floor(after + 1e-9) + 1) if n >= 2]
        last = step + 1 == self.steps
        if last:
            names.append("final")
        if not last and self._run.save_every and (step + 1) % self._run.save_every == 0:
            names.append(f"step{step + 1:06d}")
        return tuple(names)
