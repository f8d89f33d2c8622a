"""Policies that score tokens by hidden states: KVzap against loops in fp64 and against the states of transformers."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from dmc import LLM
from dmc.cache import KVCache, Policy, policy
from dmc.cache.codecs.int8 import Int8Codec
from dmc.cache.policies.streaming import StreamingPolicy
from dmc.engine import scoring
from dmc.model import read_config
from tests.cache.decisions import random_decisions, random_heads
from tests.cache.test_policies_prompt import BUDGET, COUNT, GROUP, PROMPT, cache_of, held_by, states
from tests.cache.test_rows import HEADS, LAYERS, SIZE, feed, tokens
from tests.model import tiny

BASE, WINDOW = Path(__file__).parents[2] / "checkpoints" / "base", 5


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    return random_heads(tmp_path_factory.mktemp("heads") / "heads.safetensors", LAYERS, HEADS, HEADS * SIZE)


@pytest.mark.parametrize("threshold", [None, -0.3])
@pytest.mark.parametrize("chunk", [PROMPT, 7])
def test_generated_tokens_see_what_the_scores_say(heads, threshold, chunk):
    """A query sees the newest tokens, and the older ones of the highest scores, or those above the threshold, of those that
    stayed so far."""
    layers = tokens(COUNT, seed=6)
    cache = cache_of(policy("kvzap", file=heads, budget=BUDGET, threshold=threshold, window=WINDOW))
    slot, outs = feed(cache, layers, PROMPT, chunk)
    file = {name: tensor.double() for name, tensor in load_file(heads).items()}
    for number, parts in enumerate(layers):
        query, key, value = states(parts)
        hidden = parts[1].flatten(1).double()  # what the test's model hands over
        scores = (hidden @ file["weight"][number].T + file["bias"][number]).T
        for head in range(HEADS):
            stay = set(range(PROMPT - 1))
            for i in range(PROMPT, COUNT + 1):
                older = {n for n in stay if n <= i - WINDOW}
                if threshold is None:
                    best = sorted(older, key=lambda n: scores[head, n])[max(0, len(older) - (BUDGET - WINDOW)) :]  # noqa: B023
                else:
                    best = [n for n in older if scores[head, n] >= threshold]
                stay = set(best) | (stay - older) | {i - 1}
                if i == COUNT:
                    break
                seen = torch.tensor(sorted(stay | {i}))
                for which in range(head * GROUP, (head + 1) * GROUP):
                    weights = (key[head, seen] @ query[which, i] / math.sqrt(SIZE)).softmax(-1)
                    torch.testing.assert_close(outs[number][i, which].double(), weights @ value[head, seen], rtol=1e-4, atol=1e-5)
            assert cache.entries(slot)[number, head] == len(stay) < COUNT
    cache.close(slot)
    assert cache.rows.pool.used == 0


def test_hidden_states_are_the_inputs_of_the_projections(tmp_path):
    """The prompt of a real model keeps the tokens that transformers' states, scored in fp64, say."""
    theirs = LlamaForCausalLM.from_pretrained(BASE, dtype=torch.float64)
    config, inputs = theirs.config, []
    for layer in theirs.model.layers:
        layer.input_layernorm.register_forward_hook(lambda module, given, out: inputs.append(out[0]))
    prompt = torch.randperm(2000, generator=torch.Generator().manual_seed(1))[:60].tolist()  # no two scores are equal
    with torch.no_grad():
        theirs(torch.tensor([prompt]))
    file = random_heads(tmp_path / "heads", config.num_hidden_layers, config.num_key_value_heads, config.hidden_size)
    llm = LLM(BASE, policy="kvzap", policy_settings={"file": file, "budget": 20, "window": 4}, device="cpu", dtype="fp64")
    made = scoring.prefill(llm.engine.runner, prompt, 17)
    content = {name: tensor.double() for name, tensor in load_file(file).items()}
    for number, hidden in enumerate(inputs):
        scores = hidden @ content["weight"][number].T + content["bias"][number]
        chosen = [{57, 58, 59, *scores[:57, head].topk(16).indices.tolist()} for head in range(scores.shape[1])]
        assert held_by(llm.cache, made, number) == chosen  # 19, and the next query


