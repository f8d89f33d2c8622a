"""The model class for lm-eval against lm-eval's own for Hugging Face models: the same answers from a full, dense cache."""

import json
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[eval]'")
pytest.importorskip("accelerate", reason="lm-eval's own model class needs accelerate")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from dmc.engine import LLM  # noqa: E402
from dmc.evaluation import tasks  # noqa: E402
from dmc.evaluation.lm_eval import CompressedLM  # noqa: E402
from dmc.evaluation.tasks import manager, run_tasks  # noqa: E402
from tests.model import tiny  # noqa: E402

BASE = Path(__file__).parents[2] / "checkpoints" / "base"
TASKS = Path(__file__).parent / "tasks"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """64 positions, so that texts of some length are cut."""
    fields = tiny.config(None, max_position_embeddings=64)
    return tiny.write(tmp_path_factory.mktemp("model"), fields, tiny.weights(fields))


def _requests(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]


def _theirs(directory):
    return HFLM(pretrained=str(directory), device="cpu", dtype="float32", batch_size=1)


TEXTS = ("a" * 10 + "bcd", "hello-world" * 9, "x")


def test_log_likelihoods_are_those_of_the_harness(small):
    pairs = [(context, continuation) for context in (*TEXTS, "") for continuation in ("yes", "no", "maybe-not")]
    theirs, ours = _theirs(small), CompressedLM(LLM(small, device="cpu", page_size=4, max_batch=5), progress=False)
    expected = theirs.loglikelihood(_requests("loglikelihood", *pairs), disable_tqdm=True)
    answers = ours.loglikelihood(_requests("loglikelihood", *pairs), disable_tqdm=True)
    for (logprob, greedy), (own, same) in zip(expected, answers, strict=True):
        assert own == pytest.approx(logprob, abs=1e-4) and same == greedy
    usage = ours.usage.as_dict()
    assert usage["requests"] == len(pairs) and usage["cr"] == 1 and usage["held_bytes"] == sum(usage["held"].values())
    texts = [("some-text" * 20,), ("short",)]
    expected = theirs.loglikelihood_rolling(_requests("loglikelihood_rolling", *texts), disable_tqdm=True)
    assert ours.loglikelihood_rolling(_requests("loglikelihood_rolling", *texts)) == pytest.approx(expected, abs=1e-3)


def test_generation_is_that_of_the_harness(small):
    theirs, ours = _theirs(small), CompressedLM(LLM(small, device="cpu", page_size=4), progress=False)
    free = [(text, {"max_gen_toks": 20, "do_sample": False}) for text in TEXTS]
    expected = theirs.generate_until(_requests("generate_until", *free), disable_tqdm=True)
    assert ours.generate_until(_requests("generate_until", *free)) == expected and all(expected)
    cut = [(text, {"max_gen_toks": 20, "until": [answer[4:6], "%"]}) for text, answer in zip(TEXTS, expected, strict=True)]
    stopped = ours.generate_until(_requests("generate_until", *cut))
    assert stopped == theirs.generate_until(_requests("generate_until", *cut), disable_tqdm=True)
    assert all(len(short) < len(long) for short, long in zip(stopped, expected, strict=True))
    sampled = [("hello", {"max_gen_toks": 20, "do_sample": True, "temperature": 1.0})] * 2
    first, second = ours.generate_until(_requests("generate_until", *sampled))
    assert first != second and ours.generate_until(_requests("generate_until", *sampled)) == [first, second]
    with pytest.raises(ValueError, match="num_beams=4 in generation, which is not supported"):
        ours.generate_until(_requests("generate_until", ("a", {"num_beams": 4})))
    with pytest.raises(ValueError, match="asks for 64 generated tokens"):
        ours.generate_until(_requests("generate_until", ("a", {"max_gen_toks": 64})))
    with pytest.raises(ValueError, match="longer than the model's 64 positions"):
        ours.loglikelihood(_requests("loglikelihood", ("a", "b" * 66)), disable_tqdm=True)


