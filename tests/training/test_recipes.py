"""Every recipe of configs/: loads, divides its model, fits its GPUs, holds the published settings, and steps in its layout."""

import re
import shutil
import subprocess
import sys

import pytest

from dmc.families import read_shape
from dmc.training import flops, planning
from dmc.training.config import load
from dmc.training.schedule import Schedule
from tests.training.helpers import ROOT
from tests.training.plans import plans

RECIPES = sorted(p.name for p in (ROOT / "configs").glob("*.yaml"))
LARGE = ("llama2-7b", "llama2-13b", "llama2-70b", "llama3-8b", "smollm2-135m")
# Parameters as published with the models.
PARAMETERS = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "smollm2-135m": 134_515_008,
}
LATE = {
    "qwen3-8b": 8_190_735_360,
    "qwen3-4b": 4_022_468_096,
    "qwen2.5-7b": 7_615_616_512,
    "mistral-7b": 7_248_023_552,
    "llama3.1-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_dry(name):
    """Layout, memory, time, and a step of every phase on the first rank of the first and of the last stage."""
    plan = plans()["recipes"][name]
    assert "error" not in plan, plan
    config = load(ROOT / "configs" / name)
    steps = [line for line in plan["lines"] if line.startswith("one step")]
    assert len(steps) == (1 if config.parallel.pipeline == 1 else 2) and all(line.endswith("runs") for line in steps)
    phases = "ramp, hold" if config.dmc.ramp_steps_per_unit else "hold"
    phases = f"repurpose, {phases}" if config.dmc.decision == "neuron" else phases
    assert all(f"of {phases if config.dmc.compresses else 'plain'} as rank" in line for line in steps)
    assert [line.split()[0] for line in plan["lines"] if line[0] != " "][:2] == ["layout", "memory"]


@pytest.mark.parametrize("name", LARGE)
def test_shapes_are_those_of_the_published_models(name):
    assert plans()["recipes"][f"{name}.yaml"]["parameters"] == PARAMETERS[name]
    assert plans()["recipes"][f"{name}-distill.yaml"]["parameters"] == PARAMETERS[name]


@pytest.mark.parametrize("name", LATE)
def test_recipes_of_the_families_merge_late_and_distil(name):
    assert all(plans()["recipes"][f"{name}{kind}.yaml"]["parameters"] == LATE[name] for kind in ("-distill", "-lora", ""))
    config = load(ROOT / "configs" / f"{name}-distill.yaml")
    assert (config.dmc.window, config.dmc.decide, config.dmc.decision, config.distill.weight) == (256, "late", "head", 1)


@pytest.mark.parametrize("name", [*LATE, "llama3-8b", "llama3.1-8b-instruct"])
def test_lora_fits_one_gpu_of_48_gb_as_well(name):
    """The plan's GiB, by the GPU that the recipe names and by a smaller one; the settings are the same in all of them."""
    lines = plans()["recipes"][f"{name}-lora.yaml"]["lines"]
    total = next(float(line.rsplit("total ", 1)[1]) for line in lines if line.startswith("memory"))
    assert total < flops.GPUS["l40s"].memory_gib and "teacher 0.00" in " ".join(lines)
    config, known = (load(ROOT / "configs" / f"{one}-lora.yaml") for one in (name, "llama3-8b"))
    assert (config.dmc, config.distill, config.optim) == (known.dmc, known.distill, known.optim)


@pytest.mark.parametrize("name", [*LARGE, *LATE])
def test_published_settings(name):
    config = load(ROOT / "configs" / f"{name}.yaml")
    d, o = config.dmc, config.optim
    assert (d.decision, d.gain, d.offset, d.temperature, d.cr_weight, d.cr_loss) == ("neuron", 1, 5, 0.1, 1, "soft")
    assert (d.repurpose_steps, d.ramp_steps_per_unit, d.hold_steps, d.integer_hold_steps) == (250, 6000, 2000, 0)
    assert (config.distill.weight, config.distill.lm_weight) == (0, 1)
    assert (o.name, o.beta1, o.beta2, o.weight_decay, o.clip, o.warmup_steps, o.decay_steps) == ("adamw", 0.9, 0.95, 0.1, 1, 0, 0)
    if name != "smollm2-135m":
        assert o.lr == 3e-5 and o.global_batch * config.data.sequence_length == 1024 * 4096
    assert config.run.precision == "bf16"


@pytest.mark.parametrize("name", [*LARGE, *LATE])
def test_the_fast_variant_distils(name):
    config, published = load(ROOT / "configs" / f"{name}-distill.yaml"), load(ROOT / "configs" / f"{name}.yaml")
    assert (config.distill.weight, config.distill.lm_weight, config.dmc.decision) == (1, 0, "head")
    assert config.dmc.target_cr == published.dmc.target_cr and config.run.model == published.run.model
    hf = read_shape(ROOT / config.plan.shape)
    shape = planning.Layout.of(config, config.plan.world)
    tokens, before = (planning.cost(c, hf, shape, peak_tflops=None).tokens for c in (config, published))
    assert tokens < before / 20


def test_the_tables_of_recipes_are_those_of_their_schedules():
    """docs/families.md and docs/cluster.md: ranks and tokens of each recipe."""
    families, cluster = ((ROOT / "docs" / page).read_text() for page in ("families.md", "cluster.md"))
    found = {}
    for name, *cells in re.findall(r"^\| [^|]+ \(`([\w.-]+)`\) \| (.+?) \| (.+?) \| (.+?) \|$", families, re.MULTILINE):
        for kind, cell in zip(("-lora", "-distill", ""), cells, strict=True):
            world, tokens = re.fullmatch(r"(one|\d+) (?:GPU|H100), (.+)", cell).groups()
            found[f"{name}{kind}"] = (int(world.replace("one", "1")), tokens)
    for cells in re.findall(r"^\| (`configs/.+?) \| (.+?) \| \d \| (.+?) \|", cluster, re.MULTILINE):
        names, worlds, tokens = (cell.split(", ") for cell in cells)
        for name, world, each in zip(names, worlds * len(names), tokens, strict=False):
            found[name.strip("`").removeprefix("configs/").removesuffix(".yaml")] = (int(world), each)
    assert set(found) == {n + kind for n in [*LATE, "llama3-8b"] for kind in ("", "-distill", "-lora")} | {
        n + kind for n in LARGE for kind in ("", "-distill")
    }
    for name, (world, tokens) in found.items():
        config = load(ROOT / "configs" / f"{name}.yaml")
        ours = Schedule(config).steps * config.optim.global_batch * config.data.sequence_length
        unit, digits = {"M": (1e6, 0), "B": (1e9, 1 if ours > 1e9 else 2)}[tokens[-1]]
        assert (config.plan.world, f"{ours / unit:.{digits}f}{tokens[-1]}") == (world, tokens), name


def test_other_recipes_need_no_stand_in():
    """Only models that the repository does not hold have one."""
    for name in RECIPES:
        config = load(ROOT / "configs" / name)
        assert (ROOT / config.run.model / "config.json").is_file() or (ROOT / config.plan.shape / "config.json").is_file()


PUBLISHED = [("quickstart", 120), ("merge-at-once", 400), ("cpu-long", 3200), ("dms-quickstart", 400)]


@pytest.mark.parametrize(("name", "steps"), PUBLISHED)
def test_recipes_with_published_results_keep_their_steps(name, steps):
    """docs/results describes these runs, whose ramp makes no stops; their controls have as many steps."""
    config = load(ROOT / "configs" / f"{name}.yaml")
    assert Schedule(config).steps == steps and config.dmc.integer_hold_steps == 0
    if (control := ROOT / "configs" / f"{name}-control.yaml").is_file():
        assert Schedule(load(control)).steps == steps


def dry(*arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--dry-run", *map(str, arguments)], capture_output=True, text=True, cwd=cwd
    )


def test_the_command_says_what_stands_in_for_the_model_and_writes_nothing(tmp_path):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    before = sorted(tmp_path.rglob("*"))
    done = dry("--config", "configs/llama2-7b-distill.yaml", "--world", 16, cwd=tmp_path)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    first, *_, last = done.stdout.splitlines()
    assert first == (
        "model      models/Llama-2-7b-hf is not on this machine: the shape is that of configs/shapes/llama2-7b (plan.shape), "
        "6738.42M parameters"
    )
    assert "16 ranks = tensor 4 x pipeline 1 x context 1 x data 4" in done.stdout
    assert last.startswith("not tried  data.text (corpora/llama2) was not read")
    assert sorted(tmp_path.rglob("*")) == before
