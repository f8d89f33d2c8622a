"""Which implementation runs: the project's Triton kernels, its CPU kernels (numba), or PyTorch; decided only here.

The setting is one of `BACKENDS`. It comes, in this order, from the ``backend`` argument of a call (None: none), from `using`,
from `set_default` (the trainer's ``run.kernels``), from the environment variable ``DMC_KERNELS``, and is else "auto": Triton on a
CUDA device that can run it; on a CPU the CPU kernels if the operation has some (serving) and numba is installed; PyTorch
otherwise. If "auto" selects PyTorch for training, one line on stderr says why. A setting other than "auto" is used or
rejected, never replaced, except in fp64 caches: no kernel computes in fp64, so they use PyTorch. The choice is a `Backend`.

Under Triton's interpreter (``TRITON_INTERPRET=1``, set before triton is first imported) "triton" also runs on
CPU tensors, slowly; the kernels are tested in this way without a GPU.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import importlib.util
import logging
import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class Backend(enum.StrEnum):
    """A resolved backend. `TORCH` and `REFERENCE` differ only in training; in serving PyTorch is the reference implementation."""

    TRITON = "triton"
    CPU = "cpu"
    TORCH = "torch"
    REFERENCE = "reference"


BACKENDS = ("auto", *Backend)
"""Settings."""
FORMER = {"sdpa": "torch"}
"""Names of version 0.1 → current names; they work for one more version, with a warning."""
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MOST_HEAD_SIZE = 128
_LEAST_CAPABILITY = (8, 0)  # bf16 tensor cores

_log = logging.getLogger("dmc.kernels")
_default: str | None = None
_given_up = False


def check_backend(name: str) -> str:
    """Return the name if it is one of `BACKENDS`; for a name of `FORMER`, its current name, with a warning.

    Raises:
        ValueError: naming it and the known ones.
    """
    if name in FORMER:
        say(f"kernels {name!r} are now called {FORMER[name]!r}; the next version does not accept the old name")
        return FORMER[name]
    if name not in BACKENDS:
        raise ValueError(f"unknown kernels {name!r}; known: {', '.join(BACKENDS)}")
    return str(name)


def set_default(name: str) -> None:
    """Set the default for calls without a backend; "auto" means that ``DMC_KERNELS`` decides."""
    global _default
    name = check_backend(name)
    _default = None if name == "auto" else name


@contextlib.contextmanager
def using(name: str) -> Iterator[None]:
    """Make ``name`` the default inside the block, for tests and benchmarks."""
    global _default
    before, _default = _default, check_backend(name)
    try:
        yield
    finally:
        _default = before


def choose(x: Tensor, backend: str | None = None, *, cpu: Sequence[torch.dtype] = ()) -> Backend:
    """The backend for tensors like ``x``.

    Args:
        x: ``[..., D]``, on the device and in the dtype of the computation.
        backend: a setting that overrides every default; None: the default.
        cpu: dtypes that the operation's CPU kernels support; empty: it has no CPU kernels.

    Raises:
        ValueError: if Triton or the CPU kernels were asked for by name and cannot run on ``x``, or the name is unknown.
    """
    name = check_backend(backend or chosen_name())
    if name == "cpu" and (reason := _no_cpu_kernels(x, cpu)):
        raise ValueError(f"CPU kernels were asked for, but {reason}; choose auto or torch")
    if name == "cpu" or (name == "auto" and _no_cpu_kernels(x, cpu) is None):
        return Backend.CPU
    if name not in ("auto", "triton"):
        return Backend(name)
    reason = _refusal(x.device.type, x.device.index, x.dtype, x.shape[-1], name == "triton" and interpreted())
    if reason is None:
        return Backend.TRITON
    if name == "triton":
        raise ValueError(f"Triton kernels were asked for, but {reason}; choose auto or torch")
    if not cpu:
        say(f"attention runs in PyTorch: {reason}")
    return Backend.TORCH


def chosen_name() -> str:
    """The setting for calls without a backend: one of `BACKENDS`, "auto" included."""
    return _default or check_backend(os.environ.get("DMC_KERNELS") or "auto")


def _no_cpu_kernels(x: Tensor, dtypes: Sequence[torch.dtype]) -> str | None:
    """The reason why CPU kernels for these dtypes cannot run on such tensors; None if they can."""
    if not dtypes:
        return "this operation has none"
    if x.device.type != "cpu":
        return f"they need a CPU, not {x.device.type}"
    if x.dtype not in dtypes:
        return f"they take {', '.join(map(str, dtypes))} here, not {x.dtype}"
    if _given_up or not _numba():
        return "numba is not installed or cannot compile them"
    return None


def give_up_cpu_kernels(why: object) -> None:
    """Use PyTorch instead of the CPU kernels in this process from now on, and log it."""
    global _given_up
    _given_up = True
    _say_numba("compile the CPU kernels", why)


def _say_numba(what: str, why: object) -> None:
    _log.warning("dmc: falling back to PyTorch CPU kernels: numba cannot %s (%s)", what, why)


@functools.cache
def _numba() -> bool:
    try:
        from numba import config
    except ImportError as error:  # not installed, or not compatible with the installed numpy
        if importlib.util.find_spec("numba") is None:
            return False
        _say_numba("be imported", error)
        return False
    return not config.DISABLE_JIT


def in_reach(x: Tensor) -> Tensor:
    """``[..., T, D]`` in the layout that the kernels need: contiguous features, and strides of a head's tokens below 2^31."""
    near = x.stride(-1) == 1 and x.stride(-2) * x.shape[-2] < 2**31
    return x if near else x.contiguous()


def interpreted() -> bool:
    """True if Triton's kernels run in its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _refusal(device: str, index: int | None, dtype: torch.dtype, head_size: int, interpret: bool) -> str | None:
    """The reason why Triton cannot run on such tensors; None if it can."""
    if dtype not in _DTYPES:
        return f"the kernels take bf16, fp16 and fp32, not {dtype}"
    if head_size % 2 or head_size > _MOST_HEAD_SIZE:
        return f"the kernels take even head sizes up to {_MOST_HEAD_SIZE}, not {head_size}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install -e '.[kernels]' in the checkout)"
    if device == "cpu" and interpret:
        return None
    if device != "cuda":
        return f"Triton needs a CUDA device, not {device}"
    capability = torch.cuda.get_device_capability(index)
    if capability < _LEAST_CAPABILITY:
        return f"the device has compute capability {'.'.join(map(str, capability))}, below 8.0"
    return None


@functools.cache
def say(text: str) -> None:
    """Logs a sentence, once per process and on rank 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        _log.warning("dmc: %s", text)
