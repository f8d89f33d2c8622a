"""Ranks that each hold some of the heads give what one process gives."""

import gc
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dmc import LLM, SamplingParams
from dmc.cli import main
from dmc.engine.ranks import RankFailed, Ranks
from dmc.evaluation.continuations import Request, follow
from dmc.evaluation.measure import measure
from dmc.evaluation.windows import Windows
from dmc.model import read_config
from dmc.model.fingerprint import model_hash
from dmc.model.group import Group
from dmc.model.sharded import ShardWeights
from dmc.weights import Weights
from tests.cache.decisions import random_decisions
from tests.distributed import everywhere
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
            llm.check_integrity()
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
def test_two_ranks_give_the_tokens_of_one(tmp_path, case):
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
    try:
        two.everywhere(everywhere.admit_all)
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
    finally:
        two.close()
    assert all(child.returncode == 0 for child in two.engine.ranks.children)


def test_ranks_share_the_memory_of_a_machine_and_have_pools_of_one_size(directory):
    """Each has the automatic size, the same everywhere: that of what the sequences of all slots can fill, here. Evaluation, too,
    gives what one process gives."""
    llm, one = (LLM(directory, device="cpu", page_size=8, kv_memory="auto", tensor_parallel=n) for n in (2, 1))
    try:
        pages, whole, half = llm.everywhere(everywhere.pools).unbind(1)
        assert pages.tolist() == [llm.cache.page_limit] * 2 and 2 * int(pages[0]) == one.cache.page_limit == llm.cache.pages
        assert all(0.4 < b / a < 0.6 for a, b in zip(whole, half, strict=True))
        assert_same(run(llm), run(one))
        tokens = torch.arange(60).view(2, 30) % 50 + 3
        ours, theirs = (measure(each, Windows(tokens, 9)) for each in (llm, one))
        assert ours.perplexity == pytest.approx(theirs.perplexity, rel=1e-4) and ours.held_end == theirs.held_end
        asked = [Request(tokens[0].tolist(), 6), Request([5], 3), Request(tokens[0].tolist(), [7, 8]), Request([5], [6])]
        for ours, theirs in zip(follow(llm, asked), follow(one, asked), strict=True):
            assert ours.tokens == theirs.tokens and ours.greedy == theirs.greedy
            torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=1e-4, rtol=0)
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
        ("model.embed_tokens.weight", (rows, 32), 0),
        (f"{name}q_proj.weight", (8, 32), 0),
        (f"{name}k_proj.bias", (8,), 0),
        (f"{name}o_proj.weight", (32, 8), 1),
        ("model.layers.0.mlp.down_proj.weight", (32, 12), 1),
    ):
        got = [part.get(tensor, shape) for part in parts]
        assert all(tuple(one.shape) == shape for one in got)
        full = whole(tensor)
        assert torch.equal(torch.cat(got, dim).narrow(dim, 0, full.shape[dim]), full)
    bias = [part.get(f"{name}o_proj.bias", (32,)) for part in parts]
    assert bias[0].any() and not any(other.any() for other in bias[1:])
    if decision == "head":
        rows = torch.stack([part.get(f"{name}decision.weight", (2, 32)) for part in parts])  # [rank, merge or weight, hidden]
        full = whole(f"{name}decision.weight")
        assert torch.equal(rows.transpose(0, 1).flatten(0, 1), full)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"tensor_parallel": 3}, "does not divide the model's 2 key/value heads"),
        ({"tensor_parallel": 0}, "at least 1"),
        ({"tensor_parallel": 2, "rank_timeout": 0}, "rank_timeout must be above 0"),
    ],
)
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
    monkeypatch.setattr("dmc.engine.launch._PROGRAM", "import sys; sys.exit(7)")
    with pytest.raises(ValueError, match="could not start: rank 1 has ended with exit code 7"):
        LLM(directory, device="cpu", tensor_parallel=2)


@pytest.mark.parametrize(
    "number, said", [(signal.SIGKILL, "rank 1 has ended by signal 9"), (signal.SIGSTOP, "rank 1 has not answered for 3 seconds")]
)
def test_a_rank_that_dies_or_hangs(directory, number, said):
    """While it generates: an error that names the rank, in bounded time, now and ever after; no process is left."""
    llm = LLM(directory, device="cpu", tensor_parallel=2, rank_timeout=3)
    (child,) = llm.engine.ranks.children
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
def test_a_rank_that_hangs_while_nothing_runs(directory):
    """Rank 0 waits no longer for it when it announces than in any other call."""
    llm = LLM(directory, device="cpu", tensor_parallel=2, rank_timeout=3)
    (child,) = llm.engine.ranks.children
    llm.check_ranks()
    child.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(RankFailed, match="rank 1 has not answered for 3 seconds"):
        llm.check_ranks()
    assert time.monotonic() - started < 20 and child.poll() is not None