def test_only_a_policy_that_asks_gets_hidden_states(monkeypatch, tmp_path):
    seen = []
    step = KVCache.step
    monkeypatch.setattr(KVCache, "step", lambda *given, **named: seen.append(step(*given, **named)) or seen[-1])
    for kind, asks in (("h2o", False), ("knorm", False), ("kvzap", True)):
        fields = tiny.config()
        directory = tiny.write(tmp_path / kind, fields, tiny.weights(fields))
        settings = {"file": random_heads(tmp_path / "heads", tiny.LAYERS, 2, tiny.HIDDEN)} if asks else {}
        LLM(directory, policy=kind, policy_settings=settings, device="cpu").score([[5, 6, 7]])
        assert seen and {one.reads_hidden for one in seen} == {asks}
        seen.clear()


def test_it_reads_fitted_decisions_without_a_look_ahead(tmp_path):
    for ahead in (False, True):
        random_decisions(ahead=ahead, hidden=HEADS * SIZE).save(tmp_path / f"{ahead}.safetensors")
    made = policy("kvzap", file=str(tmp_path / "False.safetensors"))
    assert torch.equal(made.weight, random_decisions(ahead=False, hidden=HEADS * SIZE).arrival)
    with pytest.raises(ValueError, match=r"needs weight \[L, H, hidden\], bias \[L, H\] and no look-ahead"):
        policy("kvzap", file=str(tmp_path / "True.safetensors"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(file="/no/such"), "/no/such does not hold the tensors weight and bias"),
        (dict(file="WRONG"), "does not hold the tensors weight and bias"),
        (dict(window=1), "window=1 must be a whole number"),
        (dict(budget=20), "budget=20 must be at least the window of 32"),
        (dict(threshold="low"), "threshold=low must be a finite number"),
        (dict(threshold=math.nan), "threshold=nan must be a finite number"),
        (dict(threshold=[1]), "must be a finite number"),
        (dict(threshold=1, share=0.25), "threshold=1 and share=0.25 are two budgets"),
        (dict(file=3), "file=3 must be the path"),
        (dict(file="NAN"), "has weights that are not finite"),
    ],
)
def test_bad_settings_are_one_sentence(heads, tmp_path, settings, said):
    save_file({"weights": torch.zeros(2)}, tmp_path / "wrong")
    if settings.get("file") == "NAN":
        save_file({"weight": torch.full((2, 2, 16), math.nan), "bias": torch.zeros(2, 2)}, tmp_path / "nan")
        settings = {"file": str(tmp_path / "nan")}
    if settings.get("file") == "WRONG":
        settings = {"file": str(tmp_path / "wrong")}
    with pytest.raises(ValueError, match=said):
        policy("kvzap", **{"file": heads} | settings)


def test_decisions_that_were_fitted_for_another_model_or_damaged(tmp_path):
    path, config = tmp_path / "decisions", read_config(BASE)
    heads, hidden = config.num_key_value_heads, config.hidden_size
    fitted = random_decisions(layers=config.num_hidden_layers, heads=heads, hidden=hidden, ahead=False)
    fitted.save(path)
    with pytest.raises(ValueError, match="the kvzap policy's file was made for the model with hash none, and"):
        LLM(BASE, policy="kvzap", policy_settings={"file": str(path)}, device="cpu")
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: its content does not match its digest"):
        policy("kvzap", file=str(path))


def test_a_file_of_another_model(heads):
    with pytest.raises(ValueError, match=r"is for \(2, 2, 16\) layers, heads and hidden size, not \(6, 2, 192\)"):
        LLM(BASE, policy="kvzap", policy_settings={"file": heads}, device="cpu")


def test_two_kinds_of_scores_are_rejected_when_a_class_is_made():
    body = {"merges": False, "arrival": lambda self, k, v, p: k, "arrival_hidden": lambda self, layer, hidden: hidden}
    with pytest.raises(TypeError, match="defines arrival and arrival_hidden: an entry has one score"):
        type("Odd", (Policy,), body)


def test_names_of_version_0_1_are_rejected():
    old = type("Old", (StreamingPolicy,), {"watches": "sum"})
    with pytest.raises(ValueError, match="Old sets watches, which is called statistics now: rename it"):
        cache_of(old())
    placed = type("Placed", (Int8Codec,), {"placed": True})
    with pytest.raises(ValueError, match="Placed sets placed, which is called needs_positions now"):
        LLM(BASE, codec=placed(), device="cpu")
