"""Compiles for an H100, without one, every Triton kernel that a computation launches; run as a script.

Launches are intercepted: instead of running, a kernel is compiled with the types, constants and alignments of its
arguments, down to machine code, and what the assembler says of registers and spills is kept.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.knobs import nvidia
from triton.runtime.jit import JITFunction

TARGET = GPUTarget("cuda", 90, 32)
_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
    torch.float8_e4m3fn: "*fp8e4nv",
}
_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


class Recorder:
    """Inside ``with``, kernels are compiled and not run; `found` says what each came to."""

    def __init__(self):
        self.found = []  # (kernel, constants, registers, bytes spilled, bytes of shared memory, instructions of its longest loop)
        self.ptx = {}  # of each kernel, the last one compiled
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
            value = values.get(param.name, param.default)
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
        registers, spilled, loop = _assemble(compiled.asm["ptx"])
        self.ptx[kernel.__name__] = compiled.asm["ptx"]
        assert len(compiled.asm["cubin"]) > 1000, kernel.__name__
        fixed = {kernel.arg_names[place[0]]: value for place, value in constants.items()} | options
        self.found.append((kernel.__name__, fixed, registers, spilled, compiled.metadata.shared, loop))


def _kind(value, constexpr):
    if constexpr or value is None or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _assemble(ptx):
    """Registers a thread, bytes spilled, as the assembler reports them, and the instructions of the longest loop."""
    with tempfile.TemporaryDirectory() as folder:
        source, machine = Path(folder) / "kernel.ptx", Path(folder) / "out"
        source.write_text(ptx)
        command = [nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", str(source), "-o", str(machine)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        command = [nvidia.nvdisasm.path, "-c", str(machine)]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, spilled = (int(re.search(what, text)[1]) for what in (r"Used (\d+) registers", r"(\d+) bytes spill stores"))
    return registers, spilled, _longest_loop(code)


def _longest_loop(code):
    """Instructions from a label to the branch back to it, at most; 0 without one."""
    labels, place, longest = {}, 0, 0
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L\S+):", line):
            labels[label[1]] = place
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            place += 1
            target = re.search(r"BRA\S* .*?(\.L\w+)", instruction[1])
            if target and target[1] in labels:
                longest = max(longest, place - labels[target[1]])
    return longest


def lane_tables(ptx):
    """Registers that the kernel's own shuffles read, and how often; each must be loaded from memory by the number of its lane."""
    shuffles = Counter(re.findall(r"shfl\.sync\.idx\.b32 %r\d+, (%r\d+), %r\d+, 31, 0xffffffff;", ptx))
    made = {}  # register → what it is made of
    for target, sources in re.findall(r"^\s*(?:@%p\d+ )?[a-z][\w.]+\s+\{? ?(%\w+) ?\}?, (.*);", ptx, re.MULTILINE):
        made.setdefault(target, []).append(sources)
    for table in shuffles:
        loads = [x for x in made[table] if x.startswith("[")]
        assert len(loads) == 1 and [x for x in made[table] if x not in loads] == ["0x0"], (table, made[table])
        seen, left = set(), re.findall(r"%\w+", loads[0])
        while left:
            one = left.pop()
            seen.add(one)
            left += [x for sources in made.get(one, ()) for x in re.findall(r"%\w+", sources) if x not in seen]
        assert "%laneid" in seen, f"{table} is not loaded by lane"
    return shuffles


