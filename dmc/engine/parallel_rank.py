"""One rank of a tensor-parallel model: its heads' part of the model and of the cache, and the commands that it runs on them.

Rank 0 schedules, samples and handles requests. The other ranks know no sequences, only slots, prompts and commands. All ranks
receive the same commands in the same order, so slots have the same numbers everywhere. `main` is
such a rank as a program of its own, which `dmc.engine.parallel` starts.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection

import torch
import torch.distributed as dist
from torch import Tensor

from dmc.cache import PoolExhausted, Prompt, Swapped
from dmc.engine.memory import automatic
from dmc.engine.parts import Parts
from dmc.engine.runner import Chunk, Runner
from dmc.model.group import Group

KEY = "DMC_RANK_KEY"  # of the environment


@dataclass(frozen=True)
class State:
    """State of a rank's page pool and codec, sent with every reply.

    Attributes:
        free, used, capacity: pages.
        lost, whole: squared error of encoded keys and values, and their squares, over the sampled pages.
    """

    free: int
    used: int
    capacity: int
    lost: tuple[float, float]
    whole: tuple[float, float]


@dataclass(frozen=True)
class Reply:
    """Reply of a rank to a command.

    Attributes:
        value: return value of the method.
        short: True if the pool had too few pages; then nothing was changed.
        state: afterwards.
    """

    value: object
    short: bool
    state: State


@dataclass(frozen=True)
class Start:
    """The first thing that a rank is told.

    Attributes:
        parts: of the model and the cache.
        device: "cpu" or "cuda".
        timeout: see `Group`.
        threads: of a rank on the CPU; None: as it is.
    """

    parts: Parts
    device: str
    timeout: float
    threads: int | None


class Rank:
    """Does what rank 0 says, on every rank, rank 0 itself included.

    Public methods are commands; each ends with the same slots free on every rank.
    """

    def __init__(self, runner: Runner, group: Group) -> None:
        self._runner, self._cache, self._group = runner, runner.cache, group
        self._kept: dict[int, Prompt | Swapped] = {}  # by the number that rank 0 gave them
        self._taken: int | None = None  # slot of the last command that can be undone
        self.hidden: Tensor | None = None  # of the last step; on rank 0 what the next `logits` are of

    def execute(self, name: str, arguments: tuple, forgotten: Sequence[int]) -> Reply:
        """Runs one command, after dropping prompts and swapped sequences that rank 0 has dropped."""
        for number in forgotten:
            self._kept.pop(number, None)
        try:
            value, short = getattr(self, name)(*arguments), False
        except PoolExhausted:
            if name not in ("load", "fork", "swap_in"):  # elsewhere another rank would be left waiting
                raise
            value, short, self._taken = None, True, None
        cache = self._cache
        return Reply(value, short, State(cache.free_pages, cache.used_pages, cache.pages, *cache.codec_error_sums))

    # ------------------------------------------------------------------------------------ commands

    def nothing(self) -> None:
        """Only the state is asked for."""

    def automatic(self, ranks_here: int | None) -> int:
        """See `dmc.engine.memory.automatic`; None: as many ranks are here as torchrun has started here."""
        here = int(os.environ["LOCAL_WORLD_SIZE"]) if ranks_here is None else ranks_here
        return automatic(self._runner.model.device, here)

    def bound(self, memory: int, tokens: int) -> None:
        """See `KVCache.bound`."""
        self._cache.bound(memory, tokens=tokens)

    def step(
        self, slots: list[int], tokens: list[int], positions: list[int], chunks: list[tuple[int, list[int]]], trace: bool,
    ) -> tuple[list[int], Tensor | None]:
        """See `Runner.step`; chunks name prompts → (bytes of each chunk's prompt, merges ``[N, L, h]`` if traced)."""
        prompts = [self._kept.setdefault(number, self._cache.prompt()) for number, _ in chunks]
        parts = [Chunk(prompt, part) for prompt, (_, part) in zip(prompts, chunks, strict=True)]
        first, rest = self._runner.step(slots, tokens, positions, parts, trace=trace)
        self.hidden = torch.cat([first, *rest])
        return [prompt.nbytes for prompt in prompts], self._runner.merges if trace else None

    def logits(self, count: int) -> None:
        """Of hidden states ``[count, hidden]`` of rank 0, which finds them in `hidden` afterwards: ``[count, V]``."""
        if self._group.rank:
            shape = (count, self._runner.model.config.hidden_size)
            self.hidden = torch.empty(shape, dtype=self._runner.model.dtype, device=self._runner.model.device)
        self.hidden = self._runner.logits(self._group.broadcast(self.hidden))

    def load(self, prompt: int, donor: int | None, common: int) -> int:
        """See `KVCache.load`."""
        self._taken = self._cache.load(self._kept[prompt], donor=donor, common=common)
        return self._taken

    def fork(self, slot: int) -> int:
        """See `KVCache.fork`."""
        self._taken = self._cache.fork(slot)
        return self._taken

    def swap_out(self, slot: int, number: int) -> None:
        """See `KVCache.swap_out`."""
        self._kept[number] = self._cache.swap_out(slot)

    def swap_in(self, number: int) -> int:
        """See `KVCache.swap_in`."""
        self._taken = self._cache.swap_in(self._kept[number])
        return self._taken

    def undo(self) -> None:
        """Takes the last `load`, `fork` or `swap_in` back, where another rank had too few pages for it."""
        if self._taken is not None:
            self._cache.close(self._taken)
        self._taken = None

    def close(self, slot: int) -> None:
        """See `KVCache.close`."""
        self._cache.close(slot)

    def can_append(self, slots: list[int]) -> bool:
        """See `KVCache.can_append`."""
        return self._cache.can_append(torch.tensor(slots, device=self._runner.model.device))

    def can_return(self, number: int, beside: bool) -> bool:
        """See `KVCache.can_return`."""
        return self._cache.can_return(self._kept[number], beside=beside)

    def entries(self, slot: int) -> Tensor:
        """See `KVCache.entries`."""
        return self._cache.entries(slot).cpu()

    def held(self, slot: int) -> tuple[dict[str, int], int]:
        """See `KVCache.held` and `KVCache.shared_bytes`."""
        return self._cache.held(slot), self._cache.shared_bytes(slot)

    def check_integrity(self) -> None:
        """See `KVCache.check_integrity`."""
        self._cache.check_integrity()


def send(link: Connection, what: object) -> None:
    """Sends anything that can be pickled; tensors by value, where `Connection.send` would share their memory."""
    link.send_bytes(pickle.dumps(what))


def receive(link: Connection) -> object:
    """What the other end has sent.

    Raises:
        EOFError: if it has gone.
    """
    return pickle.loads(link.recv_bytes())


def own_device(kind: str, local_rank: int) -> torch.device:
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


def work(store: dist.Store, address: tuple[str, int], key: bytes, rank: int, ranks: int, local_rank: int) -> int:
    """Run as a rank until rank 0 exits, and return the exit code.

    SIGINT and SIGTERM are ignored: rank 0 drains and then stops this rank.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    link = Client(address, authkey=key)
    send(link, rank)
    try:
        start: Start = receive(link)
        if start.threads:
            torch.set_num_threads(start.threads)
        device = own_device(start.device, local_rank)
        group = Group(store, rank, ranks, device=device, timeout=start.timeout)
        own = Rank(start.parts.runner(device, group), group)
        send(link, own.execute("nothing", (), ()))
        while (command := receive(link)) is not None:
            send(link, own.execute(*command))
        return 0
    except (EOFError, ConnectionError):  # rank 0 has gone
        return 1
    except BaseException as error:
        _report(link, error)
        raise


def _report(link: Connection, error: BaseException) -> None:
    try:
        send(link, f"{type(error).__name__}: {error}")
    except OSError:
        traceback.print_exc()


def main() -> None:
    """A rank that rank 0 has started, with HOST PORT LINK-PORT RANK RANKS and the link's key in the environment.

    Ends the process without the interpreter's teardown, which can take longer than rank 0 wants to wait.
    """
    host, port, link_port, rank, ranks = sys.argv[1], *(int(argument) for argument in sys.argv[2:])
    store = dist.TCPStore(host, port, is_master=False)
    code = 1
    try:
        code = work(store, (host, link_port), bytes.fromhex(os.environ[KEY]), rank, ranks, rank)
    except Exception:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
