"""Compiles for an H100, without one, every Triton kernel that a computation launches; run as a script.

Launches are intercepted: instead of running, a kernel is compiled with the types, constants and alignments of its
arguments, down to machine code, and what the assembler says of registers and spills is kept.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.knobs import nvidia
from triton.runtime.jit import JITFunction

TARGET = GPUTarget("cuda", 90, 32)
_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32",
          torch.int64: "*i64", torch.int8: "*i8", torch.uint8: "*u8", torch.bool: "*i1"}
_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


class Recorder:
    """Inside ``with``, kernels are compiled and not run; `found` says what each came to."""

    def __init__(self):
        self.found = []  # (kernel, constants, registers, bytes spilled, bytes of shared memory)
        self._seen = set()

    def __enter__(self):
        self._run = JITFunction.run
        JITFunction.run = lambda kernel, *args, grid, warmup, **kwargs: self._compile(kernel, args, kwargs)
        return self

    def __exit__(self, *_):
        JITFunction.run = self._run

    def _compile(self, kernel, args, kwargs):
        options = {k: v for k, v in kwargs.items() if k in _OPTIONS}
        values = dict(zip(kernel.arg_names, args, strict=False)) | {k: v for k, v in kwargs.items() if k not in _OPTIONS}
        signature, constants, attributes = {}, {}, {}
        for place, param in enumerate(kernel.params):
            value = values[param.name]
            signature[param.name] = kind = _kind(value, param.is_constexpr)
            if kind == "constexpr":
                constants[(place,)] = value
            elif isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
                attributes[(place,)] = [["tt.divisibility", 16]]
        key = (kernel.__name__, str(signature), str(constants), str(options))
        if key in self._seen:
            return
        self._seen.add(key)
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
        compiled = triton.compile(source, target=TARGET, options=options)
        registers, spilled = _assemble(compiled.asm["ptx"])
        assert len(compiled.asm["cubin"]) > 1000, kernel.__name__
        fixed = {kernel.arg_names[place[0]]: value for place, value in constants.items()} | options
        self.found.append((kernel.__name__, fixed, registers, spilled, compiled.metadata.shared))


def _kind(value, constexpr):
    if constexpr or value is None or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _assemble(ptx):
    """Registers a thread, and bytes spilled, as the assembler reports them."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", str(source), "-o", str(Path(folder) / "out")]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return int(re.search(r"Used (\d+) registers", text)[1]), int(re.search(r"(\d+) bytes spill stores", text)[1])


def training(size, dtype, *, tokens=4096, heads=8, groups=2, packed=True, biased=True):
    """Launches of one forward and backward pass of the training attention."""
    from dmc.kernels.attention_triton import attend
    from dmc.kernels.rope_triton import Rotate
    from dmc.kernels.scan_triton import Merge

    key, value = (torch.zeros(1, heads, tokens, size, dtype=dtype, requires_grad=True) for _ in range(2))
    query = torch.zeros(1, heads * groups, tokens, size, dtype=dtype, requires_grad=True)
    alpha = torch.zeros(1, heads, tokens, requires_grad=True)
    cos = torch.zeros(tokens, size)
    starts = torch.zeros(1, tokens, dtype=torch.bool) if packed else None
    keys, values = Merge.apply(key, value, alpha, alpha + 1, cos, cos)
    out = attend(Rotate.apply(query, cos, cos), keys, values, alpha if biased else None, starts=starts)
    out.backward(torch.zeros_like(out))


if __name__ == "__main__":
    import sys

    sizes = [int(x) for x in sys.argv[1:]] or [64, 80, 96, 128]
    with Recorder() as recorder:
        for size in sizes:
            training(size, torch.bfloat16)
    for name, constants, registers, spilled, shared in recorder.found:
        short = {k: v for k, v in constants.items() if k not in ("PRECISION",)}
        print(f"{name:24s} registers {registers:3d}  spilled {spilled:4d} B  shared {shared / 1024:5.1f} KiB  {short}")
