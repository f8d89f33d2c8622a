"""`dmc eval`: what a model is worth over its compressed cache, and what that cache holds."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dmc.commands.common import add_model, check_output, load, write_whole
from dmc.extras import required

_LONG = "long"  # the suite of `dmc.evaluation.long`

if TYPE_CHECKING:
    from tqdm import tqdm

    from dmc.engine import LLM
    from dmc.evaluation.long import LongSettings, Written
    from dmc.evaluation.needle import NeedleSettings
    from dmc.evaluation.reference import Reference
    from dmc.evaluation.suite import SuiteSettings
    from dmc.evaluation.windows import Windows


def add(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    add_model(parser)
    _add_text(parser)
    _add_needle(parser)
    _add_tasks(parser)
    out = parser.add_argument_group("all")
    out.add_argument("--seed", type=int, default=0, help="seed of needles, few-shot examples and sampling (0)")
    out.add_argument(
        "--seeds",
        type=int,
        metavar="N",
        help="with --suite quick, retrieval or long: N seeds, from --seed on: "
        "more samples, and other draws of a policy with a seed, such as random (1)",
    )
    out.add_argument("--json", metavar="OUT", help="file for all figures, with hashes, commit, versions and settings")
    out.add_argument("--no-progress", action="store_true", help="no progress bars (off anyway if stderr is not a terminal)")


def run(options: argparse.Namespace) -> None:
    """Measures what was asked for, prints it and writes it.

    Raises:
        ValueError: if nothing was asked for, or something cannot be measured; one sentence.
    """
    asked = [
        (name, measure)
        for name, wanted, measure in (
            ("text", options.text, _text),
            ("needle", options.needle, _needle),
            ("retrieval", _own_suite(options), _retrieval),
            ("long", options.suite == _LONG, _long),
            ("tasks", options.tasks or _harness_suite(options), _tasks),
        )
        if wanted
    ]
    if not asked:
        raise ValueError("nothing to measure: give --text FILE, --needle, --tasks NAME,NAME or --suite NAME")
    for flag in ("json", "plot"):
        check_output(f"--{flag}", getattr(options, flag))
    if options.plot and not options.needle:
        raise ValueError("--plot draws needle retrieval: add --needle")
    if options.plot and Path(options.plot).suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot {options.plot}: figures are .png, .svg or .pdf")
    if options.plot:
        required("--plot", "matplotlib")
    _check(options)
    ready = {"text": _references, "long": _written}  # before the model takes what memory there is for its cache
    ready = {name: (ready[name](options),) for name, _ in asked if name in ready}
    llm = load(options)
    figures = {name: measure(options, llm, *ready.get(name, ())) for name, measure in asked}
    if options.json:
        write_whole(options.json, json.dumps(_origin(options, llm) | figures, indent=1) + "\n")


def _check(options: argparse.Namespace) -> None:
    """What is wrong with a later measure is said before the first has run."""
    if options.needle:
        from dmc.evaluation.haystack import read_haystack

        _needle_settings(options)
        read_haystack(options.haystack)
    if _own_suite(options):
        from dmc.evaluation import suite
        from dmc.evaluation.haystack import read_haystack
        from dmc.model import read_config

        suite.check_room(_suite_settings(options), read_config(options.directory).positions)
        read_haystack(options.haystack)
    if options.suite == _LONG:
        from dmc.evaluation.haystack import read_haystack
        from dmc.model import read_config

        read_haystack(options.haystack)
        _long_settings(options).count(read_config(options.directory).positions)
        _base(options, needed=True)
    elif options.new_tokens is not None:
        raise ValueError(f"--new-tokens is for long generation: add --suite {_LONG}")
    if options.seeds is not None and not (_own_suite(options) or options.suite == _LONG):
        raise ValueError("--seeds is for --suite quick, retrieval or long: add one of them, or leave it out")
    if options.tasks or _harness_suite(options):
        from dmc.evaluation.tasks import check_tasks, task_names

        check_tasks(task_names(options.tasks, _harness_suite(options)), options.task_dir)
        if options.apply_chat_template:
            from dmc.evaluation.chat import choose_template
            from dmc.pretrained import load_tokenizer

            choose_template(load_tokenizer(options.directory), options.apply_chat_template)
    for flag in ("apply_chat_template", "system_instruction"):
        if getattr(options, flag) and not (options.tasks or _harness_suite(options)):
            raise ValueError(f"--{flag.replace('_', '-')} is for tasks: add --tasks or --suite")


def _add_text(parser: argparse.ArgumentParser) -> None:
    text = parser.add_argument_group("perplexity, and KL to the uncompressed model")
    text.add_argument("--text", nargs="+", action="extend", default=[], metavar="FILE", help="UTF-8 texts, measured separately")
    text.add_argument("--prompt-tokens", type=int, default=256, help="prefilled tokens of each window (256)")
    text.add_argument("--scored-tokens", type=int, default=256, help="scored tokens after them, fed one by one (256)")
    text.add_argument("--windows", type=int, default=8, help="number of windows, evenly spaced over each text (8)")
    text.add_argument("--base", metavar="DIR", help="the uncompressed model that DIR was retrofitted from (DIR, if it is plain)")
    text.add_argument("--references", metavar="DIR", help="cache of its predictions (~/.cache/dmc/references)")


def _references(options: argparse.Namespace) -> list[tuple[str, Windows, Reference | None]]:
    """Each text's windows, and what the uncompressed model predicts for them; None where there is none to compare with."""
    if not options.text or int(os.environ.get("RANK", "0")):  # ranks other than the first one have no texts: they serve it
        return []
    from dataclasses import replace

    from dmc.engine.llm import resolve
    from dmc.evaluation.reference import default_store, reference
    from dmc.evaluation.windows import read_windows
    from dmc.model import read_config

    device, dtype = resolve(options.device, options.dtype, read_config(options.directory).dtype)
    base, found = _base(options), []
    for file in options.text:
        windows = read_windows(
            file, options.directory, prompt=options.prompt_tokens, scored=options.scored_tokens, count=options.windows
        )
        store = options.references or default_store()
        wanted = reference(base, windows, store=store, dtype=dtype, device=device) if base else None
        if wanted and found:
            wanted = replace(wanted, head=found[0][2].head)  # one output matrix in memory, however many texts
        found.append((file, windows, wanted))
    return found


def _base(options: argparse.Namespace, *, needed: bool = False) -> str | None:
    """The uncompressed model: that of --base, or DIR if it is plain; None if DIR is a retrofit.

    Raises:
        ValueError: if it is ``needed`` and there is none.
    """
    from dmc.model import read_config

    if options.base or not read_config(options.directory).decision:
        return options.base or options.directory
    if needed:
        raise ValueError(
            f"--suite {_LONG} compares with texts of the uncompressed model, and {options.directory} is a retrofit: give --base, "
            "the model that it was retrofitted from"
        )
    return None


def _text(options: argparse.Namespace, llm: LLM, texts: list[tuple[str, Windows, Reference | None]]) -> list[dict]:
    from dataclasses import asdict

    from dmc.evaluation.measure import measure

    figures = []
    for file, windows, wanted in texts:
        with _bar(options, f"text {Path(file).name}", len(windows.tokens) * windows.scored, " tokens") as bar:
            done = measure(llm, windows, reference=wanted, progress=bar.update)
        figures.append(asdict(done))
        compared = (
            " (no --base: no KL)"
            if done.kl is None
            else (
                f" (uncompressed {done.base_perplexity:.4f}), KL {done.kl:.5f}"
                f"{'' if done.kl_stderr is None else f' ± {done.kl_stderr:.5f}'} nats/token, "
                f"same most likely token {done.agreement:.1%}"
            )
        )
        print(
            f"{file}: {done.windows} windows of {done.prompt_tokens} + {done.scored_tokens} tokens, perplexity "
            f"{done.perplexity:.4f}{compared}; CR {done.cr:.2f}, held {done.held_bytes:,.0f} bytes per window, dense bf16 / held "
            f"{done.ratio:.2f}"
        )
    return figures


def _add_needle(parser: argparse.ArgumentParser) -> None:
    hay = parser.add_argument_group("needle in a haystack")
    hay.add_argument("--needle", action="store_true", help="retrieve a needle from a haystack, at lengths x depths")
    hay.add_argument(
        "--haystack",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="UTF-8 texts (the Python standard library's prose)",
    )
    hay.add_argument("--kinds", type=_list(str), help="passkey,fact (default), constant; with --suite: its kinds (all)")
    hay.add_argument("--lengths", type=_list(int), help="tokens of the prompts (256,512,1024; with --suite: its own)")
    hay.add_argument("--depths", type=_list(float), default=(0, 25, 50, 75, 100), help="needle depths in %% (0,25,50,75,100)")
    hay.add_argument("--trials", type=int, help="prompts of each kind, length and depth (4; with --suite: its own)")
    hay.add_argument("--choices", type=int, default=10, help="number of answers compared, including the right one (10)")
    hay.add_argument(
        "--new-tokens",
        type=int,
        metavar="N",
        help="with --suite long: generated tokens of each text (1000, or as many as the model's positions leave)",
    )
    hay.add_argument("--plot", metavar="PNG", help="file for a heat map")


def _needle_settings(options: argparse.Namespace) -> NeedleSettings:
    from dmc.evaluation.needle import NeedleSettings

    given = _given(options)
    return NeedleSettings(depths=tuple(depth / 100 for depth in options.depths), choices=options.choices, **given)


def _given(options: argparse.Namespace, *more: str) -> dict:
    """What needles and suites share, and more settings, where they were given."""
    parts = {name: getattr(options, name) for name in ("lengths", "kinds", "trials", "seed", *more)}
    return {name: value for name, value in parts.items() if value is not None}


def _own_suite(options: argparse.Namespace) -> bool:
    """True if --suite names one of `dmc.evaluation.suite`, which needs no harness."""
    from dmc.evaluation.suite import SUITES

    return options.suite in SUITES


def _harness_suite(options: argparse.Namespace) -> str | None:
    return None if _own_suite(options) or options.suite == _LONG else options.suite


def _suite_settings(options: argparse.Namespace) -> SuiteSettings:
    from dataclasses import replace

    from dmc.evaluation.suite import SUITES

    return replace(SUITES[options.suite], **_given(options, "seeds"))


def _retrieval(options: argparse.Namespace, llm: LLM) -> dict:
    from dmc.evaluation import suite
    from dmc.evaluation.haystack import read_haystack

    settings, haystack = _suite_settings(options), read_haystack(options.haystack)
    with _bar(options, f"suite {options.suite}", suite.count(settings), " texts") as bar:
        answered = suite.run(llm, haystack, settings, bar.update)
    figures = suite.report(answered, haystack, settings)
    print(suite.as_text(figures))
    return figures


def _long_settings(options: argparse.Namespace) -> LongSettings:
    from dmc.evaluation.long import LongSettings

    given = _given(options, "seeds")
    if given.pop("kinds", None):
        raise ValueError(f"--kinds are those of needles and retrieval: --suite {_LONG} has none, so leave it out")
    return LongSettings(new_tokens=options.new_tokens, **given)


def _written(options: argparse.Namespace) -> list[Written]:
    """What the uncompressed model writes, on the first rank alone: the others serve it."""
    if int(os.environ.get("RANK", "0")):
        return []
    from dmc.engine.tokenizer import Tokenizer
    from dmc.evaluation.haystack import read_haystack
    from dmc.evaluation.long import write_full
    from dmc.evaluation.reference import default_store
    from dmc.model import read_config

    settings, tokenizer = _long_settings(options), Tokenizer(options.directory, read_config(options.directory).vocab_size)
    with _bar(options, "texts of the full cache", settings.seeds * len(settings.lengths) * settings.trials, " texts") as bar:
        return write_full(
            _base(options),
            tokenizer,
            read_haystack(options.haystack),
            settings,
            store=options.references or default_store(),
            device=options.device,
            dtype=options.dtype,
            max_batch=options.max_batch,
            progress=bar.update,
        )


