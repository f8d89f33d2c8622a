"""A checkpoint is complete or it does not exist: damage is named, failed writes leave the store as it was."""

import json
import os
import resource
import shutil

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter

from checkpoints import shards, store
from checkpoints.convert import load_hf_state
from checkpoints.store import MARKER, POINTER, CheckpointStore, verify
from tests.checkpoints.tiny import GAIN, OFFSET, tiny
from tests.training.models import megatron, weights

META = {
    "step": 7,
    "perplexity": 9.87654321,
    "corpus_hash": "aa",
    "held_out_hash": "bb",
    "tokenizer_dir": "there",
    "target_cr": 4.0,
    "measured_cr": 3.9,
    "compressed": True,
    "config": {
        "dmc": {"decision": "head", "offset": OFFSET, "gain": GAIN},
        "data": {"sequence_length": 64},
        "run": {"model": "some/model"},
    },
}

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture(scope="module")
def model():
    source = tiny("head", heads=2)
    built = megatron(source, "plain")
    built.source = source
    return built


@pytest.fixture(scope="module")
def original(model, tmp_path_factory):
    """A store of two checkpoints; copied, never touched."""
    directory = tmp_path_factory.mktemp("original") / "checkpoints"
    for name, step in (("older", 3), ("newer", 7)):
        save(CheckpointStore(directory), model, name, step=step)
    return directory


@pytest.fixture
def checkpoints(original, tmp_path):
    return CheckpointStore(shutil.copytree(original, tmp_path / "checkpoints"))


def save(checkpoints, model, name, **meta):
    checkpoints.save(name, {"model": model.sharded_state_dict()}, META | {"hf_config": model.source.config} | meta)


def listing(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


# ------------------------------------------------------------------------------------------- whole


def test_what_was_saved_is_loaded(checkpoints, model):
    before = weights(model)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.zero_()
    loaded, meta = checkpoints.load(checkpoints.directory / "newer", lambda: {"model": model.sharded_state_dict()})
    model.load_state_dict(loaded["model"])
    assert meta == verify(checkpoints.directory / "newer") == META | {"hf_config": model.source.config}
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())


def test_the_marker_lists_every_other_file_and_nothing_is_left_over(original):
    for name in ("older", "newer"):
        listed = json.loads((original / name / MARKER).read_text())
        assert listed.keys() | {MARKER} == listing(original / name).keys() and MARKER not in listed
        assert len(listed) > 3 and listed["meta.json"][0] == (original / name / "meta.json").stat().st_size
    assert sorted(p.name for p in original.iterdir()) == sorted(["older", "newer", POINTER])
    assert (original / POINTER).read_text() == "newer\nolder\n"


def test_one_of_the_same_name_is_replaced(checkpoints, model):
    save(checkpoints, model, "older", step=9)
    assert verify(checkpoints.directory / "older")["step"] == 9
    assert checkpoints.newest().name == "older"
    assert sorted(p.name for p in checkpoints.directory.iterdir()) == sorted(["older", "newer", POINTER])


def test_weights_are_read_under_hugging_face_names(checkpoints, model):
    tensors, meta = load_hf_state(checkpoints.directory / "newer")
    assert tensors.keys() == model.source.state.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in model.source.state.items())
    assert (meta["decision"], meta["offset"], meta["gain"], meta["step"]) == ("head", OFFSET, GAIN, 7)
    assert meta["results"]["base_model"] == "model"
    assert meta["results"]["measured"]["held-out perplexity"] == 9.8765


def test_a_tied_model_has_no_output_layer_of_its_own(tmp_path):
    built = megatron(tiny("neuron", heads=2, tied=True), "plain")
    built.source = tiny("neuron", heads=2, tied=True)
    save(CheckpointStore(tmp_path), built, "tied")
    tensors, _ = load_hf_state(tmp_path / "tied")
    assert tensors.keys() == built.source.state.keys() and "lm_head.weight" not in tensors


