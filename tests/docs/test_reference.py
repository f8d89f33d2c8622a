"""docs/reference is what the code says: keys, commands, objects."""

import argparse

import pytest

from dmc.training.config import Config, keys
from scripts import make_reference
from tests.docs.blocks import ROOT

PAGES = make_reference.pages()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_current(name):
    said = "not current: run `python scripts/make_reference.py` and commit docs/reference"
    assert (ROOT / "docs" / "reference" / name).read_text() == PAGES[name], said


def test_nothing_else_is_in_the_folder():
    assert {path.name for path in (ROOT / "docs" / "reference").iterdir()} == set(PAGES)


def test_every_key_is_there():
    assert "| `optim.clip` | float | `1.0` | global gradient norm |" in PAGES["configuration.md"]
    assert PAGES["configuration.md"].count("\n| `") == sum(len(keys(type(part))) for part in vars(Config()).values())


def test_arguments_of_every_kind():
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", metavar="DIR", help="of a|model")
    parser.add_argument("--kind", "-k", choices=("a", "b"), help="90 %% of <x>, as `a_b` or a_b")
    parser.add_argument("--many", nargs="+")
    parser.add_argument("--quiet", action="store_true", help="says nothing")
    positional, options = parser._action_groups
    assert make_reference._arguments(positional) == [("`DIR`", "of a|model")]
    assert make_reference._arguments(options) == [
        ("`-k {a,b}`", "90 % of \\<x>, as `a_b` or a\\_b"),
        ("`--many MANY ...`", ""),
        ("`--quiet`", "says nothing"),
    ]
    assert make_reference.table(("a", "b"), [("x|y", "z")]) == "| a | b |\n|---|---|\n| x\\|y | z |"
