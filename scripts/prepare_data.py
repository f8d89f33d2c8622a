#!/usr/bin/env python
"""Make a prepared corpus: tokens in Megatron's .bin/.idx form with a held-out part, for `train.py data.text=OUT`.

    python scripts/prepare_data.py 'books/*.jsonl.xz' --tokenizer MODEL_DIR --output corpora/books --held-out 0.005
    python scripts/prepare_data.py HuggingFaceFW/fineweb-edu --config sample-10BT --tokenizer MODEL_DIR \\
        --output corpora/fineweb --held-out 1000 --workers 16
    python scripts/prepare_data.py --verify corpora/books

Sources: files (.txt .jsonl .json .parquet .arrow .csv .tsv, compressed or not), patterns, directories, what
`datasets` saved, names on the Hugging Face Hub. docs/data.md has the rest.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dmc.extras import needed_for  # noqa: E402

_BOS = {"auto": "auto", "true": True, "false": False}


def main(argv: list[str] | None = None) -> int:
    """Parse, prepare or verify, say what came out; one sentence and 2 for what the user can fix."""
    args = _parser().parse_args(argv)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # --workers says how many cores tokenise
    try:
        _verify(args) if args.verify else _prepare(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was kept", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("sources", nargs="*", metavar="SOURCE", help="file, pattern, directory or Hub dataset; several are read in turn")
    add("--tokenizer", metavar="DIR", help="model directory whose tokenizer is used")
    add("--output", type=Path, metavar="DIR", help="the prepared corpus; must not exist")
    add("--text-column", help="column that holds the text (text; with --chat: messages)")
    add(
        "--chat",
        action="store_true",
        help="the column holds conversations, rendered by the tokenizer's chat template (docs/chat.md)",
    )
    add(
        "--loss-on",
        choices=("everything", "assistant"),
        help="with --chat: assistant also stores which tokens are assistant turns, for data.loss_on=assistant (everything)",
    )
    add("--held-out", metavar="SHARE", help="fraction (0.005) or count (1000) of the documents, chosen by their hash (0)")
    add("--held-out-file", action="append", default=[], metavar="SOURCE", help="held-out documents of their own; may be repeated")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="tokenising processes (one a core)")
    add("--config", help="configuration of a Hub dataset that has several")
    add("--split", default="train", help="split of a Hub or saved dataset (train)")
    add("--revision", help="branch, tag or commit of a Hub dataset: pin it, or the corpus may change")
    add("--download", action="store_true", help="download a Hub dataset before reading it, instead of streaming")
    add("--txt-documents", default="file", choices=("file", "paragraph", "line"), help="what one document of a .txt is (file)")
    add(
        "--parse-special-tokens",
        action="store_true",
        help="names of special tokens in the text are the tokens (chat templates), not text",
    )
    add(
        "--bos",
        default="auto",
        choices=list(_BOS),
        help="whether documents begin with a BOS token: auto follows the tokenizer, as served prompts do (auto)",
    )
    add("--limit", type=int, help="stop after so many documents")
    add("--verify", type=Path, metavar="DIR", help="read every byte of a prepared corpus and compare it with its hashes")
    return parser


def _prepare(args: argparse.Namespace) -> None:
    missing = [n for n, v in (("SOURCE", args.sources), ("--tokenizer", args.tokenizer), ("--output", args.output)) if not v]
    if missing:
        raise ValueError(f"{' and '.join(missing)} must be given: see --help")
    for name, value in (("--workers", args.workers), ("--limit", args.limit)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}: it must be at least 1")
    if args.loss_on and not args.chat:
        raise ValueError(f"--loss-on {args.loss_on} is for conversations: give --chat too")
    if args.chat and args.bos != "auto":
        raise ValueError(f"--bos {args.bos} is for texts, and a chat template writes the first tokens itself: leave it out")
    with needed_for("the preparation of a corpus"):  # late, so that --help and wrong flags are answered at once
        import dmc.training  # noqa: F401 - before anything of megatron
        from data.prepare import HeldOut, prepare
        from data.sources import Request
        from data.tokens import load_tokenizer

    # Through the clean-up, now that there may be something to clean (libraries swallow it while they are imported).
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    held_out = HeldOut.parse(args.held_out, args.held_out_file)
    request = Request(
        args.sources,
        column=args.text_column or ("messages" if args.chat else "text"),
        config=args.config,
        split=args.split,
        revision=args.revision,
        streaming=not args.download,
        txt_documents=args.txt_documents,
    )
    meta = prepare(
        request,
        load_tokenizer(args.tokenizer),
        args.output,
        held_out=held_out,
        workers=args.workers,
        parse_special=args.parse_special_tokens,
        limit=args.limit,
        bos=_BOS[args.bos],
        loss_on=(args.loss_on or "everything") if args.chat else None,
    )
    _show(args.output, meta)


def _verify(args: argparse.Namespace) -> None:
    with needed_for("the check of a corpus"):
        import dmc.training  # noqa: F401 - before anything of megatron
        from data.corpus import verify

    _show(args.verify, verify(args.verify))


def _show(path: Path, meta: dict) -> None:
    from data.skipped import Skipped

    for name, part in meta["parts"].items():
        print(
            f"{path}/{name}: {part['documents']} documents, {part['tokens']} tokens, {part['characters']} characters "
            f"({part['characters'] / part['tokens']:.2f} a token), hash {part['hash']}, tokenizer {meta['tokenizer']['hash']}"
            + (f", {part['scored']} tokens in assistant turns" if "scored" in part else "")
        )
    skipped = Skipped(*(meta.get(name, 0) for name in ("blank_documents", "null_documents", "empty_files")))
    if skipped or meta.get("copies_of_held_out"):
        copies = meta.get("copies_of_held_out")
        print(f"left out: {', '.join(filter(None, (str(skipped), f'{copies} copies of held-out documents' if copies else '')))}")


if __name__ == "__main__":
    sys.exit(main())
