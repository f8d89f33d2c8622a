"""Packages that not every installation has, and the sentence that names one where it is missing.

A serving-only installation lacks the packages of training. A command that needs one says so in one sentence and ends with
exit code 2; `required` says it before minutes of work.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_PACKAGES = {
    # what is imported: (the package that pip installs, the extra of setup.py)
    "megatron": ("megatron-core", "train"),
    "datasets": ("datasets", "train"),
    "pyarrow": ("pyarrow", "train"),  # which datasets installs
    "matplotlib": ("matplotlib", "train"),
    "fastapi": ("fastapi", "serve"),
    "uvicorn": ("uvicorn", "serve"),
    "prometheus_client": ("prometheus_client", "serve"),
    "jinja2": ("jinja2", "serve"),
    "lm_eval": ("lm-eval", "eval"),
}
_CHECKOUT = ("data", "checkpoints")  # packages that a wheel does not carry


@contextmanager
def needed_for(what: str) -> Iterator[None]:
    """Around imports: what is missing becomes one sentence.

    Args:
        what: the purpose, as the sentence's subject in the singular: "training", "the plot".

    Raises:
        ValueError: if a package of an extra, or the checkout, is missing. Another missing module is an error of the program,
            whose ModuleNotFoundError stays.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name in _CHECKOUT:
            raise ValueError(f"{what} needs a checkout of the project: run pip install -e . there") from error
        if name not in _PACKAGES:
            raise
        raise ValueError(_sentence(what, name)) from error


def required(what: str, module: str) -> None:
    """Checks that a package is there, without importing it.

    Args:
        what: see `needed_for`.
        module: its name in an import statement.

    Raises:
        ValueError: if it is missing.
    """
    if importlib.util.find_spec(module) is None:
        raise ValueError(_sentence(what, module))


@contextmanager
def needed_by_script(what: str) -> Iterator[None]:
    """`needed_for` at the top of a script: the sentence goes to stderr, and the exit code is 2."""
    try:
        with needed_for(what):
            yield
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _sentence(what: str, module: str) -> str:
    package, extra = _PACKAGES[module]
    return f"{what} needs {package}: pip install -e '.[{extra}]' in the checkout"