# ------------------------------------------------------------------------------------------- damaged


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def grow(path):
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip, grow, empty, os.unlink])
def test_damage_of_any_file_is_named(checkpoints, damage):
    path = checkpoints.directory / "newer"
    for name, data in listing(path).items():
        if name == MARKER:
            continue
        damage(path / name)
        for read in (verify, load_hf_state, lambda p: checkpoints.load(p, lambda: 1 / 0)):
            with pytest.raises(ValueError, match="use an earlier one") as caught:
                read(path)
            assert str(path) in str(caught.value) and f"{name} " in str(caught.value).replace(":", " ")
        (path / name).write_bytes(data)
    assert verify(path)["step"] == 7


@pytest.mark.parametrize("damage", [truncate, flip, grow, empty, os.unlink])
def test_damage_of_the_marker_names_the_checkpoint(checkpoints, damage):
    path = checkpoints.directory / "newer"
    damage(path / MARKER)
    with pytest.raises(ValueError, match="use an earlier one") as caught:
        verify(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "text", ["null", "[]", "{}", '"ab"', '{"meta.json": 3}', '{"meta.json": ["a", "b"]}', '{"meta.json": [1]}']
)
def test_a_marker_of_another_shape_is_damage(checkpoints, text):
    (checkpoints.directory / "newer" / MARKER).write_text(text)
    with pytest.raises(ValueError, match=f"newer is damaged .{MARKER} "):
        verify(checkpoints.directory / "newer")


def test_without_a_marker_it_is_incomplete(checkpoints):
    (checkpoints.directory / "newer" / MARKER).unlink()
    with pytest.raises(ValueError, match=f"newer is incomplete .it has no {MARKER} marker"):
        verify(checkpoints.directory / "newer")
    with pytest.raises(ValueError, match="no checkpoint at"):
        verify(checkpoints.directory / "never")


# ------------------------------------------------------------------------------------------- newest


def test_newest_follows_the_pointer(checkpoints, capsys):
    assert checkpoints.newest() == checkpoints.directory / "newer"
    (checkpoints.directory / POINTER).write_text("older\n")
    assert checkpoints.newest() == checkpoints.directory / "older"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("pointer", [None, "gone\n", ""])
def test_without_a_pointer_it_is_the_last_written(checkpoints, pointer):
    (checkpoints.directory / POINTER).unlink()
    if pointer is not None:
        (checkpoints.directory / POINTER).write_text(pointer)
    assert checkpoints.newest().name == "newer"


@pytest.mark.parametrize("damage", [truncate, flip, os.unlink])
def test_newest_falls_back_to_the_older_one_and_says_so(checkpoints, capsys, damage):
    """Each file in turn; an unreadable marker is damage, a missing one an unfinished checkpoint."""
    for name, data in listing(checkpoints.directory / "newer").items():
        path = checkpoints.directory / "newer" / name
        damage(path)
        assert checkpoints.newest() == checkpoints.directory / "older"
        said = capsys.readouterr().out
        if name != MARKER:
            assert said.startswith("warning: checkpoint ") and "newer" in said and name in said and said.count("\n") == 1
        path.write_bytes(data)
        assert checkpoints.newest() == checkpoints.directory / "newer"


def test_nothing_whole_is_no_checkpoint(checkpoints, tmp_path):
    assert CheckpointStore(tmp_path / "never").newest() is None
    flip(checkpoints.directory / "newer" / "meta.json")
    (checkpoints.directory / "older" / MARKER).unlink()
    assert checkpoints.newest() is None


def test_unfinished_writes_are_not_seen_and_are_removed(checkpoints, model):
    staging = checkpoints.directory / ".third.0123abcd.staging"
    shutil.copytree(checkpoints.directory / "older", staging)
    (checkpoints.directory / POINTER).write_text(f"{staging.name}\nthird\nnewer\n")
    assert checkpoints.newest().name == "newer"
    checkpoints.clean()
    assert not staging.exists() and checkpoints.newest().name == "newer"


def test_one_that_is_being_replaced_is_not_lost(checkpoints):
    """Killed between the two renames: it is under its retired name until the next start puts it back."""
    (checkpoints.directory / "newer").rename(checkpoints.directory / ".newer.old")
    assert checkpoints.newest() == checkpoints.directory / ".newer.old"
    checkpoints.clean()
    assert checkpoints.newest() == checkpoints.directory / "newer"
    shutil.copytree(checkpoints.directory / "older", checkpoints.directory / ".newer.old")
    assert checkpoints.newest() == checkpoints.directory / "newer"
    checkpoints.clean()
    assert not (checkpoints.directory / ".newer.old").exists() and checkpoints.newest().name == "newer"


