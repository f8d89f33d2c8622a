"""Names of tasks: suites, and what the installed harness calls them."""

import pytest

from dmc.evaluation import tasks
from dmc.evaluation.tasks import SUITES, run_tasks, task_names


def test_suites_expand():
    assert task_names(["a", "piqa"], "choice") == ["a", "piqa", *(name for name in SUITES["choice"] if name != "piqa")]
    assert set(SUITES["choice"]) < set(SUITES["standard"])
    with pytest.raises(ValueError, match="unknown suite 'all'; known: choice, standard"):
        task_names([], "all")


def test_usage_table():
    figures = {"tasks": {"x": {"metrics": {"acc": 0.5}, "stderr": {"acc": 0.1}, "examples": 7}}, "cache": {"requests": 0}}
    assert tasks.as_text(figures) == "x: acc 0.5000 ± 0.1000 (7 examples)"


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"limit": 0}, "limit must be at least 1"),
        ({"fewshot": -1}, "fewshot must be"),
        ({"task_dir": "/no/such"}, "is not a folder"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        run_tasks(None, ["x"], **settings)


def test_without_lm_eval_it_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"tasks need lm_eval: pip install -e '\.\[eval\]' in the checkout"):
        run_tasks(None, ["x"])


@pytest.mark.slow
def test_names_exist_in_the_harness():
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[eval]'")
    known = tasks.manager(None).task_index
    assert [name for name in SUITES["standard"] if name not in known] == []
    with pytest.raises(ValueError, match="humaneval executes code that the model writes"):
        tasks._check_code(tasks.manager(None), ["humaneval"], False)
    with pytest.raises(ValueError, match="no task is called 'hellaswagg': did you mean hellaswag"):
        tasks._known(["hellaswagg"], None)
