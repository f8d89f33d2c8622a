"""What a user's policy answers is checked, its exceptions carry its name, and the pool is whole after either."""

import traceback

import pytest
import torch

from dmc import LLM, SamplingParams
from dmc.cache import Policy
from dmc.cache.policies.streaming import StreamingPolicy
from dmc.cli import main
from dmc.evaluation.continuations import Request, follow
from dmc.evaluation.measure import measure
from dmc.evaluation.windows import Windows
from tests.model import tiny

PROMPTS = [[5, 6, 7, 8, 9] * 4, [9, 8, 7] * 3]


class Mine(Policy):
    """Keeps everything; a test replaces one method."""

    name, merges, evicts = "mine", False, True

    def decide(self, alpha, omega):
        return torch.zeros_like(alpha), torch.ones_like(omega)

    def keep(self, entries):
        return entries.positions >= 0


def changed(**methods):
    return type("Changed", (Mine,), {"__module__": __name__} | methods)()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    fields = tiny.config()
    return tiny.write(tmp_path_factory.mktemp("model"), fields, tiny.weights(fields))


def made(directory, policy):
    return LLM(directory, policy=policy, device="cpu", page_size=4, codec="int8", sink_tokens=1, max_batch=2)


def runs(llm):
    """Everything that feeds a cache."""
    windows = Windows(torch.tensor([PROMPTS[0]] * 2), 9)
    return {
        "generate": lambda: llm.generate(PROMPTS, SamplingParams(max_tokens=9, temperature=0, ignore_eos=True)),
        "score": lambda: llm.score(PROMPTS, prompt_tokens=5),
        "follow": lambda: follow(llm, [Request(prompt, 6) for prompt in PROMPTS]),
        "measure": lambda: measure(llm, windows),
    }


def assert_whole(llm):
    llm.check_integrity()
    assert llm.cache.rows.pool.used == 0 and llm.cache.free_slots == llm.cache.rows.slots


HOOKS = ["decide", "keep", "keep_prompt", "rewrite", "visible", "arrival", "arrival_hidden"]


def raising(hook, after):
    """A policy whose method fails when it was called so often."""
    calls = []

    def fail(self, *arguments):
        calls.append(hook)
        if len(calls) > after:
            raise ValueError("the reason of the user")
        if hook in ("arrival", "arrival_hidden"):
            return torch.zeros(len(arguments[1]), 2)
        return getattr(Mine, hook)(self, *arguments)

    return changed(**{hook: fail})


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("hook", HOOKS)
def test_an_exception_keeps_its_traceback_and_the_pool_is_whole(directory, hook, after):
    for name in ("generate", "score", "follow", "measure"):
        llm = made(directory, raising(hook, after))
        with pytest.raises(ValueError, match="the reason of the user") as caught:
            runs(llm)[name]()
        said = "".join(traceback.format_exception(caught.value))
        assert f"raised by {hook} of the policy mine (tests.cache.test_asking.Changed)" in said and "in fail" in said
        assert_whole(llm)


def test_after_an_exception_the_cache_serves_as_before(directory):
    flag = []

    def keep(self, entries):
        if flag:
            raise ArithmeticError
        return Mine.keep(self, entries)

    llm = made(directory, changed(keep=keep))
    first = [output.token_ids for output in runs(llm)["generate"]()]
    flag.append(True)
    with pytest.raises(ArithmeticError):
        runs(llm)["generate"]()
    flag.clear()
    assert [output.token_ids for output in runs(llm)["generate"]()] == first
    assert_whole(llm)


WRONG = {
    "positions": (
        dict(keep=lambda self, e: e.positions),
        r"keep of the policy mine must return bool \[2, 19\], True for what "
        r"stays or is seen: not positions, not indices; it returned int32 \[2, 19\]",
    ),
    "indices": (dict(keep=lambda self, e: torch.tensor([[0, 99]])), r"it returned int64 \[1, 2\]"),
    "one row": (dict(keep=lambda self, e: (e.positions >= 0)[0]), r"it returned bool \[19\]"),
    "a list": (dict(keep=lambda self, e: [True]), "it returned list"),
    "a prompt": (dict(keep_prompt=lambda self, e: e.positions.float()), r"keep_prompt .* it returned float32"),
    "scores": (dict(arrival=lambda self, k, v, p: k.norm(dim=-1)[..., :1]), r"arrival .* fp32 \[20, 2\]; .* float32 \[20, 1\]"),
    "hidden": (dict(arrival_hidden=lambda self, n, h: h), r"arrival_hidden .* fp32 \[29, 2\]; it returned float32 \[29, 32\]"),
    "sight": (dict(visible=lambda self, p, q: p >= 0), "visible of the policy mine must return bool"),
    "decisions": (dict(decide=lambda self, a, o: a), r"decide .* must return \(alpha, omega\), not float32"),
    "merged": (dict(rewrite=lambda self, p, k: p.keys), r"rewrite .* must return \(keys, values\) or None"),
    "merged values": (dict(rewrite=lambda self, p, k: (p.keys, p.values[:1])), r"rewrite .* return fp32 \[2, 19, 8\]"),
    "budget": (
        dict(most_entries=lambda self, tokens: min(tokens, 6)),
        "keep of the policy mine keeps 20 entries of a "
        "head after 20 tokens, the newest included, and its most_entries allows 6: keep fewer, or allow more",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_answers_are_one_sentence(directory, name):
    methods, said = WRONG[name]
    llm = made(directory, changed(**methods))
    with pytest.raises(ValueError, match=said) as caught:
        runs(llm)["generate"]()
    assert not getattr(caught.value, "__notes__", None)  # not the user's own
    assert_whole(llm)


def test_a_budget_is_checked_while_tokens_are_generated(directory):
    class Growing(StreamingPolicy):
        """Keeps its budget at the prompt's end, and one more after each token."""

        def keep(self, entries):
            return super().keep(entries) if int(entries.next[0]) <= 20 else entries.positions >= 0

    llm = made(directory, Growing(sinks=2, recent=6))
    with pytest.raises(ValueError, match="keep of the policy streaming keeps 9 entries of a head after .* allows 8"):
        llm.generate([PROMPTS[0]], SamplingParams(max_tokens=9, temperature=0, ignore_eos=True))
    assert_whole(llm)


def test_the_command_shows_the_traceback_of_a_policy_that_raises(directory, tmp_path, monkeypatch, capsys):
    (tmp_path / "acme_bad.py").write_text(
        "from dmc.cache.policies.streaming import StreamingPolicy\n\n\nclass Bad(StreamingPolicy):\n    name = 'bad'\n\n"
        "    def keep(self, entries):\n        raise ValueError('no such thing')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    rest = ["--prompt", "abcdefgh", "--max-tokens", "4", "--device", "cpu", "--policy"]
    with pytest.raises(ValueError, match="no such thing") as caught:
        main(["generate", str(directory), *rest, "acme_bad:Bad"])
    assert caught.value.__notes__ == ["raised by keep of the policy bad (acme_bad.Bad)"]
    assert main(["generate", str(directory), *rest, "streaming:recent=1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
