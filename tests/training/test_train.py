"""The entry point's own work: flags to configuration, what to resume from, the run's directory."""

import json
from hashlib import sha256

import pytest

from checkpoints.store import MARKER, CheckpointStore
from dmc.commands import train
from dmc.families import shape_of
from dmc.training.config import Config, load

FLAGS = {
    "--target-cr": ("8", "dmc.target_cr", 8.0),
    "--model": ("1e3", "run.model", "1e3"),
    "--output": ("a b", "run.output", "a b"),
    "--resume": ("auto", "run.resume", "auto"),
}


def value(config, name):
    section, key = name.split(".")
    return getattr(getattr(config, section), key)


# ------------------------------------------------------------------------------------------- flags


def test_no_argument_is_the_defaults():
    assert train.parse([]) == Config()


@pytest.mark.parametrize("flag", FLAGS)
def test_flags_set_their_key_as_it_was_typed(flag):
    text, name, expected = FLAGS[flag]
    assert value(train.parse([flag, text]), name) == expected
    assert value(train.parse([f"{flag}={text}"]), name) == expected


def test_flags_and_overrides_may_mix_and_come_after_the_file(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("dmc: {target_cr: 2, gain: 7}\nrun: {output: there, seed: 5}\n")
    config = train.parse(["dmc.gain=9", "--config", str(recipe), "--target-cr", "3", "run.seed=6", "--output", "here"])
    assert (config.dmc.target_cr, config.dmc.gain, config.run.output, config.run.seed) == (3.0, 9.0, "here", 6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target-crr", "4"], ["unknown flag --target-crr", "--target-cr", "--config", "section.key=value"]),
        (["--lr=3"], ["unknown flag --lr=3"]),
        (["-x"], ["unknown flag -x"]),
        (["--target-cr", "four"], ["dmc.target_cr is 'four'", "a number"]),
        (["--target-cr", "nan"], ["dmc.target_cr is nan"]),
        (["--config", "none.yaml"], ["no config file at none.yaml"]),
        (["retrofit"], ["'retrofit' is not an override"]),
    ],
)
def test_bad_arguments_are_one_sentence(arguments, words):
    with pytest.raises(ValueError) as caught:
        train.parse(arguments)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def _shape(**changes):
    sizes = dict(vocab_size=8, hidden_size=256, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    return shape_of({"model_type": "llama"} | sizes | changes)


def test_sequences_longer_than_the_models_positions_are_refused():
    config = load(overrides=["data.sequence_length=513"])
    train.check_length(config, _shape(max_position_embeddings=513))
    with pytest.raises(ValueError, match="data.sequence_length 513 exceeds the model's max_position_embeddings 512"):
        train.check_length(config, _shape(max_position_embeddings=512))


def test_sequences_at_which_longrope_changes_its_frequencies_are_refused():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 64, "long_factor": [4.0] * 64}
    hf = _shape(max_position_embeddings=4096, rope_parameters=rope | {"original_max_position_embeddings": 512})
    train.check_length(load(overrides=["data.sequence_length=512"]), hf)
    with pytest.raises(ValueError, match="data.sequence_length 513 exceeds the 512 positions of the model .rope_type 'longrope'"):
        train.check_length(load(overrides=["data.sequence_length=513"]), hf)


# ------------------------------------------------------------------------------------------- resuming


@pytest.fixture
def checkpoints(tmp_path):
    """A store with one checkpoint that is complete: a meta.json and a marker that lists it."""
    path = tmp_path / "run" / "checkpoints" / "cr2"
    path.mkdir(parents=True)
    (path / "meta.json").write_text("{}")
    (path / MARKER).write_text(json.dumps({"meta.json": [2, sha256(b"{}").hexdigest()]}))
    return CheckpointStore(path.parent)


def resume(checkpoints, *overrides):
    return train.find_resume(load(overrides=list(overrides)), checkpoints)


def test_a_run_starts_anew_unless_it_is_asked_to_resume(checkpoints):
    assert resume(checkpoints) is None


def test_auto_finds_the_newest_and_starts_anew_where_there_is_none(checkpoints, tmp_path):
    assert resume(checkpoints, "run.resume=auto") == checkpoints.directory / "cr2"
    assert resume(CheckpointStore(tmp_path / "never"), "run.resume=auto") is None
    (tmp_path / "empty").mkdir()
    assert resume(CheckpointStore(tmp_path / "empty"), "run.resume=auto") is None


def test_a_named_checkpoint_must_be_complete(checkpoints, tmp_path):
    path = checkpoints.directory / "cr2"
    assert resume(checkpoints, f"run.resume={path}") == path
    with pytest.raises(ValueError, match="no checkpoint at"):
        resume(checkpoints, f"run.resume={tmp_path / 'never'}")
    (path / "meta.json").write_text("[]")
    with pytest.raises(ValueError, match="is damaged: meta.json"):
        resume(checkpoints, f"run.resume={path}")


def test_auto_never_starts_anew_over_damaged_checkpoints(checkpoints):
    (checkpoints.directory / "cr2" / MARKER).unlink()
    with pytest.raises(ValueError, match="holds only incomplete or damaged checkpoints: run.overwrite=true starts again"):
        resume(checkpoints, "run.resume=auto")
    assert resume(checkpoints, "run.resume=auto", "run.overwrite=true") is None


# ------------------------------------------------------------------------------------------- the run's directory


@pytest.fixture
def output(tmp_path, process_group):
    """The directory of a run that wrote one line."""
    path = tmp_path / "run"
    train.prepare_output(path, load(), resume=False, rank=0)
    (path / "metrics.jsonl").write_text('{"step": 1}\n')
    (path / "log.txt").write_text("the user's own")
    return path


def prepare(output, *overrides, resume=False, rank=0):
    train.prepare_output(output, load(overrides=list(overrides)), resume=resume, rank=rank)


def test_the_configuration_is_kept_beside_the_run(output):
    prepare(output, "run.resume=auto", "optim.lr=0.5", resume=True)
    kept = json.loads((output / "config.json").read_text())
    assert kept["optim"]["lr"] == 0.5 and kept.keys() == load().__dict__.keys()


def test_a_directory_that_holds_a_run_is_refused_and_left_alone(output):
    before = {p.name: p.read_bytes() for p in output.iterdir()}
    with pytest.raises(ValueError, match="holds a run: continue it with --resume auto, replace it with run.overwrite=true"):
        prepare(output, "optim.lr=0.5")
    assert {p.name: p.read_bytes() for p in output.iterdir()} == before


@pytest.mark.parametrize("overrides", [["run.overwrite=true"], ["run.overwrite=true", "run.resume=auto"]])
def test_overwriting_removes_it(output, overrides):
    prepare(output, *overrides)
    assert [p.name for p in output.iterdir()] == ["config.json"]


def test_a_resumed_run_keeps_everything(output):
    prepare(output, "run.resume=auto", "run.overwrite=true", resume=True)
    assert (output / "metrics.jsonl").exists() and (output / "log.txt").exists()


def test_a_run_without_a_checkpoint_begins_its_metrics_again(output):
    """`run.resume=auto` after a crash before the first checkpoint: steps never repeat in metrics.jsonl."""
    prepare(output, "run.resume=auto")
    assert not (output / "metrics.jsonl").exists() and (output / "log.txt").exists()


def test_other_ranks_touch_nothing(tmp_path, process_group):
    prepare(tmp_path / "run", rank=1)
    assert not (tmp_path / "run").exists()
