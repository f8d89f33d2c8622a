"""Names on the Hub in the place of directories, against a local fake of its HTTP interface."""

import os
import re
import subprocess
import sys

import pytest

from dmc.hub import check_name, located, shown
from tests.hub.fake import commit, served
from tests.model import tiny
from tests.training.helpers import ROOT, SMALL, tiny_model, tiny_text


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    fields = tiny.config()
    directory = tiny.write(tmp_path_factory.mktemp("plain") / "model", fields, tiny.weights(fields))
    with served() as fake:
        fake.add("acme/small", directory)
        fake.add("acme/small", directory, "v2")
        fake.add("acme/closed", directory)
        fake.gated.add("acme/closed")
        fake.add("acme/base", tiny_model(tmp_path_factory.mktemp("base")))
        yield fake


@pytest.fixture
def run(hub, tmp_path):
    """A command in a process whose hub is the fake, with an empty cache."""

    def command(*arguments, home=tmp_path / "home", **environment):
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=240,
            cwd=tmp_path,
            env={name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
            | {
                "HF_ENDPOINT": hub.address,
                "HF_HOME": str(home),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT),
                "HF_HUB_DISABLE_XET": "1",
            }
            | environment,
        )

    return command


GENERATE = ("-m", "dmc.cli", "generate")
AFTER = ("--prompt", "abc", "--max-tokens", "3", "--codec", "int8")


def test_a_model_is_fetched_once_and_then_needs_no_network(run, hub):
    hub.asked.clear()
    done = run(*GENERATE, "acme/small", *AFTER)
    assert done.returncode == 0, done.stderr
    assert any(path.endswith("model.safetensors") for path in hub.asked)
    assert not [path for path in hub.asked if path.endswith((".bin", ".md")) or "original" in path]
    again = run(*GENERATE, "acme/small", *AFTER, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert again.returncode == 0, again.stderr


FAILS = [
    ("acme/nothing", {}, "there is no local directory acme/nothing, and the Hub .* has no model acme/nothing .* hf auth login"),
    ("acme/small@v9", {}, "and acme/small has no revision v9 on the Hub"),
    ("acme/closed", {}, "acme/closed is gated: accept its terms at http://127.0.0.1:.*/acme/closed and log in with hf"),
    ("acme/small", {"HF_HUB_OFFLINE": "1"}, "acme/small is not in the cache of huggingface_hub while HF_HUB_OFFLINE is set"),
    ("acme/small", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "while the Hub .http://127.0.0.1:9. cannot be reached"),
]


def test_what_cannot_be_fetched_is_one_sentence(run):
    """Three in one process; the others need another environment, which huggingface_hub reads when it is imported."""
    code = "from dmc.hub import located\n" + "".join(
        f"try:\n    located({name!r})\nexcept ValueError as error:\n    print(error)\n" for name, _, _ in FAILS[:3]
    )
    said = run("-c", code).stdout.splitlines()
    assert len(said) == 3
    for line, (_, _, words) in zip(said, FAILS[:3], strict=True):
        assert re.search(words, line), line
    for name, environment, words in FAILS[3:]:
        done = run(*GENERATE, name, *AFTER, **environment)
        assert done.returncode == 2 and "Traceback" not in done.stderr and re.search(words, done.stderr), done.stderr
        assert done.stderr.count("\n") == 1


def test_a_revision_and_a_token(run):
    code = "from dmc.hub import located; print(located('acme/small@v2')); print(located('acme/closed', weights=False))"
    done = run("-c", code, HF_TOKEN="hf_right")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.endswith(f"/snapshots/{commit('v2')}") and os.path.exists(f"{first}/model.safetensors")
    assert os.path.exists(f"{second}/config.json") and not os.path.exists(f"{second}/model.safetensors")


@pytest.mark.slow
def test_a_retrofit_starts_from_a_name_and_its_export_is_uploaded(run, hub, tmp_path):
    tiny_text(tmp_path / "text.jsonl")
    done = run(
        ROOT / "train.py",
        "--model",
        "acme/base",
        "--output",
        tmp_path / "run",
        f"data.text={tmp_path / 'text.jsonl'}",
        f"data.cache={tmp_path / 'cache'}",
        *SMALL,
        "dmc.hold_steps=1",
        "dmc.ramp_steps_per_unit=1",
    )
    assert done.returncode == 0, done.stderr
    export = ("-m", "dmc.cli", "export", tmp_path / "run" / "checkpoints" / "final")
    refused = run(*export, tmp_path / "a", "--push-to-hub", "me/mine")
    assert refused.returncode == 2 and "is written but not uploaded" in refused.stderr and (tmp_path / "a").is_dir()
    assert "try again with hf upload me/mine" in refused.stderr
    done = run(*export, tmp_path / "b", "--push-to-hub", "me/mine", HF_TOKEN="hf_right")
    assert done.returncode == 0 and "uploaded: http" in done.stdout, done.stderr
    assert hub.repositories["me/mine"]["main"].keys() == {path.name for path in (tmp_path / "b").iterdir()}
    assert b"base_model: acme/base" in hub.repositories["me/mine"]["main"]["README.md"]
    bad = run(*export, tmp_path / "c", "--push-to-hub", "mine")
    assert bad.returncode == 2 and "'mine' is not a name on the Hub: names have the form org/name" in bad.stderr
    assert not (tmp_path / "c").exists()


def test_local_directories_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    for name in ("runs/mine", "runs/mien", "nowhere", "a/b/c", "./acme/small", str(tmp_path)):  # the Hub is asked for none
        assert str(located(name)) == os.path.normpath(name)
    assert shown("runs/mine") == "mine" and shown("acme/small@v2") == "acme/small@v2"
    check_name("org/name")
    for name in ("name", "org/name@main", "a/b/c", ""):
        with pytest.raises(ValueError, match="org/name"):
            check_name(name)
