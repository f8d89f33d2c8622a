"""One rank's part of a checkpoint: what it writes, a snapshot of it, and the process that writes it.

The layout of the files is megatron-core's ``torch_dist`` format, so that megatron's loader reads them under any
parallel layout. They are written through the public `StorageWriter` of torch.distributed.checkpoint in a forked
process of this rank: training may go on meanwhile, and a writer that dies (killed for memory, say) is seen by
its exit, where megatron's own writer processes would be waited for without end.
"""

from __future__ import annotations

import ctypes
import dataclasses
import io
import multiprocessing.process
import signal
import time
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StoragePrefix
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from checkpoints import together
from checkpoints.integrity import Entry, seal


class Shards:
    """The part of this rank in a checkpoint that is being written to ``directory``.

    Constructed on every rank together; the tensors are those of this moment, whatever training does next.

    Raises:
        OSError: on every rank, if one of them fails.
    """

    def __init__(self, state: dict, directory: Path) -> None:
        self.directory = directory
        self._process: multiprocessing.process.BaseProcess | None = None
        together.everywhere(lambda: _wait_for(directory))
        try:
            sharded, self._common = save_preprocess(state)
            failure = None
        except Exception as error:  # noqa: BLE001 - raised by some ranks only: all of them hear of it
            sharded, failure = {}, together.reason(error)
        together.raise_first(together.gather(failure))
        self._planner, self._writer = _Planner(), _writer(directory)
        plans = together.collect(together.everywhere(lambda: self._planner.prepare(sharded)))
        self._metadata = together.on_rank_0(lambda: self._planner.create_global_plan(plans)[1])
        together.everywhere(self._start)

    def done(self) -> bool:
        """Whether this rank's writer has ended, well or not."""
        return self._process is None or self._pipe.poll()

    def finish(self) -> dict[str, Entry]:
        """Wait for every rank's writer, then write what only rank 0 writes.

        Returns:
            size and digest of every file of the checkpoint so far, by name.

        Raises:
            OSError: on every rank, if one of them failed.
        """
        results, files = together.everywhere(self._results)
        every = together.collect((results, files))

        def write_metadata() -> dict[str, Entry]:
            with (self.directory / "common.pt").open("wb") as file:  # given a path, torch names no reason
                torch.save(self._common, file)
            self._writer.finish(self._metadata, [part for part, _ in every])
            save_config(CheckpointingConfig("torch_dist", 1), str(self.directory))
            names = ("common.pt", ".metadata", "metadata.json")
            return {name: seal(self.directory / name) for name in names}

        own = together.on_rank_0(write_metadata)
        return {name: entry for _, part in every for name, entry in part.items()} | own

    def abandon(self) -> None:
        """Stop this rank's writer."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None

    def _start(self) -> None:
        if not self._planner.snapshot():
            return
        context = multiprocessing.get_context("fork")
        self._pipe, other = context.Pipe(duplex=False)
        self._process = context.Process(target=_write, args=(self._writer, self._planner, other), daemon=True)
        held = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))
        self._process.start()  # signals that are sent to the whole group are left to this process
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        other.close()  # only the writer holds it now: its death ends the pipe

    def _results(self) -> tuple[list, dict[str, Entry]]:
        if self._process is None:
            return [], {}
        try:
            failure, results, files = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise OSError(f"the process that wrote it was ended by exit code {self._process.exitcode}") from None
        self._process.join()
        self._process = None
        if failure is not None:
            raise OSError(failure)
        return results, files


class _Planner(MCoreSavePlanner):
    """Plans a rank's part and holds its data on the CPU."""

    def __init__(self) -> None:
        super().__init__(dedup_replicated_tensors=False, flatten_state_dict=False)
        self._data: dict = {}

    def prepare(self, sharded: dict) -> SavePlan:
        """This rank's plan: the tensors of which it is the main replica."""
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
        self.set_up_planner(mcore_to_pyt_state_dict(by_key, False), is_coordinator=together.rank() == 0)
        plan = self.create_decentralized_global_plan(self.create_local_plan())
        return self.finish_plan(dataclasses.replace(plan, storage_data=_StoragePrefix(f"__{together.rank()}_")))

    def snapshot(self) -> bool:
        """Bring the data to the CPU, where a fork keeps it as it is now; whether there is any."""
        data = {item.index: super(_Planner, self).resolve_data(item) for item in self.plan.items}
        self._data = {index: x.detach().cpu() if isinstance(x, torch.Tensor) else x for index, x in data.items()}
        return bool(data)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """The data of an item of the plan, as it was at the snapshot."""
        return self._data[write_item.index]


def _writer(directory: Path) -> FileSystemWriter:
    # One thread: torch loses the errors of further ones. No copying ahead: that is for CUDA tensors.
    return FileSystemWriter(directory, thread_count=1, sync_files=True, per_thread_copy_ahead=0)


def _write(writer: FileSystemWriter, planner: _Planner, pipe) -> None:  # noqa: ANN001
    """The writer process: send ``(failure, results, entry of every file)``."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a killed run leaves no writer behind
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    try:
        results = writer.write_data(planner.plan, planner).wait()
        names = {result.storage_data.relative_path for result in results}
        pipe.send((None, results, {name: seal(Path(writer.path) / name) for name in names}))
    except BaseException as error:  # noqa: BLE001 - the parent raises it
        pipe.send((together.reason(error), [], {}))


def _wait_for(directory: Path) -> None:
    """A shared file system may show a new directory late; one that is not shared never shows it."""
    for _ in range(50):
        if directory.is_dir():
            return
        time.sleep(0.2)
    raise OSError(f"{directory.parent} is not the same directory on every node: put run.output on a shared file system")
