"""Continued pretraining on megatron-core: the only part of `dmc` that imports it.

Importing this package makes megatron-core usable on the machine at hand (`dmc.training.cpu`), so import it
before anything of ``megatron``.
"""

from dmc.training import cpu

cpu.install()
