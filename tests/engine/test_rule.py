"""What a query sees is a rule of positions alone: alone = batched = chunked = preempted = shared, for every pair."""

import pytest

from dmc import LLM, SamplingParams
from dmc.cache import CODECS, POLICIES
from dmc.engine.predict import Predictor
from dmc.model.fingerprint import model_hash
from tests.cache.decisions import random_decisions, random_heads
from tests.cache.stored import needed
from tests.model import tiny

PROMPTS = ["abcdefghijklm" * 4, "tuv", "abcdefghijklm" * 4 + "xyz", "0123456789" * 3, "abcdefghijklm" * 4]
PARTS = ("kivi", "rotated", "svd", "gear-4bit", "gear-2bit", "tcq-4bit", "tcq-3bit", "tcq-2bit")  # of the paths of others
PAIRS = [  # scores are gathered from exact and from encoded pages alike: two codecs show it, the others are slow
    pytest.param(
        policy,
        codec,
        marks=[pytest.mark.slow]
        * (
            (policy not in ("full", "dmc", "streaming") and codec not in ("dense", "tcq"))
            or (codec in PARTS and policy != "dmc")
            or (policy in ("pyramidkv", "adakv", "random", "kvzap") and codec != "dense")
        ),
    )
    for policy in POLICIES
    for codec in CODECS
]
PAIRS += [pytest.param("late", codec, marks=[pytest.mark.slow] * (codec not in ("dense", "tcq"))) for codec in CODECS]
PAIRS += [pytest.param("gate-merge", codec, marks=[pytest.mark.slow] * (codec != "dense")) for codec in CODECS]
SETTINGS = {"streaming": {"sinks": 3, "recent": 30}, "h2o": {"heavy": 16, "recent": 17}, "tova": {"budget": 33}}
SETTINGS |= {name: {"budget": 24, "window": 8} for name in ("snapkv", "pyramidkv", "adakv")}
SETTINGS |= {name: {"budget": 24} for name in ("expected", "knorm", "random")} | {"merged": {"budget": 24, "of": "expected"}}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    fields = tiny.config("neuron")
    return tiny.write(tmp_path_factory.mktemp("model"), fields, tiny.weights(fields))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A model without decisions of its own, which policy gate asks for."""
    fields = tiny.config()
    return tiny.write(tmp_path_factory.mktemp("plain"), fields, tiny.weights(fields))


@pytest.fixture(scope="module")
def marking(tmp_path_factory):
    """A model that marks tokens for eviction, which policy dms asks for."""
    fields = tiny.config("head", dmc={"method": "dms", "window": 20, "decision": "head", "offset": 0.0})
    return tiny.write(tmp_path_factory.mktemp("marking"), fields, tiny.weights(fields))


@pytest.fixture(scope="module")
def late(tmp_path_factory):
    """A model that merges what leaves a window, decided with a look ahead."""
    dmc = {"method": "dmc", "window": 11, "decide": "late", "decision": "head", "offset": tiny.OFFSET}
    fields = tiny.config("head", dmc=dmc)
    return tiny.write(tmp_path_factory.mktemp("late"), fields, tiny.weights(fields))


def params(new=24):
    drawn = [SamplingParams(max_tokens=new, seed=i, temperature=0.8, ignore_eos=True) for i in range(4)]
    return [SamplingParams(max_tokens=new, temperature=0, ignore_eos=True), *drawn]


def run(llm, prompts, each, *, preempt=False):
    """Outputs, with the integrity of the cache checked after every step."""
    engine = llm.engine
    sequences = [one for prompt, own in zip(prompts, each, strict=True) for one in llm.sequences(prompt, own)]
    for sequence in sequences:
        engine.add(sequence)
    steps = 0
    while engine.busy:
        engine.step()
        steps += 1
        if preempt and steps % 5 == 0 and len(engine.scheduler.running) > 1:
            engine.scheduler.preempt(engine.scheduler.running[-1])
        llm.cache.check_integrity()
    assert llm.cache.rows.pool.used == 0 and not engine.scheduler.kept
    return [sequence.output() for sequence in sequences]


def assert_same(outputs, expected):
    for output, alone in zip(outputs, expected, strict=True):
        assert output.token_ids == alone.token_ids and output.text == alone.text
        assert output.finish_reason == alone.finish_reason
        assert all(output.stats.held[part] == alone.stats.held[part] for part in ("pages", "exact", "tail"))
        assert (output.stats.entries == alone.stats.entries).all()


@pytest.mark.parametrize("policy, codec", PAIRS)
def test_alone_is_batched_is_chunked_is_preempted(directory, plain, marking, late, policy, codec, monkeypatch, tmp_path):
    directory = {"dms": marking, "late": late, "gate": plain, "gate-merge": plain}.get(policy, directory)
    policy, merge = {"late": "dmc", "gate-merge": "gate"}.get(policy, policy), policy == "gate-merge"
    common = {"policy": policy, "policy_settings": SETTINGS.get(policy), "codec": codec, "page_size": 8, "device": "cpu"}
    fixed = needed(codec, layers=tiny.LAYERS, heads=2, size=tiny.SIZE, theta=1e4, model_hash=model_hash(directory))
    common |= {"codec_settings": fixed, "window": 0}
    if policy == "gate":
        common |= {"decisions": random_decisions(window=9, model=model_hash(plain)), "target_cr": 2}
        common["policy_settings"] = {"merge": merge, "length": 60}
    if policy == "kvzap":
        file = random_heads(tmp_path / "heads", tiny.LAYERS, 2, tiny.HIDDEN)
        common["policy_settings"] = {"file": file, "budget": 24, "window": 8}
    if POLICIES[policy].evicts:  # the last bit of a sum that a lossy codec turned can decide which token goes
        common["dtype"] = "fp64"
    alone = LLM(directory, **common)
    expected = [run(alone, [prompt], [own])[0] for prompt, own in zip(PROMPTS, params(), strict=True)]
    batched = LLM(directory, **common)
    assert_same(run(batched, PROMPTS, params()), expected)
    assert_same(run(LLM(directory, prefill_tokens=5, **common), PROMPTS, params()), expected)
    # A pool that just holds the largest at its worst moment, and a prediction far too low: all are admitted, then sent away.
    pool = alone.cache.rows.pool
    most = max(sum(output.stats.held[part] for part in ("pages", "exact")) for output in expected) // pool.page_bytes
    longest = max(len(output.prompt_token_ids) + len(output.token_ids) for output in expected)
    memory = max(most + 2 * tiny.LAYERS * 2, alone.cache.worst_pages(longest)) * pool.page_bytes
    if alone.cache.policy.ring is not None:
        memory *= 2  # a ring takes most of a short row: room for two
    monkeypatch.setattr(Predictor, "pages", lambda self, tokens: 1)
    tight = LLM(directory, kv_memory=memory, max_batch=4, prefill_tokens=20, **common)
    # Rows with a ring take most of their pages at once and hardly grow: such sequences are sent away by hand as well.
    outputs = run(tight, PROMPTS, params(), preempt=tight.cache.policy.ring is not None)
    assert_same(outputs, expected)
    assert tight.engine.preemptions > 0 and any(output.stats.preemptions for output in outputs)


def test_n_completions_share_their_prompt(directory):
    llm = LLM(directory, codec="tcq", page_size=8, device="cpu")
    own = SamplingParams(max_tokens=20, n=5, seed=7, ignore_eos=True)
    used = []
    step = llm.engine.step
    llm.engine.step = lambda: (step(), used.append(llm.cache.rows.pool.used))[0]
    outputs = llm.generate(PROMPTS[0], own)
    assert [output.index for output in outputs] == list(range(5))
    assert len({tuple(output.token_ids) for output in outputs}) == 5
    assert outputs[0].token_ids == llm.generate(PROMPTS[0], SamplingParams(max_tokens=20, seed=7, ignore_eos=True))[0].token_ids
    assert all(output.stats.shared_bytes > 0 for output in outputs[:4])
    page = llm.cache.rows.pool.page_bytes
    unshared = sum(output.stats.held["pages"] + output.stats.held["exact"] for output in outputs) // page
    assert max(used) < unshared  # shared pages are counted once
    again = llm.generate(PROMPTS[0], own)
    assert [output.token_ids for output in again] == [output.token_ids for output in outputs]


def test_a_common_beginning_shares_its_pages(directory):
    """Two prompts that part near the end, together: what each generates alone, on fewer pages."""
    prompts, each = [PROMPTS[0], PROMPTS[0] + "xyz"], params()[:2]
    for codec in ("dense", "tcq"):
        llm = LLM(directory, codec=codec, page_size=4, sink_tokens=0, device="cpu")
        expected = [llm.generate(prompt, own)[0] for prompt, own in zip(prompts, each, strict=True)]
        outputs = run(llm, prompts, each)
        assert_same(outputs, expected)
        assert outputs[0].stats.shared_bytes > 0 and expected[0].stats.shared_bytes == 0


def test_order_is_that_of_arrival(directory):
    llm = LLM(directory, max_batch=2, device="cpu", prefill_tokens=8)
    each = [SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)] * 6
    prompts = ["a" * 30, "b", "c" * 20, "d", "e" * 9, "f"]
    sequences = [one for prompt, own in zip(prompts, each, strict=True) for one in llm.sequences(prompt, own)]
    for sequence in sequences:
        llm.engine.add(sequence)
    while llm.engine.busy:
        llm.engine.step()
    admitted = [sequence.times["admitted"] for sequence in sequences]
    assert admitted == sorted(admitted)


def test_cancel_in_every_state(directory):
    llm = LLM(directory, codec="tcq", page_size=8, device="cpu", max_batch=3, prefill_tokens=10)
    sequences = [llm.sequences(prompt, SamplingParams(max_tokens=30, ignore_eos=True))[0] for prompt in PROMPTS]
    for sequence in sequences:
        llm.engine.add(sequence)
    for _ in range(9):
        llm.engine.step()
    scheduler = llm.engine.scheduler
    scheduler.preempt(scheduler.running[-1])
    assert scheduler.waiting and scheduler.prefilling and scheduler.running and scheduler.swapped
    for queue in ("swapped", "running", "prefilling", "waiting"):
        victim = getattr(scheduler, queue)[0]
        llm.engine.cancel(victim)
        llm.cache.check_integrity()
        assert victim.output().finish_reason == "cancelled" and victim not in getattr(scheduler, queue)
    while llm.engine.busy:
        llm.engine.step()
        llm.cache.check_integrity()
    assert llm.cache.rows.pool.used == 0 and llm.cache.free_slots == 3 + 4


def test_alone_and_out_of_pages(directory, monkeypatch):
    """More than predicted, with nobody to send away: it ends with what it has, and says why."""
    monkeypatch.setattr(Predictor, "pages", lambda self, tokens: 1)
    llm = LLM(directory, page_size=4, policy="full", device="cpu", kv_memory=40 * 256)
    short, long, none = run(
        llm,
        ["a", "b" * 20, "c" * 100],
        [SamplingParams(max_tokens=8, temperature=0)] * 1 + [SamplingParams(max_tokens=100, temperature=0, ignore_eos=True)] * 2,
    )
    assert short.finish_reason in ("length", "eos")
    assert long.finish_reason == "memory" and 10 < len(long.token_ids) < 100
    assert none.finish_reason == "memory" and none.token_ids == [] and none.stats is None


def test_prediction_follows_what_is_measured(directory):
    llm = LLM(directory, page_size=4, device="cpu")
    assert llm.engine.predictor.cr == pytest.approx(1.9)  # what the checkpoint reports
    before = llm.engine.predictor.pages(200)
    outputs = llm.generate([prompt * 2 for prompt in PROMPTS[:3]] * 8, SamplingParams(max_tokens=90, ignore_eos=True))
    measured = sum(o.stats.cached_tokens for o in outputs) * 4 / sum(int(o.stats.entries.sum()) for o in outputs)
    assert abs(llm.engine.predictor.cr - measured) < 0.5 * abs(1.9 - measured) + 0.05
    assert llm.engine.predictor.pages(200) != before
    held = sum(outputs[0].stats.held[part] for part in ("pages", "exact")) // llm.cache.rows.pool.page_bytes
    assert llm.engine.predictor.pages(outputs[0].stats.cached_tokens) == pytest.approx(held, rel=0.3)
