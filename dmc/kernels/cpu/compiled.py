"""Compilation of the CPU kernels, and the smallest of them.

Loops run over slices from 0 on, or index by unsigned numbers: numba checks an index at every step unless it is known to be
positive, and a loop with such checks is not vectorised. bf16 is read as the upper half of an fp32's bits.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from dmc.kernels.cpu.host import host

_ROOM, _PACKAGE = Path(__file__).parents[1], __name__.rsplit(".", 2)[0]
_WORDS = (b"numba", b"llvmlite", b"compiled", b"callback")  # every compiled file has one of them
KEPT = True  # whether machine code is kept on disk
FAST = frozenset({"reassoc", "contract", "nsz"})
"""Flags that allow computing numbers in another order than written."""


def compiled(*, exact: bool = False, ordered: bool = False) -> Callable[[Callable], Callable]:
    """A decorator that compiles a function with numba, without Python's lock.

    Args:
        exact: no sum is reordered, and no product fused into one.
        ordered: no sum is reordered.
    """
    fastmath = set() if exact else {"contract"} if ordered else set(FAST)
    options = dict(fastmath=fastmath, nogil=True, error_model="numpy")

    def wrap(loop: Callable) -> Callable:
        made = numba.njit(**options)(loop)
        return made if keep(made, made.enable_caching) else numba.njit(**options)(loop)

    return wrap


def keep(made: object, enable: Callable[[], None]) -> bool:
    """Keeps the machine code of a numba function on disk, if there is a writable folder.

    Args:
        made: numba's function.
        enable: its method that starts keeping it.
    """
    global KEPT
    try:
        enable()
        # Machine code contains that of called functions, also from other files, but numba checks the date of its own file alone.
        made._cache._cache_file._source_stamp = _stamp(Path(inspect.getfile(made.__wrapped__)))
        return True
    except (RuntimeError, AttributeError, OSError):  # no writable folder, or no date: compiled by each process
        KEPT = False
        return False


def _stamp(file: Path) -> str:
    """The date of a file's machine code: a digest of this project's compiled code, and of the file if it is another package's."""
    if file.resolve().is_relative_to(_ROOM.resolve()):
        return _sources()
    return _sources() + hashlib.sha256(file.read_bytes()).hexdigest()


@lru_cache
def _sources() -> str:
    """Digest of this project's compiled code, for this CPU."""
    return hashlib.sha256((repr(host()) + digest(_ROOM, _PACKAGE)).encode()).hexdigest()


