"""Train the small base model's byte-level BPE tokenizer on the standard library's training split.

    python scripts/train_tokenizer.py OUT --vocab-size 2048

Writes tokenizer.json and tokenizer_config.json, which `AutoTokenizer.from_pretrained(OUT)` reads.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data import stdlib

END, PAD = "<|endoftext|>", "<|pad|>"


def main() -> None:
    """Parse the arguments, train, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory to write the two tokenizer files to")
    parser.add_argument("--vocab-size", type=int, default=2048, help="entries, special tokens included (2048)")
    args = parser.parse_args()
    if (args.out / "tokenizer.json").exists():
        sys.exit(f"error: {args.out / 'tokenizer.json'} exists; name another directory")
    training, _ = stdlib.split(stdlib.documents(("src", "topic", "api")))
    tokenizer = train([d.text for d in training], args.vocab_size)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(args.out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
        "bos_token": END,
        "eos_token": END,
        "pad_token": PAD,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (args.out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    characters = sum(len(d.text) for d in training)
    tokens = sum(len(e.ids) for e in tokenizer.encode_batch([d.text for d in training]))
    print(f"{args.vocab_size} entries; {tokens} training tokens, {characters / tokens:.2f} characters a token")


def train(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer: any text round-trips; digits are single tokens; indentation is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


if __name__ == "__main__":
    main()
