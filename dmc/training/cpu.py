"""The one place that lets unmodified megatron-core run where there is no CUDA (CPU tensors, gloo).

megatron-core asks for CUDA devices and streams by name. Two mechanisms answer, and both are installed only
where ``torch.cuda.is_available()`` is false, before megatron is imported:

- a `TorchFunctionMode` that turns CUDA devices in calls of torch into the CPU;
- a few functions of ``torch.cuda`` replaced by ones that have nothing to do.
"""

from __future__ import annotations

import contextlib

import torch
from torch.overrides import TorchFunctionMode

_installed: TorchFunctionMode | None = None


def install() -> None:
    """Make megatron-core run on the CPU if there is no CUDA; does nothing elsewhere or the second time."""
    global _installed
    if torch.cuda.is_available() or _installed is not None:
        return
    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu
    torch.cuda.synchronize = lambda *_, **__: None
    torch.cuda.Stream = _Stream  # stays a class: megatron annotates with `torch.cuda.Stream | None`
    torch.cuda.current_stream = torch.cuda.default_stream = lambda *_, **__: _Stream()
    torch.cuda.stream = lambda _: contextlib.nullcontext()
    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed) and None
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = lambda *_, **__: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    _installed = _CudaToCpu()
    _installed.__enter__()


def device() -> torch.device:
    """The device that this process trains on."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def backend() -> str:
    """The torch.distributed backend that goes with `device`."""
    return "nccl" if torch.cuda.is_available() else "gloo"


class _CudaToCpu(TorchFunctionMode):
    """Rewrites the CUDA devices in a call; `Tensor.type()` answers as on CUDA, since megatron compares it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        kwargs = dict(kwargs or {})
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


def _is_cuda(where: object) -> bool:
    return str(where).startswith("cuda") if isinstance(where, str | torch.device) else False


class _Stream:
    """A stream (and its events) of a device on which everything is done when the call returns."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def wait_stream(self, *_: object) -> None: ...

    def wait_event(self, *_: object) -> None: ...

    def record_event(self, *_: object) -> _Stream:
        return self

    def wait(self, *_: object) -> None: ...

    def record(self, *_: object) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, _: object) -> float:
        return 0.0

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass
