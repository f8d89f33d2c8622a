"""What a BOS token at the start of documents is worth: loss on held-out documents, before and after continued pretraining.

    python scripts/bos_effect.py MODEL_DIR stories.jsonl --runs runs/bos --output docs/results/bos.json

The tokenizer of MODEL_DIR must add a BOS token. Every twentieth document is held out. The model is scored on the first
tokens of each held-out document, with the BOS token before it (as a served prompt has it) and without. Then it is trained
on the other documents with data.bos=true and with data.bos=false, the same tokens of text in the same order of documents,
and scored in the same two ways. All scores are over the same tokens: the first token of a document, which nothing predicts
without BOS, is left out. Runs with several seeds, each a few minutes of CPU at most. Prints the table of the results.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

import dmc.training  # noqa: F401 - before anything of megatron
from data.files import read_files
from data.opening import opening
from data.stdlib import corpus_hash
from data.tokens import load_tokenizer
from dmc import pretrained
from dmc.evaluation import provenance

ROOT = Path(__file__).resolve().parents[1]
BUCKETS = {"2 to 8": (1, 8), "9 to 32": (8, 32), "33 to 128": (32, 128), "129 on": (128, None), "all": (1, None)}
PROMPTS = {"with BOS": True, "without": False}


def main() -> None:
    """Train, score, write, print."""
    args = _arguments()
    try:
        result = measure(args)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


def measure(args: argparse.Namespace) -> dict:
    """The rows of every model and prompt, and how they were made.

    Raises:
        ValueError: if the tokenizer adds no BOS token, or the text is too short.
    """
    tokenizer = load_tokenizer(args.model)
    begin = opening(tokenizer)
    if not begin:
        raise ValueError(f"the tokenizer in {args.model} adds no BOS token: name a model whose tokenizer does")
    docs, _ = read_files(args.text)
    cut = args.length - len(begin)
    kept = [tokenizer.encode(doc.text, add_special_tokens=False, verbose=False)[:cut] for doc in docs[19::20]]
    kept = [ids for ids in kept if len(ids) > BUCKETS["129 on"][0] + 1]
    if not kept:
        raise ValueError(f"{args.text} has no held-out document of more than {BUCKETS['129 on'][0] + 1} tokens: give more text")
    torch.set_num_threads(1)
    rows = _rows("base", None, Path(args.model), kept, begin)
    for seed in range(args.seeds):
        for name, bos in (("trained with BOS", "true"), ("trained without", "false")):
            rows += _rows(name, seed, _trained(args, bos, seed), kept, begin)
    return {
        "command": " ".join(["python scripts/bos_effect.py", *sys.argv[1:]]),
        "commit": provenance.commit(),
        "hardware": provenance.hardware("cpu"),
        "versions": provenance.versions(),
        "model": Path(args.model).name,
        "begin": begin,
        "text_hash": corpus_hash(docs),
        "documents": len(docs),
        "held_out": len(kept),
        "length": args.length,
        "scored_tokens": sum(len(ids) - 1 for ids in kept),
        "steps": args.steps,
        "batch": args.batch,
        "lr": args.lr,
        "seeds": args.seeds,
        "rows": rows,
    }


def table(result: dict) -> str:
    """Markdown: a line per model and prompt, losses in nats/token, the mean over seeds and their range."""
    lines = [f"| model | prompt | {' | '.join(f'tokens {name}' if name != 'all' else name for name in BUCKETS)} |"]
    lines.append("|---|---|" + "---|" * len(BUCKETS))
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in result["rows"]:
        groups.setdefault((row["model"], row["prompt"]), []).append(row["loss"])
    for (model, prompt), losses in groups.items():
        cells = [_cell([loss[name] for loss in losses]) for name in BUCKETS]
        lines.append(f"| {model} | {prompt} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


def _rows(name: str, seed: int | None, directory: Path, kept: list[list[int]], begin: list[int]) -> list[dict]:
    model = pretrained.load_model(directory, torch.float32)
    return [
        {"model": name, "seed": seed, "prompt": prompt, "loss": _scored(model, kept, begin if first else [])}
        for prompt, first in PROMPTS.items()
    ]


@torch.inference_mode()
def _scored(model: PreTrainedModel, kept: list[list[int]], begin: list[int]) -> dict[str, float]:
    """Mean loss of the tokens of each bucket; a token's number counts from the first of its document."""
    per_document = []
    for ids in kept:
        whole = torch.tensor([[*begin, *ids]])
        losses = F.cross_entropy(model(whole).logits[0, :-1], whole[0, 1:], reduction="none").double()
        per_document.append(losses[len(whole[0]) - len(ids) :])  # of the text's second token and those after it
    return {
        name: torch.cat([losses[first - 1 : stop and stop - 1] for losses in per_document]).mean().item()
        for name, (first, stop) in BUCKETS.items()
    }


def _trained(args: argparse.Namespace, bos: str, seed: int) -> Path:
    """A Hugging Face directory of the model after training; made once."""
    run = args.runs / f"bos-{bos}-{seed}"
    out = run / "hf"
    if out.is_dir():
        return out
    shutil.rmtree(run, ignore_errors=True)
    train = [
        sys.executable,
        ROOT / "train.py",
        "--model",
        args.model,
        "--output",
        run,
        "dmc.method=none",
        f"data.text={args.text}",
        f"data.bos={bos}",
        f"data.sequence_length={args.length}",
        f"data.cache={args.runs / 'cache'}",
        f"run.seed={seed}",
        f"run.steps={args.steps}",
        f"optim.global_batch={args.batch}",
        f"optim.micro_batch={args.batch}",
        f"optim.lr={args.lr}",
        f"optim.decay_steps={args.steps // 2}",
        "log.eval_sequences=4",
        "run.threads=1",
        "log.every=50",
    ]
    export = [sys.executable, ROOT / "scripts/export_hf.py", run / "checkpoints/final", out]
    for command in (train, export):
        subprocess.run([str(part) for part in command], check=True)
    return out


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face directory of a model whose tokenizer adds a BOS token")
    parser.add_argument("text", help="files as in data.text")
    parser.add_argument("--runs", type=Path, default=Path("runs/bos"), help="directory of the training runs (runs/bos)")
    parser.add_argument("--output", type=Path, default=Path("bos.json"), help="JSON file of the results (bos.json)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a training sequence, and of a scored document (256)")
    parser.add_argument("--steps", type=int, default=200, help="training steps (200)")
    parser.add_argument("--batch", type=int, default=8, help="sequences per step (8)")
    parser.add_argument("--lr", type=float, default=5e-4, help="learning rate (5e-4)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind (3)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
