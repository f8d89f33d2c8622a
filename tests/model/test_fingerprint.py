"""The hash of a model's files."""

import hashlib
import json

import pytest
from safetensors.torch import save_file

from dmc.model import fingerprint
from dmc.model.fingerprint import model_hash
from tests.checkpoints.test_convert import llama_directory, sharded_directory


def test_the_fingerprint_changes_with_configuration_and_weights(tmp_path):
    directory, model = llama_directory(tmp_path / "model")
    first = model_hash(directory)
    assert first == model_hash(llama_directory(tmp_path / "copy")[0]) and len(first) == 16
    assert model_hash(directory, "random") != first
    model.state["model.norm.weight"][3] += 1e-6
    save_file(model.state, directory / "model.safetensors")
    second, unread = model_hash(directory), model_hash(directory, "random")
    assert second != first and unread == model_hash(tmp_path / "copy", "random")
    (directory / "config.json").write_text(json.dumps(model.config | {"rms_norm_eps": 1e-4}))
    assert len({first, second, model_hash(directory)}) == 3


@pytest.mark.parametrize("size", [1, 2, 5])
def test_ranks_divide_the_reading_and_agree(tmp_path, monkeypatch, size):
    directory, _ = sharded_directory(tmp_path / "model")
    alone = hashlib.sha256((directory / "config.json").read_bytes() + b"pretrained")
    for path in sorted(directory.glob("*.safetensors")):
        alone.update(hashlib.sha256(path.read_bytes()).digest())
    files, read, digest = sorted(directory.glob("*.safetensors")), [], fingerprint._digest
    monkeypatch.setattr(fingerprint, "_digest", lambda path, *state: read.append(path) or digest(path, *state))
    monkeypatch.setattr(fingerprint.dist, "get_world_size", lambda: size)
    for rank in range(size):

        def gather(out, own, rank=rank):
            out[:] = [[digest(path, 0, 0) for path in files[r::size]] for r in range(size)]
            assert own == out[rank]

        monkeypatch.setattr(fingerprint.dist, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(fingerprint.dist, "all_gather_object", gather)
        assert model_hash(directory, together=True) == alone.hexdigest()[:16]
    assert sorted(read) == files  # each file by one rank