def training(size, dtype, *, tokens=4096, heads=8, groups=2, packed=True, biased=True, window=64):
    """Launches of one forward and backward pass of the training attention, merging at once and late."""
    from dmc.kernels.attention.gpu import attend, attend_late
    from dmc.kernels.attention.rotate_gpu import Rotate
    from dmc.kernels.decisions.decide import Drawn
    from dmc.kernels.decisions.gpu import Soft
    from dmc.kernels.scan.gpu import Merge

    key, value = (torch.zeros(1, heads, tokens, size, dtype=dtype, requires_grad=True) for _ in range(2))
    query = torch.zeros(1, heads * groups, tokens, size, dtype=dtype, requires_grad=True)
    alpha = torch.zeros(1, heads, tokens, requires_grad=True)
    where = Drawn(0, 0, 0, torch.zeros(1, dtype=torch.int64), 0, torch.zeros(tokens, dtype=torch.int64))
    sum(x.sum() for x in Soft.apply(alpha, alpha, torch.zeros(1, 1, tokens, dtype=torch.bool), where, 2.5, 0.1)[:3]).backward()
    cos = torch.zeros(tokens, size)
    starts = torch.zeros(1, tokens, dtype=torch.bool) if packed else None
    keys, values = Merge.apply(key, value, alpha, alpha + 1, cos, cos)
    query = Rotate.apply(query, cos, cos)
    out = attend(query, keys, values, alpha if biased else None, starts=starts)
    out.backward(torch.zeros_like(out), retain_graph=True)
    out = attend_late(query, keys, values, alpha, key, value, window=window, starts=starts)
    out.backward(torch.zeros_like(out))


