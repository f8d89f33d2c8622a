"""Saving in the background, which checkpoints stay, and a disk that is really full."""

import os
import signal
import subprocess
import time

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from torch.distributed.checkpoint import FileSystemWriter

from checkpoints.integrity import MARKER
from checkpoints.store import POINTER, CheckpointStore, verify

pytestmark = pytest.mark.usefixtures("process_group")


def state(value, size=1000):
    tensor = torch.full((size,), float(value))
    return {"weight": ShardedTensor.from_rank_offsets("weight", tensor), "step": value}


def save(store, value, name=None, **options):
    store.save(name or f"step{value:06d}", state(value), {"step": value}, **options)


def load(store, path=None):
    loaded, meta = store.load(path or store.newest(), lambda: state(-1))
    assert torch.equal(loaded["weight"], torch.full((1000,), float(meta["step"]))) and loaded["step"] == meta["step"]
    return meta["step"]


def names(store):
    return sorted(p.name for p in store.directory.iterdir() if p.name != POINTER)


@pytest.fixture
def slow_writer(monkeypatch):
    """The writer process waits for half a second before it writes."""
    write = FileSystemWriter.write_data
    monkeypatch.setattr(FileSystemWriter, "write_data", lambda *a: (time.sleep(0.5), write(*a))[1])


# ------------------------------------------------------------------------------------------- background


def test_a_background_save_holds_the_values_of_its_moment(tmp_path, slow_writer):
    store = CheckpointStore(tmp_path)
    weight = torch.full((1000,), 5.0)
    begun = time.perf_counter()
    store.save("step5", {"weight": ShardedTensor.from_rank_offsets("weight", weight), "step": 5}, {"step": 5}, background=True)
    assert time.perf_counter() - begun < 0.4
    weight.zero_()  # training goes on
    store.poll()
    assert store.newest() is None  # not before it is whole
    store.wait()
    assert load(store) == 5


def test_polling_completes_it(tmp_path, slow_writer):
    store = CheckpointStore(tmp_path)
    save(store, 1, background=True)
    for _ in range(100):
        store.poll()
        if store.newest() is not None:
            break
        time.sleep(0.05)
    assert load(store) == 1 and names(store) == ["step000001"]
    store.poll()
    store.wait()


def test_the_next_save_completes_the_one_before(tmp_path, slow_writer):
    store = CheckpointStore(tmp_path)
    save(store, 1, background=True)
    save(store, 2, background=True)
    assert load(store) == 1
    store.wait()
    assert load(store) == 2


def test_a_writer_that_is_killed_is_an_error_and_not_a_hang(tmp_path, slow_writer):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    save(store, 2, background=True)
    os.kill(store._pending.shards._process.pid, signal.SIGKILL)
    begun = time.perf_counter()
    with pytest.raises(OSError, match="not written: .*the process that wrote it was ended by exit code -9"):
        store.wait()
    assert time.perf_counter() - begun < 5
    assert names(store) == ["step000001"] and load(store) == 1
    save(store, 3)
    assert load(store) == 3


def test_the_writer_outlives_the_signals_of_preemption(tmp_path, slow_writer):
    """SLURM sends them to every process of a job step."""
    store = CheckpointStore(tmp_path)
    save(store, 1, background=True)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(store._pending.shards._process.pid, number)
    store.wait()
    assert load(store) == 1


def test_an_abandoned_save_leaves_no_writer_and_is_cleared_up(tmp_path, slow_writer):
    store = CheckpointStore(tmp_path)
    save(store, 1, background=True)
    pid = store._pending.shards._process.pid
    store.abandon()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert CheckpointStore(tmp_path).newest() is None
    CheckpointStore(tmp_path).clean()
    assert names(store) == []


# ------------------------------------------------------------------------------------------- retention


def test_the_last_resume_points_stay_and_so_do_the_results(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=2)
    for value, name in enumerate([None, "cr2", None, "cr3", None, None, "final"]):
        save(store, value, name)
    assert names(store) == ["cr2", "cr3", "final", "step000004", "step000005"]
    assert load(store) == 6
    assert [load(store, tmp_path / name) for name in names(store)] == [1, 3, 6, 4, 5]


def test_without_a_limit_all_stay(tmp_path):
    store = CheckpointStore(tmp_path)
    for value in range(4):
        save(store, value)
    assert len(names(store)) == 4


def test_the_last_good_one_is_never_removed(tmp_path):
    """Damaged ones neither count nor vanish, and the one just written stays whatever its number."""
    store = CheckpointStore(tmp_path, keep_last=1)
    save(store, 9)
    save(CheckpointStore(tmp_path), 10)
    (tmp_path / "step000010" / MARKER).unlink()
    assert load(store) == 9
    save(store, 3)  # resumed from an earlier step
    assert names(store) == ["step000003", "step000010"] and load(store) == 3


def test_what_cannot_be_removed_is_a_warning(tmp_path, monkeypatch, capsys):
    store = CheckpointStore(tmp_path, keep_last=1)
    save(store, 1)
    rename = os.rename

    def refuse(source, target):
        if str(target).endswith(".trash"):
            raise PermissionError(13, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    save(store, 2)
    assert "warning: an outdated checkpoint was not removed" in capsys.readouterr().out
    assert load(store) == 2


def test_half_removed_ones_are_cleared_up(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    save(store, 2)
    (tmp_path / "step000001").rename(tmp_path / ".step000001.trash")
    (tmp_path / "newest.tmp").write_text("half")
    (tmp_path / "notes.txt").write_text("the user's own")
    store.clean()
    assert names(store) == ["notes.txt", "step000002"]


# ------------------------------------------------------------------------------------------- a full disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting a small file system is not allowed here: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_ends_the_save_in_one_sentence(small_disk, background):
    store = CheckpointStore(small_disk / "checkpoints")
    save(store, 1)
    before = {p: p.read_bytes() for p in store.directory.rglob("*") if p.is_file()}
    with pytest.raises(OSError, match="the checkpoint was not written: .*No space left on device") as caught:
        store.save("step000002", state(2, size=1_000_000), {"step": 2}, background=background)
        store.wait()
    assert "\n" not in str(caught.value)
    assert {p: p.read_bytes() for p in store.directory.rglob("*") if p.is_file()} == before
    assert load(store) == 1
    save(store, 3)  # the room that it took is free again
    assert load(store) == 3 and verify(store.newest()) == {"step": 3}


def test_a_disk_that_fills_anywhere_leaves_the_store_as_it_was(small_disk):
    """From no room at all to almost enough: whichever file is the first that does not fit."""
    store = CheckpointStore(small_disk / "checkpoints")
    save(store, 1)
    before = names(store)
    filler, written = small_disk / "filler", 0
    for free in range(0, 64, 4):  # KiB
        filler.unlink(missing_ok=True)
        stat = os.statvfs(small_disk)
        filler.write_bytes(bytes(max(0, stat.f_bavail * stat.f_frsize - free * 1024)))
        try:
            save(store, 100 + free)
        except OSError as error:
            assert "No space left on device" in str(error)
            assert names(store) == before and load(store) == 1
        else:
            written += 1
            break
    assert free > 8 and written
    assert load(store) == 100 + free
