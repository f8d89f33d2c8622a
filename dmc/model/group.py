"""Collectives over the ranks of one tensor-parallel engine."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

_HEADER = 4096  # bytes of an announcement's first part: most have no other
_LENGTH = 8  # of these, for the length of all
_UNLIMITED = timedelta(days=365)  # for the next announcement, while rank 0 is idle


class PeerLost(RuntimeError):
    """A collective failed: another rank has ended, or is late."""


class Group:
    """Collectives of the ranks: tensors of the model by NCCL on GPUs and by gloo on the CPU, everything else by gloo.

    It has process groups of its own and leaves torch.distributed's default group alone, which may belong to other code of
    this process. Every rank must make the same calls in the same order.

    Args:
        store: over which the ranks find each other.
        rank, ranks: which of how many.
        device: of the model's tensors.
        timeout: seconds that a call waits for the other ranks; other ranks than 0 wait for `announce` without a limit.

    Attributes:
        together: True while all ranks run the same code, which is when collectives are allowed.
        calls: collectives begun so far.

    Raises:
        PeerLost: by every method, if a rank has ended or is late.
        RuntimeError: by every method, if it is called while ``together`` is False: the other ranks would not take part.
    """

    def __init__(self, store: dist.Store, rank: int, ranks: int, *, device: torch.device, timeout: float) -> None:
        self.rank, self.ranks, self.device = rank, ranks, device
        self.together, self.calls = False, 0
        wait = timedelta(seconds=timeout)
        self._small = self._tensors = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, ranks, wait)
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = wait
            self._tensors = dist.ProcessGroupNCCL(dist.PrefixStore("nccl", store), rank, ranks, options)

    # ------------------------------------------------------------------------------------ tensors of the model, in place

    def sum(self, tensor: Tensor) -> Tensor:
        """All-reduce by sum, in place; the same bits on all ranks."""
        tensor = tensor.contiguous()
        self._call(lambda: self._tensors.allreduce([tensor]))
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        """Tensors of one shape, in the order of ranks; None on other ranks than 0."""
        options = dist.GatherOptions()
        options.rootRank = 0
        whole = [torch.empty_like(tensor) for _ in range(self.ranks)] if self.rank == 0 else None
        self._call(lambda: self._tensors.gather([] if whole is None else [whole], [tensor.contiguous()], options))
        return whole

    # ------------------------------------------------------------------------------------ everything else, on the CPU

    def least(self, value: int) -> int:
        """The smallest of the ranks' numbers, on all ranks."""
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MIN
        number = torch.tensor([value])
        self._call(lambda: self._small.allreduce([number], options))
        return int(number)

    def all(self, tensor: Tensor) -> list[Tensor]:
        """Tensors of one shape and dtype, in the order of ranks, on the CPU of all ranks."""
        tensor = tensor.cpu().contiguous()
        whole = [torch.empty_like(tensor) for _ in range(self.ranks)]
        self._call(lambda: self._small.allgather([whole], [tensor]))
        return whole

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor, on the CPU of all ranks; elsewhere ``tensor`` gives shape and dtype."""
        tensor = tensor.cpu().contiguous()
        self._call(lambda: self._small.broadcast([tensor], _from_first()))
        return tensor

    def announce(self, message: bytes | None = None) -> bytes:
        """Rank 0's bytes, on all ranks; the other ranks call it without, and wait for as long as nothing is announced."""
        first = torch.zeros(_HEADER, dtype=torch.uint8)
        if message is not None:
            whole = len(message).to_bytes(_LENGTH, "little") + message
            first[: len(whole)] = _bytes(whole[:_HEADER])
        wait = _UNLIMITED if message is None else None  # rank 0 waits for others that hang no longer than in any other call
        self._call(lambda: self._small.broadcast([first], _from_first(wait)))
        start = first.numpy().tobytes()
        length = int.from_bytes(start[:_LENGTH], "little")
        if length <= _HEADER - _LENGTH:
            return start[_LENGTH : _LENGTH + length]
        rest = torch.empty(length - (_HEADER - _LENGTH), dtype=torch.uint8)
        if message is not None:
            rest = _bytes(message[_HEADER - _LENGTH :])
        self._call(lambda: self._small.broadcast([rest], _from_first()))
        return start[_LENGTH:] + rest.numpy().tobytes()

    def abort(self) -> None:
        """Ends calls on GPUs that wait for a rank that has ended; may be called from another thread."""
        if self.device.type == "cuda":
            self._tensors.abort()

    def _call(self, begin: Callable[[], dist.Work]) -> None:
        if not self.together:
            raise RuntimeError(
                "this needs all ranks of the tensor-parallel engine, and rank 0 alone has called it: run it by LLM.everywhere"
            )
        self.calls += 1
        try:
            begin().wait()
        except RuntimeError as error:
            raise PeerLost(str(error)) from error


def _from_first(timeout: timedelta | None = None) -> dist.BroadcastOptions:
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    if timeout is not None:
        options.timeout = timeout
    return options


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
