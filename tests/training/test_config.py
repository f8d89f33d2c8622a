"""Configurations: YAML and overrides, types, what is refused and how, and the recipes of the project."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from dmc.training.config import Config, check, describe, load, to_dict

RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
FIELDS = {
    f"{section.name}.{item.name}": item.default
    for section in dataclasses.fields(Config)
    for item in dataclasses.fields(section.default_factory)
}


def refusal(*overrides, path=None):
    with pytest.raises(ValueError) as caught:
        load(path, list(overrides))
    text = str(caught.value)
    assert "\n" not in text
    return text


def written(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


# ------------------------------------------------------------------------------------------- reading


def test_defaults_pass_their_own_checks():
    assert load() == Config()
    check(Config())


def test_yaml_round_trip_of_every_field(tmp_path):
    """Each field is changed, written and read back."""
    config = Config()
    for name, default in FIELDS.items():
        section, key = name.split(".")
        other = not default if isinstance(default, bool) else default + 1 if isinstance(default, int) else default
        setattr(getattr(config, section), key, other + 0.25 if isinstance(other, float) else other)
    config.optim.beta1, config.optim.beta2, config.optim.global_batch = 0.5, 0.75, 9
    config.guard.action, config.guard.max_norm_ratio = "skip", 20.0
    config.parallel.virtual, config.data.sequence_length = 2, 1032  # 2 x context x tensor, as they are changed to
    config.parallel.pipeline, config.data.cache, config.log.wandb = 2, "some where", "project"
    path = written(tmp_path, yaml.safe_dump(to_dict(config)))
    assert load(path) == config != Config()


def test_every_field_is_in_the_dictionary():
    values = to_dict(Config())
    assert {f"{section}.{key}" for section in values for key in values[section]} == set(FIELDS)


SPEAKING = {"optim.lr", "optim.weight_decay", "optim.beta1"}  # names that say it all


def test_the_help_explains_every_field():
    """Its section, its name, its default and some words."""
    found, section = {}, None
    for line in describe().splitlines():
        if head := re.match(r"  (\w+)\.   \S", line):
            section = head[1]
        else:
            key, rest = re.match(r"    (\w+) +(.*)$", line).groups()
            found[f"{section}.{key}"] = rest
    assert found.keys() == FIELDS.keys()
    for name, default in FIELDS.items():
        shown, words = found[name][: len(repr(default))], found[name][len(repr(default)) :].split()
        assert shown == repr(default) and (len(words) > 1 or name in SPEAKING), name


def test_overrides_come_after_the_file(tmp_path):
    path = written(tmp_path, "optim: {lr: 1.0, clip: 2.0}\nrun: {output: there}\n")
    config = load(path, ["optim.lr=0.5", "optim.lr=0.25"])
    assert (config.optim.lr, config.optim.clip, config.run.output) == (0.25, 2.0, "there")


@pytest.mark.parametrize("text", ["", "{}", "# nothing but a comment\n", "optim: {}\n"])
def test_an_empty_file_is_the_defaults(tmp_path, text):
    assert load(written(tmp_path, text)) == Config()


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optim.lr=1e-3", 1e-3),
        ("optim.lr=1.0e-3", 1e-3),
        ("optim.lr='3e-4'", 3e-4),
        ("optim.lr=1", 1.0),
        ("run.steps=1e3", 1000),
        ("run.steps=20.0", 20),
        ("run.steps='20'", 20),
        ("run.seed=7", 7),
        ("run.overwrite=true", True),
        ("run.overwrite=no", False),
        ("parallel.tensor=1", 1),
        ("run.output=a b", "a b"),
        ("run.output=7", "7"),
        ("run.output=a=b", "a=b"),
        ("run.output=2020-01-02", "2020-01-02"),
        ("run.output='true'", "true"),
        ("data.held_out=", ""),
        ("data.bos=true", True),
        ("data.bos=no", False),
        ("data.bos='false'", False),
        ("data.bos=auto", "auto"),
        ("dmc.target_cr=2.5", 2.5),
    ],
)
def test_values_take_the_type_of_their_field(override, value):
    section, key = override.split("=")[0].split(".")
    got = getattr(getattr(load(overrides=[override]), section), key)
    assert got == value and type(got) is type(value)


def test_numbers_in_a_file_may_be_strings(tmp_path):
    assert load(written(tmp_path, "optim: {lr: 1e-3}")).optim.lr == 1e-3  # YAML 1.1 reads a string here


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_loads(path):
    assert load(path) != Config()
    assert path.read_text().startswith("#")  # what it is for, and its command


# ------------------------------------------------------------------------------------------- refusing


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optin.lr=1", ["unknown config section 'optin'", *to_dict(Config())]),
        ("optim.lrr=1", ["unknown config key 'optim.lrr'", *to_dict(Config())["optim"]]),
        ("optim=1", ["unknown config key 'optim'", "lr"]),
        ("optim.lr.x=1", ["unknown config key 'optim.lr.x'"]),
        ("optim.lr", ["'optim.lr' is not an override", "section.key=value"]),
        ("=3", ["unknown config section ''"]),
        ("optim.lr=fast", ["optim.lr is 'fast'", "a number"]),
        ("optim.lr=", ["optim.lr is ''", "a number"]),
        ("optim.lr=true", ["optim.lr is True", "type float"]),
        ("optim.lr=[1]", ["optim.lr is [1]", "type float"]),
        ("optim.lr=null", ["optim.lr is None", "type float"]),
        ("run.steps=2.5", ["run.steps is 2.5", "type int"]),
        ("run.steps=true", ["run.steps is True", "type int"]),
        ("run.steps=.inf", ["run.steps is inf", "type int"]),
        ("run.overwrite=1", ["run.overwrite is 1", "type bool"]),
        ("data.bos=1", ["data.bos is '1': it must be auto, true or false"]),
        ("data.bos=always", ["data.bos is 'always': it must be auto, true or false"]),
        ("run.overwrite=maybe", ["run.overwrite is 'maybe'", "type bool"]),
        ("run.output=true", ["run.output is True", "type str"]),
        ("run.output={a: b}", ["run.output is {'a': 'b'}", "type str"]),
        ("run.output=[", ["'run.output=['", "quote it"]),
        ("guard.action=ignore", ["guard.action is 'ignore'", "stop, skip"]),
        ("guard.max_norm_ratio=1", ["guard.max_norm_ratio is 1.0", "above 1, or 0"]),
        ("guard.window=0", ["guard.window is 0", "at least 1"]),
        ("run.keep_last=-1", ["run.keep_last is -1", "at least 0"]),
        ("run.peer_timeout=.inf", ["run.peer_timeout is inf"]),
    ],
)
def test_overrides_are_refused_with_the_known_names(override, words):
    text = refusal(override)
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optim: [1, 2]", ["'optim'", "must hold keys"]),
        ("optim:", ["'optim'", "must hold keys", "None"]),
        ("optin: {lr: 1}", ["unknown config section 'optin'", "known: data, dmc, distill, optim, parallel, run, guard, log"]),
        ("optin: {}", ["unknown config section 'optin'"]),
        ("optim.lr: 1", ["unknown config section 'optim.lr'"]),
        ("optim: {lrr: 1}", ["unknown config key 'optim.lrr'"]),
        ("optim: {3: 1}", ["unknown config key 'optim.3'"]),
        ("- 1", ["must hold sections", "list"]),
        ("just words", ["must hold sections", "str"]),
        ("optim: {lr: 1", ["recipe.yaml is not readable as YAML"]),
    ],
)
def test_files_are_refused(tmp_path, text, words):
    text = refusal(path=written(tmp_path, text))
    assert all(word in text for word in words), text


def test_files_that_are_none_are_refused(tmp_path):
    assert "no config file at" in refusal(path=tmp_path / "none.yaml")
    assert "no config file at" in refusal(path=tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"optim: \xff\xfe")
    assert "binary.yaml is not readable as YAML" in refusal(path=tmp_path / "binary.yaml")


CHOICES = {
    "dmc.method": "dmc, dms, none",
    "dmc.decision": "neuron, head, all, periodic, random",
    "dmc.cr_loss": "soft, hard",
    "optim.name": "adamw, muon",
    "parallel.recompute": "none, selective, full",
    "run.precision": "fp32, bf16",
    "run.kernels": "auto, triton, cpu, torch, reference",
    "run.init": "pretrained, random",
}
AT_LEAST_0 = (
    "dmc.repurpose_steps",
    "dmc.ramp_steps_per_unit",
    "dmc.hold_steps",
    "dmc.integer_hold_steps",
    "dmc.cr_weight",
    "distill.weight",
    "distill.lm_weight",
    "optim.weight_decay",
    "optim.min_lr",
    "optim.decay_steps",
    "optim.warmup_steps",
    "run.seed",
    "run.save_every",
    "log.eval_every",
    "run.threads",
)
AT_LEAST_1 = (
    "data.sequence_length",
    "optim.micro_batch",
    "optim.global_batch",
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.virtual",
    "parallel.context",
    "log.every",
    "log.eval_sequences",
    "run.steps",
)
POSITIVE = ("optim.lr", "optim.clip", "dmc.gain", "dmc.temperature")


@pytest.mark.parametrize(("name", "known"), CHOICES.items())
def test_choices_are_listed(name, known):
    assert refusal(f"{name}=other") == f"{name} is 'other': it must be one of {known}"


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        *((name, -1, "at least 0") for name in AT_LEAST_0),
        *((name, 0, "at least 1") for name in AT_LEAST_1),
        *((name, value, "a positive number") for name in POSITIVE for value in (0, -1, ".nan", ".inf")),
        *((name, value, "at least 0") for name in AT_LEAST_0 if isinstance(FIELDS[name], float) for value in (".nan", ".inf")),
        *(("dmc.target_cr", value, "at least 1") for value in (0.5, -4, ".nan", ".inf")),
        *((name, value, "below 1") for name in ("optim.beta1", "optim.beta2") for value in (-0.1, 1, ".nan")),
        ("dmc.offset", ".inf", "finite"),
        ("run.seed", 2**40, "below 2^40"),
    ],
)
def test_ranges_name_the_field_and_the_value(name, value, rule):
    text = refusal(f"{name}={value}")
    assert text.startswith(f"{name} is {str(value).lstrip('.').removesuffix('.0')}") and rule in text


@pytest.mark.parametrize("name", [n for n in AT_LEAST_0 if n not in ("distill.weight",)])
def test_zero_is_allowed(name):
    load(overrides=[f"{name}=0"])


PIPELINE = "parallel.pipeline=2"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optim.global_batch=3", "optim.micro_batch=2"], ["optim.global_batch 3", "optim.micro_batch 2"]),
        (["distill.weight=0"], ["distill.weight and distill.lm_weight are both 0"]),
        (["dmc.method=none", "distill.teacher=there", "distill.weight=0"], ["distill.weight and distill.lm_weight are both 0"]),
        (["optim.name=muon", "parallel.tensor=2"], ["optim.name=muon", "parallel.tensor=1", "2"]),
        (["parallel.sequence=true"], ["parallel.sequence", "parallel.tensor"]),
        (["optim.name=muon", "parallel.distributed_optimizer=true"], ["optim.name=muon", "distributed_optimizer=false"]),
        (["parallel.virtual=2"], ["parallel.virtual is 2", "parallel.pipeline above 1"]),
        (["parallel.context=2", "data.sequence_length=66"], ["data.sequence_length 66", "multiple of 4", "parallel.context=2"]),
        (["parallel.context=2", "parallel.sequence=true", "parallel.tensor=2", "data.sequence_length=68"], ["multiple of 8"]),
        (["dmc.train=decision", "dmc.decision=neuron"], ["dmc.train=decision", "dmc.decision=neuron", "dmc.train=all"]),
        (["dmc.train=decision", "dmc.method=none"], ["dmc.train=decision", "dmc.method=none"]),
        (["run.init=random"], ["run.init=random", "dmc.method=none"]),
        (["dmc.hold_steps=0", "dmc.target_cr=1"], ["dmc.hold_steps is 0"]),
        (["dmc.hold_steps=0", "dmc.ramp_steps_per_unit=0"], ["dmc.hold_steps is 0"]),
    ],
)
def test_fields_that_contradict_each_other(overrides, words):
    text = refusal(*overrides)
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    "overrides",
    [
        [PIPELINE],
        [PIPELINE, "dmc.method=none"],
        [PIPELINE, "parallel.virtual=3"],
        ["dmc.train=decision"],
        ["parallel.context=2", "data.sequence_length=64"],
        ["parallel.sequence=true", "parallel.tensor=2"],
        ["run.init=random", "dmc.method=none"],
        ["distill.weight=0", "distill.lm_weight=1"],
        ["dmc.hold_steps=0"],
        ["dmc.method=none", "dmc.hold_steps=0", "dmc.target_cr=1"],
        ["optim.global_batch=6", "optim.micro_batch=3"],
        ["dmc.decision=neuron", "dmc.hold_steps=0", "dmc.target_cr=1"],
    ],
)
def test_fields_that_go_together(overrides):
    load(overrides=overrides)


def test_a_checkpoint_of_before_a_setting_has_its_default():
    """Settings that came later: resumed with their defaults, refused with others where they matter."""
    import types
    from dataclasses import asdict

    from dmc.training.trainer import Trainer

    hashes = {key: "h" for key in ("model_hash", "corpus_hash", "tokenizer_hash")}
    for method, window, allowed in (("dmc", "null", True), ("dmc", 7, False), ("dms", 64, True), ("dms", 7, False)):
        config = load(None, [f"dmc.method={method}", f"dmc.window={window}"])
        then = asdict(config)
        del then["dmc"]["decide"], then["dmc"]["train"]
        then["dmc"]["window"] = 64  # recorded whatever the method
        trainer = types.SimpleNamespace(config=config, meta=hashes | {"config": asdict(config)})
        if allowed:
            Trainer._check_same_run(trainer, "P", hashes | {"config": then})
        else:
            with pytest.raises(ValueError, match=f"trained with dmc.window={None if method == 'dmc' else 64}, here it is 7"):
                Trainer._check_same_run(trainer, "P", hashes | {"config": then})


@pytest.mark.parametrize(
    ("then", "here", "words"),
    [
        ({}, {"begin": []}, None),
        ({"begin": [1]}, {"begin": [1]}, None),
        ({}, {"begin": [1]}, r"begin with the tokens \[\], here with \[1\]: set data.bos=false"),
        ({"begin": [1]}, {"begin": []}, r"begin with the tokens \[1\], here with \[\]: set data.bos=true"),
        ({"begin": [2], "tokenizer_hash": "other"}, {"begin": [1]}, "trained from another tokenizer"),
    ],
)
def test_a_resumed_run_keeps_what_documents_begin_with(then, here, words):
    """Checkpoints of before data.bos have none."""
    import types
    from dataclasses import asdict

    from dmc.training.trainer import Trainer

    config = load()
    hashes = {key: "h" for key in ("model_hash", "corpus_hash", "tokenizer_hash")}
    meta = hashes | {"config": asdict(config), "corpus_hash": "another" if words else "h"} | here
    trainer = types.SimpleNamespace(config=config, meta=meta)
    made = hashes | {"config": asdict(config)} | then
    if words is None:
        Trainer._check_same_run(trainer, "P", made)
    else:
        with pytest.raises(ValueError, match=words):
            Trainer._check_same_run(trainer, "P", made)


@pytest.mark.parametrize(("method", "steps", "allowed"), [("dmc", 0, True), ("dmc", 40, False), ("none", 40, True)])
def test_a_checkpoint_of_before_the_holds_at_integer_ratios_is_continued_without_them(method, steps, allowed):
    """Its step numbers are those of a ramp without stops: with stops its next step would have another target."""
    import types
    from dataclasses import asdict

    from dmc.training.trainer import Trainer

    hashes = {key: "h" for key in ("model_hash", "corpus_hash", "tokenizer_hash")}
    config = load(None, [f"dmc.method={method}", f"dmc.integer_hold_steps={steps}"])
    then = asdict(config)
    del then["dmc"]["integer_hold_steps"]
    trainer = types.SimpleNamespace(config=config, meta=hashes | {"config": asdict(config)})
    if allowed:
        Trainer._check_same_run(trainer, "P", hashes | {"config": then})
    else:
        with pytest.raises(ValueError, match="trained with dmc.integer_hold_steps=0, here it is 40"):
            Trainer._check_same_run(trainer, "P", hashes | {"config": then})


def test_a_window_and_what_it_needs():
    """The window in force, when decisions are made, and settings that cannot work, each in one sentence."""
    assert load().dmc.recent is None and not load().dmc.looks_ahead
    dms = load(overrides=["dmc.method=dms"]).dmc
    assert dms.recent == 64 and not dms.looks_ahead
    late = load(overrides=["dmc.window=16"]).dmc
    assert late.recent == 16 and late.looks_ahead
    assert not load(overrides=["dmc.window=16", "dmc.decide=arrival"]).dmc.looks_ahead
    assert not load(overrides=["dmc.window=16", "dmc.decision=neuron"]).dmc.looks_ahead
    assert not load(overrides=["dmc.window=0"]).dmc.looks_ahead
    assert load(overrides=["dmc.method=dms", "dmc.decide=late"]).dmc.looks_ahead
    for overrides, words in (
        (["dmc.window=-1"], "dmc.window is -1: it must be at least 0"),
        (["dmc.window=1.5"], "dmc.window is 1.5: it must be of type int"),
        (["dmc.window=x"], "dmc.window is 'x': it must be a number"),
        (["dmc.decide=late"], "dmc.window=null, dmc.decision=head has none to read"),
        (["dmc.decide=late", "dmc.window=8", "dmc.decision=neuron"], "set dmc.window to at least 1 and dmc.decision=head"),
        (["dmc.decide=soon"], "dmc.decide is 'soon': it must be one of auto, arrival, late"),
        (["dmc.window=254"], "1024 / 256 = 4 and dmc.target_cr 4 is out of reach: set dmc.window to at most 253"),
        (["dmc.window=1024"], "the largest possible CR is 1024 / 1026 = 0.998"),
        (["dmc.window=0", "data.sequence_length=4"], "lower dmc.target_cr or raise data.sequence_length"),
    ):
        with pytest.raises(ValueError) as caught:
            load(overrides=overrides)
        assert words in str(caught.value) and "\n" not in str(caught.value)
    load(overrides=["dmc.window=253"])
