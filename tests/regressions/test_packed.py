"""Batches of packed documents that other projects mixed, on the exported model code."""

import pytest
import torch

from tests.checkpoints.test_hf_dms import made
from tests.checkpoints.test_hf_rope import text


# https://github.com/huggingface/transformers/pull/46634: documents packed by position_ids saw each other where an attention mask
# of ones was passed along.
@pytest.mark.parametrize("method", ["dmc", "dms"])
@torch.no_grad()
def test_a_mask_of_ones_does_not_unpack_documents(method):
    model, parts = made(method=method, window=4 if method == "dms" else 0), [text(1, 12, 1), text(1, 17, 2)]
    ids = torch.cat(parts, 1)
    positions = torch.cat([torch.arange(12), torch.arange(17)])[None]
    alone = torch.cat([model(part).logits for part in parts], 1)
    got = model(ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(got, alone, rtol=0, atol=1e-5)
