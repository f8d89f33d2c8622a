"""megatron-core's distributed optimizer, with three faults fixed that show with torch's AdamW (no apex, no TE).

Found on megatron-core 0.16.1 and 0.19.2, where neither transformer-engine nor apex brings a fused Adam:

1. a checkpoint loaded before the first step finds no optimizer state to fill;
2. the loader of a fully reshardable checkpoint asks each parameter's tensors for a ``step`` that it does not hold;
3. after a load all parameters share one ``step`` tensor, which every parameter's update then advances: Adam's
   bias correction runs away without an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

# Loads under any layout. Its price: while saving, data-parallel rank 0 of each model-parallel rank holds the whole state.
METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


class ShardedOptimizer(DistributedOptimizer):
    """`DistributedOptimizer` whose checkpoints are right with ``torch.optim.AdamW``."""

    def sharded_state_dict(self, model: dict, is_loading: bool = False, *args: object, **kwargs: object) -> dict:
        """The sharded state, as megatron's; before a load there is a state to fill."""
        if is_loading:
            self._allocate()
        return super().sharded_state_dict(model, is_loading, *args, **kwargs)

    def load_state_dict(self, state_dict: dict) -> None:
        """Loads as megatron's; every parameter gets its own ``step``."""
        super().load_state_dict(state_dict)
        for state in self.optimizer.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].clone()

    def _set_main_param_and_optimizer_states(self, model_param: Tensor, tensors: dict) -> None:
        group, order = self.model_param_group_index_map[model_param]
        if not _is_torch_adam(self.optimizer):
            super()._set_main_param_and_optimizer_states(model_param, tensors)
            return
        main = self.optimizer.param_groups[group]["params"][order]
        main.detach().copy_(tensors["param"])
        for key, held in self.optimizer.state[main].items():
            if key != "step":  # one number for all, restored with the parameter groups
                held.copy_(tensors[key])

    def _allocate(self) -> None:
        if not _is_torch_adam(self.optimizer):
            return
        self.init_state_fn(self.optimizer, self.config)
        for state in self.optimizer.state.values():
            state.setdefault("step", torch.tensor(0.0))


def _is_torch_adam(optimizer: torch.optim.Optimizer) -> bool:
    return isinstance(optimizer, torch.optim.Adam)  # AdamW is a kind of it


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """While megatron builds optimizers, its factory takes `ShardedOptimizer`."""
    before = megatron_optimizer.DistributedOptimizer
    megatron_optimizer.DistributedOptimizer = ShardedOptimizer
    try:
        yield
    finally:
        megatron_optimizer.DistributedOptimizer = before
