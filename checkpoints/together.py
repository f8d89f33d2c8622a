"""Steps that every rank takes together, whose failure on one rank is raised on all of them.

A rank that fails alone would leave the others waiting in the next collective call. Here each rank first tries
its part, then all of them hear whether one failed. Without a process group there is one rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.distributed.checkpoint.api import CheckpointException

from dmc.training import cpu

T = TypeVar("T")


def rank() -> int:
    """This process's rank."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def ranks() -> int:
    """How many processes there are."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def gather(value: T) -> list[T]:
    """Every rank's (small) value, in the order of ranks, on every rank."""
    if ranks() == 1:
        return [value]
    values: list = [None] * ranks()
    torch.distributed.all_gather_object(values, value)
    return values


def collect(value: T) -> list[T]:
    """Every rank's value, in the order of ranks, on rank 0; an empty list elsewhere."""
    if ranks() == 1:
        return [value]
    values: list | None = [None] * ranks() if rank() == 0 else None
    torch.distributed.gather_object(value, values, dst=0)
    return values or []


def all_true(flag: bool) -> bool:
    """Whether ``flag`` is true on every rank."""
    if ranks() == 1:
        return flag
    lowest = torch.tensor(int(flag), device=cpu.device())
    torch.distributed.all_reduce(lowest, op=torch.distributed.ReduceOp.MIN)
    return bool(lowest.item())


def broadcast(value: T) -> T:
    """Rank 0's value."""
    if ranks() == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def everywhere(work: Callable[[], T]) -> T:
    """Run ``work``, which holds no collective call, on every rank.

    Raises:
        OSError: on every rank, if it raised on one; names that rank and its reason.
    """
    result, failure = _attempt(work)
    raise_first(gather(failure))
    return result


def on_rank_0(work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0; its result on every rank.

    Raises:
        OSError: on every rank, if it raised.
    """
    result, failure = _attempt(work) if rank() == 0 else (None, None)
    result, failure = broadcast((result, failure))
    raise_first([failure])
    return result


def raise_first(failures: list[str | None]) -> None:
    """Raise the first failure of the ranks, if there is one."""
    for number, failure in enumerate(failures):
        if failure is not None:
            where = f" (rank {number})" if ranks() > 1 else ""
            raise OSError(f"the checkpoint was not written: {failure}{where}")


def reason(error: BaseException) -> str:
    """What went wrong, in one line: the system's own error where torch hides it behind another."""
    while isinstance(error, CheckpointException):  # the errors of all ranks in one
        error = next(iter(error.failures.values()))[0]
    chain = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None and before not in chain:
        chain.append(before)
    error = next((e for e in chain if isinstance(e, OSError)), error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)}" if lines else type(error).__name__


def _attempt(work: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return work(), None
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must not wait for this one
        return None, reason(error)
