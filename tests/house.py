"""The rules of the house, and how a tree is read: who may import whom, and which floors there are.

Imports are read from the source. An import in a function counts as well, and so does one under TYPE_CHECKING: a circle that
is broken by a lazy import is a circle for whoever reads or changes these files.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
TREES = ("dmc", "checkpoints", "data", "scripts", "integrations", "train.py")

MATHS = {"dmc.functional", "dmc.functional_dms", "dmc.fitted", "dmc.rope"}  # plain PyTorch, below everything else
FILES = {  # transformers' loaders; weights by name; the sentence of a missing package; names on the Hub
    "dmc.pretrained",
    "dmc.weights",
    "dmc.extras",
    "dmc.hub",
}
ENGINE = MATHS | FILES | {"dmc", "dmc.families", "dmc.kernels", "dmc.cache", "dmc.model", "dmc.engine"}  # and below
DMC = ENGINE | {"dmc.server", "dmc.evaluation", "dmc.analysis", "dmc.training"}
CHECKOUT = {"data", "checkpoints"}
MAY_IMPORT = {
    # room: the rooms that it may import, beside itself. "dmc" is dmc/__init__.py, which loads `dmc.LLM` on first use
    "dmc": set(),
    "dmc.functional": set(),
    "dmc.functional_dms": {"dmc.functional"},
    "dmc.fitted": set(),
    "dmc.rope": set(),  # frequencies from transformers, imported where a config is read
    "dmc.pretrained": {"dmc.families"},
    "dmc.weights": set(),
    "dmc.extras": set(),
    "dmc.hub": set(),
    "dmc.plugins": set(),  # classes of other packages by their names
    "dmc.families": MATHS,
    "dmc.kernels": MATHS,
    "dmc.cache": MATHS | {"dmc.kernels", "dmc.plugins"},
    "dmc.model": MATHS | {"dmc.weights", "dmc.families", "dmc.kernels"},
    "dmc.engine": MATHS | FILES | {"dmc.families", "dmc.model", "dmc.cache"},
    "dmc.server": {"dmc.engine"},
    "dmc.evaluation": ENGINE,
    "dmc.analysis": ENGINE,
    "dmc.training": MATHS | {"dmc.families", "dmc.kernels"},
    "data": FILES | {"dmc.training", "dmc.families"},
    "checkpoints": FILES | {"dmc.training", "dmc.families", "dmc.rope"},
    "dmc_vllm": ENGINE,  # integrations/vllm, a package of its own
    "dmc.commands": DMC | CHECKOUT,
    "dmc.__main__": {"dmc.cli"},
    "dmc.cli": DMC | CHECKOUT | {"dmc.commands"},
    "scripts": DMC | CHECKOUT | {"dmc.commands", "dmc.cli"},
    "train": DMC | CHECKOUT | {"dmc.commands", "dmc.cli"},
}
ALSO = {("dmc.evaluation", "data.stdlib")}  # (room, module): the text that every machine has; it imports data.guides alone
KERNEL_FLOORS = (("backend", "pages"), ("cpu",), ("formats",), ("*",), ("ready",))  # "*": one folder per operation
CACHE_FLOORS = (("policies", "codecs"), ("storage",), ("reading",), ("kv",))
TRAINING_ONLY = ("megatron", "datasets", "matplotlib")
SERVING = (
    "dmc",
    "dmc.functional",
    "dmc.functional_dms",
    "dmc.fitted",
    "dmc.rope",
    "dmc.pretrained",
    "dmc.weights",
    "dmc.hub",
    "dmc.plugins",
    "dmc.families",
    "dmc.kernels",
    "dmc.cache",
    "dmc.model",
    "dmc.engine",
    "dmc.server",
    "dmc.cli",
)


class House:
    """The modules below a folder, and what each imports.

    Attributes:
        files: of each module, its dotted name → path.
        arrows: module → names of the project's modules that it imports, anywhere in the file.
        at_once: the same, but those that run when the module is imported.
        packages: module → first names of other packages, anywhere in the file; ``packages_at_once`` when it is imported.
    """

    def __init__(self, root: Path, trees: tuple[str, ...] = TREES) -> None:
        paths = [p for tree in trees for p in ([root / tree] if tree.endswith(".py") else sorted((root / tree).rglob("*.py")))]
        self.files = {_name(path.relative_to(root)): path for path in paths if path.exists()}
        self.files |= {name: path for path in (root / "tests").rglob("*.py") if (name := _name(path.relative_to(root)))}
        self.arrows, self.at_once, self.packages, self.packages_at_once = {}, {}, {}, {}
        for name, path in self.files.items():
            tree = ast.parse("" if room(name) == "tests" else path.read_text(encoding="utf-8"))  # tests import what they test
            package = name if path.name == "__init__.py" else name.rpartition(".")[0]
            for nodes, arrows, packages in (
                (ast.walk(tree), self.arrows, self.packages),
                (_runs_at_once(tree), self.at_once, self.packages_at_once),
            ):
                arrows[name], packages[name] = set(), set()
                for wanted, names in _imports(nodes, package):
                    self._sort(name, wanted, names, arrows[name], packages[name])

    def _sort(self, name: str, wanted: str, names: list[str], arrows: set[str], packages: set[str]) -> None:
        found = {f"{wanted}.{one}" for one in names if f"{wanted}.{one}" in self.files}
        if wanted in self.files and len(found) < max(1, len(names)):
            found.add(wanted)
        arrows |= found - {name}
        if not found and wanted.partition(".")[0] not in {one.partition(".")[0] for one in self.files}:
            packages.add(wanted.partition(".")[0])

    def within(self, *rooms: str) -> list[str]:
        """Modules of these rooms."""
        return [name for name in self.files if room(name) in rooms]


def _name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__").removeprefix("integrations.vllm.")


def _runs_at_once(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported: not those in functions, nor under ``if TYPE_CHECKING``."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting += node.orelse
            continue
        yield node
        waiting += ast.iter_child_nodes(node)


def _imports(nodes: Iterator[ast.AST], package: str) -> Iterator[tuple[str, list[str]]]:
    """(module, names taken from it) of every import statement, and of calls of ``import_module`` that name a module."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((one.name, []) for one in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            yield ".".join([*base, *([node.module] if node.module else [])]), [one.name for one in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("import_module", "__import__"):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield node.args[0].value, []


