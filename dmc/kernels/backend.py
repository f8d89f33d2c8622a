"""Which implementation runs: the project's Triton kernels, or one of the PyTorch forms beside them.

The setting is one of `BACKENDS`. It comes, in this order, from the ``backend`` argument of a call, from
`using`, from `set_default` (the trainer's ``run.kernels``), from the environment variable ``DMC_KERNELS``, and
is else "auto": Triton on a CUDA device that can run it, PyTorch elsewhere; for serving on a CPU
loops that numba compiles (`cpu.py` of each operation). That "auto" falls back to PyTorch is said
once, on stderr. A setting that is not "auto" is obeyed or refused, never replaced.

Under Triton's interpreter (``TRITON_INTERPRET=1``, set before triton is first imported) "triton" runs on CPU
tensors too, slowly: that is how the kernels are tested without a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Iterator

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "sdpa", "reference")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MOST_HEAD_SIZE = 128
_LEAST_CAPABILITY = (8, 0)  # bf16 tensor cores

_log = logging.getLogger("dmc.kernels")
_default: str | None = None


def check_backend(name: str) -> str:
    """The name itself, if it is one of `BACKENDS`.

    Raises:
        ValueError: naming it and the known ones.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown kernels {name!r}; known: {', '.join(BACKENDS)}")
    return name


def set_default(name: str) -> None:
    """Sets what runs from now on where a call does not say it; "auto" leaves it to ``DMC_KERNELS``."""
    global _default
    _default = None if check_backend(name) == "auto" else name


@contextlib.contextmanager
def using(name: str) -> Iterator[None]:
    """Inside the block, ``name`` is the default: for tests and benchmarks."""
    global _default
    before, _default = _default, check_backend(name)
    try:
        yield
    finally:
        _default = before


def choose(x: Tensor, backend: str | None = None) -> str:
    """What runs on tensors like ``x``: a name of `BACKENDS` other than "auto".

    Args:
        x: ``[..., D]``, on the device and in the dtype of the computation.
        backend: a name that overrides every default.

    Raises:
        ValueError: if Triton was asked for by name and cannot run on ``x``, or the name is unknown.
    """
    name = check_backend(backend or chosen_name())
    if name not in ("auto", "triton"):
        return name
    reason = _refusal(x.device.type, x.device.index, x.dtype, x.shape[-1], name == "triton" and interpreted())
    if reason is None:
        return "triton"
    if name == "triton":
        raise ValueError(f"Triton kernels were asked for, but {reason}; choose auto or sdpa")
    say(f"attention runs in PyTorch (sdpa): {reason}")
    return "sdpa"


def chosen_name() -> str:
    """The setting where a call names none: one of `BACKENDS`, "auto" included."""
    return _default or os.environ.get("DMC_KERNELS") or "auto"


def in_reach(x: Tensor) -> Tensor:
    """``[..., T, D]`` as the kernels address it: features side by side, and a head's tokens less than 2^31 numbers apart."""
    near = x.stride(-1) == 1 and x.stride(-2) * x.shape[-2] < 2**31
    return x if near else x.contiguous()


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _refusal(device: str, index: int | None, dtype: torch.dtype, head_size: int, interpret: bool) -> str | None:
    """Why Triton cannot run on such tensors; None where it can."""
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
