"""Tensor parallelism of one engine: its ranks are started here, or were by torchrun.

Rank 0 schedules and tells the others what to do (`dmc.engine.parallel_team`), each does it to its heads
(`dmc.engine.parallel_rank`), and the engine sees one model and one cache (`dmc.engine.parallel_cache`).
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import threading
import time
import weakref
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener

import torch
import torch.distributed as dist

from dmc.cache import POLICIES
from dmc.engine.parallel_cache import TeamRunner
from dmc.engine.parallel_rank import KEY, Rank, Start, own_device, receive, send, work
from dmc.engine.parallel_team import START_SECONDS, RankFailed, Team, end, ended, last_words
from dmc.engine.parts import Parts
from dmc.model import read_config
from dmc.model.group import Group
from dmc.model.sharded import check_split

_PROGRAM = "from dmc.engine.parallel_rank import main; main()"

def start(parts: Parts, device: torch.device, ranks: int, timeout: float) -> tuple[Team, TeamRunner]:
    """Starts the ranks of a model, or joins those that torchrun has started.

    Under torchrun, ranks other than 0 never return: they work until rank 0 ends, and then this process ends too.

    Args:
        parts: of the model and the cache; ``kv_memory`` is that of each rank.
        device: the CPU, or "cuda" without a number: every rank takes a GPU.
        ranks: how many.
        timeout: seconds that a rank may keep the others waiting.

    Raises:
        ValueError: if the model cannot be cut so, a policy needs all heads, or the ranks cannot start.
    """
    config = read_config(parts.path)
    check_split(config, ranks)
    if not parts.policy.by_head:
        raise ValueError(
            f"the {parts.policy.name} policy decides over all heads of a layer together, and tensor parallelism puts these on "
            f"different ranks; use tensor_parallel 1, or one of: {', '.join(name for name in POLICIES if POLICIES[name].by_head)}"
        )
    if any(codec.placed for codec in (parts.codec if isinstance(parts.codec, list) else [parts.codec])):
        raise ValueError(
            "the eigen codec's bases are for all heads of a layer, and tensor parallelism puts these on different ranks; use "
            "tensor_parallel 1 or another codec"
        )
    if timeout <= 0:
        raise ValueError(f"rank_timeout must be above 0 seconds, got {timeout:g}")
    if device.index is not None:
        raise ValueError(f"device {str(device)!r} is one device, and tensor_parallel {ranks} needs {ranks}: give {device.type!r}")
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started == 1:
        return _spawn(parts, device.type, ranks, timeout)
    if started != ranks:
        raise ValueError(f"torchrun has started {started} processes, but tensor_parallel is {ranks}; make them equal")
    return _join(parts, device.type, ranks, timeout)


def _spawn(parts: Parts, kind: str, ranks: int, timeout: float) -> tuple[Team, TeamRunner]:
    """Ranks 1, 2, ... as processes of this one, on this machine."""
    device = own_device(kind, 0)
    if kind == "cuda":
        own_device(kind, ranks - 1)  # there must be so many
        torch.cuda.set_device(0)
    store, key = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), secrets.token_bytes(32)
    threads = None
    environment = os.environ | {KEY: key.hex(), "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    if kind == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, torch.get_num_threads() // ranks)
        torch.set_num_threads(threads)
    with Listener(("127.0.0.1", 0), backlog=ranks, authkey=key) as listener:
        children = [
            subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, "127.0.0.1", str(store.port), str(listener.address[1]),
                 str(rank), str(ranks)], env=environment, stdin=subprocess.DEVNULL,
            ) for rank in range(1, ranks)
        ]
        return _lead(parts, store, listener, children, device, Start(parts, kind, timeout, threads), ranks)


def _join(parts: Parts, kind: str, ranks: int, timeout: float) -> tuple[Team, TeamRunner]:
    """The ranks that torchrun has started, on one machine or several."""
    store, rank, _ = next(iter(dist.rendezvous("env://")))
    host, local = os.environ["MASTER_ADDR"], int(os.environ.get("LOCAL_RANK", "0"))
    store = dist.PrefixStore("dmc", store)
    if rank:
        port, key = store.get("link").decode().split()
        raise SystemExit(work(store, (host, int(port)), bytes.fromhex(key), rank, ranks, local))
    key = secrets.token_bytes(32)
    with Listener((host, 0), backlog=ranks, authkey=key) as listener:
        store.set("link", f"{listener.address[1]} {key.hex()}")
        return _lead(parts, store, listener, [], own_device(kind, local), Start(parts, kind, timeout, None), ranks)


def _lead(
    parts: Parts, store: dist.Store, listener: Listener, children: list[subprocess.Popen], device: torch.device, begin: Start,
    ranks: int,
) -> tuple[Team, TeamRunner]:
    links = []
    try:
        links = _links(listener, children, ranks)
        for link in links:
            send(link, begin)
        group = Group(store, 0, ranks, device=device, timeout=begin.timeout)
        own = parts.runner(device, group)
        team = Team(Rank(own, group), links, children, begin.timeout)
        if parts.automatic:  # one size for all ranks, since rank 0 schedules by its own: what the scarcest has
            least = min(reply.value for reply in team.call("automatic", ranks if children else None))
            team.call("bound", least, own.model.config.positions)
    except BaseException as error:
        words = None if isinstance(error, ValueError) else last_words(links, children)
        for child in children:
            child.kill()
        end(links, children)
        if isinstance(error, RankFailed | RuntimeError | EOFError | OSError):
            raise ValueError(f"tensor parallelism could not start: {words or error}") from error
        raise
    for child in children:
        threading.Thread(target=_watch, args=(child, weakref.ref(group)), daemon=True).start()
    return team, TeamRunner(team, own, read_config(parts.path))


def _links(listener: Listener, children: list[subprocess.Popen], ranks: int) -> list[Connection]:
    """A link to each of ranks 1, 2, ...; those that rank 0 has started may die instead of coming."""
    links: dict[int, Connection] = {}

    def accept() -> None:
        while len(links) < ranks - 1:
            try:
                link = listener.accept()
                links[receive(link)] = link
            except (AuthenticationError, EOFError, ConnectionError):
                continue  # whoever that was, it was none of the ranks
            except OSError:
                return  # given up

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    latest = time.monotonic() + START_SECONDS
    while thread.is_alive():
        thread.join(0.05)
        dead = next((rank for rank, child in enumerate(children, 1) if child.poll() is not None), None)
        if dead is not None:
            raise RankFailed(ended(dead, children[dead - 1]))
        if time.monotonic() > latest:
            raise RankFailed(f"only {len(links) + 1} of {ranks} ranks have come after {START_SECONDS:g} seconds")
    return [links[rank] for rank in range(1, ranks)]


def _watch(child: subprocess.Popen, group: weakref.ref[Group]) -> None:
    """NCCL does not notice that a process of the same machine has died: its calls are ended from here."""
    child.wait()
    own = group()
    if own is not None and own.device.type == "cuda":
        own.abort()
