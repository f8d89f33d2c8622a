"""The numbers and samples of a small model's card: held-out perplexity, what far tokens are worth, what it writes.

    python scripts/base_card.py checkpoints/base

Computed with transformers alone, in fp32, on the standard library's held-out guides (one sequence within one document
each). "Far tokens": the loss at positions 768 to 1,023 with all tokens before them, against the same tokens where each
block of 64 sees only the 192 tokens before the block and itself. Prints Markdown.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from dmc import pretrained
from dmc.extras import needed_by_script

with needed_by_script("the card"):
    from data import tokens as token_files
    from data.batches import Sequences

_LENGTH, _FAR, _BLOCK, _NEAR = 1024, 768, 64, 192
_PROMPTS = ('The "with" statement', "import os\nimport sys\n\ndef main(argv):", '    def close(self):\n        """')


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face directory")
    parser.add_argument("--text", default="stdlib", help="as train.py's data.text (stdlib)")
    parser.add_argument("--sequences", type=int, default=24, help="held-out sequences (24); far tokens: half of them")
    args = parser.parse_args()
    if not Path(args.model).is_dir() or args.sequences < 1:
        parser.error(f"{args.model} must be a Hugging Face directory, and --sequences {args.sequences} at least 1")
    disable_progress_bar()
    try:
        _card(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _card(args: argparse.Namespace) -> None:
    model = pretrained.load_model(args.model, torch.float32)
    tokenizer = token_files.load_tokenizer(args.model, model.config.vocab_size)
    _, corpus = token_files.corpora(args.text, "", tokenizer, "runs/data")
    batch = Sequences(corpus, _LENGTH).within_documents(args.sequences)
    ids = torch.cat([batch.tokens, batch.labels[:, -1:]], dim=1)
    with torch.inference_mode():
        losses = torch.cat([_losses(model, row[None]) for row in ids]).double()
        characters = sum(len(tokenizer.decode(row)) for row in batch.labels.tolist()) / batch.labels.numel()
        half = ids[: max(1, args.sequences // 2)]
        near = torch.stack([_near(model, row) for row in half]).double().mean().item()
    print(f"| perplexity, {len(ids)} sequences | {math.exp(losses.mean()):.2f} a token ({characters:.2f} characters a token) |")
    far = losses[: len(half), _FAR:].mean()
    print(f"| loss at positions {_FAR} to {_LENGTH - 1}, all before them seen | {far:.2f} nats/token |")
    print(f"| the same, only the newest {_NEAR} to {_NEAR + _BLOCK} seen | {near:.2f} nats/token |")
    for prompt in _PROMPTS:
        print(f"\n```\n{_sample(model, tokenizer, prompt)}\n```")


def _losses(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Loss of each token but the first: ids ``[B, T + 1]`` → ``[B, T]``, nats."""
    logits = model(ids[:, :-1]).logits
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


def _near(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Mean loss from position `_FAR` on, block by block with only the nearest tokens as context."""
    starts = range(_FAR, _LENGTH, _BLOCK)
    windows = torch.stack([ids[start - _NEAR : start + _BLOCK + 1] for start in starts])
    return _losses(model, windows)[:, _NEAR:].mean()


def _sample(model: PreTrainedModel, tokenizer: object, prompt: str) -> str:
    torch.manual_seed(0)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    made = model.generate(ids, max_new_tokens=70, do_sample=True, temperature=0.7, top_p=0.95, top_k=0)
    return tokenizer.decode(made[0], skip_special_tokens=True)


if __name__ == "__main__":
    main()
