"""A hard budget of entries (``max_entries``): exact admission, no preemption, flat memory, the commands, and what is rejected."""

import json

import pytest

from dmc import LLM, SamplingParams
from dmc.cli import main
from dmc.evaluation import grid
from dmc.model.fingerprint import model_hash
from tests.cache.decisions import random_decisions
from tests.model import tiny

WINDOW, MOST, SINKS = 6, 9, 2
KINDS = ("late", "gate", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("dms", "gate-merge")))
PROMPTS = ["abcdefghijklm" * 2, "tuv", "0123456789"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model that merges what leaves a window, one that drops it, one that merges at once, and a plain one."""
    room = {"max_position_embeddings": 1024}
    late = {"method": "dmc", "window": WINDOW, "decide": "late", "decision": "head", "offset": tiny.OFFSET}
    dms = {"method": "dms", "window": WINDOW, "decision": "head", "offset": 0.0}
    fields = {
        "late": tiny.config("head", dmc=late, **room),
        "dms": tiny.config("head", dmc=dms, **room),
        "once": tiny.config("head"),
        "plain": tiny.config(**room),
    }
    return {name: tiny.write(tmp_path_factory.mktemp("budget") / name, each, tiny.weights(each)) for name, each in fields.items()}


def load(models, kind, **settings):
    """An `LLM` under a hard budget; int8 pages of 4 entries."""
    common = {"codec": "int8", "page_size": 4, "sink_tokens": 1, "device": "cpu", "max_entries": MOST} | settings
    if not kind.startswith("gate"):
        return LLM(models[kind], **common)
    fitted = random_decisions(window=WINDOW, sinks=SINKS, model=model_hash(models["plain"]))
    own = {"merge": kind == "gate-merge", "length": 60}
    return LLM(models["plain"], policy="gate", decisions=fitted, target_cr=2, policy_settings=own, **common)


@pytest.mark.parametrize("kind", KINDS)
def test_admission_reserves_the_bound_and_nothing_is_preempted(models, kind):
    """Memory for two sequences of the largest size runs two at a time; a page less runs one. Texts are those of an empty pool."""
    params = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
    expected = [load(models, kind).generate(prompt, params)[0] for prompt in PROMPTS]
    cache = load(models, kind).cache
    each, page = cache.worst_pages(10_000), cache.rows.pool.page_bytes
    assert each == cache.worst_pages(WINDOW + MOST)
    for pages, together in ((2 * each, 2), (2 * each - 1, 1)):
        llm = load(models, kind, kv_memory=pages * page)
        engine, most = llm.engine, 0
        for prompt in PROMPTS:
            engine.add(llm.sequences(prompt, params)[0])
        sequences = list(engine.scheduler.waiting)
        while engine.busy:
            engine.step()
            most = max(most, len(engine.scheduler.running) + len(engine.scheduler.prefilling))
        llm.cache.check_integrity()
        assert most == together and engine.preemptions == 0
        assert [one.output().token_ids for one in sequences] == [one.token_ids for one in expected]
        assert all(one.output().stats.entries.max() <= WINDOW + MOST for one in sequences)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_flat_over_a_long_text(models, kind):
    """On exactly the pages of one sequence: from the token on that fills every head, none is taken or given back."""
    cache = load(models, kind).cache
    llm = load(models, kind, kv_memory=cache.worst_pages(10_000) * cache.rows.pool.page_bytes)
    engine, used, held = llm.engine, [], []
    (sequence,) = llm.sequences(PROMPTS[0], SamplingParams(max_tokens=300, temperature=0, ignore_eos=True))
    engine.add(sequence)
    while engine.busy:
        engine.step()
        if sequence.slot is not None:
            used.append(llm.cache.rows.pool.used)
            held.append(sum(llm.cache.held(sequence.slot).values()))
    output = sequence.output()
    assert output.finish_reason == "length" and engine.preemptions == 0
    assert len(used) == 299 and len(set(used[150:])) == len(set(held[150:])) == 1 and max(used) <= llm.cache.rows.pool.limit
    assert output.stats.entries.max() == WINDOW + MOST


def test_the_commands_take_the_flag(models, tmp_path, capsys):
    base, common = models["plain"], ["--device", "cpu"]
    prompt = ["--prompt", "abcdefgh" * 9, "--json", "--max-tokens", "8", *common]
    entries = []
    for given in ([], ["--max-entries", "9"]):
        assert main(["inspect", str(models["late"]), *given, *prompt]) == 0
        entries.append(json.loads(capsys.readouterr().out)["entries"])
    heads = tiny.LAYERS * 2
    assert entries[1] == heads * (WINDOW + 9) < entries[0]
    assert main(["generate", str(models["dms"]), "--prompt", "abc", "--max-tokens", "40", "--max-entries", "9", *common]) == 0
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(33 + i * i % 94) for i in range(200)))
    capsys.readouterr()
    sizes = ["--prompt-tokens", "40", "--scored-tokens", "8", "--windows", "1"]
    assert (
        main(
            [
                "eval",
                str(models["late"]),
                "--text",
                str(text),
                "--max-entries",
                "9",
                "--base",
                str(base),
                "--references",
                str(tmp_path),
                "--json",
                str(tmp_path / "eval.json"),
                "--no-progress",
                *sizes,
                *common,
            ]
        )
        == 0
    )
    figures = json.loads((tmp_path / "eval.json").read_text())
    assert figures["settings"]["policy"]["max_entries"] == 9 and figures["text"][0]["cr"] > 47 / (WINDOW + 9)
    out = tmp_path / "out"
    assert (
        main(
            [
                "frontier",
                "--base",
                str(base),
                "--models",
                str(models["late"]),
                "--text",
                str(text),
                "--out",
                str(out),
                "--prompt",
                "40",
                "--scored",
                "4",
                "--windows",
                "1",
                "--codecs",
                "dense",
                "--policies",
                "dmc",
                *common,
                "--max-entries",
                "9",
            ]
        )
        == 0
    )
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [row["policy"] for row in rows] == ["dmc", "dmc:max_entries=9"]
    assert rows[1]["result"]["cr"] > rows[0]["result"]["cr"] > 1


WHO = "late merging \\(a model retrofitted with dmc.window\\), policy dms or policy gate"


@pytest.mark.parametrize(
    ("model", "given", "words"),
    [
        ("plain", {}, f"max_entries=9 bounds .*and policy full has none for this model: leave it out, or use {WHO}"),
        ("plain", {"policy": "h2o"}, f"policy h2o has none .*{WHO}"),
        ("once", {}, f"policy dmc has none .*{WHO}"),
        ("late", {"policy": "full"}, "policy full has none"),
        ("late", {"policy_settings": {"max_entries": 9}}, "max_entries is given twice"),
        ("late", {"max_entries": 0}, "max_entries=0 must be a whole number, at least 1"),
        ("late", {"max_entries": 4, "codec": "int8"}, "holds nothing but the 4 sinks \\(sink_tokens\\): give at least 5"),
        ("late", {"max_entries": 2.5}, "max_entries=2.5 must be a whole number"),
    ],
)
def test_wrong_use(models, model, given, words):
    with pytest.raises(ValueError, match=words):
        LLM(models[model], **{"max_entries": 9, "device": "cpu"} | given)


def test_a_policy_that_is_ready_made_has_its_own(models):
    with pytest.raises(ValueError, match="max_entries goes with a policy's name"):
        LLM(models["late"], policy=LLM(models["late"], device="cpu").cache.policy, max_entries=9, device="cpu")


@pytest.mark.parametrize(
    ("model", "given", "words"),
    [("late", "0", "max_entries=0 must be"), ("plain", "9", "policy full has none"), ("late", "x", "invalid int value: 'x'")],
)
def test_commands_say_what_is_wrong_in_a_sentence(models, capsys, model, given, words):
    for command, *more in (("generate", "--prompt", "a"), ("serve",), ("inspect", "--prompt", "a"), ("eval", "--needle")):
        try:
            code = main([command, str(models[model]), "--device", "cpu", "--max-entries", given, *more])
        except SystemExit as error:
            code = error.code
        error = capsys.readouterr().err
        assert code == 2 and words in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("names", "most", "words"),
    [(("plain",), [9], "no policy of these has one"), (("plain", "late"), [0], "max_entries=0 must be")],
)
def test_the_grid_says_what_is_wrong_at_the_start(models, names, most, words):
    with pytest.raises(ValueError, match=words):
        grid.cells([models[name] for name in names], max_entries=most)
    for choice, said in (("dmc", "merging at once has no window"), ("h2o", "has no setting max_entries")):
        with pytest.raises(ValueError, match=said):
            grid.cells([models["plain"], models["once"]], policies=[grid.choose(choice, max_entries=9)])


def test_a_request_beyond_the_memory_names_the_budget(models):
    cache = load(models, "late").cache
    llm = load(models, "late", kv_memory=(cache.worst_pages(10_000) - 1) * cache.rows.pool.page_bytes)
    with pytest.raises(ValueError, match="need up to .* at max_entries=9, but kv_memory holds .* max_entries or max_tokens"):
        llm.generate("a" * 50, SamplingParams(max_tokens=100))
