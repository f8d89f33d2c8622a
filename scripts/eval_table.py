"""Needle retrieval and a multiple-choice set of one model under several caches, as a table (docs/results/eval.md).

    python scripts/eval_table.py checkpoints/base --out runs/eval
    python scripts/eval_table.py checkpoints/base --out runs/eval --models runs/cpu-long/cr4-hf runs/gqa1-hf
    python scripts/eval_table.py SmolLM2-135M --out runs/eval --task-dir DIR --tasks arc_local,piqa_local

Runs `dmc eval` once for each cache, all in this process, and writes each report and table.md into --out. Models of
--models (retrofits of the first, or the first after GQA up-training) come under their own policy. The multiple-choice
set is made from the standard library's held-out files: which line follows 40 lines of source, the real one or one of
three others of the same file? It is written as a task of the lm-evaluation-harness; --tasks names others instead.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
from pathlib import Path

from data.stdlib import documents, split
from dmc.cli import main as dmc
from dmc.evaluation.grid import runnable

CACHES = {
    "full, dense bf16": ["--policy", "full", "--exact-dtype", "bf16"],
    "full, GEAR 4 bit": ["--policy", "full", "--codec", "gear-4bit"],
    "full, GEAR 2 bit": ["--policy", "full", "--codec", "gear-2bit"],
    "full, TCQ 4 bit": ["--policy", "full", "--codec", "tcq", "--bits", "4"],
    "full, TCQ 2 bit": ["--policy", "full", "--codec", "tcq", "--bits", "2"],
    "StreamingLLM 1/4, dense bf16": ["--policy", "streaming:share=0.25", "--exact-dtype", "bf16"],
    "H2O 1/4, dense bf16": ["--policy", "h2o:share=0.25", "--exact-dtype", "bf16"],
    "TOVA 1/4, dense bf16": ["--policy", "tova:share=0.25", "--exact-dtype", "bf16"],
}
OF_OTHERS = {
    "dense bf16": ["--exact-dtype", "bf16"],
    "GEAR 4 bit": ["--codec", "gear-4bit"],
    "TCQ 4 bit": ["--codec", "tcq", "--bits", "4"],
}
"""What each of --models gets, under the policy that it was trained for, or full."""
TASK = {
    "task": "next_line",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "next_line.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{text}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "target_delimiter": "",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
    "metadata": {"version": 1.0},
}
LINES = 40


def write_choices(folder: Path, count: int) -> None:
    """The multiple-choice task, ``count`` questions."""
    folder.mkdir(parents=True, exist_ok=True)
    draw, questions = random.Random(0), []
    files = [text for document in split(documents(("src",)))[1] if len(text := document.text.splitlines()) > 3 * LINES]
    while len(questions) < count:
        lines = draw.choice(files)
        start = draw.randrange(len(lines) - LINES)
        text, right = lines[start : start + LINES], lines[start + LINES]
        others = sorted({line for line in lines if len(line.strip()) > 12 and line not in (*text, right)})
        if len(right.strip()) <= 12 or len(others) < 3:
            continue
        choices = [right, *draw.sample(others, 3)]
        draw.shuffle(choices)
        questions.append(
            {"text": "\n".join(text), "choices": [f"\n{choice}" for choice in choices], "answer": choices.index(right)}
        )
    (folder / "next_line.jsonl").write_text("".join(f"{json.dumps(question)}\n" for question in questions))
    (folder / "next_line.yaml").write_text(json.dumps(TASK))  # JSON is YAML


def runs(model: str, others: list[Path]) -> dict[str, list[str]]:
    """Name of a row → model and flags of `dmc eval`.

    Raises:
        ValueError: if one of the others is not a model.
    """
    rows = {name: [model, *flags] for name, flags in CACHES.items()}
    for path in others:
        able = runnable(path)
        policy = "full" if "full" in able else able[0]
        rows |= {f"{path.name}, {policy}, {name}": [str(path), "--policy", policy, *flags] for name, flags in OF_OTHERS.items()}
    return rows


def table(reports: dict[str, dict]) -> str:
    """Markdown, a line a cache; ± is the standard error over needles and questions."""
    tasks = list(next(iter(reports.values()))["tasks"]["tasks"])
    lines = [
        f"| cache | exact | choice | margin, nats | {' | '.join(f'{task}, acc' for task in tasks)} | CR | "
        "KV bytes per prompt | dense bf16 / held |",
        "|---" * (7 + len(tasks)) + "|",
    ]
    for name, report in reports.items():
        (needle,), scored = report["needle"]["kinds"].values(), report["tasks"]["tasks"]
        margins = [trial["margin"] for trial in report["needle"]["trials"]]
        error = statistics.stdev(margins) / math.sqrt(len(margins)) if len(margins) > 1 else math.nan
        accuracies = " | ".join(f"{scored[task]['metrics']['acc']:.3f} ± {scored[task]['stderr']['acc']:.3f}" for task in tasks)
        lines.append(
            f"| {name} | {needle['exact']:.2f} | {needle['choice']:.2f} | {needle['margin']:+.2f} ± {error:.2f} | "
            f"{accuracies} | {needle['cr']:.2f} | {needle['held_bytes']:,.0f} | {needle['byte_ratio']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """See the head of this file."""
    options = _options()
    try:
        rows = runs(options.model, options.models)
    except ValueError as error:
        print(f"eval_table: {error}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    tasks, folder = options.tasks, options.task_dir
    if not tasks:
        tasks, folder = TASK["task"], options.out / "tasks"
        write_choices(folder, options.questions)
    reports = {}
    for number, (name, words) in enumerate(rows.items()):
        out = options.out / f"{number}.json"
        code = dmc(
            [
                "eval",
                *words,
                "--needle",
                "--kinds",
                "passkey",
                "--lengths",
                str(options.length),
                "--depths",
                "10,50,90",
                "--trials",
                str(options.trials),
                "--choices",
                "6",
                "--tasks",
                tasks,
                "--task-dir",
                str(folder),
                *(["--limit", str(options.questions)] if options.tasks else []),
                "--json",
                str(out),
                "--plot",
                str(options.out / f"{number}.png"),
            ]
        )
        if code:
            return code
        reports[name] = json.loads(out.read_text())
        (options.out / "table.md").write_text(table(reports))
        print(f"--- {name}\n{table(reports)}", flush=True)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", type=Path, nargs="+", default=[], help="others to compare with it, each under its own policy")
    parser.add_argument("--length", type=int, default=512, help="tokens of needle prompts (512)")
    parser.add_argument("--trials", type=int, default=4, help="needles at each of three depths (4)")
    parser.add_argument("--questions", type=int, default=48, help="of the multiple-choice set, or of each of --tasks (48)")
    parser.add_argument("--tasks", help="tasks of the harness, with commas between, instead of the set that is made here")
    parser.add_argument("--task-dir", type=Path, help="where their files are")
    options = parser.parse_args()
    if bool(options.tasks) != bool(options.task_dir):
        parser.error("--tasks and --task-dir belong together: the names, and the folder with their files")
    return options


if __name__ == "__main__":
    sys.exit(main())
