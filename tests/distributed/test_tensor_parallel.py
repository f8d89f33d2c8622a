"""Two processes that each hold half of the heads give what one process gives."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from dmc import LLM, SamplingParams
from dmc.cli import main
from dmc.engine.parallel_team import RankFailed
from dmc.engine.predict import Predictor
from dmc.model import Weights, read_config
from dmc.model.fingerprint import model_hash
from dmc.model.sharded import ShardWeights
from tests.cache.decisions import random_decisions
from tests.model import tiny

ROOT = Path(__file__).parents[2]
PROMPTS = ["abcdefghijklm" * 3, "tuv", "abcdefghijklm" * 3 + "xyz", "0123456789" * 3]
EACH = [
    SamplingParams(max_tokens=16, temperature=0, ignore_eos=True, logprobs=2),
    *(SamplingParams(max_tokens=16, seed=i, temperature=0.8, ignore_eos=True, n=i) for i in (1, 2)),
    SamplingParams(max_tokens=16, seed=3, top_p=0.9, repetition_penalty=1.2, ignore_eos=True),
]
CASES = {  # decision, key/value heads, fields of config.json, settings
    "gqa-neuron-tcq": ("neuron", 2, {"tie_word_embeddings": True}, {"codec": "tcq"}),
    "mha-head-biases": ("head", 4, {"attention_bias": True, "mlp_bias": True}, {"codec": "dense"}),
    "gqa-head-dms": ("head", 2, {"dmc": {"method": "dms", "window": 9, "decision": "head", "offset": 0.0}}, {}),
    "plain-h2o-int8": (None, 2, {}, {"policy": "h2o", "policy_settings": {"heavy": 10, "recent": 12}, "codec": "int8"}),
    "plain-gate": (None, 2, {}, {"policy": "gate", "target_cr": 2, "policy_settings": {"length": 60}}),
}


def write(path, decision, heads, changes):
    fields = tiny.config(decision, heads=heads, **changes)
    tensors = tiny.weights(fields)
    for i in range(fields["num_hidden_layers"]):
        parts = [f"self_attn.{part}_proj" for part in "qkvo" if fields.get("attention_bias")]
        for name in parts + [f"mlp.{part}_proj" for part in ("gate", "up", "down") if fields.get("mlp_bias")]:
            rows = len(tensors[f"model.layers.{i}.{name}.weight"])
            tensors[f"model.layers.{i}.{name}.bias"] = torch.linspace(-0.1, 0.1, rows)
    return tiny.write(path, fields, tensors)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write(tmp_path_factory.mktemp("model"), "neuron", 2, {})


def run(llm, prompts=PROMPTS, each=EACH, check=True):
    """Outputs, with the integrity of every rank's cache checked now and then."""
    sequences = [one for prompt, own in zip(prompts, each, strict=True) for one in llm.sequences(prompt, own)]
    for sequence in sequences:
        llm.engine.add(sequence)
    for number in itertools.count():
        if not llm.engine.busy:
            break
        llm.engine.step()
        if check and number % 4 == 0:
            llm.cache.check_integrity()
    assert llm.cache.used_pages == 0 and llm.cache.free_slots == llm.engine.max_batch + 4
    return [sequence.output() for sequence in sequences]


