"""What evicting policies remember: pairs that were said once and are asked for later, by cache budget.

    python scripts/retrieval.py SmolLM2-135M --budgets 80 40 20 --output retrieval.json

A text is a list of lines, a name and two words (`amber apple bread`), and later repeats some of them in another order.
Teacher-forced through the real cache: the loss of the repeated words is small if the first line is still there.
With --read prompt the list is a prompt, read exactly and then cut to the budget; with --read tokens everything but the
first token is generated, so the cache is cut after every token. Budgets are the tokens that a query sees;
bytes are those held at the end.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from dmc import LLM  # noqa: E402
from dmc.engine.tokenizer import Tokenizer  # noqa: E402
from dmc.evaluation.provenance import commit, model_hash, versions  # noqa: E402
from dmc.model import read_config  # noqa: E402

_NAMES = (
    "amber birch cedar delta ember frost grove haven ivory jolly karma lemon mango noble ocean pearl quiet river "
    "salt tiger urban velvet willow yellow zebra anchor basil copper dragon engine forest garden harbor island jacket kettle"
).split()
_VALUES = "apple bread chair dance eagle field glass horse image juice knife light money night order paper queen radio".split()


@dataclass(frozen=True)
class Text:
    """Token ids; ``prompt`` of them come before the questions; ``answers`` are the positions of the values asked for."""

    tokens: list[int]
    prompt: int
    answers: list[range]


@dataclass(frozen=True)
class Row:
    """Result of one policy and budget: mean loss of a value's token (nats); share of values whose every token has p > 1/2."""

    read: str
    policy: str
    budget: int | None
    loss: float
    found: float
    held_bytes: int
    ratio: float


def text(encode: Callable[[str], list[int]], lines: int, questions: int, seed: int) -> Text:
    """So many lines, then some of them again; pieces are encoded one by one, so that both are alike.

    Args:
        encode: text → token ids.
        lines, questions: how many, and how many of them are repeated; at most lines.
        seed: of names, words and order.
    """
    draw = random.Random(seed)
    pairs = [(name, f" {draw.choice(_VALUES)} {draw.choice(_VALUES)}") for name in draw.sample(_NAMES, lines)]
    tokens, answers = list(encode("\n")), []

    def say(name: str, value: str) -> None:
        tokens.extend(encode(name))
        start = len(tokens)
        tokens.extend(encode(value))
        answers.append(range(start, len(tokens)))
        tokens.extend(encode("\n"))

    for pair in pairs:
        say(*pair)
    prompt = len(tokens)
    answers.clear()
    for pair in draw.sample(pairs, questions):
        say(*pair)
    return Text(tokens, prompt, answers)


def policies(budget: int) -> dict[str, dict]:
    """Settings with which a query of each evicting policy sees ``budget`` tokens."""
    return {
        "streaming": {"sinks": 4, "recent": budget - 4},
        "h2o": {"heavy": budget - budget // 2, "recent": budget // 2},
        "tova": {"budget": budget},
    }


def measure(options: argparse.Namespace, texts: list[Text], policy: str, budget: int | None) -> Row:
    """Scores the texts under one policy."""
    settings = policies(budget)[policy] if budget else {}
    llm = LLM(
        options.directory,
        policy=policy,
        policy_settings=settings,
        codec="dense",
        exact_dtype="bf16",
        device="cpu",
        max_batch=len(texts),
        page_size=4,
    )
    # All texts go in step; of a longer one the last few tokens of its list are generated as well.
    prompt = 1 if options.read == "tokens" else min(one.prompt for one in texts)
    scores = llm.score([one.tokens for one in texts], prompt_tokens=prompt)
    loss, found = [], []
    for one, score in zip(texts, scores, strict=True):
        for places in one.answers:
            own = score.logprobs[torch.tensor(list(places)) - 1]
            loss += (-own).tolist()
            found.append(float(own.exp().min() > 0.5))
    held = sum(score.stats.held_bytes for score in scores)
    dense = sum(score.stats.dense_bytes for score in scores)
    return Row(options.read, policy, budget, sum(loss) / len(loss), sum(found) / len(found), held // len(texts), dense / held)


def main(arguments: list[str] | None = None) -> int:
    """Measures every policy at every budget, prints a table and writes JSON if asked to; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", metavar="DIR", help="Hugging Face model directory with a tokenizer")
    parser.add_argument("--read", choices=("prompt", "tokens"), default="prompt", help="how the list comes (prompt)")
    parser.add_argument("--budgets", type=int, nargs="+", default=[80, 40, 20], help="tokens that a query sees (80 40 20)")
    parser.add_argument("--lines", type=int, default=32, help="of the list (32)")
    parser.add_argument("--questions", type=int, default=8, help="lines asked for again (8)")
    parser.add_argument("--texts", type=int, default=4, help="of other names and words (4)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    if min(options.budgets) < 8 or not 1 <= options.questions <= options.lines <= len(_NAMES) or options.texts < 1:
        parser.error(f"budgets of at least 8, 1 text or more, and 1 to --lines questions of at most {len(_NAMES)} lines")
    try:
        if options.output:  # said now rather than when everything has been measured
            options.output.parent.mkdir(parents=True, exist_ok=True)
            if options.output.is_dir():
                raise ValueError(f"--output {options.output} is a folder: name a file")
        config = read_config(options.directory)
        encode = partial(Tokenizer(options.directory, config.vocab_size).inner.encode, add_special_tokens=False)
        texts = [text(encode, options.lines, options.questions, seed) for seed in range(options.texts)]
        rows = []
        print("read    policy      budget  loss   found  held bytes  dense bf16 / held")
        for policy, budget in [("full", None), *((name, size) for size in options.budgets for name in policies(size))]:
            row = measure(options, texts, policy, budget)
            rows.append(row)
            print(f"{row.read:7} {policy:11} {budget or '':>6} {row.loss:6.3f} {row.found:6.2f}", end=" ")
            print(f"{row.held_bytes:11,} {row.ratio:8.2f}", flush=True)
    except (ValueError, OSError) as error:
        print(f"retrieval: {error}", file=sys.stderr)
        return 2
    if options.output:
        facts = {
            "model": Path(options.directory).name,
            "model_hash": model_hash(options.directory),
            "commit": commit(),
            "versions": versions(),
            "lines": options.lines,
            "questions": options.questions,
            "texts": options.texts,
            "tokens": [len(one.tokens) for one in texts],
            "prompt": [one.prompt for one in texts],
            "rows": [asdict(row) for row in rows],
        }
        options.output.write_text(json.dumps(facts, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
