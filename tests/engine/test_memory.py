"""The size of the page pool where nobody gives one, and that such a pool is taken lazily and is large enough."""

import argparse

import psutil
import pytest
import torch

from dmc import LLM, SamplingParams, cli
from dmc.cache.storage.pages import PagePool
from dmc.engine import memory, parts
from tests.model import tiny

GIB = 1 << 30


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    fields = tiny.config(None)
    return tiny.write(tmp_path_factory.mktemp("model"), fields, tiny.weights(fields))


@pytest.mark.parametrize(("free", "ranks", "size"), [(10 * GIB, 1, 5 * GIB), (10 * GIB, 2, 2.5 * GIB), (90 * GIB, 1, 16 * GIB)])
def test_on_a_cpu_half_of_the_available_memory_up_to_a_bound(monkeypatch, free, ranks, size):
    monkeypatch.setattr(memory, "available", lambda: free)
    assert memory.automatic(torch.device("cpu"), ranks) == size


def test_on_a_gpu_nine_tenths_of_what_is_free(monkeypatch):
    done = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("emptied"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: done.append(str(device)) or (50 * GIB, 80 * GIB))
    assert memory.automatic(torch.device("cuda", 1), 4) == 45 * GIB  # every rank has a GPU of its own
    assert done == ["emptied", "cuda:1"]


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"memory.max": "1000\n", "memory.current": "700\n", "memory.stat": "anon 600\ninactive_file 50\n"}, 350),
        ({"memory.max": "max\n", "memory.current": "700\n", "memory.stat": "inactive_file 50\n"}, None),
        (
            {
                "memory/memory.limit_in_bytes": "1000",
                "memory/memory.usage_in_bytes": "900",
                "memory/memory.stat": "total_inactive_file 20\n",
            },
            120,
        ),
        ({"memory.max": "100", "memory.current": "700", "memory.stat": ""}, 0),
        ({}, None),
    ],
)
def test_the_limit_of_a_container_counts(tmp_path, files, left):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    free = psutil.virtual_memory().available
    assert memory.available(tmp_path) == left if left is not None else abs(memory.available(tmp_path) - free) < free / 2


def test_a_pool_takes_memory_only_as_it_is_used():
    held = psutil.Process().memory_info().rss
    pool = PagePool(1 << 14, limit=1 << 16)  # 1 GiB
    pages = pool.take(64)
    pool.memory[pages] = 1
    assert pool.capacity == 1 << 16 and pages.tolist() == list(range(1, 65))
    assert psutil.Process().memory_info().rss - held < 100 << 20
    assert pool.memory.data_ptr() % 64 == 0 and not pool.memory[65:200].any()


def test_a_pool_that_grows_gets_a_final_size_while_nothing_is_taken():
    pool = PagePool(64, limit=None)
    pool.give(pool.take(100))
    pool.bound(7)
    assert (pool.limit, pool.capacity, pool.free, pool.used) == (7, 7, 7, 0)
    assert sorted(pool.take(7).tolist()) == list(range(1, 8))
    with pytest.raises(AssertionError):
        pool.bound(9)


def test_too_much_memory_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match=r"^kv_memory of \d+ bytes cannot be allocated on cpu: give less$"):
        PagePool(1 << 20, limit=1 << 40)


CASES = [
    ("full", {}, "dense"),
    ("full", {}, "kivi"),
    ("h2o", {"heavy": 9, "recent": 8}, "int8"),
    ("tova", {"share": 0.5}, "dense"),
]


@pytest.mark.parametrize(("policy", "settings", "codec"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_what_full_batches_of_the_longest_sequences_need_is_enough(directory, policy, settings, codec):
    """With more memory than they can fill, the pool has the most pages that each slot's sequence ever has, and few more."""
    common = dict(device="cpu", policy=policy, policy_settings=settings, codec=codec, page_size=8, max_batch=2)
    free, bounded = LLM(directory, **common), LLM(directory, kv_memory="auto", **common)
    pool, positions = bounded.cache.rows.pool, bounded.model.config.max_position_embeddings
    assert free.cache.rows.pool.limit is None
    params = SamplingParams(max_tokens=positions - 100, temperature=0, ignore_eos=True)
    prompts, peak = [[1 + (3 * i + j) % 50 for j in range(100)] for i in range(3)], 0
    (alone,) = free.sequences(prompts[0], params)
    free.engine.add(alone)
    while free.engine.busy:
        free.engine.step()
        peak = max(peak, free.cache.rows.pool.used)
    slots = bounded.cache.rows.slots
    assert peak * slots <= pool.limit <= 2.5 * peak * slots
    outputs = bounded.generate(prompts, params)
    assert outputs[0].token_ids == alone.output().token_ids
    assert {o.finish_reason for o in outputs} == {"length"} and bounded.engine.preemptions == 0


def test_little_memory_bounds_the_pool(directory, monkeypatch):
    monkeypatch.setattr(parts, "automatic", lambda device: 20_000)
    llm = LLM(directory, device="cpu", kv_memory="auto")
    assert llm.cache.rows.pool.limit == 20_000 // llm.cache.rows.pool.page_bytes
    with pytest.raises(ValueError, match="but kv_memory holds"):
        llm.generate("a" * 100, SamplingParams(max_tokens=100))
    monkeypatch.setattr(parts, "automatic", lambda device: 3)
    with pytest.raises(ValueError, match="kv memory of 3 bytes holds no page"):
        LLM(directory, device="cpu", kv_memory="auto")


@pytest.mark.parametrize("wrong", ["lots", 1.5, True])
def test_other_settings_are_refused(directory, wrong):
    with pytest.raises(ValueError, match="kv_memory must be a number of bytes, 'auto' or None, got"):
        LLM(directory, device="cpu", kv_memory=wrong)


@pytest.mark.parametrize("command", ["generate", "serve", "eval", "inspect"])
@pytest.mark.parametrize(("flags", "wanted"), [((), "auto"), (("--kv-memory", "auto"), "auto"), (("--kv-memory", "3KiB"), 3072)])
def test_every_command_takes_the_automatic_size_by_default(monkeypatch, directory, command, flags, wanted):
    seen = []

    class Stopped(Exception):
        pass

    def llm(*_, kv_memory, **__):
        seen.append(kv_memory)
        raise Stopped

    monkeypatch.setattr("dmc.engine.LLM", llm)
    extra = {"generate": ["--prompt", "x"], "serve": [], "eval": ["--needle"], "inspect": ["--prompt", "x"]}[command]
    with pytest.raises(Stopped):
        cli.main([command, str(directory), *extra, *flags])
    assert seen == [wanted]


def test_eval_asks_the_base_model_before_the_cache_takes_the_memory(monkeypatch, tmp_path, directory):
    """On a GPU both models would else have to fit beside 90 % of what is free."""
    from dmc.commands import eval as command

    text = tmp_path / "text.txt"
    text.write_text("some text " * 60)
    done = []
    monkeypatch.setattr("dmc.evaluation.reference.reference", lambda *_, **__: done.append("reference"))
    monkeypatch.setattr(command, "load", lambda options: done.append("model"))
    monkeypatch.setattr(command, "_text", lambda options, llm, texts: done.append([name for name, *_ in texts]))
    parser = argparse.ArgumentParser()
    command.add(parser)
    command.run(parser.parse_args([str(directory), "--text", str(text), "--prompt-tokens", "20", "--scored-tokens", "5"]))
    assert done == ["reference", "model", [str(text)]]
