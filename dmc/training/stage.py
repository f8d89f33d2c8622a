"""A chunk of the model on one rank and, while distilling, the teacher's chunk of the same layers next to it.

Through a pipeline the teacher's hidden states travel with the student's: a stage receives and sends both,
side by side along the batch, so that the last stage has the logits of both. The teacher's half carries no
gradient.
"""

from __future__ import annotations

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from dmc.training.state import LayerState


class Stage(GPTModel):
    """megatron's GPTModel with a teacher (`attach_teacher`) that takes no part in its weights or state dict."""

    def __init__(self, *args: object, state: LayerState, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.state = state
        self._teacher: tuple[Stage, ...] = ()  # in a tuple: a plain attribute would register it as a submodule
        self._received: tuple[Tensor | None, Tensor | None] = (None, None)

    def attach_teacher(self, teacher: Stage) -> None:
        """Distil from ``teacher``; the stage itself stands for the uncompressed model that it is without decisions."""
        self._teacher = (teacher,)

    @property
    def distils(self) -> bool:
        """Whether this pass runs the teacher: in training, where there is one."""
        return bool(self._teacher) and self.training

    def set_input_tensor(self, input_tensor: list[Tensor | None] | Tensor | None) -> None:
        """What the stage before sent ``[T, B, hidden]``; student and teacher ``[T, 2 B, hidden]`` while distilling."""
        tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        self._received = (tensor, None)
        if tensor is not None and self.distils:
            student, teacher = tensor.chunk(2, dim=1)
            self._received = (student.contiguous(), teacher.detach().contiguous())
        self.decoder.set_input_tensor(self._received[0])

    @torch.no_grad()
    def run_teacher(self, tokens: Tensor, positions: Tensor, rows: Tensor) -> Tensor | None:
        """The teacher's hidden states or, on the last stage, logits; None in a pass that does not distil."""
        if not self.distils:
            return None
        (teacher,) = self._teacher
        if teacher is not self:
            teacher.set_input_tensor(self._received[1])
            return teacher(tokens, positions, rows)
        # Frozen weights: without decisions and low-rank updates it is the original model.
        mode, self.state.mode, self.state.adapted = self.state.mode, "plain", False
        self.decoder.set_input_tensor(self._received[1])
        try:
            return self(tokens, positions, rows)
        finally:
            self.state.mode, self.state.adapted = mode, True
            self.decoder.set_input_tensor(self._received[0])
