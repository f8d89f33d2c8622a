"""The commands of README and docs: every program, flag, setting and file exists, and the blocks marked ``<!-- run -->`` run."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs import checks
from tests.docs.blocks import PAGES, ROOT, all_blocks, blocks, commands
from tests.docs.checks import check_page, check_span, flags_of_text, outputs

BY_PAGE = {page: list(found) for page, found in itertools.groupby(all_blocks(), key=lambda block: block.page)}
RUN = [block for found in BY_PAGE.values() for block in found if block.mark in ("run", "run slow")]


@pytest.fixture(scope="session")
def written():
    """What the commands of each page write."""
    return {page: outputs(found) for page, found in BY_PAGE.items()}


@pytest.mark.parametrize("page", BY_PAGE)
def test_the_commands_of_a_page_exist(page, written):
    elsewhere = {path: below for other, paths in written.items() if other != page for path, below in paths.items()}
    assert check_page(BY_PAGE[page], elsewhere) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_flags_in_the_text_exist(page):
    assert [error for span in flags_of_text(page.read_text()) for error in check_span(span)] == []


@pytest.mark.parametrize(
    "block", [pytest.param(block, marks=pytest.mark.slow if block.mark == "run slow" else (), id=str(block)) for block in RUN]
)
def test_a_block_runs(block, tmp_path):
    """In a copy of the repository; where the page shows output below the block, it is what the block prints.

    Without the CPU's compiled loops, which a copy would compile again.
    """
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, tmp_path / "copy", ignore=ignored, symlinks=True)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "copy"), "PATH": path, "OMP_NUM_THREADS": "1"}
    environment["DMC_KERNELS"] = "torch"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text], cwd=tmp_path / "copy", env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{block}:\n{done.stdout}\n{done.stderr}"
    found = BY_PAGE[block.page]
    following = found[found.index(block) + 1 :][:1]
    if following and following[0].language == "":
        assert done.stdout.splitlines() == following[0].text.splitlines(), f"{block} prints\n{done.stdout}"


def test_some_blocks_run():
    """The fast suite tries at least these pages."""
    assert {block.page for block in RUN if block.mark == "run"} >= {
        "docs/cluster.md",
        "docs/serving.md",
        "docs/kernels.md",
        "docs/methods/gqa.md",
    }


def test_messages_name_extras_of_the_checkout():
    """An index may hold anything under this project's name."""
    assert re.findall(r"install '?dmc\b.*", checks._sources()) == []


# ------------------------------------------------------------------------------------------ the checks themselves


def check(text, language="bash", elsewhere=None):
    return check_page(list(blocks(f"words\n\n```{language}\n{text}\n```\n")), elsewhere)


