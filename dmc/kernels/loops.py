"""Whether loops that numba compiles run in place of PyTorch on a CPU (`*_cpu.py` and `*_numba.py` beside this file)."""

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
    logging.getLogger("dmc.kernels").warning("dmc: attention runs in PyTorch: numba cannot compile the loops (%s)", why)


@functools.cache
def _numba() -> bool:
    try:
        import numba  # noqa: F401
    except ImportError as error:  # not installed, or not made for the numpy that is
        if importlib.util.find_spec("numba") is None:
            return False
        logging.getLogger("dmc.kernels").warning("dmc: attention runs in PyTorch: numba cannot be imported (%s)", error)
        return False
    return True
