"""Low-rank updates of a frozen model (LoRA, arXiv 2106.09685) on megatron-core's parallel linear layers.

A linear layer W gives W x + scale * B (A x), with A [rank, inputs] and B [outputs, rank]; W is frozen, B starts at 0. The
factors are cut as the layer is: where its outputs are cut (q, k, v; gate and up) B is, where its inputs are (output
projection; down) A is, and the other factor every tensor-parallel rank holds whole. The frozen model itself is the teacher
of a distillation: with the updates left out it is the original one.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from dmc.training import cpu
from dmc.training.stage import Stage
from dmc.training.state import LayerState

# module within a layer: (its linear layer, the name of its update, whether its outputs are cut, tensors that it fuses)
TARGETS = (
    ("self_attention", "linear_qkv", "lora_qkv", True, 1),
    ("self_attention", "linear_proj", "lora_proj", False, 1),
    ("mlp", "linear_fc1", "lora_fc1", True, 2),
    ("mlp", "linear_fc2", "lora_fc2", False, 1),
)


class LowRank(nn.Module):
    """The update of one linear layer.

    Args:
        config: of the layer; its tensor and sequence parallelism are followed.
        inputs, outputs: sizes of the whole layer.
        rank: of the update.
        scale: of the update.
        outputs_cut: whether tensor parallelism cuts the layer's outputs, else its inputs.
        parts: tensors that the layer fuses, each of which is cut separately (gate and up: 2).
        start: A of the whole layer, ``[rank, inputs]``.
        group: of the tensor-parallel ranks.

    Attributes:
        a: ``[rank, inputs of this rank]``.
        b: ``[parts, outputs / parts of this rank, rank]``.
    """

    def __init__(
        self,
        config: TransformerConfig,
        inputs: int,
        outputs: int,
        *,
        rank: int,
        scale: float,
        outputs_cut: bool,
        parts: int,
        start: Tensor,
        group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__()
        self.scale, self.outputs_cut, self.group, self.sequence = scale, outputs_cut, group, config.sequence_parallel
        ranks, own = group.size(), group.rank()
        a = start if outputs_cut else start.chunk(ranks, dim=1)[own]
        made = {"dtype": config.params_dtype, "device": cpu.device()}
        self.a = nn.Parameter(a.to(**made).contiguous())
        self.b = nn.Parameter(torch.zeros(parts, outputs // parts // (ranks if outputs_cut else 1), rank, **made))
        cut, whole, dim = (self.b, self.a, 1) if outputs_cut else (self.a, self.b, 1)
        set_tensor_model_parallel_attributes(cut, True, dim, 1)
        whole.sequence_parallel = config.sequence_parallel  # its gradient is then a part, of this rank's positions

    def forward(self, x: Tensor) -> Tensor:
        """Input of the linear layer → what is added to its output, in the layer's own parallel form."""
        low = F.linear(x, self.a)
        if self.outputs_cut and self.sequence:
            low = mappings.gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True, group=self.group)
        elif self.outputs_cut:
            low = mappings.copy_to_tensor_model_parallel_region(low, group=self.group)
        elif self.sequence:
            low = mappings.reduce_scatter_to_sequence_parallel_region(low, group=self.group)
        else:
            low = mappings.reduce_from_tensor_model_parallel_region(low, group=self.group)
        return self.scale * F.linear(low, self.b.flatten(0, 1))

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The sharded state, for checkpoints that load under any layout."""
        axes = {"b": 1} if self.outputs_cut else {"a": 1}
        return make_sharded_tensors_for_checkpoint(self.state_dict(keep_vars=True), prefix, axes, sharded_offsets)


def install(chunk: Stage, state: LayerState, *, rank: int, alpha: float, mlp: bool, seed: int) -> None:
    """Give the linear layers of a chunk updates of rank ``rank``, scaled by ``alpha / rank``, which start at 0.

    Args:
        chunk: of the model, with its weights.
        state: of its layers: the updates are left out while `LayerState.adapted` is False.
        mlp: whether those of the MLP get updates too, in addition to attention's.
        seed: of A, which is the same under every layout.
    """
    for layer in chunk.decoder.layers:
        for index, (owner, name, update, outputs_cut, parts) in enumerate(TARGETS):
            if owner == "mlp" and not mlp:
                continue
            module = getattr(layer, owner)
            linear, group = getattr(module, name), layer.self_attention.tp_group
            cut = group.size()
            outputs, inputs = linear.weight.shape
            inputs, outputs = (inputs, outputs * cut) if outputs_cut else (inputs * cut, outputs)
            generator = torch.Generator().manual_seed((seed * 100_003 + layer.layer_number) * len(TARGETS) + index)
            start = (2 * torch.rand(rank, inputs, generator=generator) - 1) / math.sqrt(inputs)  # as in peft
            made = LowRank(
                chunk.config,
                inputs,
                outputs,
                rank=rank,
                scale=alpha / rank,
                outputs_cut=outputs_cut,
                parts=parts,
                start=start,
                group=group,
            )
            module.add_module(update, made)
            linear.register_forward_hook(_adding(made, state))


def _adding(update: LowRank, state: LayerState):  # noqa: ANN202
    """A forward hook of a linear layer, which returns (output, bias)."""

    def hook(_: nn.Module, inputs: tuple, output: tuple) -> tuple | None:
        return (output[0] + update(inputs[0]), *output[1:]) if state.adapted else None

    return hook