BAD = [
    ("huggingface-cli download meta-llama/Llama-2-7b-hf --local-dir models/x", "unknown program huggingface-cli"),
    ("git clone REPOSITORY dmc && cd dmc", "unknown program git"),
    ("hf downlaod a/b", "there is no command hf downlaod"),
    ("hf download a/b --local-directory models/x", "unknown flag --local-directory"),
    ("pip install 'dmc[eval]'", "would take whatever an index has under this name"),
    ("pip install -e '.[evaluation]'", "there is no extra evaluation; known: train, log, kernels"),
    ("pip install torhc", "the package torhc is not in constraints.txt"),
    ("pip install -c constraint.txt torch", "there is no file constraint.txt"),
    ("pip install --edit .", "unknown flag --edit"),
    ("python scripts/no_such.py", "there is no script scripts/no_such.py"),
    ("bash scripts/no_such.sh", "there is no script scripts/no_such.sh"),
    ("bash scripts/quickstart.sh --again", "knows no --again"),
    ("python -m dmc.no_such", "there is no module dmc.no_such"),
    ("python scripts/export_hf.py checkpoints/base out --dtyp float32", "unrecognized arguments: --dtyp float32"),
    ("python scripts/export_hf.py checkpoints/base out --dtype float8", "invalid choice: 'float8'"),
    ("python scripts/export_hf.py checkpoints/base", "the following arguments are required"),
    ("python scripts/export_hf.py runs/mine/checkpoints/final out", "nothing says where runs/mine/checkpoints/final comes from"),
    ("torchrun train.py --output runs/a\npython scripts/export_hf.py runs/a/checkpoints/last out", "runs/a/checkpoints/last"),
    ("dmc generate my-model --prompt x\npython scripts/export_hf.py checkpoints/base my-model", "where my-model comes from"),
    ("torchrun train.py --target-ratio 4", "unknown flag --target-ratio"),
    ("torchrun train.py dmc.target=4", "unknown config key 'dmc.target'"),
    ("torchrun train.py optim.lr=fast", "optim.lr is 'fast'"),
    ("torchrun --procs 2 train.py --target-cr 4", "torchrun:"),
    ("torchrun trian.py", "there is no script trian.py"),
    ("torchrun train.py --config configs/no_such.yaml", "no config file at configs/no_such.yaml"),
    ("torchrun train.py data.text=novels.txt", "nothing says where novels.txt comes from"),
    ("sbatch scripts/slurm/single.sbatch configs/smollm2-135m.yaml", "there is no script scripts/slurm/single.sbatch"),
    ("sbatch --gpus 4 scripts/slurm/single_node.sbatch configs/smollm2-135m.yaml", "unknown flag --gpus"),
    ("sbatch scripts/slurm/single_node.sbatch configs/quickstart.yaml log.wandbs=x", "unknown config key 'log.wandbs'"),
    ("sbatch scripts/slurm/single_node.sbatch configs/smollm2-135m.yaml", "where models/SmolLM2-135M comes from"),
    ("sbatch ... log.wandbs=PROJECT", "unknown config key 'log.wandbs'"),
    ("dmc serv DIR", "invalid choice: 'serv'"),
    ("dmc serve DIR --kv-mem 2GiB", "unknown argument --kv-mem"),
    ("dmc serve DIR [--max-batches 16]", "unknown argument --max-batches"),
    ("dmc generate DIR --prompt x --codec zip", "unknown codec 'zip'"),
    ("dmc generate DIR --prompt x --codec kivi:bites=2", "bites"),
    ("dmc generate DIR --prompt x --codec int8 --bits 4", "the int8 codec has no setting bits"),
    ("dmc generate DIR --prompt x --policy lru", "unknown policy 'lru'"),
    ("dmc generate DIR --prompt x --codec eigen:file=no.safetensors", "where no.safetensors comes from"),
    ("dmc frontier --out runs/f --codecs zip", "unknown codec 'zip'"),
    ("DMC_KERNEL=torch dmc generate DIR --prompt x", "nothing reads the environment variable DMC_KERNEL"),
    ("RETROFIT='dmc.hold=160' bash scripts/retrofit_smollm2.sh data", "unknown config key 'dmc.hold'"),
    ("bash scripts/retrofit_smollm2.sh dta", "knows no dta"),
    ("B='python scripts/bench_serve.py SmolLM2-135M'\n$B --batchs 8", "unrecognized arguments: --batchs"),
    ("pytest --slow tests/no_such.py", "there is no tests/no_such.py"),
    ("serve run dmc.server.ray:make directory=DIR", "there is no dmc.server.ray:make"),
    ("serve run dmc.server.ray:build directories=DIR", "takes no directories=DIR"),
    ("tail -f slurm-JOB.out", "jobs write slurm-dmc-JOB.out"),
    ("for i in 1 2; do\n    dmc calibrate DIR --texts x --out y\ndone", "are required: --text"),
    ("dmc frontier --out runs/f --policies lru", "unknown policy 'lru'"),
    ("dmc generate DIR --prompt 'x", "a quote that is not closed"),
]