def digest(room: Path, package: str) -> str:
    """Digest of all files that machine code depends on. Machine code that was kept under another digest is not used.

    Args:
        room: folder of the package.
        package: its name, as imports have it.
    """
    digest = hashlib.sha256()
    for path in sources(room, package):
        digest.update(path.relative_to(room).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def sources(room: Path, package: str) -> list[Path]:
    """Files that compiled functions depend on, anywhere below ``room``.

    These are the files that import numba, llvmlite or the decorators `compiled` and `callback`, and the package's files that
    they import: numba freezes the constants that a compiled function reads.
    """
    found, known = set(), {}

    def imports(path: Path) -> set[str]:
        if path not in known:
            known[path] = _imports(path)
        return known[path]

    waiting = [
        path for path in room.rglob("*.py")
        if any(word in path.read_bytes() for word in _WORDS) and _compiles(imports(path))
    ]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += [file for name in imports(path) if (file := _file(room, package, name)) is not None]
    return sorted(found)


def _imports(path: Path) -> set[str]:
    """Dotted names that a file imports at its top: modules, and modules with the names imported from them."""
    names = set()
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Import):
            names |= {one.name for one in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{one.name}" for one in node.names}
    return names


def _compiles(imports: set[str]) -> bool:
    return any(name.split(".")[0] in ("numba", "llvmlite") or name.endswith((".compiled", ".callback")) for name in imports)


def _file(room: Path, package: str, name: str) -> Path | None:
    """The file of a module of the package; None for other modules and for names within modules."""
    if not name.startswith(package + "."):
        return None
    path = room.joinpath(*name.removeprefix(package + ".").split(".")).with_suffix(".py")
    return path if path.exists() else None


@compiled()
def dot(a, b):  # noqa: ANN001, ANN201
    """Dot product of two vectors."""
    total = np.float32(0)
    for d in range(len(a)):
        total += a[d] * b[d]
    return total


@compiled()
def widen(source, bits):  # noqa: ANN001, ANN201
    """bf16 to fp32, through the bits of the fp32."""
    for d in range(len(source)):
        bits[d] = np.uint32(source[d]) << np.uint32(16)


@compiled()
def whole(source, out):  # noqa: ANN001, ANN201
    """Converts signed bytes, stored as unsigned ones, to fp32."""
    for i in range(len(source)):
        out[i] = np.float32(np.int8(source[i]))


@compiled()
def half(source, at, bits, value):  # noqa: ANN001, ANN201
    """One bf16 number, through ``bits`` and ``value``, the same four bytes."""
    bits[0] = np.uint32(source[at]) << np.uint32(16)
    return value[0]


@intrinsic
def float_of(context, bits):  # noqa: ANN001, ANN201
    """The fp32 number of 32 bits."""
    return types.float32(types.int32), lambda context, builder, signature, arguments: builder.bitcast(*arguments, ir.FloatType())


@intrinsic
def bits_of(context, number):  # noqa: ANN001, ANN201
    """The 32 bits of an fp32 number, as int32."""
    return types.int32(types.float32), lambda context, builder, signature, arguments: builder.bitcast(*arguments, ir.IntType(32))


def wide(x):  # noqa: ANN001, ANN201
    """A number in fp32, from fp32 or from bf16 as uint16."""
    raise NotImplementedError("for compiled functions")


def narrow(row, x):  # noqa: ANN001, ANN201
    """An fp32 number in the dtype of a row: fp32, or bf16 as uint16, rounded to the nearest even."""
    raise NotImplementedError("for compiled functions")


@overload(wide)
def _wide(x):  # noqa: ANN001, ANN202
    if x == types.uint16:
        return lambda x: float_of(np.int32(x) << np.int32(16))
    return lambda x: x


@overload(narrow)
def _narrow(row, x):  # noqa: ANN001, ANN202
    if row.dtype == types.uint16:
        return lambda row, x: _halved(x)
    return lambda row, x: x


@compiled()
def _halved(x):  # noqa: ANN001, ANN202
    bits = np.uint32(bits_of(x))
    rest = (bits >> np.uint32(16)) & np.uint32(1)
    near = (bits + np.uint32(0x7FFF) + rest) >> np.uint32(16)
    return np.uint16(near if x == x else (bits >> np.uint32(16)) | np.uint32(64))


@compiled(ordered=True)
def exponential(x):  # noqa: ANN001, ANN201
    """exp(x) of numbers up to 0 in place, to 2 units in the last place; 0 below -87.

    Cody and Waite: x = n log 2 + f with log 2 in two parts, the series of exp(f) for f within log(2) / 2 of 0, n as the exponent.
    """
    for i in range(len(x)):
        y = max(x[i], np.float32(-88))
        n = np.floor(y * np.float32(1.4426950408889634) + np.float32(0.5))
        f = y - n * np.float32(0.693359375)
        f = f - n * np.float32(-2.12194440e-4)
        p = np.float32(1 / 5040)
        p = p * f + np.float32(1 / 720)
        p = p * f + np.float32(1 / 120)
        p = p * f + np.float32(1 / 24)
        p = p * f + np.float32(1 / 6)
        p = p * f + np.float32(0.5)
        p = p * f + np.float32(1)
        p = p * f + np.float32(1)
        p = p if x[i] >= np.float32(-87) else p * np.float32(0)  # a NaN stays one
        x[i] = p * float_of((np.int32(n) + np.int32(127)) << np.int32(23))
