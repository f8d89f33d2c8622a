"""Starts the ranks of a tensor-parallel engine, or joins those that torchrun has started."""

from __future__ import annotations

import os
import pickle
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
import torch.distributed as dist

from dmc.cache import POLICIES
from dmc.engine.core import Engine
from dmc.engine.memory import automatic
from dmc.engine.parts import Parts
from dmc.engine.ranks import RankFailed, Ranks
from dmc.model import read_config
from dmc.model.group import Group, PeerLost
from dmc.model.sharded import check_split

_PROGRAM = "from dmc.engine.launch import main; main()"


@dataclass(frozen=True)
class Member:
    """What a rank has to know.

    Attributes:
        parts: of the engine.
        device: "cpu" or "cuda".
        rank, ranks: which of how many.
        local_rank, ranks_here: the same, of those on this machine.
        timeout: seconds that a rank may keep the others waiting.
        key: see `Ranks`.
        port: of the store on this machine; 0 if torchrun has one.
        threads: of a rank on the CPU; None: as it is.
    """

    parts: Parts
    device: str
    rank: int
    ranks: int
    local_rank: int
    ranks_here: int
    timeout: float
    key: bytes
    port: int = 0
    threads: int | None = None


def start(parts: Parts, device: torch.device, ranks: int, timeout: float) -> Engine:
    """The engine of this process, with those of the other ranks ready.

    Under torchrun, ranks other than 0 never return: they run what rank 0 runs until it ends, and then this process ends too.

    Args:
        parts: of the engine; ``kv_memory`` is that of each rank.
        device: the CPU, or "cuda" without a number: every rank takes a GPU.
        ranks: how many.
        timeout: seconds that a rank may keep the others waiting.

    Raises:
        ValueError: if the model cannot be cut so, a policy needs all heads, or the ranks cannot start.
    """
    _check(parts, device, ranks, timeout)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started == 1:
        return _spawn(parts, device.type, ranks, timeout)
    if started != ranks:
        raise ValueError(f"torchrun has started {started} processes, but tensor_parallel is {ranks}; make them equal")
    return _join(parts, device.type, ranks, timeout)


def _check(parts: Parts, device: torch.device, ranks: int, timeout: float) -> None:
    check_split(read_config(parts.path), ranks)
    if not parts.policy.by_head:
        raise ValueError(
            f"the {parts.policy.name} policy {parts.policy.across_heads}, and tensor parallelism puts these on different ranks; "
            f"use tensor_parallel 1, or one of: {', '.join(name for name in POLICIES if POLICIES[name].by_head)}"
        )
    if any(codec.needs_positions for codec in (parts.codec if isinstance(parts.codec, list) else [parts.codec])):
        raise ValueError(
            "the eigen codec's bases are for all heads of a layer, and tensor parallelism puts these on different ranks; use "
            "tensor_parallel 1 or another codec"
        )
    if timeout <= 0:
        raise ValueError(f"rank_timeout must be above 0 seconds, got {timeout:g}")
    if device.index is not None:
        raise ValueError(f"device {str(device)!r} is one device, and tensor_parallel {ranks} needs {ranks}: give {device.type!r}")


def _spawn(parts: Parts, kind: str, ranks: int, timeout: float) -> Engine:
    """Ranks 1, 2, ... as processes of this one, on this machine. Each reads its `Member` from stdin."""
    if kind == "cuda":
        _own_device(kind, ranks - 1)  # there must be so many
    threads = None
    if kind == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, torch.get_num_threads() // ranks)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    member = Member(parts, kind, 0, ranks, 0, ranks, timeout, secrets.token_bytes(32), store.port, threads)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", _PROGRAM]
    children = [subprocess.Popen(command, env=environment, stdin=subprocess.PIPE) for _ in range(1, ranks)]
    for rank, child in enumerate(children, 1):
        try:
            with child.stdin as stdin:
                pickle.dump(replace(member, rank=rank, local_rank=rank), stdin)
        except OSError:
            pass  # it has ended: `Ranks.meet` says so
    return _take_part(member, store, children)


def _join(parts: Parts, kind: str, ranks: int, timeout: float) -> Engine:
    """The ranks that torchrun has started, on one machine or several."""
    store, rank, _ = next(iter(dist.rendezvous("env://")))
    store = dist.PrefixStore("dmc", store)
    if rank == 0:
        store.set("key", secrets.token_bytes(32).hex())
    key = bytes.fromhex(store.get("key").decode())
    local, here = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    member = Member(parts, kind, rank, ranks, local, here, timeout, key)
    if rank == 0:
        return _take_part(member, store)
    if threading.current_thread() is threading.main_thread():
        _ignore_signals()
    _leave(_work(member, store))


def _take_part(member: Member, store: dist.Store, children: Sequence[subprocess.Popen] = ()) -> Engine:
    """This rank's engine, once every rank has its own.

    Raises:
        ValueError: if the directory, a setting or the machine does not allow it, or another rank cannot start.
    """
    ranks = Ranks(store, member.rank, member.ranks, key=member.key, timeout=member.timeout, children=children)
    try:
        if member.threads:
            torch.set_num_threads(member.threads)
        device = _own_device(member.device, member.local_rank)
        ranks.meet("started")
        ranks.join(Group(store, member.rank, member.ranks, device=device, timeout=member.timeout))
        engine = member.parts.engine(device, ranks)
        ranks.meet("loaded")
        if member.parts.automatic:  # one size for all ranks: that of the rank with the least memory
            memory = ranks.group.least(automatic(device, member.ranks_here))
            engine.cache.bound(memory, tokens=engine.runner.model.config.positions)
        ranks.ready(engine)
        return engine
    except BaseException as error:
        said = ranks.explain(error) if isinstance(error, PeerLost) or member.rank else str(error)
        ranks.end_children()
        if isinstance(error, RankFailed | RuntimeError | OSError):
            raise ValueError(f"tensor parallelism could not start: {said}") from error
        raise


def _work(member: Member, store: dist.Store) -> int:
    """A rank other than 0, until rank 0 ends it → the exit code."""
    try:
        engine = _take_part(member, store)
    except ValueError:
        return 1  # rank 0 says it
    return engine.ranks.follow(engine)


def _leave(code: int) -> NoReturn:
    """Ends the process without the interpreter's teardown: it takes long, and destroys process groups whose peers have ended."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _own_device(kind: str, local_rank: int) -> torch.device:
    """The device of a rank: all ranks of a machine share its CPU, or take a GPU each.

    Raises:
        ValueError: if there are too few GPUs.
    """
    if kind == "cpu":
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(f"tensor parallelism takes a GPU for each rank, and this machine has {torch.cuda.device_count()}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _ignore_signals() -> None:
    """SIGINT and SIGTERM go to all ranks and are rank 0's business: it finishes its requests, and then ends the other ranks."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def main() -> None:
    """A rank that rank 0 has started, with its `Member` on stdin."""
    _ignore_signals()
    member: Member = pickle.load(sys.stdin.buffer)
    _leave(_work(member, dist.TCPStore("127.0.0.1", member.port, is_master=False)))
