"""The decisions that the pictures show are those that the model serves by."""

import pytest
import torch

from dmc.analysis.decisions import decisions
from dmc.model import Decoder
from tests.model import tiny


@pytest.mark.parametrize("decision", ["head", "neuron"])
def test_they_add_up_to_the_entries_of_algorithm_1(decision, tmp_path):
    fields = tiny.config(decision)
    tensors = tiny.weights(fields)
    tokens = torch.randint(tiny.VOCAB, (50,), generator=torch.Generator().manual_seed(0))
    made = decisions(Decoder.load(tiny.write(tmp_path, fields, tensors), dtype=torch.float32), tokens)
    assert made.shape == (tiny.LAYERS, 2, 50) and 0 < made.mean() < 1 and not made[..., 0].any()
    _, lengths = tiny.token_by_token(fields, tensors, tokens.tolist())
    assert torch.equal((1 - made).sum(-1).long(), lengths)
