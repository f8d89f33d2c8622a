"""Writes docs/reference from the code: configuration, command line, HTTP interface, metrics, file formats, Python API.

    python scripts/make_reference.py             write them
    python scripts/make_reference.py --check     write nothing; exit with 1 where one is not current

The pages are in the repository; `tests/docs/test_reference.py` fails where they are not current.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
import typing
from pathlib import Path

from dmc import cli
from dmc.commands import export, train
from dmc.training.config import Config, keys
from dmc.training.signals import EXIT_CODE

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts import reference_files, reference_server, reference_sizing  # noqa: E402 - the folder is on the path only now
from scripts.reference_text import escaped, table  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
NOTE = "<!-- Written by scripts/make_reference.py: edit the code, then run it again. -->"
EXIT_CODES = (
    ("0", "the command is done"),
    ("1", "a rank died, the engine failed, training stopped at bad numbers, or a cell of a frontier failed"),
    ("2", "wrong use, a file that cannot be read or written, or a missing package; one sentence on stderr"),
    (str(EXIT_CODE), "`dmc train` only: a signal stopped it after a checkpoint; the same command with `--resume` goes on"),
    ("130", "Ctrl-C"),
)
API = (
    "dmc.LLM",
    "dmc.SamplingParams",
    "dmc.engine.Output",
    "dmc.engine.Stats",
    "dmc.functional",
    "dmc.cache.Policy",
    "dmc.cache.Entries",
    "dmc.cache.Codec",
    "dmc.families.Family",
)


def main() -> None:
    """Write all pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a page is not current")
    check = parser.parse_args().check
    texts = {ROOT / "docs" / "reference" / name: text for name, text in pages().items()}
    sizing = reference_sizing.PAGE
    for path, text in (texts | {sizing: reference_sizing.filled(sizing.read_text())}).items():
        if check:
            if not path.is_file() or path.read_text() != text:
                sys.exit(f"{path.relative_to(ROOT)} is not current: run python scripts/make_reference.py")
            continue
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        print(f"wrote {path.relative_to(ROOT)}")


def pages() -> dict[str, str]:
    """Text of each page of docs/reference by its file name."""
    server = {"http.md": ("HTTP interface", reference_server.http()), "metrics.md": ("Metrics", reference_server.metrics())}
    own = server | {"files.md": ("File formats", reference_files.files())}
    return {"configuration.md": configuration(), "cli.md": command_line(), "api.md": api()} | {
        name: "\n\n".join([f"# {title}", NOTE, text]) + "\n" for name, (title, text) in own.items()
    }


def configuration() -> str:
    """Every key of the configuration of training."""
    parts = [
        "# Configuration of training",
        NOTE,
        "Every key of a recipe in `configs/`. On the command line a key is set as `section.key=value`, after the flags of "
        "[`dmc train`](cli.md#dmc-train). An unknown key is an error that lists the known ones. More in "
        "[training](../training.md).",
    ]
    for section, owner in typing.get_type_hints(Config).items():
        parts += [f"## {section}", inspect.getdoc(owner)]
        rows = [
            (f"`{section}.{name}`", kind.replace(" | ", " or "), f"`{default}`", escaped(text))
            for name, kind, default, text in keys(owner)
        ]
        parts.append(table(("key", "type", "default", "meaning"), rows))
    return "\n\n".join(parts) + "\n"


def command_line() -> str:
    """Every command of `dmc` with its arguments, as its parser has them."""
    _, parsers = cli._parsers()
    summaries = {name: entry[0] for name, entry in (cli.PROGRAMS | cli.COMMANDS).items()}
    parsers |= {"train": train.make_parser(), "export": export.make_parser()}
    parts = [
        "# Command line",
        NOTE,
        "`--help` of each command prints the same arguments.",
        table(("exit code", "meaning"), list(EXIT_CODES)),
    ]
    parts.append(table(("command", ""), [(f"[`dmc {name}`](#dmc-{name})", text) for name, text in summaries.items()]))
    shown: dict[tuple, str] = {}
    for name, summary in summaries.items():
        parts += [f"## dmc {name}", f"{summary[0].upper()}{summary[1:]}."]
        positional, options, *groups = parsers[name]._action_groups
        own = [*_arguments(positional), *_arguments(options)]
        if own:
            parts.append(table(("argument", "meaning"), own))
        for group in groups:
            rows = _arguments(group)
            first = shown.setdefault((group.title, *rows), name)  # several commands have the same flags of the cache
            title = f"**{group.title[0].upper()}{group.title[1:]}**"
            parts += [title, table(("argument", "meaning"), rows)] if first == name else [f"{title}: [as above](#dmc-{first})."]
    return "\n\n".join(parts) + "\n"


def api() -> str:
    """The public Python API; mkdocstrings fills in each object on the site.

    Raises:
        AttributeError: if an object is not there.
    """
    rows, parts = [], []
    for name in API:
        owner, _, last = name.rpartition(".")
        found = getattr(importlib.import_module(owner), last, None) or importlib.import_module(name)
        rows.append((f"`{name}`", inspect.getdoc(found).split("\n\n")[0].replace("\n", " ")))
        defined = found.__name__ if inspect.ismodule(found) else f"{found.__module__}.{found.__qualname__}"
        parts.append(f'::: {defined}\n    options: {{heading: "{name}"}}')
    intro = "The site shows the docstrings of these objects below. In the repository, read them in the code."
    return "\n\n".join(["# Python API", NOTE, intro, table(("object", ""), rows), *parts]) + "\n"


def _arguments(group: argparse._ArgumentGroup) -> list[tuple[str, str]]:
    """(how it is written, what it means) of each argument of a group, `--help` left out."""
    rows = []
    for action in group._group_actions:
        if isinstance(action, argparse._HelpAction):
            continue
        value = "" if action.nargs == 0 else action.metavar or action.dest.upper()
        if action.choices is not None:
            value = f"{{{','.join(map(str, action.choices))}}}"
        many = " ..." if action.nargs in ("*", "+") else ""
        rows.append((f"`{' '.join([*action.option_strings[-1:], value]).strip()}{many}`", escaped(action.help)))
    return rows


if __name__ == "__main__":
    main()
