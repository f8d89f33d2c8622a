"""Vector arithmetic on runs of memory, for loops that numba does not vectorise.

A run holds fp32, or bf16 as the upper halves of fp32's bits; arithmetic is fp32, rounded to the nearest even when bf16 is
stored (the CPU's own instruction may flush numbers below 2^-126 to 0). In functions compiled with ``exact`` nothing is reordered,
and only explicit fused operations are fused.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import binding, ir
from numba.core import cgutils

from dmc.kernels.cpu.host import host

LANES, _CONVERTS = host().lanes, host().pairs
if _CONVERTS:
    binding.initialize_native_asmparser()  # bf16 instructions have the CPU's own names

_SINGLE, _HALF, _WORD, _ADDRESS = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_LOG2 = 0.693359375, -2.12194440e-4  # log 2 in two parts
_SERIES = 1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0


def over(builder, size, body: Callable, carried: list = (), join: Callable | None = None) -> list:  # noqa: ANN001
    """Loops over numbers 0 to ``size``, `LANES` at a time and then one at a time.

    Args:
        size: int64.
        body: ``body(vectors, i, carried) → carried``: processes the numbers from i on.
        carried: fp32 numbers, the initial value in each lane: the neutral element of ``join``.
        join: a method of `Vectors` that reduces the lanes to one number; default `Vectors.total`.

    Returns:
        The reduced numbers.
    """
    join = join or Vectors.total
    start, sums = _ADDRESS(0), list(carried)
    for lanes in dict.fromkeys((LANES, 1)):
        vectors = Vectors(builder, lanes)
        values = [vectors.begin(x, neutral) for x, neutral in zip(sums, carried, strict=True)]
        before, test, inside, after = builder.block, *(builder.append_basic_block(name) for name in ("test", "body", "after"))
        builder.branch(test)
        builder.position_at_end(test)
        i, phis = builder.phi(_ADDRESS), [builder.phi(value.type) for value in values]
        following = builder.add(i, _ADDRESS(lanes))
        builder.cbranch(builder.icmp_signed("<=", following, size), inside, after)
        builder.position_at_end(inside)
        new = body(vectors, i, phis) or []
        for phi, old, value in zip([i, *phis], [start, *values], [following, *new], strict=True):
            phi.add_incoming(old, before)
            phi.add_incoming(value, builder.block)
        builder.branch(test)
        builder.position_at_end(after)
        start, sums = i, [join(vectors, phi) for phi in phis]
    return sums


class Vectors:
    """Operations on vectors of so many fp32 numbers."""

    def __init__(self, builder, lanes: int) -> None:  # noqa: ANN001
        self.builder, self.lanes = builder, lanes
        self.singles, self.halves, self.words = (ir.VectorType(kind, lanes) for kind in (_SINGLE, _HALF, _WORD))

    def load(self, address, i, half: bool):  # noqa: ANN001, ANN201
        """Loads from number ``i`` of the run at an address."""
        kind = self.halves if half else self.singles
        value = self.builder.load(self._at(address, i, kind))
        value.align = 2 if half else 4
        return self._widened(value) if half else value

    def store(self, value, address, i, half: bool) -> None:  # noqa: ANN001
        """The inverse of `load`."""
        value = self._halved(value) if half else value
        self.builder.store(value, self._at(address, i, value.type)).align = 2 if half else 4

    def all(self, number):  # noqa: ANN001, ANN201
        """A number, of Python or a value, in all lanes."""
        if isinstance(number, float | int):
            return self.singles([float(number)] * self.lanes)
        first = self.builder.insert_element(self.singles(ir.Undefined), number, _WORD(0))
        return self.builder.shuffle_vector(first, self.singles(ir.Undefined), self.words([0] * self.lanes))

    def begin(self, number, others):  # noqa: ANN001, ANN201
        """A number in the first lane, another in the others."""
        return self.builder.insert_element(self.all(others), number, _WORD(0))

    def total(self, value):  # noqa: ANN001, ANN201
        """The sum over the lanes, halves onto halves."""
        return self._joined(value, self.builder.fadd)

    def largest(self, value):  # noqa: ANN001, ANN201
        """The largest of the lanes."""
        return self._joined(value, self.larger)

    def larger(self, x, y):  # noqa: ANN001, ANN201
        """The larger of x and y; y where x is NaN."""
        return self.builder.select(self.builder.fcmp_ordered(">", x, y), x, y)

    def _joined(self, value, join):  # noqa: ANN001, ANN202
        lanes = self.lanes
        while lanes > 1:
            lanes //= 2
            mask = self.words([(lane + lanes) % self.lanes for lane in range(self.lanes)])
            value = join(value, self.builder.shuffle_vector(value, value, mask))
        return self.builder.extract_element(value, _WORD(0))

    def fused(self, x, y, z):  # noqa: ANN001, ANN201
        """``x y + z``, rounded once if the CPU can."""
        if not host().fma:
            return self.builder.fadd(self.builder.fmul(x, y), z)
        return self._call("fma", x, y, z)

    def exponential(self, x):  # noqa: ANN001, ANN201
        """exp(x) of numbers up to 0, to 2 units in the last place; 0 below -87; NaN of NaN. See `compiled.exponential`."""
        build, least = self.builder, self.all(-88.0)
        y = build.select(build.fcmp_ordered("<", x, least), least, x)
        n = self._call("floor", self.fused(y, self.all(1.4426950408889634), self.all(0.5)))
        f = self.fused(n, self.all(-_LOG2[1]), self.fused(n, self.all(-_LOG2[0]), y))
        p = self.all(_SERIES[0])
        for term in _SERIES[1:]:
            p = self.fused(p, f, self.all(term))
        power = build.shl(build.add(build.fptosi(n, self.words), self.words([127] * self.lanes)), self.words([23] * self.lanes))
        p = build.fmul(p, build.bitcast(power, self.singles))
        return build.select(build.fcmp_ordered("<", x, self.all(-87.0)), self.all(0.0), p)

    def _call(self, name, *arguments):  # noqa: ANN001, ANN202
        form = ir.FunctionType(self.singles, [self.singles] * len(arguments))
        function = cgutils.get_or_insert_function(self.builder.module, form, f"llvm.{name}.v{self.lanes}f32")
        return self.builder.call(function, arguments)

    def _at(self, address, i, kind):  # noqa: ANN001, ANN202
        size = _ADDRESS(2 if kind.element == _HALF else 4)
        return self.builder.inttoptr(self.builder.add(address, self.builder.mul(i, size)), kind.as_pointer())

    def _widened(self, value):  # noqa: ANN001, ANN202
        words = self.builder.shl(self.builder.zext(value, self.words), self.words([16] * self.lanes))
        return self.builder.bitcast(words, self.singles)

    def _halved(self, value):  # noqa: ANN001, ANN202
        build, words = self.builder, self.words
        if _CONVERTS and self.lanes == LANES:
            return build.asm(ir.FunctionType(self.halves, [self.singles]), "vcvtneps2bf16 $1, $0", "=v,v", [value], False)
        bits = build.bitcast(value, words)
        up = build.lshr(bits, words([16] * self.lanes))
        even = build.add(build.and_(up, words([1] * self.lanes)), words([0x7FFF] * self.lanes))
        near = build.lshr(build.add(bits, even), words([16] * self.lanes))
        quiet = build.or_(up, words([64] * self.lanes))
        return build.trunc(build.select(build.fcmp_unordered("uno", value, value), quiet, near), self.halves)
