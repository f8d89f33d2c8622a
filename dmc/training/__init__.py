"""Continued pretraining on megatron-core: the only part of `dmc` that imports it.

Importing this package makes megatron-core usable on the machine at hand (`dmc.training.cpu`), so import it
before anything of ``megatron``.
"""

import warnings

import torch

from dmc.training import cpu

# megatron-core says once a module that the optional packages are missing; `kernels_in_use` says it once a run.
for _message in (
    ".*Transformer Engine.*",
    ".*Apex.*",
    ".*model_parallel_group. deprecated.*",
    ".*load_state_dict.*deprecated.*",
    ".*will be deprecated.*",
    "full scope is deprecated.*",  # of CUDA graphs, which are off
    "`torch.distributed.*is deprecated.*",
):
    warnings.filterwarnings("ignore", message=_message)
if not torch.cuda.is_available():
    warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS.*")

cpu.install()
