"""Preemption: SIGTERM and SIGUSR1 end the run after the current step, with a checkpoint.

SLURM sends SIGTERM when a job is preempted and, where the job asks for it (``--signal=USR1@180`` in scripts/slurm),
SIGUSR1 some time before its limit. Not every rank need get the signal, and none at the same time: after each step all of
them agree.
"""

from __future__ import annotations

import signal

import torch

from dmc.training import cpu

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: run the same command again


class Stopped(SystemExit):
    """The run ended early on a signal, its checkpoint is complete; ends the process with `EXIT_CODE`."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(EXIT_CODE)
        self.signal, self.step = signal.Signals(number).name, step

    def __str__(self) -> str:
        """One sentence."""
        return f"stopped by {self.signal} after step {self.step}: run the same command with --resume auto"


class StopSignals:
    """Notes SIGTERM and SIGUSR1 from its construction on, in place of what they did before."""

    def __init__(self) -> None:
        self._received = 0
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def agreed(self) -> int:
        """The signal that any rank has received (the highest number), or 0; every rank calls it together."""
        received = torch.tensor(self._received, device=cpu.device())
        torch.distributed.all_reduce(received, op=torch.distributed.ReduceOp.MAX)
        return int(received.item())

    def _note(self, number: int, _: object) -> None:
        self._received = max(self._received, number)
