"""The text that every machine has: the Python standard library's sources, docstrings and prose.

Nothing is shipped and nothing is downloaded. Four kinds of documents, each a `Document`:

- ``src/...``    one source file of the standard library (tests, demos and code-page tables left out);
- ``guide/...``  the same file as pages of reference and source (`data.guides`);
- ``topic/...``  one page of the language reference that ``help()`` shows (``pydoc_data.topics``);
- ``api/...``    the docstrings of one built-in or extension module, which stand in no source file.

The library differs between Python versions, so a corpus has a hash (`corpus_hash`) that goes into every
result computed on it. The held-out part is chosen by the name of the top-level module: near copies that
live in one package stay on one side.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import pkgutil
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from data.guides import guide

# Directories that are no prose and no program anyone reads: tests, third-party code, generated tables.
SKIPPED_DIRECTORIES = frozenset(
    {
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "encodings",
        "turtledemo",
        "__pycache__",
        "_bundled",
        "lib-dynload",
        "config",
        "pydoc_data",
    }
)
# One bucket of twenty is held out. This one holds programs and library code of many sizes.
HELD_OUT_BUCKET, BUCKETS = 7, 20


@dataclass(frozen=True)
class Document:
    """One text with a stable name, e.g. ``src/json/decoder.py``."""

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether the document belongs to the held-out split (by the name of its top-level module)."""
        module = self.name.split("/")[1].removesuffix(".py")
        digest = hashlib.sha256(module.lstrip("_").encode()).digest()
        return digest[0] % BUCKETS == HELD_OUT_BUCKET


def documents(kinds: tuple[str, ...] = ("guide", "topic", "api")) -> list[Document]:
    """The documents of this machine's standard library of the given kinds, sorted by name.

    Guides hold the sources, so the default leaves ``src`` out.

    Raises:
        ValueError: if the standard library has no sources (a zipped or stripped Python).
    """
    sources = list(_sources())
    if not sources:
        raise ValueError(
            f"the standard library under {sysconfig.get_paths()['stdlib']} has no .py sources; "
            "use a Python with its library unpacked, or train on your own text with data.text=FILE"
        )
    makers = {"src": lambda: sources, "guide": lambda: _guides(sources), "topic": _topics, "api": _extension_docstrings}
    return sorted((d for kind in kinds for d in makers[kind]()), key=lambda d: d.name)


def split(docs: list[Document]) -> tuple[list[Document], list[Document]]:
    """``(training, held-out)`` documents."""
    return [d for d in docs if not d.held_out], [d for d in docs if d.held_out]


def corpus_hash(docs: list[Document]) -> str:
    """SHA-256 over names and texts: 16 hex digits that identify the corpus a number was measured on."""
    digest = hashlib.sha256()
    for doc in docs:
        digest.update(doc.name.encode() + b"\0" + doc.text.encode() + b"\0")
    return digest.hexdigest()[:16]


def _sources() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if path.name.startswith("_sysconfigdata") or any(
            part in SKIPPED_DIRECTORIES or part.startswith("config-") for part in parts[:-1]
        ):  # build paths of one machine; directories that are no text
            continue
        try:
            with tokenize.open(path) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):  # deliberately broken files in some distributions
            continue
        if text.strip():
            yield Document("src/" + "/".join(parts), text)


def _guides(sources: list[Document]) -> Iterator[Document]:
    for source in sources:
        path = source.name.removeprefix("src/")
        text = guide(path, source.text)
        if text:
            yield Document(f"guide/{path}", text)


def _topics() -> Iterator[Document]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # stripped distributions leave the package out
        return
    for name, text in topics.items():
        yield Document(f"topic/{name}", text.strip() + "\n")


def _extension_docstrings() -> Iterator[Document]:
    names = set(sys.builtin_module_names) | {
        m.name for m in pkgutil.iter_modules([str(Path(sysconfig.get_paths()["stdlib"]) / "lib-dynload")])
    }
    for name in sorted(n for n in names if "test" not in n and n in sys.stdlib_module_names):
        try:
            module = importlib.import_module(name)
        except ImportError:  # e.g. _tkinter without a Tk library
            continue
        text = _describe(module)
        if text.count("\n") > 3:
            yield Document(f"api/{name}", text)


def _describe(module: ModuleType) -> str:
    """The docstrings of a module, of its functions and classes and of their methods, as indented text."""
    lines = [f"module {module.__name__}", ""]
    if module.__doc__:
        lines += [inspect.cleandoc(module.__doc__), ""]
    for name, value in sorted(vars(module).items()):
        owner = getattr(value, "__module__", None) or module.__name__
        if name.startswith("_") or owner.lstrip("_") != module.__name__.lstrip("_"):
            continue
        if not isinstance(value, type):
            if inspect.isroutine(value):
                lines += _entry(name, value, "")
            continue
        lines += _entry(f"class {name}", value, "")
        for attribute, member in sorted(vars(value).items()):
            if inspect.isroutine(member) and not attribute.startswith("_"):
                lines += _entry(attribute, member, "    ")
    return "\n".join(lines)


def _entry(name: str, value: object, indent: str) -> list[str]:
    doc = inspect.getdoc(value)
    if not doc:
        return []
    signature = getattr(value, "__text_signature__", None) or ""
    body = "\n".join(f"{indent}    {line}".rstrip() for line in doc.splitlines())
    return [f"{indent}{name}{signature.replace('$', '')}", body, ""]
