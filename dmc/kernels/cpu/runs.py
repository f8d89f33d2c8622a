"""Decides if the CPU kernels replace PyTorch (`cpu.py` and `loop.py` of each operation)."""

from __future__ import annotations

import torch
from torch import Tensor

from dmc.kernels.backend import Backend, choose, chosen_name


def runs_on_cpu(like: Tensor, *dtypes: torch.dtype) -> bool:
    """True if the CPU kernels run on tensors like this: on a CPU, with numba installed and no other backend set.

    Args:
        like: a tensor of the computation.
        dtypes: that the kernels support in addition to fp32.
    """
    dtypes = torch.float32, *dtypes
    asked = like.device.type == "cpu" and like.dtype in dtypes and chosen_name() in ("auto", Backend.CPU)
    return asked and choose(like, cpu=dtypes) is Backend.CPU
