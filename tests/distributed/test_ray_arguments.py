"""What a deployment takes is what `LLM` and the server take, with their defaults; read from the source, without Ray."""

import ast
import dataclasses
import inspect
from pathlib import Path

import pytest

from dmc import LLM
from dmc.server.settings import Settings

SOURCE = Path(__file__).parents[2] / "dmc" / "server" / "ray.py"


def arguments():
    tree = ast.parse(SOURCE.read_text())
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Arguments")
    fields = {}
    for node in found.body:
        if isinstance(node, ast.AnnAssign):
            value = node.value.args[0] if isinstance(node.value, ast.Call) else node.value  # Field(default, ...)
            fields[node.target.id] = inspect.Parameter.empty if value is None else eval(ast.unparse(value))
    return fields


def test_the_settings_of_the_engine():
    """With the defaults of `LLM`, but for the page pool: a replica serves, and sizes it as `dmc serve` does."""
    taken = inspect.signature(LLM.__init__).parameters
    wanted = {name: each.default for name, each in taken.items() if name not in ("self", "path")} | {"kv_memory": "auto"}
    assert {name: value for name, value in arguments().items() if name in wanted} == wanted


@pytest.mark.parametrize(
    "field", [f for f in dataclasses.fields(Settings) if f.name not in ("name", "host", "port")], ids=lambda field: field.name
)
def test_the_settings_of_the_server(field):
    """Ray's proxy reads heads and listens: its own settings say how."""
    if field.name == "head_timeout":
        assert field.name not in arguments()
    else:
        assert arguments()[field.name] == field.default