def test_local_tasks_give_the_numbers_of_the_harness(tmp_path, monkeypatch):
    import datasets
    import lm_eval

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    names = ["local_choice", "local_generate"]
    figures = run_tasks(LLM(BASE, policy="full", device="cpu"), names, task_dir=TASKS, progress=False)
    monkeypatch.chdir(TASKS)  # the paths in the task files
    theirs = lm_eval.simple_evaluate(
        model=_theirs(BASE), tasks=names, task_manager=manager(TASKS, defaults=False), bootstrap_iters=0
    )
    for name in names:
        assert figures["tasks"][name]["metrics"] == {
            key.removesuffix(",none"): pytest.approx(value)
            for key, value in theirs["results"][name].items()
            if key.endswith(",none") and "stderr" not in key
        }
    choice = figures["tasks"]["local_choice"]
    assert choice["examples"] == 5 and len(choice["hash"]) == 16 and choice["metrics"]["acc"] > 0.5
    assert figures["cache"]["requests"] == 15 + 4 and json.dumps(figures)
    some = run_tasks(LLM(BASE, policy="full", device="cpu"), ["local_choice"], task_dir=TASKS, limit=2, progress=False)
    assert some["tasks"]["local_choice"]["examples"] == 2 and some["cache"]["requests"] == 6


TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def test_chat_templates_give_the_numbers_of_the_harness(tmp_path, monkeypatch):
    """Prompts as conversations, with solved examples as earlier turns and an instruction before them."""
    import datasets
    import lm_eval

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    names = ["local_choice", "local_generate"]
    llm, hf = LLM(BASE, policy="full", device="cpu"), _theirs(BASE)
    llm.tokenizer.inner.chat_template = hf.tokenizer.chat_template = TEMPLATE
    own = {"chat_template": True, "system": "Answer.", "fewshot": 1}
    figures = run_tasks(llm, names, task_dir=TASKS, progress=False, **own)["tasks"]
    monkeypatch.chdir(TASKS)
    theirs = lm_eval.simple_evaluate(
        model=hf,
        tasks=names,
        task_manager=manager(TASKS, defaults=False),
        bootstrap_iters=0,
        apply_chat_template=True,
        system_instruction="Answer.",
        num_fewshot=1,
        random_seed=0,
        numpy_random_seed=0,
        torch_random_seed=0,
        fewshot_random_seed=0,
    )
    for name in names:
        assert figures[name]["metrics"] == {
            key.removesuffix(",none"): pytest.approx(value)
            for key, value in theirs["results"][name].items()
            if key.endswith(",none") and "stderr" not in key
        }
        asked = theirs["samples"][name][0]["arguments"][0][0]
        assert asked.startswith("[system] Answer.") and asked.count("[user]") == 2 and asked.endswith("[assistant] ")
        assert figures[name]["hash"] == tasks._hash(theirs["samples"][name])  # the same prompts


def test_one_of_several_templates(small):
    model = CompressedLM(LLM(small, device="cpu"), progress=False)
    history = [{"role": "user", "content": "x"}]
    with pytest.raises(ValueError, match="the model's tokenizer has no chat template: leave --apply-chat-template out"):
        model.apply_chat_template(history)
    model.tokenizer.chat_template = {"default": "D{{ messages[0]['content'] }}", "rag": "R{{ messages[0]['content'] }}"}
    assert model.apply_chat_template(history) == "Dx" and model.chat_template(True) == "D{{ messages[0]['content'] }}"
    assert model.chat_template("rag")[0] == "R" and model.apply_chat_template(history) == "Rx"
    with pytest.raises(ValueError, match="no chat template called 'tools': give --apply-chat-template one of default, rag"):
        model.chat_template("tools")
    model.tokenizer.chat_template = "{{ raise_exception('no system') }}"
    assert model.chat_template(False) is None
    with pytest.raises(ValueError, match=r"chat template rejects a task's messages \(system, user\): no system"):
        model.apply_chat_template([{"role": "system", "content": "s"}, *history])
    with pytest.raises(ValueError, match="has one chat template, without a name"):
        model.chat_template("rag")


