"""Where a run's numbers go: a line on the terminal, JSONL always, tensorboard and wandb when asked for."""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import psutil
import torch

from dmc.families import ModelShape
from dmc.training import cpu, flops
from dmc.training.config import Config, LogConfig


class Meter:
    """Speed, memory and time left of a run, step by step.

    Args:
        config: of the run.
        hf: of the model.
        steps: of the whole run.
        world: ranks.
    """

    def __init__(self, config: Config, hf: ModelShape, *, steps: int, world: int) -> None:
        self._tokens = config.optim.global_batch * config.data.sequence_length
        self._steps, self._started = steps, time.perf_counter()
        self._first: int | None = None
        peak = flops.peak_tflops(config)
        # MFU a token per second; None where nothing is known of the machine.
        self._share = None if peak is None else flops.model_flops(config, hf) / (peak * 1e12 * world)

    def __call__(self, step: int, seconds: float) -> dict[str, float]:
        """After ``step`` steps, the last of which took ``seconds``: tokens_per_s, mfu (if known), memory_gib, eta_s.

        ``memory_gib`` is the largest of all ranks (collective): the peak that CUDA allocated, or the process's
        resident size. The ETA goes by this process's own pace, evaluations and checkpoints included.
        """
        if self._first is None:  # the time before the first step (loading, first evaluation) is not repeated
            self._first, self._started = step - 1, time.perf_counter() - seconds
        pace = (time.perf_counter() - self._started) / (step - self._first)
        speed = self._tokens / seconds
        share = {} if self._share is None else {"mfu": speed * self._share}
        return {"tokens_per_s": speed} | share | {"memory_gib": _memory_gib(), "eta_s": pace * (self._steps - step)}


class Reporter:
    """Writes on rank 0 only; on other ranks every method does nothing.

    ``metrics.jsonl`` holds one object a step (keys as in `Trainer.train_step`) and one an evaluation (keys
    ``eval_...``). A resumed run cuts off what was written after its checkpoint, so that steps never repeat.
    """

    def __init__(self, config: LogConfig, output: Path, settings: dict, *, rank: int, steps: int) -> None:
        self._active, self._steps = rank == 0, steps
        self._path = output / "metrics.jsonl"
        self._file: TextIO | None = None
        self._resumed_at: int | None = None
        self._tensorboard = self._open_tensorboard = self._wandb = None
        if not self._active:
            return
        if config.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ValueError("log.tensorboard needs the package tensorboard: pip install tensorboard") from None
            # Opened at the first point: only then is it known which points a resumed run writes again.
            self._open_tensorboard = lambda: SummaryWriter(str(output / "tensorboard"), purge_step=self._resumed_at)
        if config.wandb:
            try:
                import wandb
            except ImportError:
                raise ValueError("log.wandb needs the package wandb: pip install wandb") from None
            with _nobody_to_ask():
                try:
                    self._wandb = wandb.init(
                        project=config.wandb, config=settings, dir=str(output), id=_run_id(output), resume="allow"
                    )
                except wandb.errors.UsageError as error:
                    raise ValueError(
                        f"log.wandb={config.wandb} could not start ({' '.join(str(error).split())}): run `wandb login`, set "
                        "WANDB_API_KEY, or set WANDB_MODE=offline"
                    ) from None

    def resumed(self, step: int) -> None:
        """Forget lines of later steps than the checkpoint's."""
        self._resumed_at = step + 1
        if not self._active or not self._path.is_file():
            return
        kept = [line for line in self._path.read_text().splitlines() if _step_of(line) <= step]
        self._path.write_text("".join(line + "\n" for line in kept))
        self.say(f"resumed at step {step}")

    def step(self, metrics: dict, *, shown: bool) -> None:
        """The metrics of a step; ``shown`` also prints the progress line."""
        if not self._active:
            return
        self._write(metrics)
        if shown:
            self.say(progress_line(metrics, self._steps))

    def evaluation(self, metrics: dict) -> None:
        """The numbers of an evaluation on held-out text."""
        if not self._active:
            return
        self._write(metrics)
        self.say(
            f"       evaluation [{metrics['name']}]  held-out perplexity {metrics['eval_perplexity']:.4f}"
            f"  measured CR {metrics['eval_cr']:.3f}"
        )

    def say(self, text: str) -> None:
        """A line on the terminal of rank 0."""
        if self._active:
            print(text, flush=True)

    def close(self) -> None:
        """Flush and finish."""
        for sink in (self._file, self._tensorboard):
            if sink is not None:
                sink.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _write(self, metrics: dict) -> None:
        if self._file is None:
            self._file = self._path.open("a")
        self._file.write(json.dumps({"time": round(time.time(), 3)} | metrics) + "\n")
        self._file.flush()
        numbers = dict(_scalars({k: v for k, v in metrics.items() if k != "step"}))
        if self._open_tensorboard is not None:
            self._tensorboard, self._open_tensorboard = self._open_tensorboard(), None
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, metrics["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=metrics["step"])


def progress_line(metrics: dict, steps: int) -> str:
    """``step 120/450 ramp  loss 0.312  target CR 2.10  measured CR 2.07  3120 tokens/s  ETA 2:41``."""
    parts = [f"step {metrics['step']}/{steps} {metrics['phase']:<9}", f"loss {metrics['loss']:.4f}"]
    if "measured_cr" in metrics:
        parts += [f"target CR {metrics['target_cr']:.2f}", f"measured CR {metrics['measured_cr']:.2f}"]
    parts.append(f"{metrics['tokens_per_s']:.0f} tokens/s")
    if "mfu" in metrics:
        parts.append(f"MFU {100 * metrics['mfu']:.1f} %")
    return "  ".join([*parts, f"{metrics['memory_gib']:.1f} GiB", f"ETA {clock(metrics['eta_s'])}"])


def clock(seconds: float) -> str:
    """``2:41`` minutes, ``25:01:01`` hours."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _memory_gib() -> float:
    own = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss
    largest = torch.tensor(float(own), device=cpu.device())
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return largest.item() / 2**30


def _scalars(metrics: dict) -> Iterator[tuple[str, float]]:
    """Numbers as they are, lists of numbers one by one (``cr_layer/07``): what curves are drawn of."""
    for key, value in metrics.items():
        if isinstance(value, int | float):
            yield key, value
        elif isinstance(value, list) and all(isinstance(x, int | float) for x in value):
            yield from ((f"{key}/{i:02d}", x) for i, x in enumerate(value))


def _step_of(line: str) -> int:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):  # a line cut short by the crash that is being resumed from
        return 2**62


@contextmanager
def _nobody_to_ask() -> Iterator[None]:
    """Standard input is empty: a library that would ask on the terminal raises, and no run waits for an answer."""
    with open(os.devnull) as nothing:
        kept, sys.stdin = sys.stdin, nothing
        try:
            yield
        finally:
            sys.stdin = kept


def _run_id(output: Path) -> str:
    """The wandb run of this output directory: kept, so that a resumed run continues its curves."""
    path = output / "wandb_run_id"
    if not path.is_file():
        path.write_text(secrets.token_hex(8))
    return path.read_text().strip()
