"""The worked example of docs/families.md: a family of one file is read, trained, exported and served."""

import json
import re
import sys
import types

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from checkpoints import convert
from checkpoints.export_hf import export
from dmc import LLM
from dmc.families import read, read_shape
from dmc.training import decoder, setup
from dmc.training.config import ParallelConfig
from dmc.training.state import LayerState, Settings
from dmc.weights import Weights
from tests.families.models import SIZES
from tests.training.helpers import ROOT, TOKENIZER
from tests.training.models import logits
from tests.training.models import weights as parameters


class AcmeConfig(Qwen3Config):
    model_type = "acme"


class AcmeForCausalLM(Qwen3ForCausalLM):
    """Qwen3 with Qwen2's biases."""

    config_class = AcmeConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            for name in ("q_proj", "k_proj", "v_proj"):
                old = getattr(layer.self_attn, name)
                setattr(layer.self_attn, name, torch.nn.Linear(old.in_features, old.out_features, bias=True))


@pytest.fixture
def acme(monkeypatch):
    """The file of the page as a module of the folder, and the classes as transformers' own."""
    text = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "families.md").read_text(), re.S)[1]
    module = types.ModuleType("dmc.families.acme")
    exec(text, module.__dict__)
    known = read.families() | {"acme": module.FAMILY}
    monkeypatch.setattr(read, "families", lambda: known)
    transformers = sys.modules["transformers"]
    monkeypatch.setattr(transformers, "AcmeConfig", AcmeConfig, raising=False)
    monkeypatch.setattr(transformers, "AcmeForCausalLM", AcmeForCausalLM, raising=False)
    return module.FAMILY


def test_the_page(process_group, acme, tmp_path):
    assert (acme.title, acme.qkv_bias, acme.qk_norm) == ("Acme", True, True)
    torch.manual_seed(0)
    whole = AcmeForCausalLM(AcmeConfig(**SIZES | {"head_dim": 16})).eval()
    whole.save_pretrained(tmp_path / "in")
    assert json.loads((tmp_path / "in" / "config.json").read_text())["model_type"] == "acme"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "in" / name).write_bytes((TOKENIZER / name).read_bytes())
    tokens = torch.randint(3, 2048, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = whole(tokens).logits
    chosen = expected[0].log_softmax(-1)[:-1].gather(1, tokens[0, 1:, None])[:, 0]
    score = LLM(tmp_path / "in", device="cpu", dtype="fp32").score(tokens.tolist(), prompt_tokens=10)[0]
    torch.testing.assert_close(score.logprobs, chosen, rtol=0, atol=1e-4)

    shape = read_shape(tmp_path / "in")
    model = decoder.build(
        shape, ParallelConfig(), LayerState(Settings("head", 3.0, 0.5), mode="plain"), sequence_length=64, dtype=torch.float32
    )[0].eval()
    setup.load_weights(model, convert.loader(shape, Weights(tmp_path / "in")))
    assert (logits(model, tokens) - expected).abs().max() < 1e-4

    out = export(
        convert.to_hf(shape, parameters(model)),
        shape.fields,
        out=tmp_path / "out",
        decision="head",
        gain=3.0,
        offset=0.5,
        target_cr=2,
        measured_cr=2,
        tokenizer_dir=TOKENIZER,
        card={},
        dtype=torch.float32,
    )
    assert "from transformers import AcmeConfig" in (out / "configuration_dmc_acme.py").read_text()
    exported = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():  # fresh decision heads say 0: nothing merges
        assert (exported(tokens).logits - expected).abs().max() < 1e-4