def test_the_beginning_of_an_answer(small):
    """The harness asks for it where a task has a gen_prefix: the last turn stays open."""
    model = CompressedLM(LLM(small, device="cpu"), progress=False)
    model.tokenizer.chat_template = TEMPLATE
    history = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "It is"}]
    assert model.apply_chat_template(history, add_generation_prompt=False) == "[user] x\n[assistant] It is"
    assert model.apply_chat_template(history[:1]) == "[user] x\n[assistant] "


def test_code_is_run_only_if_allowed(small, monkeypatch):
    llm = LLM(small, device="cpu")
    for name in ("local_code", "local_group"):
        with pytest.raises(ValueError, match="local_code executes code that the model writes.*--allow-code"):
            run_tasks(llm, [name], task_dir=TASKS)


def test_no_data_and_no_network_is_one_sentence(small, monkeypatch):
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="task local_hub cannot be loaded: .*someone/data-that-is-nowhere") as caught:
        run_tasks(LLM(small, device="cpu"), ["local_hub"], task_dir=TASKS)
    assert "\n" not in str(caught.value) and "is there a network?" in str(caught.value)


ARGS = f"pretrained={BASE},policy=h2o,heavy=4,recent=4,codec=int8,page_size=8,dtype=float32"


def test_the_harness_finds_the_model_by_its_name(tmp_path, monkeypatch):
    """What ``--model dmc --model_args`` gives are the numbers of `run_tasks` on the same cache."""
    import datasets
    import lm_eval

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    settings = {"policy": "h2o", "policy_settings": {"heavy": 4, "recent": 4}, "codec": "int8", "page_size": 8}
    ours = run_tasks(LLM(BASE, device="cpu", **settings), ["local_choice"], task_dir=TASKS, progress=False)
    monkeypatch.chdir(TASKS)
    theirs = lm_eval.simple_evaluate(
        model="dmc",
        model_args=ARGS,
        tasks=["local_choice"],
        task_manager=manager(TASKS, defaults=False),
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
    )
    metrics = ours["tasks"]["local_choice"]["metrics"]
    assert {name: theirs["results"]["local_choice"][f"{name},none"] for name in metrics} == metrics
    config = theirs["config"]
    assert config["dmc_policy"] == "h2o" and config["dmc_codec"] == "int8" and config["dmc_cache"]["cr"] > 1
    assert config["dmc_settings"]["policy"]["heavy"] == 4 and config["dmc_settings"]["cache"]["page_size"] == 8


def test_the_entry_point_names_the_model_class():
    import tomllib
    from importlib.metadata import EntryPoint

    made = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["entry-points"]["lm_eval.models"]
    assert EntryPoint("dmc", made["dmc"], "lm_eval.models").load() is CompressedLM


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("policy=h2o", "the model dmc needs its directory: add pretrained=DIR"),
        (f"pretrained={BASE},policy=h2o,budget=4", "budget is unknown; known: pretrained, policy, .*of the policy: heavy"),
        (f"pretrained={BASE},heavy=4", r"--model_args heavy is unknown; .*settings \(no policy\)"),
        (f"pretrained={BASE},policy=h2o,heavy=x", "heavy=x must be a whole number"),
        (
            f"pretrained={BASE},policy=h2o,policy_settings=x",
            "policy_settings=x must be a dict: give each setting by its own name",
        ),
    ],
)
def test_wrong_model_args(arguments, said):
    with pytest.raises(ValueError, match=said):
        CompressedLM.create_from_arg_string(arguments, {"device": "cpu", "batch_size": "auto:4"})


@pytest.mark.slow
def test_the_command_of_the_harness(tmp_path):
    """In a process of its own, as a user runs it."""
    import os
    import subprocess
    import sys

    root = Path(__file__).parents[2]
    asked = [
        "run",
        "--model",
        "dmc",
        "--model_args",
        ARGS,
        "--tasks",
        "local_choice",
        "--include_path",
        str(TASKS),
        "--device",
        "cpu",
        "--output_path",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "dmc.evaluation.harness", *asked],
        cwd=TASKS,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(root), "HF_DATASETS_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text())
    assert results["config"]["dmc_policy"] == "h2o" and results["results"]["local_choice"]["acc,none"] > 0
    assert "local_choice" in done.stdout