@pytest.mark.parametrize(("text", "said"), BAD)
def test_a_bad_block_is_found(text, said):
    errors = check(text)
    assert len(errors) >= 1 and said in " ".join(errors), errors


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("from dmc import LLMs", "dmc has no LLMs"),
        ("LLM('DIR', kv_memori=3)", "LLM takes no kv_memori"),
        ("LLM('DIR', codec='zip')", "unknown codec 'zip'"),
        ("SamplingParams(tokens=3)", "SamplingParams takes no tokens"),
        ("LLM('my-model')", "where my-model comes from"),
        ("x = (", "no Python"),
    ],
)
def test_a_bad_python_block_is_found(text, said):
    assert said in " ".join(check(text, "python"))


GOOD = [
    "hf download a/b --local-dir models/x\ndmc generate models/x --prompt 'y'",
    "pip install -c constraints.txt -e '.[dev,log]' && bash scripts/test.sh --slow tests/server",
    "torchrun --nproc-per-node 2 train.py --target-cr 3 --output runs/a\npython scripts/export_hf.py runs/a/checkpoints/cr2 x",
    "for bits in 2 4; do   # comment; with $(things) 'in it\n  dmc generate DIR --prompt x --codec kivi:bits=4\ndone",
    "python scripts/prepare_data.py some/dataset --tokenizer DIR --output corpora/x\n"
    "torchrun train.py data.text=corpora/x --model DIR --output runs/b",
    'DMC_KERNELS=torch dmc generate DIR --prompt "a # b" \\\n    --codec int8 [--max-tokens 3]',
    'torchrun ... train.py --config R.yaml --resume auto --output "$out" || { [ -e "$out/stopped" ] && scontrol requeue 1; }',
    "torchrun -m dmc.cli serve DIR --tensor-parallel 2",
]


@pytest.mark.parametrize("text", GOOD)
def test_a_good_block_passes(text):
    assert check(text) == []


def test_files_may_come_from_a_mark_or_another_page():
    text = "```bash\ndmc generate my-model --prompt x\n```\n"
    assert "where my-model comes from" in check_page(list(blocks(text)))[0]
    assert check_page(list(blocks(f"<!-- needs my-model -->\n{text}"))) == []
    assert check_page(list(blocks(text)), {"my-model": True}) == []
    assert "unknown mark 'nedes my-model'" in check_page(list(blocks(f"<!-- nedes my-model -->\n{text}")))[0]


def test_blocks_and_their_lines():
    found = list(blocks("a\n\n<!-- run -->\n```bash\nx\n```\n\n```\nshown\n```\n"))
    assert [(b.line, b.language, b.mark, b.text) for b in found] == [(4, "bash", "run", "x\n"), (8, "", "", "shown\n")]


def test_words_are_those_of_a_shell():
    (one, two, three) = commands("A=1 B='x y' p \"q 'r'\" s\\ t # c\nu v#w \\\n  --x=${y#*,} && z '1\n2'\n")
    assert (one.environment, one.words) == ({"A": "1", "B": "x y"}, ["p", "q 'r'", "s t"])
    assert two.words == ["u", "v#w", "--x=${y#*,}"] and three.words == ["z", "1\n2"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("run `dmc serv DIR`", "invalid choice: 'serv'"),
        ("set `--kv-memories` to", "no program has the flag --kv-memories"),
        ("`pip install 'dmc[eval]'` brings", "would take whatever"),
        ("`huggingface-cli download x`", "unknown program huggingface-cli"),
    ],
)
def test_bad_commands_in_the_text_are_found(text, said):
    assert said in " ".join(error for span in flags_of_text(text) for error in check_span(span))


@pytest.mark.parametrize("text", ["`dmc eval` says", "`dmc eval --needle` and `--kv-memory BYTES`", "the word `python`"])
def test_good_commands_in_the_text_pass(text):
    assert [error for span in flags_of_text(text) for error in check_span(span)] == []
