"""Tasks of the lm-evaluation-harness on a model under its policy and codec: which there are, and running them."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dmc.engine import LLM

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

CHOICE = ("mmlu", "arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande", "boolq")
SUITES = {"choice": CHOICE, "standard": (*CHOICE, "gsm8k", "humaneval", "bbh", "longbench")}
"""Names of the harness; all of them need the Hugging Face hub, or its data sets in the local cache."""


def task_names(names: Sequence[str], suite: str | None) -> list[str]:
    """Tasks that were named and those of a suite, each once.

    Raises:
        ValueError: if there is no such suite.
    """
    if suite is not None and suite not in SUITES:
        raise ValueError(f"unknown suite {suite!r}; known: {', '.join(SUITES)}; without the harness: quick, retrieval, long")
    return list(dict.fromkeys([*names, *SUITES.get(suite, ())]))


def run_tasks(
    llm: LLM,
    names: Sequence[str],
    *,
    task_dir: str | Path | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    chat_template: bool | str = False,
    system: str | None = None,
    seed: int = 0,
    allow_code: bool = False,
    progress: bool = True,
) -> dict:
    """Runs tasks through the compressed cache.

    Args:
        llm: with an empty cache and a tokenizer.
        names: of tasks, groups or tags of the harness, or of ``task_dir``.
        task_dir: folder of task files of one's own (YAML, as the harness reads them, in subfolders too). Paths of data in
            them are relative to it. They may name Python functions, which run: use only those that you trust.
        limit: examples of each task, the first ones; None: all.
        fewshot: solved examples before each question; None: as the task says.
        chat_template: True to give prompts as conversations in the tokenizer's chat template, or the name of one of several;
            solved examples are then earlier turns.
        system: instruction before each prompt; the system's message if there is a chat template.
        seed: of few-shot examples and of tasks that sample.
        allow_code: whether tasks may execute code that the model has written.
        progress: see `CompressedLM`.

    Returns:
        Figures of each task and group, what they cost the cache, and the harness's version, ready for JSON.

    Raises:
        ValueError: in one sentence: if lm-eval is not installed, a name is unknown, a task's data cannot be had, a task
            executes code and may not, or what it asks for is beyond the model.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if fewshot is not None and fewshot < 0:
        raise ValueError(f"fewshot must be at least 0, got {fewshot}")
    folder = None if task_dir is None else Path(task_dir).resolve()
    if folder is not None and not folder.is_dir():
        raise ValueError(f"{task_dir} is not a folder: --task-dir is a folder with task files (YAML)")
    with _needs_lm_eval():
        import lm_eval
        from lm_eval.api.group import Group

        from dmc.evaluation.lm_eval import CompressedLM
    model = CompressedLM(llm, seed=seed, progress=progress)
    model.chat_template(chat_template)
    with _quiet():
        known = _known(names, folder)
        _check_code(known, names, allow_code)
        with contextlib.chdir(folder or "."):
            loaded = [thing for name in names for thing in _loaded(known, name)]
        results = lm_eval.simple_evaluate(
            model=model,
            tasks=loaded,
            task_manager=known,
            limit=limit,
            num_fewshot=fewshot,
            confirm_run_unsafe_code=allow_code,
            apply_chat_template=chat_template,
            system_instruction=system,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            log_samples=True,
        )
    groups = {thing.name for thing in loaded if isinstance(thing, Group)}
    return _figures(results, groups) | {"cache": model.usage.as_dict(), "lm_eval": lm_eval.__version__}


def check_tasks(names: Sequence[str], task_dir: str | Path | None) -> None:
    """Raises ValueError if the harness is missing, the folder is none, or no task has one of these names."""
    folder = None if task_dir is None else Path(task_dir).resolve()
    if folder is not None and not folder.is_dir():
        raise ValueError(f"{task_dir} is not a folder: --task-dir is a folder with task files (YAML)")
    with _needs_lm_eval():
        import lm_eval  # noqa: F401
    with _quiet():
        _known(names, folder)


def as_text(figures: dict) -> str:
    """The figures of `run_tasks` as a table."""
    lines = []
    for name, each in figures["tasks"].items():
        metrics = ", ".join(
            f"{metric} {value:.4f}" + (f" ± {each['stderr'][metric]:.4f}" if metric in each["stderr"] else "")
            for metric, value in each["metrics"].items()
        )
        lines.append(f"{name}: {metrics} ({each['examples']} examples)")
    cache = figures["cache"]
    if cache["requests"]:
        lines.append(
            f"{cache['requests']} requests of {cache['tokens']:.0f} tokens: CR {cache['cr']:.2f}, held "
            f"{cache['held_bytes']:,.0f} bytes each (encoded {cache['held']['pages']:,.0f}), dense bf16 / held "
            f"{cache['byte_ratio']:.2f}"
        )
    return "\n".join(lines)


def manager(folder: str | Path | None, *, defaults: bool = True) -> TaskManager:
    """The harness's own index of tasks, and those of a folder; reading its own takes some ten seconds."""
    with _needs_lm_eval():
        from lm_eval.tasks import TaskManager
    return TaskManager(include_path=None if folder is None else str(folder), include_defaults=defaults)


def _known(names: Sequence[str], folder: Path | None) -> TaskManager:
    """Tasks of the folder alone, if it has all names: the harness's own tasks need not be read then."""
    if folder is not None:
        own = manager(folder, defaults=False)
        if all(name in own.task_index for name in names):
            return own
    every = manager(folder)
    for name in names:
        if name not in every.task_index:
            near = difflib.get_close_matches(name, every.all_tasks, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists those of the harness"
            raise ValueError(f"no task is called {name!r}: {hint}")
    return every


def _check_code(known: TaskManager, names: Sequence[str], allowed: bool) -> None:
    """Before anything of such a task is loaded, since loading it executes code already."""
    if allowed:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # the metric's own consent
        return
    for name in names:
        for leaf in _leaves(known, name):
            if (known.task_index[leaf].cfg or {}).get("unsafe_code"):
                raise ValueError(
                    f"{leaf} executes code that the model writes, on this machine: add --allow-code if you want that, or leave "
                    "the task out"
                )


def _leaves(known: TaskManager, name: str) -> Iterator[str]:
    """Names of the tasks of a task, group or tag, as far as the index knows them."""
    entry = known.task_index.get(name)
    if entry is None:
        return
    members = (entry.cfg or {}).get("task") if entry.kind.name == "GROUP" else entry.tags if entry.kind.name == "TAG" else None
    if members is None:
        yield name
        return
    for member in members:
        own = member if isinstance(member, str) else member.get("task") or member.get("group")
        if isinstance(own, str) and own != name:
            yield from _leaves(known, own)


def _loaded(known: TaskManager, name: str) -> list:
    """A group, or the tasks of a name; their data are read."""
    try:
        found = known.load([name])
    except Exception as error:  # the harness, `datasets` and the hub raise whatever they raise
        entry = known.task_index[name]
        source = (entry.cfg or {}).get("dataset_path")
        what = f"data set {source}" if isinstance(source, str) else "data"
        raise ValueError(
            f"task {name} cannot be loaded: {_first_line(error)}. Its {what} must be on this machine or come from the Hugging "
            "Face hub; is there a network?"
        ) from error
    return [found["groups"][name]] if name in found["groups"] else list(found["tasks"].values())


def _figures(results: dict, asked: set[str]) -> dict:
    tasks = {}
    for name, figures in results["results"].items():
        if name in results.get("groups", {}) and name not in asked and not figures:
            continue
        metrics, errors = {}, {}
        for key, value in figures.items():
            if not isinstance(value, int | float) or "," not in key:
                continue
            metric, _, kept = key.partition(",")
            target, metric = (errors, metric.removesuffix("_stderr")) if metric.endswith("_stderr") else (metrics, metric)
            target[metric if kept == "none" else f"{metric}:{kept}"] = float(value)
        samples = results.get("samples", {}).get(name, [])
        examples = len({sample["doc_id"] for sample in samples}) or _count(results, name)
        tasks[name] = {
            "metrics": metrics,
            "stderr": errors,
            "examples": examples,
            "hash": _hash(samples),
            "version": results.get("versions", {}).get(name),
            "fewshot": results.get("n-shot", {}).get(name),
        }
    return {"tasks": tasks}


def _count(results: dict, group: str) -> int | None:
    """Examples of all tasks of a group."""
    members = results.get("group_subtasks", {}).get(group, [])
    counts = [_count(results, member) or results.get("n-samples", {}).get(member, {}).get("effective", 0) for member in members]
    return sum(counts) or None


def _hash(samples: Sequence[dict]) -> str | None:
    """16 hex digits of the questions and answers of a task, in order; None for a group."""
    if not samples:
        return None
    text = "".join(f"{sample['doc_hash']}{sample['prompt_hash']}{sample['target_hash']}" for sample in samples)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n", 1)[0].rstrip(". ")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextlib.contextmanager
def _needs_lm_eval() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(f"tasks need {error.name}: pip install -e '.[eval]' in the checkout") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's remarks on its own settings; what is wrong comes as an error."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
