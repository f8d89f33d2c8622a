"""`LLM.generate`: requests, sampling, batching, memory, statistics."""

import pytest
import torch

import dmc
from dmc import LLM, SamplingParams
from dmc.engine import total_stats
from dmc.engine.runner import Chunk
from dmc.engine.sampler import Sampler, choose, logprobs
from dmc.engine.scheduler import KEPT_PROMPTS
from dmc.engine.sequence import TRANSITIONS, State
from tests.model import tiny

GREEDY = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    fields = tiny.config("neuron")
    return tiny.write(tmp_path_factory.mktemp("model"), fields, tiny.weights(fields))


@pytest.fixture(scope="module")
def llm(directory):
    return LLM(directory, codec="tcq", page_size=8, device="cpu")


@pytest.fixture(autouse=True)
def cache_is_empty_after_each(llm):
    yield
    llm.cache.check_integrity()
    assert llm.cache.rows.pool.used == 0 and llm.cache.free_slots == 16 + KEPT_PROMPTS


def test_greedy_is_the_argmax_of_score(directory):
    llm = LLM(directory, device="cpu", page_size=4)
    output = llm.generate([[7, 8, 9]], GREEDY)[0]
    assert output.finish_reason == "length" and len(output.token_ids) == 30
    _, (hidden,) = llm.engine.runner.step([], [], [], [Chunk(llm.cache.prompt(), [7, 8, 9, *output.token_ids])])
    assert llm.model.logits(hidden)[2:-1].argmax(-1).tolist() == output.token_ids


def test_one_prompt_alone_is_the_same_in_a_batch(directory):
    """Also where slots and memory let only some run at a time, so that requests join and leave in between."""
    prompts = ["abc", "a longer prompt, for once", "Z", "0123456789" * 3]
    params = [
        GREEDY,
        SamplingParams(max_tokens=12, seed=1),
        SamplingParams(max_tokens=20, seed=2, top_p=0.8, temperature=0.7),
        SamplingParams(max_tokens=5, seed=3, top_k=5),
    ]
    narrow = LLM(directory, codec="tcq", page_size=8, max_batch=2, device="cpu")
    worst = max(narrow.cache.worst_pages(len(p) + s.max_tokens) for p, s in zip(prompts, params, strict=True))
    tight = LLM(
        directory, codec="tcq", page_size=8, device="cpu", kv_memory=worst * narrow.cache.rows.pool.page_bytes, prefill_tokens=30
    )
    for engine in (LLM(directory, codec="tcq", page_size=8, device="cpu"), narrow, tight):
        together = engine.generate(prompts, params)
        for prompt, own, output in zip(prompts, params, together, strict=True):
            alone = engine.generate(prompt, own)[0]
            assert (output.token_ids, output.text) == (alone.token_ids, alone.text)
            assert output.stats.held == alone.stats.held
        assert engine.cache.rows.pool.used == 0
        engine.cache.check_integrity()


def test_text_stop_and_end(llm):
    full = llm.generate("hello", GREEDY)[0]
    assert len(full.text) >= 25 and full.prompt_token_ids == llm.tokenizer.encode("hello")
    stop = full.text[9:11]
    place = full.text.find(stop)
    cut = llm.generate("hello", SamplingParams(max_tokens=30, temperature=0, ignore_eos=True, stop=stop))[0]
    assert cut.finish_reason == "stop" and cut.text == full.text[:place]
    assert cut.token_ids == full.token_ids[: len(cut.token_ids)]
    one = llm.generate("hello", SamplingParams(max_tokens=30, temperature=0, ignore_eos=True, stop=["@@", full.text[0]]))[0]
    assert one.text == "" and one.finish_reason == "stop"


def test_end_token(directory, llm):
    token = llm.generate("hello", GREEDY)[0].token_ids[4]
    (directory / "generation_config.json").write_text(f'{{"eos_token_id": [{token}, 3]}}')
    ending = LLM(directory, codec="tcq", page_size=8, device="cpu")
    (directory / "generation_config.json").unlink()
    output = ending.generate("hello", SamplingParams(max_tokens=30, temperature=0))[0]
    assert output.finish_reason == "eos" and output.token_ids[-1] == token and len(output.token_ids) <= 5
    assert len(ending.generate("hello", GREEDY)[0].token_ids) == 30


def test_seeds(llm):
    def run(seed):
        return llm.generate("seed", SamplingParams(max_tokens=12, seed=seed))[0].token_ids

    assert run(5) == run(5) != run(6)
    assert run(None) != run(None)


def test_logprobs(llm):
    params = SamplingParams(max_tokens=6, seed=0, logprobs=3)
    output = llm.generate("log", params)[0]
    assert len(output.logprobs) == len(output.token_ids)
    for token, given in zip(output.token_ids, output.logprobs, strict=True):
        assert given.token_id == token and len(given.top) == 3
        logs = [value for _, value in given.top]
        assert logs == sorted(logs, reverse=True) and given.logprob <= logs[0] <= 0
        assert all(value == given.logprob for ident, value in given.top if ident == token)
    assert llm.generate("log", GREEDY)[0].logprobs is None