def room(module: str) -> str:
    """The room of a module: dmc's folders and top-level files one each, and the other trees."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "dmc" else parts[0]


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one node (Tarjan)."""
    index, low, stack, found = {}, {}, [], []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in arrows.get(node, ()):
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in arrows:
        if node not in index:
            visit(node)
    return found


def forbidden(house: House) -> list[str]:
    """Imports between rooms that `MAY_IMPORT` does not name."""

    def allowed(name: str) -> str:
        return ", ".join(sorted(MAY_IMPORT[name])) or "nothing" if name in MAY_IMPORT else "nothing until it is in MAY_IMPORT"

    return [
        f"{module} imports {other}: {room(module)} may import {allowed(room(module))}"
        for module, others in sorted(house.arrows.items())
        for other in sorted(others)
        if room(other) not in {room(module), *MAY_IMPORT.get(room(module), ())} and (room(module), other) not in ALSO
    ]


def inner_rooms(house: House, package: str) -> dict[str, set[str]]:
    """Rooms of a package → rooms of it that each imports: its folders, those of ``formats`` one each, and its top-level files."""

    def inner(module: str) -> str:
        rest = module.removeprefix(package + ".").split(".")
        return ".".join(rest[: 2 if rest[0] == "formats" else 1])

    modules = [name for name in house.files if name.startswith(package + ".")]
    rooms = {inner(name): set() for name in modules}
    for name in modules:
        rooms[inner(name)] |= {inner(other) for other in house.arrows[name] if other.startswith(package + ".")} - {inner(name)}
    return rooms


def floors(rooms: dict[str, set[str]]) -> int:
    """Rooms in the longest chain of imports; there must be no circle."""
    height: dict[str, int] = {}

    def of(name: str) -> int:
        if name not in height:
            height[name] = 1 + max((of(other) for other in rooms[name]), default=0)
        return height[name]

    return max(map(of, rooms), default=0)


def upwards(rooms: dict[str, set[str]], order: tuple[tuple[str, ...], ...]) -> list[str]:
    """Imports from a lower to a higher floor, and between the rooms of ``formats``."""

    def floor(name: str) -> int:
        first = name.partition(".")[0]
        named = [number for number, names in enumerate(order) if first in names]
        return named[0] if named else next(number for number, names in enumerate(order) if "*" in names)

    return [
        f"{name} imports {other}"
        for name, others in sorted(rooms.items())
        for other in sorted(others)
        if floor(other) > floor(name) or (name.startswith("formats.") and other.startswith("formats."))
    ]


def training_packages(house: House) -> list[str]:
    """Packages of training that serving imports: anywhere in its own files, or when a file is imported that it imports."""
    wrong = [
        f"{module} imports {package}"
        for module in house.within(*SERVING)
        for package in sorted(house.packages[module] & set(TRAINING_ONLY))
    ]
    waiting, known = house.within(*SERVING), {}
    known = dict.fromkeys(waiting, "")
    while waiting:
        module = waiting.pop()
        wrong += [
            f"{known[module] or module} imports {package} by way of {module}"
            for package in sorted(house.packages_at_once[module] & set(TRAINING_ONLY))
            if known[module]
        ]
        parents = {module.rpartition(".")[0]} & set(house.files)  # importing a module runs its packages' own files
        for other in sorted((house.at_once[module] | parents) - set(known)):
            known[other] = known[module] or module
            waiting.append(other)
    return wrong


INSIDE = ("rows", "pool")  # parts of a KVCache that are its own business
MEASURES = {"scripts/bench_decode.py"}  # times the kernels on rows of a cache, without an engine


def reaches(source: str) -> list[str]:
    """Where a file takes the parts of a cache: ``cache.rows``, ``self._cache.rows``, ``llm.cache.rows.pool``, also by getattr."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in INSIDE:
            owner = node.value
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "attrgetter", "operator.attrgetter"):
            names = [part for one in node.args if isinstance(one, ast.Constant) for part in str(one.value).split(".")]
            owner = node.args[0] if set(names) & set(INSIDE) else None
        else:
            continue
        name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
        if name.strip("_").endswith("cache") or (name.strip("_") in ("own", "rows") and isinstance(node, ast.Attribute)):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found
