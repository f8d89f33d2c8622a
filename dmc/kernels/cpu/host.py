"""Features of the CPU that numba compiles for, which the CPU kernels' own instructions depend on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from numba.core import config
from numba.core.codegen import get_host_cpu_features


@dataclass(frozen=True)
class Host:
    """Sizes of vectors.

    Attributes:
        lanes: fp32 numbers of a vector.
        vectors: of sums per row of a tile; 6 rows of them, with their operands, fit the registers.
        fma: whether the CPU has fused multiply-add.
        pairs: whether it has dot products of pairs of bf16.
        looks_up: whether it looks up 16 numbers in a register at once.
    """

    lanes: int
    vectors: int
    fma: bool
    pairs: bool
    looks_up: bool


@lru_cache
def host() -> Host:
    """`Host` of this CPU, restricted by ``NUMBA_CPU_NAME``, ``NUMBA_CPU_FEATURES`` and ``NUMBA_ENABLE_AVX``."""
    named = config.CPU_NAME and config.CPU_FEATURES is None  # then only LLVM knows its features
    text = config.CPU_FEATURES if config.CPU_FEATURES is not None else "" if named else get_host_cpu_features()
    has = {feature[1:] for feature in text.split(",") if feature.startswith("+")}
    if "avx512f" in has:
        return Host(16, 4, True, "avx512bf16" in has, True)
    if "avx2" in has and "fma" in has:
        return Host(8, 2, True, False, False)
    wide = "neon" in has or "asimd" in has  # 32 registers
    return Host(4, 4 if wide else 2, wide, False, False)