def test_stats(llm):
    outputs = llm.generate(["some words", "x"], GREEDY)
    for output, prompt in zip(outputs, (10, 1), strict=True):
        stats = output.stats
        assert (stats.prompt_tokens, stats.generated_tokens, stats.cached_tokens) == (prompt, 30, prompt + 29)
        assert stats.entries.shape == (tiny.LAYERS, 2)
        assert stats.cr == pytest.approx(stats.cached_tokens * 4 / stats.entries.sum().item()) and stats.cr > 1.2
        assert stats.cr_per_head[1][0] == pytest.approx(stats.cached_tokens / stats.entries[1, 0].item())
        assert stats.cr_per_layer[0] == pytest.approx(2 * stats.cached_tokens / stats.entries[0].sum().item())
        assert stats.held_bytes == sum(stats.held.values()) > 0
        assert stats.dense_bytes == stats.cached_tokens * tiny.LAYERS * 2 * tiny.SIZE * 2 * 2
        assert stats.tokens_per_second > 0
    both = total_stats(outputs, 2.0)
    assert both.tokens_per_second == 30 and both.held_bytes == sum(output.stats.held_bytes for output in outputs)
    assert both.ratio == both.dense_bytes / both.held_bytes


def test_requests_that_are_refused(llm, directory):
    for prompt, params, said in (
        ("", GREEDY, "at least 1"),
        ([[]], GREEDY, "at least 1"),
        ([[97]], GREEDY, "token id 97"),
        ("x" * 240, GREEDY, "240 prompt tokens \\+ max_tokens 30 = 270 are more than the 256"),
        (["a", "b"], [GREEDY], "2 prompts"),
    ):
        with pytest.raises(ValueError, match=said):
            llm.generate(prompt, params)
    small = LLM(directory, device="cpu", kv_memory=20_000)
    with pytest.raises(ValueError, match="about 28 pages of 1024 bytes at a compression ratio of 1.90, but .* 19"):
        small.generate("x" * 170, GREEDY)
    with pytest.raises(ValueError, match="cannot hold the longest"):
        small.score([list(range(3, 90)) * 2])
    for tokens, said in (([5], "at least 2"), ([5] * 300, "300 tokens is longer"), ([5, -1], "token id -1")):
        with pytest.raises(ValueError, match=said):
            llm.score([tokens])
    with pytest.raises(ValueError, match="prompt_tokens"):
        llm.score([[5, 6]], prompt_tokens=0)


def test_a_failure_leaves_nothing_behind(llm, monkeypatch):
    calls = []

    def broken(*_):
        calls.append(1)
        if len(calls) > 40:
            raise RuntimeError("broken")
        return original(*_)

    original = type(llm.cache.policy).decide
    monkeypatch.setattr(type(llm.cache.policy), "decide", broken)
    with pytest.raises(RuntimeError, match="broken"):
        llm.generate(["one", "two"], GREEDY)
    with pytest.raises(RuntimeError, match="broken"):
        llm.score([[5, 6, 7]])
    monkeypatch.undo()
    assert len(llm.generate("one", GREEDY)[0].token_ids) == 30


@pytest.mark.parametrize(
    "setting, value",
    [
        ("max_tokens", 0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -3.0),
        ("logit_bias", {3: 101.0}),
        ("n", 0),
        ("stop_token_ids", [-1]),
        ("stop", [""]),
        ("seed", -1),
        ("logprobs", -1),
    ],
)
def test_params_out_of_range(setting, value):
    with pytest.raises(ValueError, match=setting):
        SamplingParams(**{setting: value})


def test_sampling_follows_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0])

    def shares(**settings):
        params = SamplingParams(seed=0, **settings)
        sampler = Sampler(params)
        drawn = [chosen for _ in range(10) for chosen in choose([sampler] * 400, logits.expand(400, -1))]
        return torch.bincount(torch.tensor(drawn), minlength=5) / 4000

    torch.testing.assert_close(shares(), logits.softmax(0), atol=0.03, rtol=0)
    torch.testing.assert_close(shares(temperature=0.5), (logits * 2).softmax(0), atol=0.03, rtol=0)
    cut = torch.tensor([2.0, -torch.inf, -torch.inf, -torch.inf, 3.0]).softmax(0)
    torch.testing.assert_close(shares(top_k=2), cut, atol=0.03, rtol=0)
    torch.testing.assert_close(shares(top_p=0.8), cut, atol=0.03, rtol=0)  # .64 + .23 reach .8
    assert shares(top_p=0.1).argmax() == 4 and shares(top_p=0.1)[4] == 1
    assert shares(temperature=0)[4] == 1
    (found,) = logprobs(logits[None], [2], [0])
    assert found.logprob == pytest.approx(logits.log_softmax(0)[2].item()) and logprobs(logits[None], [2], [None]) == [None]


