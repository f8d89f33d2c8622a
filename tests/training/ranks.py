"""Ranks of train.py that tests stop, kill and poison: real processes without torchrun, which would end them itself.

They are forked by one server process that has imported everything: a run then costs what it computes.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.training import hooks
from tests.training.helpers import ROOT


class Server:
    """Starts ranks; `close` ends it and what it started."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.training.ranks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )

    def start(self, log: Path, arguments: list, *, ranks: int = 1, hook: str = "", settings: dict | None = None) -> Run:
        """Start a run; ``hook`` names a function of `tests.training.hooks` that is called with ``settings`` first."""
        log.mkdir(parents=True, exist_ok=True)
        pids = self.ask(
            {"log": str(log), "arguments": [str(a) for a in arguments], "ranks": ranks, "hook": hook, "settings": settings or {}}
        )
        return Run(self, log, pids)

    def ask(self, command: object) -> list:
        """Send a command, return the answer."""
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End the server."""
        self._process.stdin.close()
        self._process.wait()


class Run:
    """The ranks of a run."""

    def __init__(self, server: Server, log: Path, pids: list[int]) -> None:
        self._server, self._log, self.pids = server, log, pids

    def wait(self, *ranks: int, timeout: float = 200) -> list[int | None]:
        """Exit codes of ``ranks`` (all by default), negative for a signal, None for one that has not ended in time."""
        pids = [self.pids[rank] for rank in ranks or range(len(self.pids))]
        deadline = time.monotonic() + timeout
        while None in (codes := self._server.ask(pids)) and time.monotonic() < deadline:
            time.sleep(0.1)
        return codes

    def said(self, rank: int = 0) -> str:
        """What a rank wrote on stdout and stderr."""
        return (self._log / f"rank{rank}.txt").read_text()


def serve() -> None:
    """The server: a JSON command a line on stdin, a JSON answer a line on stdout."""
    from dmc.commands import train  # noqa: F401 - what every rank needs

    codes: dict[int, int] = {}
    for line in sys.stdin:
        command = json.loads(line)
        if isinstance(command, list):
            answer = [_code(pid, codes) for pid in command]
        else:
            answer = _fork(command)
        print(json.dumps(answer), flush=True)
    for pid in codes:
        if codes[pid] is None:
            os.kill(pid, 9)


def _code(pid: int, codes: dict) -> int | None:
    if codes.get(pid) is None:
        done, status = os.waitpid(pid, os.WNOHANG)
        codes[pid] = os.waitstatus_to_exitcode(status) if done else None
    return codes[pid]


def _fork(command: dict) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [_rank(command, rank, port) for rank in range(command["ranks"])]


def _rank(command: dict, rank: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    out = os.open(f"{command['log']}/rank{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(command["ranks"]),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "LOCAL_WORLD_SIZE": str(command["ranks"]),
        "MASTER_PORT": str(port),
    }
    from dmc.commands import train

    sys.argv = ["train.py", *command["arguments"]]
    code: object = 1
    try:
        if command["hook"]:
            getattr(hooks, command["hook"])(rank, **command["settings"])
        train.main.__wrapped__()
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001 - as the interpreter does
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    serve()
