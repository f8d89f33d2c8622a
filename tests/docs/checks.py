"""Whether the commands of a page exist: programs, flags, settings, and the files that they read.

Nothing is run but parsers: a script's own parser is taken from it just before it would parse. A file that a command reads
must be in the repository, written by a command before it (or on another page), the reader's own, or a placeholder in capitals.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import importlib.util
import inspect
import io
import re
import runpy
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from tests.cache.decisions import random_decisions, random_heads
from tests.docs.blocks import ROOT, Block, Command, commands
from tests.docs.files import Files
from tests.docs.programs import PROGRAMS

YOUR_MODULES = {"strided", "levels"}  # made by blocks of tutorials/policy.md and add-something.md: tests/docs/test_tutorial.py
# SLURM is on no machine that tests run on.
SBATCH_FLAGS = {"--nodes", "--export", "--time", "--partition", "--account"}
_EXTENSIONS = (".txt", ".py", ".yaml", ".jsonl", ".json", ".xz", ".safetensors", ".gguf", ".whl", ".sh", ".sbatch")
_OUTPUTS = {"out", "output", "json", "results", "plot", "bases"}  # names of arguments that are written
_MODELS = {"directory", "model", "models", "base", "tokenizer", "checkpoint", "inp", "source"}  # read, whatever their form
_APART = {"prompt", "stop", "command", "codec", "codecs", "policy", "policies"}  # free text, and what is checked by itself
_LOCAL = ("runs", "corpora", "models", "checkpoints", "configs", "docs", "scripts")


def check_page(blocks: list[Block], elsewhere: dict[str, bool] | None = None) -> list[str]:
    """One sentence for everything that is wrong with the blocks of a page, in their order."""
    files, errors = Files(elsewhere=elsewhere or {}), []
    for block in blocks:
        if block.mark.startswith("needs "):
            files.written |= dict.fromkeys(block.mark.split()[1:], True)
        elif block.mark not in ("", "run", "run slow"):
            errors.append(f"{block}: unknown mark {block.mark!r}")
        check = {"bash": _shell, "python": _python}.get(block.language)
        errors += [f"{block}: {error}" for error in check(block.text, files)] if check else []
    return errors


def outputs(blocks: list[Block]) -> dict[str, bool]:
    """What the commands of a page write."""
    files = Files()
    for block in blocks:
        if block.language == "bash":
            list(_shell(block.text, files))
    return files.written


def _shell(text: str, files: Files) -> Iterator[str]:
    try:
        found = list(commands(text))
    except ValueError as error:
        yield str(error)
        return
    for command in found:
        yield from check(command, files)


def check(command: Command, files: Files) -> Iterator[str]:
    """What is wrong with a command; what it writes is added to ``files``."""
    program, *arguments = command.words
    for name in command.environment:
        if not re.search(rf"\b{name}\b", _sources()):
            yield f"nothing reads the environment variable {name}"
    for value in command.environment.values():
        yield from _settings(re.findall(r"\b[a-z]+\.[a-z_]+=\S+", value))
    if re.fullmatch(r"python[\d.]*", program):
        yield from _python_program(arguments, files)
    elif program in _PROGRAMS:
        yield from _PROGRAMS[program](arguments, files)
    else:
        yield f"unknown program {program}"


# ------------------------------------------------------------------------------------------ python programs


def _python_program(arguments: list[str], files: Files) -> Iterator[str]:
    if arguments[:1] == ["-m"]:
        yield from _module(arguments[1], arguments[2:], files)
    elif arguments and not arguments[0].startswith("-"):
        yield from _script(arguments[0], arguments[1:], files)
    else:
        yield f"python without a script: {' '.join(arguments)}"


def _module(name: str, arguments: list[str], files: Files) -> Iterator[str]:
    if name == "dmc.cli":
        yield from _dmc(arguments, files)
    elif name == "venv":
        files.written[arguments[-1]] = True
    elif importlib.util.find_spec(name) is None:
        yield f"there is no module {name}"


def _script(path: str, arguments: list[str], files: Files) -> Iterator[str]:
    if not (ROOT / path).is_file():
        yield f"there is no script {path}"
    elif path == "train.py":
        yield from _train(arguments, files)
    elif "--help" not in arguments:
        parser = _parser(path)
        parser.allow_abbrev = False
        options, error = _parsed(parser.parse_args, arguments)
        if error:
            yield f"{path}: {error}"
            return
        yield from _namespace(path, options, files)
        if path == "scripts/quickstart_report.py":
            files.written[str(options.runs)] = True


def _namespace(program: str, options: argparse.Namespace, files: Files) -> Iterator[str]:
    """Files that are read must be there; those that are written are noted."""
    written = {}
    for name, value in vars(options).items():
        for each in value if isinstance(value, list | tuple) else [value]:
            if not isinstance(each, str | Path) or name in _APART:
                continue
            text = str(each)
            if name in _OUTPUTS:
                written[text] = True
            elif (name in _MODELS or _is_path(text)) and not _is_on_hub(text) and files.missing(text):
                yield f"{program}: nothing says where {text} comes from"
    files.written |= written


def _is_path(text: str) -> bool:
    return text.endswith(_EXTENSIONS) or bool(re.fullmatch(r"[\w.*-]+(/[\w.*-]+)+/?", text))


def _is_on_hub(text: str) -> bool:
    return bool(re.fullmatch(r"[\w-]+/[\w.-]+", text)) and text.split("/")[0] not in _LOCAL and not text.endswith(_EXTENSIONS)


class _Captured(BaseException):
    """Carries a parser out of a script that is about to parse."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