def test_cuts_and_penalties_are_those_of_transformers():
    """Against its logits processors, by the probabilities that are left."""
    from transformers import generation as hf

    logits = torch.randn(60, generator=torch.Generator().manual_seed(3)) * 2
    prompt, ids = [4, 9, 9, 30], torch.tensor([[4, 9, 9, 30]])
    for settings, warpers in (
        ({"min_p": 0.2}, [hf.MinPLogitsWarper(0.2)]),
        (
            {"top_k": 9, "top_p": 0.7, "min_p": 0.15, "temperature": 0.6},
            [hf.TemperatureLogitsWarper(0.6), hf.TopKLogitsWarper(9), hf.TopPLogitsWarper(0.7), hf.MinPLogitsWarper(0.15)],
        ),
        ({"repetition_penalty": 1.8}, [hf.RepetitionPenaltyLogitsProcessor(1.8)]),
    ):
        expected = logits[None].clone()
        for warper in warpers:
            expected = warper(ids, expected)
        drawn = []
        for seed in range(600):  # a new sampler each time: the penalty must not see its own draws
            drawn += choose([Sampler(SamplingParams(seed=seed, **settings), prompt=prompt)], logits[None])
        shares = torch.bincount(torch.tensor(drawn), minlength=60) / 600
        assert (shares[expected[0] == -torch.inf] == 0).all()
        torch.testing.assert_close(shares, expected[0].softmax(0), atol=0.08, rtol=0)


def test_penalties_of_the_output_and_bias():
    logits = torch.tensor([0.0, 1.0, 3.0, 2.9])
    sampler = Sampler(SamplingParams(temperature=0, frequency_penalty=0.06, presence_penalty=0.05))
    # 3 against 2.9; 2.89 against 2.9; 2.89 against 2.79; 2.83 against 2.79; 2.77 against 2.79
    assert [choose([sampler], logits[None])[0] for _ in range(5)] == [2, 3, 2, 2, 3]
    assert choose([Sampler(SamplingParams(temperature=0, logit_bias={1: 5.0, 2: -100}))], logits[None]) == [1]
    assert choose([Sampler(SamplingParams(temperature=0, repetition_penalty=2.0), prompt=[2, 3])], logits[None]) == [2]
    assert choose([Sampler(SamplingParams(temperature=0, repetition_penalty=4.0), prompt=[2, 3])], logits[None]) == [1]


def test_a_choice_does_not_depend_on_the_batch():
    """Completions of all kinds at once, step by step, against each alone; flat rows need more than the sorted tokens."""
    generator = torch.Generator().manual_seed(0)
    kinds = [
        {},
        {"temperature": 0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 0.7, "top_p": 0.9},
        {"top_k": 5},
        {"min_p": 0.1},
        {"top_p": 0.5, "top_k": 700},
        {"temperature": 0, "frequency_penalty": 1.0},
        {"logit_bias": {3: 20.0}},
    ]
    params = [SamplingParams(seed=seed, **settings) for seed, settings in enumerate(kinds)]
    together, alone = ([Sampler(each, prompt=[1, 2]) for each in params] for _ in range(2))
    for step in range(6):
        spread = torch.tensor([0.1, 5.0])[(torch.arange(len(kinds)) + step) % 2, None]
        logits = torch.randn(len(kinds), 1500, generator=generator) * spread
        expected = [choose([sampler], row[None])[0] for sampler, row in zip(alone, logits, strict=True)]
        assert choose(together, logits) == expected


def test_states_change_only_as_written_down(llm):
    (sequence,) = llm.sequences("hello", GREEDY)
    for state in (State.PREFILLED, State.SWAPPED, State.WAITING):
        with pytest.raises(AssertionError, match=f"waiting cannot become {state.value}"):
            sequence.become(state)
    assert TRANSITIONS.keys() == set(State) and not TRANSITIONS[State.FINISHED]
    llm.engine.add(sequence)
    seen = [sequence.state]
    while llm.engine.busy:
        llm.engine.step()
        seen.append(sequence.state)
    assert list(dict.fromkeys(seen)) == [State.WAITING, State.RUNNING, State.FINISHED]  # prompt and pages in one step


def test_stop_tokens(llm):
    token = llm.generate("hello", GREEDY)[0].token_ids[6]
    own = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True, stop_token_ids=[token])
    output = llm.generate("hello", own)[0]
    assert output.finish_reason == "eos" and output.token_ids[-1] == token and token not in output.token_ids[:-1]
    with pytest.raises(ValueError, match="token id 97"):
        llm.generate("hello", SamplingParams(logit_bias={97: 1.0}))


def test_import_is_light():
    import subprocess
    import sys

    code = "import sys, dmc; assert 'torch' not in sys.modules; import dmc.functional; print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "transformers" not in loaded and "safetensors" not in loaded
    with pytest.raises(AttributeError, match="has no attribute 'Engine'"):
        dmc.Engine  # noqa: B018
