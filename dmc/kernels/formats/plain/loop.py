"""CPU kernels that read the codes of int8 and fp8 pages (`dmc.kernels.decode.loop`)."""

from __future__ import annotations

import numpy as np

from dmc.kernels.cpu.compiled import compiled


@compiled()
def whole(source, out):  # noqa: ANN001, ANN201
    """Signed bytes, held as unsigned ones, to fp32."""
    for i in range(len(source)):
        out[i] = np.float32(np.int8(source[i]))


@compiled()
def e4m3(source, bits, out):  # noqa: ANN001, ANN201
    """FP8 to fp32, which are ``bits`` and ``out`` of the same memory; 448 at most, so none is a NaN."""
    for i in range(len(source)):
        code = np.uint32(source[i])
        bits[i] = ((code & np.uint32(128)) << np.uint32(24)) | ((code & np.uint32(127)) << np.uint32(20))
    for i in range(len(source)):
        out[i] *= np.float32(2.0**120)  # the difference of the exponents' biases; exact, subnormal numbers included


@compiled()
def look_up(source, table, out):  # noqa: ANN001, ANN201
    """``table[source]``."""
    for i in range(len(source)):
        out[i] = table[source[i]]
