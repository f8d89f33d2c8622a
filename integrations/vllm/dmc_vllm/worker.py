"""vLLM's workers, which also tell the cache which requests have begun, ended or lost their blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.platforms import current_platform

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Base
else:
    from vllm.v1.worker.gpu_worker import Worker as Base


class DmcWorker(Base):
    """See the head of this file."""

    def execute_model(self, scheduler_output: SchedulerOutput) -> object:
        """Runs a step of vLLM's scheduler."""
        with torch.inference_mode():  # as the model runs: tables that grew in it cannot be changed outside
            self._arena.requests.follow(scheduler_output)
        return super().execute_model(scheduler_output)

    def dmc_stats(self) -> dict[str, int | float]:
        """Figures of the cache, for ``LLM.collective_rpc("dmc_stats")``; see `dmc_vllm.requests.Requests.stats`."""
        return self._arena.requests.stats()

    @property
    def _arena(self):  # noqa: ANN202
        return self.model_runner.get_model().arena
