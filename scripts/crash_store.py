"""Kill saves of the checkpoint store again and again, and see that nothing complete is lost.

    python scripts/crash_store.py                  # 1000 kills, about 3 minutes
    python scripts/crash_store.py --kills 200

Each round is a process of its own that loads the newest checkpoint, compares its contents, and saves further ones
(at once or in the background, keeping the last two) until it is killed with SIGKILL: with its writer at the n-th
file operation or after a random time, or the writer alone. After each kill the newest checkpoint must be
whole, and no older than the last one whose save had returned. Exit code 1 and one line if it is not.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from torch.distributed import HashStore

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dmc.extras import needed_by_script  # noqa: E402

with needed_by_script("the test"):
    from checkpoints.store import CheckpointStore

KEEP_LAST = 2
SIZE = 50_000  # floats of the larger tensor: a write of several pages
OPERATIONS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}  # of Python's audit events; fsync is added


def main(argv: list[str] | None = None) -> int:
    """Run the rounds; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000, help="how many (1000)")
    parser.add_argument("--directory", help="where to save; a new temporary directory by default")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    args = parser.parse_args(argv)
    begun = time.perf_counter()
    try:
        if args.directory is not None:
            report = crash(Path(args.directory), args.kills, random.Random(args.seed))
        else:
            with tempfile.TemporaryDirectory() as directory:
                report = crash(Path(directory) / "checkpoints", args.kills, random.Random(args.seed))
    except AssertionError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    print(f"{args.kills} kills, nothing complete was lost: {report}, {time.perf_counter() - begun:.0f} s", flush=True)
    return 0


def crash(directory: Path, kills: int, moments: random.Random) -> str:
    """Kill ``kills`` rounds of saves; AssertionError if something complete was lost.

    Returns:
        how many kills of each kind, and how many saves were completed between them.
    """
    kinds, saves, known = Counter(), 0, 0
    rounds = 0
    while sum(kinds.values()) < kills:
        rounds += 1
        assert rounds < 3 * kills + 100, f"only {sum(kinds.values())} of {rounds} rounds were killed: the moments come too late"
        kind = moments.choice(("operation", "operation", "time", "writer"))
        at = moments.uniform(0, 3) if kind == "time" else moments.randint(1, 120 if kind == "operation" else 12)
        lines, killed = _round(directory, kind, at, seed=rounds)
        steps = [int(line.split()[1]) for line in lines if line.startswith("saved")]
        failures = [line for line in lines if line.startswith("error")]
        where = f"round {rounds} ({kind} {at})"
        assert not failures, f"{where}: {failures[0]}"
        kinds[kind] += killed
        saves += len(steps)
        known = max([known, *steps])
        newest = CheckpointStore(directory).newest()
        found = -1 if newest is None else int(newest.name.strip(".").removeprefix("step").removesuffix(".old"))
        assert found >= known or known == 0, f"{where}: the newest complete one is {newest}, step {known} was saved before"
    return f"{dict(kinds)}, {saves} saves"


def _round(directory: Path, kind: str, at: float, seed: int) -> tuple[list[str], bool]:
    """One process of saves and its end: what it said, and whether something was killed."""
    reading, writing = os.pipe()
    begun = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        os.setpgid(0, 0)
        code = 3
        try:
            _save_until_killed(directory, kind, at, random.Random(seed), os.fdopen(writing, "w", buffering=1))
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    lines = []
    with os.fdopen(reading) as file:
        for line in file:
            lines.append(line.rstrip())
            if kind == "time" and line.startswith("loaded"):  # in the unit of what loading took on this machine
                time.sleep(at * (time.perf_counter() - begun))
                os.killpg(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        lines.append(f"error: the process ended with code {os.WEXITSTATUS(status)}")
    return lines, os.WIFSIGNALED(status) or "writer killed" in lines


def _save_until_killed(directory: Path, kind: str, at: float, moments: random.Random, out) -> None:  # noqa: ANN001
    """What a run does: clean, load, save; reports by lines, since it may end at any of them."""
    if kind != "time":
        _kill_at(int(at), directory, alone=kind == "writer")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    store = CheckpointStore(directory, keep_last=KEEP_LAST)
    store.clean()
    newest, step = store.newest(), 0
    if newest is not None:
        loaded, meta = store.load(newest, lambda: _state(-1))
        step = meta["step"]
        if loaded["step"] != step or any(not torch.equal(loaded[k], _state(step)[k].data) for k in ("large", "small")):
            print(f"error: {newest} does not hold what step {step} saved", file=out)
            return
    hidden = [p.name for p in directory.iterdir() if p.name.startswith(".")] if directory.is_dir() else []
    if hidden:
        print(f"error: left over after cleaning: {hidden}", file=out)
        return
    print(f"loaded {step}", file=out)
    waiting = None
    for step in range(step + 1, step + 6):  # noqa: B020 - on from the one that was found
        background = moments.random() < 0.5
        try:
            store.save(f"step{step:06d}", _state(step), {"step": step}, background=background)
            if waiting is not None:
                print(f"saved {waiting}", file=out)
            waiting = step if background else None
            if not background:
                print(f"saved {step}", file=out)
        except OSError as error:
            expected = kind == "writer" and "ended by exit code -9" in str(error)
            print("writer killed" if expected else f"error: {error}", file=out)
            return
    time.sleep(0.05 if waiting else 0)


def _state(step: int) -> dict:
    """Tensors from which the step can be told."""
    from megatron.core.dist_checkpointing import ShardedTensor  # after dmc.training, which makes it run without CUDA

    large, small = torch.arange(SIZE, dtype=torch.float32) + step, torch.tensor([step, -step])
    return {
        "large": ShardedTensor.from_rank_offsets("large", large),
        "small": ShardedTensor.from_rank_offsets("small", small),
        "step": step,
    }


def _kill_at(number: int, directory: Path, *, alone: bool) -> None:
    """Kill this process and its writer at their n-th file operation in ``directory``; or the writer alone at its n-th."""
    counter, main = mmap.mmap(-1, 8), os.getpid()
    fsync = os.fsync

    def operation() -> None:
        if alone and os.getpid() == main:
            return
        count = int.from_bytes(counter[:8], "little") + 1
        counter[:8] = count.to_bytes(8, "little")
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL) if alone else os.killpg(0, signal.SIGKILL)

    def hook(event: str, args: tuple) -> None:
        if event in OPERATIONS and str(args[0]).startswith(str(directory)):
            operation()

    os.fsync = lambda file: (operation(), fsync(file))[1]
    sys.addaudithook(hook)


if __name__ == "__main__":
    sys.exit(main())
