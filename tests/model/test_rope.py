"""Rotary tables, limits and refusals, against transformers' own classes."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from dmc import LLM, SamplingParams
from dmc.families import read_shape
from dmc.functional import rotate
from dmc.model import read_config
from dmc.rope import Rope, settings_of
from dmc.training import decoder
from tests.model import tiny
from tests.model.ropes import CONTRADICTING, KINDS, LONGROPE, SCALED, YARN


def directory_of(path, decision=None, **changes):
    """A random model; ``changes`` of config.json's fields take the place of tiny's rotary settings."""
    fields = tiny.config(decision, **changes)
    if "rope_parameters" not in changes:
        del fields["rope_parameters"]
    return tiny.write(path, fields, tiny.weights(tiny.config(decision)))


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_tables_of_serving_and_training_are_those_of_transformers(changes, tmp_path):
    directory = directory_of(tmp_path, **changes)
    rotary = LlamaRotaryEmbedding(LlamaConfig.from_pretrained(directory))
    settings = read_config(directory).rope
    length = settings.positions
    expected = [table[0] for table in rotary(torch.zeros(1), torch.arange(length)[None])]
    for cos, sin in (
        Rope.of(settings, dtype=torch.float32, device="cpu")(torch.arange(length)),
        decoder.rope_tables(read_shape(directory), length),
    ):
        assert torch.equal(cos.cpu(), expected[0]) and torch.equal(sin.cpu(), expected[1])


@pytest.mark.parametrize("changes", CONTRADICTING.values(), ids=CONTRADICTING)
def test_two_forms_that_contradict_each_other_are_read_as_transformers_reads_them(changes, tmp_path):
    directory = directory_of(tmp_path, **changes)
    config = LlamaConfig.from_pretrained(directory)
    settings = read_config(directory).rope
    assert settings == settings_of(config) == read_shape(directory).rope
    tokens = torch.randint(3, tiny.VOCAB, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logs = LlamaForCausalLM.from_pretrained(directory)(tokens).logits[0, :-1].log_softmax(-1)
    score = LLM(directory, device="cpu", dtype="fp32").score(tokens.tolist(), prompt_tokens=20)[0]
    torch.testing.assert_close(score.logprobs, logs.gather(1, tokens[0, 1:, None])[:, 0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("changes", SCALED.values(), ids=SCALED)
def test_the_inverse_undoes_rotation_and_scaling(changes, tmp_path):
    rope = Rope.of(read_config(directory_of(tmp_path, **changes)).rope, dtype=torch.float32, device="cpu")
    assert rope.scaling > 1.1
    x, places = torch.randn(30, 8, generator=torch.Generator().manual_seed(0)), torch.arange(30)
    torch.testing.assert_close(rotate(rotate(x, rope(places)), rope.inverse(places)), x, rtol=0, atol=1e-5)


PARTIAL = {"partial_rotary_factor": 0.5}


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        ({"rope_type": "spiral"}, "rope_type 'spiral': known are default, dynamic, "),
        ({"rope_type": "axial"}, "rope_type 'axial': known are default, "),
        ({"rope_type": "yarn"}, "'factor'"),
        ({"rope_type": "longrope", "short_factor": [1.0]}, "'long_factor'"),
        ({"rope_type": "linear", "factor": 2.0, **PARTIAL}, "rotates 4 of the 8 dimensions"),
        (YARN | PARTIAL, "rotates 4 of the 8 dimensions"),
        (LONGROPE | {"short_factor": [1.0, 2.0], "long_factor": [1.0, 2.0]}, "transformers cannot compute rope_type 'longrope'"),
        ({"rope_type": "linear", "factor": 0}, "not finite"),
        ({"rope_type": "linear", "factor": "four"}, "rope_type 'linear'"),
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": "big"}, "rope_type 'dynamic'"),
    ],
)
def test_what_transformers_llama_cannot_run_is_refused_by_serving_and_training(rope, said, tmp_path):
    directory = directory_of(tmp_path, rope_parameters=rope)
    for read in (read_config, read_shape):
        with pytest.raises(ValueError) as caught:
            read(directory)
        message = str(caught.value)
        assert said in message and "\n" not in message and str(directory / "config.json") in message


@pytest.mark.parametrize(("kind", "limit"), [("dynamic", 64), ("longrope", 48)])
def test_lengths_at_which_the_frequencies_change_are_refused(kind, limit, tmp_path):
    directory = directory_of(tmp_path, **KINDS[kind])
    llm = LLM(directory, device="cpu")
    settings = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    prompt = list(range(3, 3 + limit - 8))
    assert len(llm.generate([prompt], settings)[0].token_ids) == 8
    with pytest.raises(ValueError, match=f"{limit} positions of the model .rope_type '{kind}' gives all tokens of a longer"):
        llm.generate([[*prompt, 5]], settings)
    with pytest.raises(ValueError, match=f"{limit} positions .rope_type '{kind}'"):
        llm.score([list(range(3, 4 + limit))])
    hf = read_shape(directory)
    decoder.rope_tables(hf, limit)
    with pytest.raises(ValueError, match=f"data.sequence_length {limit + 1} exceeds the {limit} positions .*'{kind}'"):
        decoder.rope_tables(hf, limit + 1)
    with pytest.raises(ValueError, match=f"these hold for {limit} positions"):
        llm.model.rope(torch.tensor([limit]))


@pytest.mark.parametrize("changes", SCALED.values(), ids=SCALED)
@pytest.mark.parametrize("decision", ["neuron", "head"])
def test_merged_keys_are_scaled_once(changes, decision, tmp_path):
    """The engine over its cache against the exported model code, both merging, with an attention factor above 1."""
    from checkpoints.hf_model.modeling_dmc_llama import DmcLlamaForCausalLM

    directory = directory_of(tmp_path, decision, **changes)
    tokens = torch.randint(3, tiny.VOCAB, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = DmcLlamaForCausalLM.from_pretrained(directory)(tokens[:, :-1])
    expected = out.logits[0].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
    for prompt in (1, 20, 39):
        score = LLM(directory, device="cpu", dtype="fp32", page_size=4).score(tokens.tolist(), prompt_tokens=prompt)[0]
        torch.testing.assert_close(score.logprobs, expected, rtol=0, atol=1e-4)
        assert 1.2 < score.stats.cr < 3 and torch.equal(score.stats.entries, out.past_key_values.lengths()[:, 0])


def test_the_older_form_has_no_say_where_the_file_has_it_empty(tmp_path):
    """config.json of an exported plain Llama says its settings twice; both readings are one."""
    written = json.loads((directory_of(tmp_path, **KINDS["yarn"]) / "config.json").read_text())
    rope = dict(written["rope_parameters"])
    twice = written | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    (tmp_path / "twice").mkdir()
    (tmp_path / "twice" / "config.json").write_text(json.dumps(twice))
    assert read_config(tmp_path / "twice").rope == read_config(tmp_path).rope