def _long(options: argparse.Namespace, llm: LLM, written: list[Written]) -> dict:
    from dmc.evaluation import long
    from dmc.evaluation.haystack import read_haystack

    total = 2 * sum(one.texts.numel() for one in written)
    with _bar(options, f"suite {options.suite}", total, " tokens") as bar:
        continued = long.run(llm, written, bar.update)
    figures = long.report(continued, written, read_haystack(options.haystack), _long_settings(options))
    print(long.as_text(figures))
    return figures


def _needle(options: argparse.Namespace, llm: LLM) -> dict:
    from dmc.evaluation import needle
    from dmc.evaluation.haystack import read_haystack
    from dmc.evaluation.needle_plot import plot_needle

    settings = _needle_settings(options)
    haystack = read_haystack(options.haystack)
    with _bar(options, "needles", needle.count(settings), " needles") as bar:
        trials = needle.needle(llm, haystack, settings, bar.update)
    figures = needle.report(trials, haystack, settings)
    print(needle.as_text(figures))
    if options.plot:
        title = f"{llm.path.resolve().name}, {llm.cache.policy.name} x {llm.cache.codec_name}"
        plot_needle(figures, options.plot, title=title)
    return figures


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    tasks = parser.add_argument_group("tasks of the lm-evaluation-harness (pip install -e '.[eval]')")
    tasks.add_argument("--tasks", type=_list(str), default=(), metavar="NAME,NAME", help="names of the harness, or of --task-dir")
    tasks.add_argument(
        "--suite",
        metavar="NAME",
        help="choice (mmlu, arc_easy, ...) or standard (the usual ones); without the "
        "harness: quick or retrieval (needles, key-value pairs, several turns, written out), long (text "
        "against what the full cache writes)",
    )
    tasks.add_argument("--task-dir", metavar="DIR", help="your own task files (YAML; data paths relative to DIR)")
    tasks.add_argument("--limit", type=int, metavar="N", help="use only the first N examples of each task")
    tasks.add_argument("--fewshot", type=int, metavar="N", help="solved examples before each question (the task's default)")
    tasks.add_argument(
        "--apply-chat-template",
        "--apply_chat_template",
        nargs="?",
        const=True,
        default=False,
        metavar="NAME",
        help="format prompts with the tokenizer's chat template (the one called NAME, if it has several)",
    )
    tasks.add_argument("--system-instruction", "--system_instruction", metavar="TEXT", help="system message before each prompt")
    tasks.add_argument("--allow-code", action="store_true", help="let tasks execute code of the model on this machine")


def _tasks(options: argparse.Namespace, llm: LLM) -> dict:
    from dmc.evaluation.tasks import as_text, run_tasks, task_names

    figures = run_tasks(
        llm,
        task_names(options.tasks, _harness_suite(options)),
        task_dir=options.task_dir,
        limit=options.limit,
        fewshot=options.fewshot,
        chat_template=options.apply_chat_template,
        system=options.system_instruction,
        seed=options.seed,
        allow_code=options.allow_code,
        progress=not options.no_progress,
    )
    print(as_text(figures))
    return figures


def _origin(options: argparse.Namespace, llm: LLM) -> dict:
    """What the figures were made with."""
    from dmc import __version__
    from dmc.evaluation.measure import cache_settings
    from dmc.evaluation.provenance import commit, model_hash, versions

    arguments = {name: value for name, value in vars(options).items() if name not in ("command", "json", "no_progress")}
    return {
        "dmc": __version__,
        "commit": commit(),
        "versions": versions(),
        "model": llm.path.resolve().name,
        "model_hash": model_hash(llm.path),
        "policy": llm.cache.policy.name,
        "codec": llm.cache.codec_name,
        "settings": cache_settings(llm),
        "device": llm.model.device.type,
        "dtype": str(llm.model.dtype).removeprefix("torch."),
        "arguments": arguments,
    }


def _bar(options: argparse.Namespace, what: str, total: int, unit: str) -> tqdm:
    from tqdm import tqdm

    return tqdm(desc=what, total=total, unit=unit, dynamic_ncols=True, disable=True if options.no_progress else None)


def _list(kind: type) -> Callable[[str], tuple]:
    """``"a,b"`` → (a, b); an argparse type."""

    def parse(text: str) -> tuple:
        try:
            return tuple(kind(part.strip()) for part in text.split(","))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers, such as 1,2") from error

    return parse
