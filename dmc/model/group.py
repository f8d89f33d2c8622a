"""The ranks of one tensor-parallel model, and what they say to each other in the middle of it."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


class Group:
    """Sums, gathers and broadcasts over ranks, by gloo for tensors on the CPU and by NCCL on GPUs.

    It is a process group of its own and leaves torch.distributed's default group alone, which may belong to somebody
    else in this process. Every rank must make the same calls in the same order.

    Args:
        store: over which the ranks find each other.
        rank, ranks: which of how many.
        device: of the tensors.
        timeout: seconds that a call waits for the others.

    Raises:
        RuntimeError: by every method, if a rank has gone or is late.
    """

    def __init__(self, store: dist.Store, rank: int, ranks: int, *, device: torch.device, timeout: float) -> None:
        self.rank, self.ranks, self.device = rank, ranks, device
        wait = timedelta(seconds=timeout)
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = wait
            self._group = dist.ProcessGroupNCCL(dist.PrefixStore("nccl", store), rank, ranks, options)
        else:
            self._group = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, ranks, wait)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place; the same bits everywhere."""
        tensor = tensor.contiguous()
        self._group.allreduce([tensor]).wait()
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        """Tensors of one shape, in the order of ranks; None on other ranks than 0."""
        options = dist.GatherOptions()
        options.rootRank = 0
        whole = [torch.empty_like(tensor) for _ in range(self.ranks)] if self.rank == 0 else None
        self._group.gather([] if whole is None else [whole], [tensor.contiguous()], options).wait()
        return whole

    def broadcast(self, tensor: Tensor) -> Tensor:
        """That of rank 0, in place."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        tensor = tensor.contiguous()
        self._group.broadcast([tensor], options).wait()
        return tensor

    def abort(self) -> None:
        """Ends calls that wait for a rank that has gone; may be called from another thread."""
        self._group.abort()