# ------------------------------------------------------------------------------------------- failing


def fail_to_write(*_, **__):
    raise OSError(28, "No space left on device")


def assert_as_before(checkpoints, before):
    assert listing(checkpoints.directory) == before
    assert all(not p.name.startswith(".") for p in checkpoints.directory.iterdir())
    assert checkpoints.newest().name == "newer"


@pytest.mark.parametrize("name", ["newer", "third"])
def test_a_full_disk_leaves_the_store_as_it_was(checkpoints, model, name):
    """The writers of the tensors, which are processes of their own, meet a real limit."""
    before = listing(checkpoints.directory)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="the checkpoint was not written: .*File too large"):
            save(checkpoints, model, name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_as_before(checkpoints, before)
    save(checkpoints, model, name, step=11)
    assert verify(checkpoints.newest())["step"] == 11


@pytest.mark.parametrize(
    "where",
    [
        (torch, "save"),
        (store, "_write_atomically"),
        (store, "_make"),
        (store, "seal"),
        (shards, "seal"),
        (shards, "save_config"),
        (FileSystemWriter, "write_data"),
        (FileSystemWriter, "finish"),
        (os, "fsync"),
    ],
)
def test_any_failing_write_leaves_the_store_as_it_was(checkpoints, model, monkeypatch, where):
    before = listing(checkpoints.directory)
    with monkeypatch.context() as patch:
        patch.setattr(*where, fail_to_write)
        with pytest.raises(OSError, match="the checkpoint was not written: .*No space left on device") as caught:
            save(checkpoints, model, "newer")
    assert "\n" not in str(caught.value)
    assert_as_before(checkpoints, before)
    save(checkpoints, model, "newer", step=12)
    assert verify(checkpoints.newest())["step"] == 12


@pytest.mark.parametrize(
    ("saved", "other"),
    [
        (dict(decision="head", heads=2), dict(decision="neuron", heads=2)),
        (dict(decision="neuron", heads=2), dict(decision="head", heads=2)),
        (dict(decision="head", heads=2), dict(decision="head", heads=4)),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path, saved, other):
    built = megatron(tiny(**saved), "plain")
    built.source = tiny(**saved)
    checkpoints = CheckpointStore(tmp_path)
    save(checkpoints, built, "one")
    part = "decision" if saved["decision"] != other["decision"] else "linear_qkv"
    with pytest.raises(ValueError, match=f"one does not fit this model: .*{part}") as caught:
        checkpoints.load(tmp_path / "one", lambda: {"model": megatron(tiny(**other), "plain").sharded_state_dict()})
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------- on the disk


def test_everything_is_on_the_disk_before_it_counts(checkpoints, model, tmp_path, monkeypatch):
    """Every file and the directory are flushed before the rename, the directory above after it."""
    log = tmp_path / "log"
    fsync, rename = os.fsync, os.rename

    def note(text):
        with log.open("a") as file:  # the writer process notes its own
            file.write(text + "\n")

    monkeypatch.setattr(os, "fsync", lambda file: (note(f"sync {os.readlink(f'/proc/self/fd/{file}')}"), fsync(file)))
    monkeypatch.setattr(os, "rename", lambda a, b: (note(f"rename {a} {b}"), rename(a, b)))
    save(checkpoints, model, "third")
    lines = log.read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("rename") and line.endswith("/third"))
    staging = lines[at].split()[1]
    flushed = [line.removeprefix("sync ") for line in lines[:at] if line.startswith("sync ")]
    files = listing(checkpoints.directory / "third").keys() - {MARKER}
    assert len(files) > 4 and {f"{staging}/{name}" for name in files} <= set(flushed)
    marker = flushed.index(f"{staging}/{MARKER}.tmp")
    assert all(flushed.index(f"{staging}/{name}") < marker for name in files)  # last of the files
    assert staging in flushed[marker:]
    pointer = flushed.index(f"{checkpoints.directory / POINTER}.tmp")
    assert marker < pointer and str(checkpoints.directory) in flushed[pointer:]
    assert f"sync {checkpoints.directory}" in lines[at:]