def decoding(size, dtype, kind, *, groups=4, page=32, rows=64, biased=False):
    """Launches of one decode step; ``biased``: of a model whose keys have a bias."""
    from dmc.kernels.decode.gpu import decode
    from dmc.kernels.formats.plain.format import PlainFormat
    from dmc.kernels.pages.paged import Paged

    stored = {"dense": ("k", dtype), "int8": ("k_codes", torch.int8), "fp8": ("k_numbers", torch.uint8)}[kind]
    encoded = {stored[0].replace("k", part, 1): torch.zeros(2, page, size, dtype=stored[1]) for part in "kv"}
    if kind != "dense":
        encoded |= {f"{part}_scale": torch.zeros(2, page, dtype=torch.bfloat16) for part in "kv"}
    full_precision = {part: torch.zeros(2, 12, size, dtype=dtype) for part in "kv"}
    table, count = torch.zeros(rows, 4, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
    own = torch.zeros(rows, size, dtype=dtype)
    made = PlainFormat(kind, page, size, {name: (x.dtype, x.shape[1:]) for name, x in encoded.items()}, None)
    cache = _biased(Paged(made, encoded, full_precision, table, table, count, count), biased)
    decode(torch.zeros(rows, groups, size, dtype=dtype), own, own, torch.arange(rows), cache, size**-0.5)


def decoding_pages(size, dtype, codec, *, groups=4, page=64, rows=64, biased=False):
    """The launches of one decode step over pages as a codec lays them out; ``biased``: see `decoding`."""
    from dmc.cache.storage.pages import Layout
    from dmc.kernels.decode.gpu import decode
    from dmc.kernels.pages.paged import Paged

    made, full_precision = codec.page_format(page, size, dtype), {part: torch.zeros(2, 12, size, dtype=dtype) for part in "kv"}
    fields = Layout(made.fields).views(torch.zeros(2, 1 << 15, dtype=torch.uint8))
    table, count = torch.zeros(rows, 4, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
    own = torch.zeros(rows, size, dtype=dtype)
    cache = _biased(Paged(made, fields, full_precision, table, table, count, count), biased)
    decode(torch.zeros(rows, groups, size, dtype=dtype), own, own, torch.arange(rows), cache, size**-0.5)


def _biased(cache, biased):
    if not biased:
        return cache
    from dmc.kernels.pages.key_bias import KeyBias
    from dmc.rope import Rope

    bias = KeyBias(torch.ones(1, 2, cache.head_size), Rope(torch.ones(cache.head_size // 2)))
    place = torch.zeros(2, cache.page, dtype=torch.int32)
    bias.features(place)
    heads = torch.zeros(len(cache.encoded_count), dtype=torch.int64)
    return replace(cache, encoded=cache.encoded | {"position": place}, key_bias=bias, heads=heads)


def prefilling(size, dtype, *, rows=8, groups=4, tokens=1024, entries=256):
    """The launch of one prompt."""
    from dmc.kernels.prefill.gpu import prefill

    zeros = lambda *shape: torch.zeros(*shape, dtype=dtype)  # noqa: E731
    keys, own = zeros(rows, entries, size), zeros(rows, tokens, size)
    places, positions = torch.zeros(rows, entries, dtype=torch.int32), torch.arange(tokens, dtype=torch.int32)
    prefill(zeros(rows, groups, tokens, size), keys, keys, places, own, own, positions, size**-0.5)


def growing(size, dtype, codec, *, page=64, per_full_page=17, rows=64):
    """Rows that tokens are appended to, in one byte pool."""
    from dmc.cache.storage.pages import Layout
    from dmc.kernels.pages.paged import Growing

    memory, int32 = torch.zeros(2, 1 << 16, dtype=torch.uint8), dict(dtype=torch.int32)
    half, made = per_full_page * size * dtype.itemsize, codec.page_format(page, size, dtype)
    full_precision = {
        part: memory[:, n * half : (n + 1) * half].view(dtype).unflatten(1, (-1, size)) for n, part in enumerate("kv")
    }
    count, table = torch.zeros(rows, **int32), torch.zeros(rows, 5, **int32)
    return Growing(
        made,
        Layout(made.fields).views(memory),
        full_precision,
        table,
        table,
        count,
        count,
        sinks=4,
        window=0,
        numerators=torch.zeros(rows, 2 * size),
        z=torch.zeros(rows),
        memory=memory,
        stack=torch.zeros(1, dtype=torch.int64),
        free=torch.zeros(1, **int32),
        owners=torch.zeros(2, **int32),
        failed=torch.zeros(1, **int32),
    )


def appending(size, dtype, *, rows=64):
    """The launch of one token a row."""
    from dmc.cache import codec
    from dmc.kernels.append.gpu import append

    x, alpha, table = torch.zeros(rows, size, dtype=dtype), torch.zeros(rows), torch.zeros(64, size)
    state = growing(size, dtype, codec("dense"), rows=rows)
    append(state, torch.arange(rows), x, x, alpha, alpha, torch.arange(8), (table, table))


def encoding(size, dtype, codec, *, page=64, rows=64):
    """The launches that encode the pages of full rows."""
    from dmc.kernels.encode.gpu import encode

    encode(growing(size, dtype, codec, page=page, rows=rows), torch.arange(rows))


def main():
    """``python -m tests.kernels.sm90 [train|serve|grow] SIZE ...``: a line for each kernel."""
    import sys

    from dmc.cache import codec

    parts, sizes = [x for x in sys.argv[1:] if not x.isdigit()], [int(x) for x in sys.argv[1:] if x.isdigit()]
    with Recorder() as recorder:
        for size in sizes or [64, 80, 96, 128]:
            if not parts or "train" in parts:
                training(size, torch.bfloat16)
            if not parts or "grow" in parts:
                appending(size, torch.bfloat16)
                for name, settings in (("dense", {}), ("int8", {}), ("fp8", {}), ("tcq", {"bits": 4}), ("tcq", {"bits": 3})):
                    encoding(size, torch.bfloat16, codec(name, **settings))
            serving = not parts or "serve" in parts
            for kind, groups in (("dense", 1), ("dense", 4), ("int8", 1), ("fp8", 4)) if serving else ():
                decoding(size, torch.bfloat16, kind, groups=groups)
                decoding(size, torch.bfloat16, kind, groups=groups, rows=1)
                decoding(size, torch.bfloat16, kind, groups=groups, biased=True)
            if serving:
                prefilling(size, torch.bfloat16)
                for bits, groups in ((4, 1), (4, 4), (3, 1)):
                    gear = codec("gear", bits=bits, backbone="kivi", rank=1)
                    decoding_pages(size, torch.bfloat16, gear, groups=groups, page=32)
                    decoding_pages(size, torch.bfloat16, codec("tcq", bits=bits), groups=groups)
                    for one, page in ((gear, 32), (codec("tcq", bits=bits), 64)):
                        decoding_pages(size, torch.bfloat16, one, groups=groups, page=page, biased=True)
                for bits in (2, 8):
                    decoding_pages(size, torch.bfloat16, codec("tcq", bits=bits), groups=4)
    for name, constants, registers, spilled, shared, loop in recorder.found:
        short = {k: v for k, v in constants.items() if k != "PRECISION" and v is not None}
        told = f"registers {registers:3d}  spilled {spilled:4d} B  shared {shared / 1024:5.1f} KiB  longest loop {loop:4d}"
        print(f"{name:24s} {told}  {short}")


if __name__ == "__main__":
    main()