@pytest.mark.slow
def test_under_torchrun(directory):
    """As many ranks as torchrun has started, with --tensor-parallel or without."""
    arguments = ["generate", str(directory), "--prompt", "abcabc", "--device", "cpu", "--temperature", "0", "--codec", "tcq"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def said(*start, more=()):
        done = subprocess.run(
            [sys.executable, *start, "dmc", *arguments, *more],
            capture_output=True,
            text=True,
            timeout=200,
            env=environment,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    one = said("-m")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    for more in ([], ["--tensor-parallel", "2"]):
        two = said(*torchrun, more=more)
        assert two.splitlines()[0] == one.splitlines()[0] and two.splitlines()[3] == one.splitlines()[3]
        assert len(two.splitlines()) == len(one.splitlines())  # rank 0 alone prints


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return write(tmp_path_factory.mktemp("wide"), "neuron", 4, {})


def test_random_schedules_are_the_same_on_all_ranks(directory):
    """Arrivals, aborts and preemptions at random, in a pool that is too small: after each step all ranks are where rank 0 is."""
    draw = random.Random(5)
    llm = LLM(directory, device="cpu", page_size=8, tensor_parallel=2, max_batch=4, prefill_tokens=24, kv_memory=20 * 512)
    try:
        llm.everywhere(everywhere.admit_all)
        alive, swapped = [], 0
        for _ in range(70):
            if draw.random() < 0.5 and len(alive) < 12:
                prompt = draw.choice(PROMPTS)[: draw.randint(1, 40)]
                params = SamplingParams(max_tokens=draw.randint(1, 40), temperature=0.8, n=draw.randint(1, 3))
                alive += llm.sequences(prompt, params)
                for sequence in alive[-params.n :]:
                    llm.engine.add(sequence)
            if draw.random() < 0.1 and alive:
                llm.engine.cancel(*draw.sample(alive, min(2, len(alive))))
            if draw.random() < 0.1:
                llm.everywhere(everywhere.preempt)
            llm.engine.step()
            swapped += len(llm.engine.scheduler.swapped)
            first, second = llm.everywhere(everywhere.states)
            assert torch.equal(first, second)
            alive = [sequence for sequence in alive if sequence.finish_reason is None]
        llm.check_integrity()
        assert swapped > 10 and llm.engine.preemptions > 3
        llm.engine.abort()
        assert llm.cache.used_pages == 0 and not llm.engine.busy
    finally:
        children = llm.engine.ranks.children
        del llm  # as good as close()
        gc.collect()
    assert [child.returncode for child in children] == [0]


def test_announcements_are_signed():
    """Of any length; what was not announced with the key is not run."""
    ranks = Ranks(dist.HashStore(), 0, 1, key=b"k" * 32, timeout=5.0)
    group = Group(dist.HashStore(), 0, 1, device=torch.device("cpu"), timeout=5.0)
    ranks.join(group)
    for length in (0, 1, 4087, 4088, 4089, 100_000):
        assert group.announce(message := bytes(range(251)) * (length // 251) + b"x" * (length % 251)) == message
    with pytest.raises(RuntimeError, match="not signed by rank 0"):
        ranks._announced()
    ranks.close()


def test_ranks_that_are_out_of_step_are_noticed(directory):
    llm = LLM(directory, device="cpu", tensor_parallel=2)
    with pytest.raises(RankFailed, match="rank 1 has another schedule than rank 0"):
        llm.everywhere(everywhere.diverge)
    assert [child.poll() is not None for child in llm.engine.ranks.children] == [True]


def test_errors_of_commands(directory):
    """A wrong argument changes nothing; a fault of a rank ends all, and is told; rank 0 alone calls no collectives."""
    llm = LLM(directory, device="cpu", tensor_parallel=2)
    expected = llm.generate("abc", EACH[0])[0].token_ids
    with pytest.raises(ValueError, match="no such word"):
        llm.everywhere(everywhere.refuse, "no such word" + " " * 9000)  # more than fits the first part of an announcement
    with pytest.raises(RuntimeError, match="run it by LLM.everywhere"):
        llm.cache.held(0)
    assert llm.generate("abc", EACH[0])[0].token_ids == expected
    with pytest.raises(RankFailed, match="rank 1 has failed: KeyError: 'of rank'"):
        llm.everywhere(everywhere.fail, 1)
    assert [child.poll() is not None for child in llm.engine.ranks.children] == [True]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command, said",
    [
        ((everywhere.signal_rank, 2, "SIGKILL"), "rank 2 has ended"),
        ((everywhere.fail, 3), "rank 3 has failed: KeyError"),
        ((everywhere.signal_rank, 2, "SIGSTOP"), "rank 2 has not answered for 4 seconds"),
        ((everywhere.late, 1), "rank 1 has not answered for 4 seconds"),
    ],
)
def test_the_one_of_four_ranks_is_named(wide, command, said):
    llm = LLM(wide, device="cpu", tensor_parallel=4, rank_timeout=4)
    started = time.monotonic()
    with pytest.raises(RankFailed, match=said):
        llm.everywhere(*command)
    assert time.monotonic() - started < 20
    assert all(child.poll() is not None for child in llm.engine.ranks.children)
