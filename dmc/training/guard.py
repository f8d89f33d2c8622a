"""The numerics guard: a step whose loss or gradients cannot be right changes no weight.

The gradient norm is known before the optimizer's step. A loss or norm that is NaN or infinite, or a norm far above
the running median, makes every rank leave the step out alike (``guard.action=skip``) or end the run (``stop``);
either way rank 0 writes a report of what was wrong (`dmc.training.diagnosis`).
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor, nn

from dmc.training import cpu, diagnosis
from dmc.training.config import GuardConfig


class Guard:
    """Applies the optimizer's steps that are sound; every rank calls it together.

    Args:
        config: what is done about the others.
        directory: of the reports.
        optimizer: of megatron-core.
        chunks: the parts of the model on this rank, under their own parameter names.
    """

    def __init__(self, config: GuardConfig, directory: Path, optimizer: MegatronOptimizer, chunks: list[nn.Module]) -> None:
        self._config, self._directory, self._optimizer, self._chunks = config, directory, optimizer, chunks
        self._norms: list[float] = []  # of the last accepted steps
        self._skipped = 0  # in a row

    def step(self, metrics: dict, samples: Tensor) -> bool:
        """The optimizer's step, unless it is rejected; sets ``metrics["grad_norm"]``.

        Args:
            metrics: of this step (``step``, ``loss``, ...), the same on every rank.
            samples: ``[n]`` indices of this rank's sequences of the step.

        Returns:
            whether the weights changed.

        Raises:
            FloatingPointError: on every rank, if the run stops; weights and optimizer are as before the step.
        """
        overflow = self._optimizer.prepare_grads()
        own = float(self._optimizer.get_grad_norm() or 0.0)
        sound, norm = _agree(not overflow and math.isfinite(own), own)
        metrics["grad_norm"] = norm
        reason = self._wrong(sound, norm, metrics["loss"])
        if reason is None:
            self._apply(own)
            self._norms = [*self._norms, norm][-self._config.window :]
            self._skipped = 0
            return True
        self._skipped += 1
        stops = self._config.action == "stop" or self._skipped > self._config.max_skips
        self._report(metrics, reason, samples, "stopped" if stops else "skipped")
        return False

    def state(self) -> dict:
        """What a resumed run goes on from; JSON values."""
        return {"norms": self._norms, "skipped": self._skipped}

    def load_state(self, state: dict) -> None:
        """Go on from `state`."""
        self._norms, self._skipped = list(state["norms"]), state["skipped"]

    def _wrong(self, sound: bool, norm: float, loss: float) -> str | None:
        """Why this step cannot be right, or None."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not sound:
            return "the gradient norm is not finite"
        ratio = self._config.max_norm_ratio
        if ratio and len(self._norms) == self._config.window and norm > ratio * (median := statistics.median(self._norms)):
            return f"the gradient norm {norm:.4g} is above guard.max_norm_ratio {ratio:g} times the running median {median:.4g}"
        return None

    def _apply(self, norm: float) -> None:
        """Clip and step, as megatron's own `step` does after its norm."""
        for part in getattr(self._optimizer, "chained_optimizers", [self._optimizer]):
            parameters = [] if part.is_stub_optimizer else part.get_parameters()
            if parameters:
                clip_grad_by_total_norm_fp32(
                    parameters, part.config.clip_grad, norm, part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
                )
        if not self._optimizer.step_with_ready_grads():
            raise FloatingPointError("the optimizer rejected a step whose gradients are finite")

    def _report(self, metrics: dict, reason: str, samples: Tensor, outcome: str) -> None:
        path = self._directory / f"step{metrics['step']:06d}.json"
        found = diagnosis.examine(self._chunks, self._optimizer, samples)
        if found is not None:  # rank 0
            report = {"outcome": outcome, "reason": reason} | metrics | found
            median = statistics.median(self._norms) if self._norms else None
            report |= {"median_grad_norm": median, "refused_in_a_row": self._skipped}
            _write(path, report)
            print(f"warning: step {metrics['step']} {outcome}: {reason}; report in {path}", flush=True)
        if outcome == "stopped":
            after = f" after {self._skipped - 1} skipped steps in a row" if self._config.action == "skip" else ""
            raise FloatingPointError(
                f"step {metrics['step']}{after}: {reason}; the weights are as before it, the report is {path}: lower optim.lr, "
                "look at the samples of this step, or continue with guard.action=skip"
            )


def _agree(sound: bool, norm: float) -> tuple[bool, float]:
    """``sound`` on every rank, and the largest norm; NaN if any is not finite."""
    worst = torch.tensor([float(not sound), norm if sound else 0.0], dtype=torch.float64, device=cpu.device())
    torch.distributed.all_reduce(worst, op=torch.distributed.ReduceOp.MAX)
    unsound, norm = worst.tolist()
    return (False, math.nan) if unsound else (True, norm)


def _write(path: Path, report: dict) -> None:
    """JSON has no NaN: such numbers become strings. A report that cannot be written does not hide its reason."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_strict(report), indent=1) + "\n")
    except OSError as error:
        print(f"warning: the report {path} was not written: {error}", flush=True)


def _strict(value: object) -> object:
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