def assert_same(outputs, expected):
    for output, one in zip(outputs, expected, strict=True):
        assert output.token_ids == one.token_ids and output.text == one.text and output.finish_reason == one.finish_reason
        assert torch.equal(output.stats.entries, one.stats.entries) and output.stats.dense_bytes == one.stats.dense_bytes
        assert all(output.stats.held[part] == one.stats.held[part] for part in ("pages", "exact", "tail"))
        for ours, theirs in zip(output.logprobs or [], one.logprobs or [], strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)  # stored entries may round the other way


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_give_the_tokens_of_one(tmp_path, monkeypatch, case):
    """Greedy, seeded and n > 1 in one batch, prompts in chunks; then a pool so small that sequences are preempted."""
    decision, heads, changes, settings = CASES[case]
    directory = write(tmp_path / "model", decision, heads, changes)
    if case == "plain-gate":
        settings = settings | {"decisions": random_decisions(window=9, model=model_hash(directory))}
    one = LLM(directory, device="cpu", page_size=8, **settings)
    expected = run(one)
    page = one.cache.page_bytes
    most = max(sum(output.stats.held[part] for part in ("pages", "exact")) for output in expected) // page
    tight = {"kv_memory": (most // 2 + 4 * heads) * page, "prefill_tokens": 20}
    two = LLM(directory, device="cpu", page_size=8, tensor_parallel=2, **tight, **settings)
    monkeypatch.setattr(Predictor, "pages", lambda self, tokens: 1)  # everyone is admitted
    try:
        assert_same(run(two), expected)
        assert two.engine.preemptions > 0
        tokens = [list(range(3, 40)), list(range(20, 50))]
        for ours, theirs in zip(two.score(tokens, prompt_tokens=9), one.score(tokens, prompt_tokens=9), strict=True):
            torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=1e-4, rtol=0)
        assert two.cache.codec_error == pytest.approx(one.cache.codec_error, abs=0.05)
        (traced,) = two.sequences("abcabc", EACH[0])
        traced.trace = []
        two.engine.add(traced)
        while two.engine.busy:
            two.engine.step()
        (alone,) = one.sequences("abcabc", EACH[0])
        alone.trace = []
        one.engine.add(alone)
        while one.engine.busy:
            one.engine.step()
        assert torch.equal(torch.stack(traced.trace), torch.stack(alone.trace))
        assert not two._team.own._kept  # prompts and swapped sequences of the past are dropped everywhere
    finally:
        two.close()
    assert all(child.returncode == 0 for child in two._team._children)


def test_ranks_share_the_memory_of_a_machine_and_have_pools_of_one_size(directory):
    """Each has the automatic size, the same everywhere: that of what the sequences of all slots can fill, here."""
    llm, one = (LLM(directory, device="cpu", page_size=8, kv_memory="auto", tensor_parallel=n) for n in (2, 1))
    try:
        pages = [state.capacity for state in llm._team.states]
        assert pages == [llm.cache.page_limit] * 2 and 2 * pages[0] == one.cache.page_limit
        whole = [reply.value for reply in llm._team.call("automatic", 1)]
        half = [reply.value for reply in llm._team.call("automatic", 2)]
        assert all(0.4 < b / a < 0.6 for a, b in zip(whole, half, strict=True))
        assert_same(run(llm), run(one))
    finally:
        llm.close()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_embedded_model(tmp_path, ranks):
    directory = ROOT / "checkpoints/base" if ranks == 2 else write(tmp_path / "model", "neuron", 4, {})
    prompts = ["def read(path):\n    ", "0123"] if ranks == 2 else PROMPTS[:2]
    expected = run(LLM(directory, device="cpu", codec="tcq"), prompts, EACH[:2], check=False)
    llm = LLM(directory, device="cpu", codec="tcq", tensor_parallel=ranks)
    assert_same(run(llm, prompts, EACH[:2], check=False), expected)
    llm.close()


@pytest.mark.parametrize("decision", ["neuron", "head"])
def test_parts_make_up_the_whole(tmp_path, decision):
    """Each tensor of the ranks, put together, is the file's; and a rank reads no more than its part."""
    directory = write(tmp_path, decision, 4, {"attention_bias": True, "vocab_size": 97})
    whole, config, ranks = Weights(directory), read_config(directory), 4
    parts = [ShardWeights(whole, rank, ranks, config.vocab_size) for rank in range(ranks)]
    rows = -(-97 // ranks)
    name = "model.layers.1.self_attn."
    for tensor, shape, dim in (
        ("model.embed_tokens.weight", (rows, 32), 0), (f"{name}q_proj.weight", (8, 32), 0), (f"{name}k_proj.bias", (8,), 0),
        (f"{name}o_proj.weight", (32, 8), 1), ("model.layers.0.mlp.down_proj.weight", (32, 12), 1),
    ):
        got = [part.get(tensor, shape) for part in parts]
        assert all(tuple(one.shape) == shape for one in got)
        full = whole._files[tensor].get_tensor(tensor)
        assert torch.equal(torch.cat(got, dim).narrow(dim, 0, full.shape[dim]), full)
    bias = [part.get(f"{name}o_proj.bias", (32,)) for part in parts]
    assert bias[0].any() and not any(other.any() for other in bias[1:])
    if decision == "head":
        rows = torch.stack([part.get(f"{name}decision.weight", (2, 32)) for part in parts])  # [rank, merge or weight, hidden]
        full = whole._files[f"{name}decision.weight"].get_tensor(f"{name}decision.weight")
        assert torch.equal(rows.transpose(0, 1).flatten(0, 1), full)


@pytest.mark.parametrize("settings, said", [
    ({"tensor_parallel": 3}, "does not divide the model's 2 key/value heads"), ({"tensor_parallel": 0}, "at least 1"),
    ({"tensor_parallel": 2, "rank_timeout": 0}, "rank_timeout must be above 0"),
])
def test_what_cannot_be_cut_is_refused(directory, settings, said):
    with pytest.raises(ValueError, match=said):
        LLM(directory, device="cpu", **settings)


def test_a_policy_of_all_heads_is_refused(directory):
    with pytest.raises(ValueError, match="the tova policy decides over all heads of a layer together.*one of: full, dmc"):
        LLM(directory, device="cpu", policy="tova", tensor_parallel=2)


def test_torchrun_of_another_size_is_refused(directory, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main(["generate", str(directory), "--prompt", "a", "--device", "cpu", "--tensor-parallel", "2"]) == 2
    assert "torchrun has started 3 processes, but tensor_parallel is 2" in capsys.readouterr().err


def test_a_rank_that_cannot_start(directory, tmp_path, monkeypatch):
    monkeypatch.setattr("dmc.engine.parallel._PROGRAM", "import sys; sys.exit(7)")
    with pytest.raises(ValueError, match="could not start: rank 1 has ended with exit code 7"):
        LLM(directory, device="cpu", tensor_parallel=2)


# Whether a stopped rank is missed in a collective or when its answer is due depends on where the signal met it.
STOPPED = "Timed out|rank 1 has not answered for 3 seconds"


@pytest.mark.parametrize("number, said", [(signal.SIGKILL, "rank 1 has ended by signal 9"), (signal.SIGSTOP, STOPPED)])
def test_a_rank_that_dies_or_hangs(directory, number, said):
    """While it generates: an error that names the rank, in bounded time, now and ever after; no process is left."""
    llm = LLM(directory, device="cpu", tensor_parallel=2, rank_timeout=3)
    (child,) = llm._team._children
    threading.Timer(0.5, child.send_signal, [number]).start()
    started = time.monotonic()
    with pytest.raises(RankFailed, match=said):
        while time.monotonic() < started + 60:
            llm.generate("abc", SamplingParams(max_tokens=200, ignore_eos=True))
    assert time.monotonic() - started < 30
    with pytest.raises(RankFailed, match=said):
        llm.generate("abc")
    assert child.poll() is not None


@pytest.mark.slow
def test_under_torchrun(directory):
    arguments = ["generate", str(directory), "--prompt", "abcabc", "--device", "cpu", "--temperature", "0", "--codec", "tcq"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def said(*start, more=()):
        done = subprocess.run([sys.executable, *start, "dmc.cli", *arguments, *more], capture_output=True, text=True, timeout=200,
                              env=environment, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return done.stdout

    one = said("-m")
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "-m"]
    two = said(*torchrun, more=["--tensor-parallel", "2"])
    assert two.splitlines()[0] == one.splitlines()[0] and two.splitlines()[3] == one.splitlines()[3]