@functools.cache
def _parser(path: str) -> argparse.ArgumentParser:
    """The parser of a script in the repository."""

    def stop(parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        raise _Captured(parser)

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", stop),
        mock.patch.object(sys, "argv", [path]),
        mock.patch.object(sys, "path", [str(ROOT), *sys.path]),
    ):
        try:
            runpy.run_path(str(ROOT / path), run_name="__main__")
        except _Captured as captured:
            return captured.parser
    raise AssertionError(f"{path} parses no arguments")


def _parsed(parse: Callable, arguments: list[str]) -> tuple[object, str]:
    """The result of a parser and "", or None and what it says."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            return parse(arguments), ""
        except SystemExit as stop:
            return None, "" if stop.code in (0, None) else said.getvalue().strip().splitlines()[-1]


# ------------------------------------------------------------------------------------------ training


def _train(arguments: list[str], files: Files) -> Iterator[str]:
    from dmc.commands import train
    from dmc.training.schedule import Schedule

    given = [word for word in arguments if word != "..."]
    if "--help" in given:
        return
    with contextlib.suppress(ValueError):  # a recipe of the reader's own
        place = given.index("--config") + 1
        if not (ROOT / given[place]).is_file() and not files.missing(given[place]):
            del given[place - 1 : place + 1]
    dry = "--dry-run" in given
    with contextlib.chdir(ROOT):
        try:
            config, error = _parsed(train.parse, given)
        except ValueError as wrong:
            config, error = None, str(wrong)
    if error or config is None:
        yield f"train.py: {error}"
        return
    for path in [] if dry else [config.run.model, config.distill.teacher, *_texts(config.data.text)]:
        if path and not _is_on_hub(path) and files.missing(path):
            yield f"train.py: nothing says where {path} comes from"
    schedule, out = Schedule(config), config.run.output
    names = {name for step in range(schedule.steps) for name in schedule(step).saves} if schedule.steps < 10**6 else set()
    files.written |= {out: False} | {f"{out}/checkpoints/{name}": False for name in names}


def _texts(text: str | list) -> list[str]:
    if isinstance(text, list) or ":" in text or text.startswith("stdlib"):
        return []
    return text.split(",")


def _settings(settings: list[str], config: str | None = None) -> Iterator[str]:
    """Keys and values of a training configuration, ``section.key=value``."""
    from dmc.training.config import load

    if settings or config:
        try:
            load(ROOT / config if config else None, settings)
        except ValueError as error:
            yield str(error)


def _torchrun(arguments: list[str], files: Files) -> Iterator[str]:
    from torch.distributed.run import get_args_parser

    options, error = _parsed(get_args_parser().parse_args, [word for word in arguments if word != "..."])
    if error:
        yield f"torchrun: {error}"
    elif options.module:
        yield from _module(options.training_script, options.training_script_args, files)
    else:
        yield from _script(options.training_script, options.training_script_args, files)


def _sbatch(arguments: list[str], files: Files) -> Iterator[str]:
    words = [word for word in arguments if word != "..."]
    while words and words[0].startswith("-"):
        flag, equals, _ = words.pop(0).partition("=")
        if flag not in SBATCH_FLAGS:
            yield f"sbatch: unknown flag {flag}"
        if not equals:
            words.pop(0)
    if words and words[0].endswith(".sbatch"):
        script = words.pop(0)
        if not (ROOT / script).is_file():
            yield f"there is no script {script}"
        if not words or not (ROOT / words[0]).is_file():
            yield f"{script}: there is no recipe {words[:1]}"
            return
        recipe = words.pop(0)
        yield from _train(["--config", recipe, *words, "--output", f"runs/{Path(recipe).stem}"], files)
    else:
        yield from _settings(words)


# ------------------------------------------------------------------------------------------ the console command


def _dmc(arguments: list[str], files: Files) -> Iterator[str]:
    from dmc import cli

    if arguments[:1] == ["train"]:
        yield from _train(arguments[1:], files)
        return
    if arguments[:1] == ["export"]:
        yield from _script("scripts/export_hf.py", arguments[1:], files)
        return
    parser, known = cli._parsers()
    result, error = _parsed(parser.parse_known_args, arguments)
    if error or result is None:
        if error:
            yield error
        return
    options, unknown = result
    if unknown:
        yield f"dmc {options.command}: unknown argument {unknown[0]}; its flags: {', '.join(known[options.command].flags())}"
    yield from _policies_and_codecs(options, files)
    yield from _namespace(f"dmc {options.command}", options, files)


def _policies_and_codecs(options: argparse.Namespace, files: Files) -> Iterator[str]:
    from dmc.commands.common import codec_choice
    from dmc.evaluation.grid import choose, codec_settings
    from dmc.evaluation.spec import named

    try:
        if options.command == "frontier":
            for text in options.policies or ():
                yield from _policy(*named(text), files)
            for text in options.codecs or ():
                name, settings = named(re.sub(r"\$\{[^}]*\}", "4", text))
                yield from _file_of(settings, files)
                yield from _made("codec", name, codec_settings(choose(name, **settings))[0]) if "file" not in settings else ()
        elif hasattr(options, "codec"):
            if options.policy:
                name, settings = named(options.policy)
                given = {name: getattr(options, name) for name in ("decisions", "target_cr", "max_entries")}
                yield from _policy(name, settings | {key: value for key, value in given.items() if value is not None}, files)
            name, settings = codec_choice(options)
            yield from _file_of(settings, files)
            yield from _made("codec", name, settings) if "file" not in settings else ()
    except ValueError as error:
        yield f"dmc {options.command}: {error}"


def _file_of(settings: dict, files: Files) -> Iterator[str]:
    if "file" in settings and files.missing(str(settings["file"])):
        yield f"nothing says where {settings['file']} comes from"


def _policy(name: str, settings: dict, files: Files) -> Iterator[str]:
    """A file of decisions or heads is checked for where it comes from; random ones stand for its content."""
    if "decisions" in settings:
        if files.missing(str(settings["decisions"])):
            yield f"nothing says where {settings['decisions']} comes from"
        settings = settings | {"decisions": random_decisions(window=64, sinks=4)}
    yield from _file_of(settings, files)
    with tempfile.TemporaryDirectory() as folder:
        own = {"file": random_heads(f"{folder}/heads", 1, 1, 1)} if "file" in settings else {}
        yield from _made("policy", name, settings | own)


def _made(kind: str, name: str, settings: dict) -> Iterator[str]:
    from dmc.cache import codec, policy

    if name.partition(":")[0] in YOUR_MODULES:
        return
    try:
        {"codec": codec, "policy": policy}[kind](name, **settings)
    except ValueError as error:
        yield str(error)


_SPOKEN = ("huggingface-cli", "git", "conda")  # programs that no page should name: nothing installs them
_PROGRAMS = PROGRAMS | {"torchrun": _torchrun, "dmc": _dmc, "sbatch": _sbatch}


@functools.cache
def _sources() -> str:
    """All code of the repository, but that of these checks."""
    return _text("*.py") + _shell_sources()


@functools.cache
def _shell_sources() -> str:
    return _text("*.sh") + _text("*.sbatch")


def _text(pattern: str) -> str:
    folders = ("dmc", "data", "checkpoints", "scripts", "tests")
    files = [ROOT / "train.py", *(path for folder in folders for path in (ROOT / folder).rglob(pattern))]
    return "\n".join(path.read_text() for path in files if path.parent != ROOT / "tests" / "docs")


# ------------------------------------------------------------------------------------------ code in the text


def flags_of_text(text: str) -> list[str]:
    """Code spans of a page, outside its blocks, that are commands or begin with a flag."""
    spans = re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))
    programs = "|".join([*_PROGRAMS, *_SPOKEN, r"python[\d.]*"])
    return [" ".join(span.split()) for span in spans if re.match(rf"(?:{programs}) \S|--[a-z]", span)]


def check_span(span: str) -> Iterator[str]:
    """What is wrong with a command or flag in the text, which may leave out arguments."""
    if span.startswith("--"):
        flag = re.match(r"--[\w-]+", span)[0]
        if f'"{flag}' not in _sources() and not re.search(rf"{flag}(?![\w-])", _shell_sources()):
            yield f"no program has the flag {flag}"
        return
    files = Files()
    files.missing = lambda path: False
    fragment = ("the following arguments are required", "expected one argument")
    yield from (error for error in _shell(span, files) if not any(part in error for part in fragment))


# ------------------------------------------------------------------------------------------ blocks of Python


def _python(text: str, files: Files) -> Iterator[str]:
    """Names that are imported from this project, and the arguments of its `LLM` and `SamplingParams`."""
    import dmc

    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        yield f"no Python: {error.msg}"
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dmc":
            module = importlib.import_module(node.module)
            yield from (f"{node.module} has no {each.name}" for each in node.names if not hasattr(module, each.name))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("LLM", "SamplingParams"):
            known = inspect.signature(getattr(dmc, node.func.id)).parameters
            yield from (f"{node.func.id} takes no {each.arg}" for each in node.keywords if each.arg not in known)
            if node.func.id == "LLM":
                yield from _python_llm({each.arg: each.value for each in node.keywords}, node.args, files)


def _python_llm(keywords: dict[str, ast.expr], arguments: list[ast.expr], files: Files) -> Iterator[str]:
    checked = ("codec", "policy", "decisions", "target_cr", "max_entries")
    value = {name: ast.literal_eval(node) for name, node in keywords.items() if name.startswith(checked)}
    if "codec" in value:
        yield from _made("codec", value["codec"], value.get("codec_settings", {}))
    if "policy" in value:
        given = {name: value[name] for name in ("decisions", "target_cr", "max_entries") if name in value}
        yield from _policy(value["policy"], value.get("policy_settings", {}) | given, files)
    if arguments and files.missing(path := ast.literal_eval(arguments[0])):
        yield f"nothing says where {path} comes from"
