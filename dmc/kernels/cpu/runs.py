"""Whether the CPU kernels run in place of PyTorch (`cpu.py` and `loop.py` of each operation)."""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch
from torch import Tensor

from dmc.kernels.backend import chosen_name

_given_up = False


def runs_on_cpu(like: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether the loops are to be used on tensors like this: on a CPU, with numba installed and nothing else asked for.

    Args:
        like: of the computation.
        dtypes: that the loops take beside fp32.
    """
    fits = like.device.type == "cpu" and like.dtype in (torch.float32, *dtypes) and chosen_name() == "auto"
    return fits and not _given_up and _numba()


def give_up_loops(why: object) -> None:
    """From now on PyTorch does in this process what the loops cannot; says so."""
    global _given_up
    _given_up = True
    _say("compile the loops", why)


def _say(what: str, why: object) -> None:
    logging.getLogger("dmc.kernels").warning("dmc: PyTorch does what compiled loops would: numba cannot %s (%s)", what, why)


@functools.cache
def _numba() -> bool:
    try:
        from numba import config
    except ImportError as error:  # not installed, or not made for the numpy that is
        if importlib.util.find_spec("numba") is None:
            return False
        _say("be imported", error)
        return False
    return not config.DISABLE_JIT
