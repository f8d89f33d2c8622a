"""`dmc export`: a training checkpoint as a self-contained Hugging Face directory.

    dmc export CHECKPOINT OUT

OUT then loads with AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True) where only torch and
transformers are installed. A checkpoint of an uncompressed run (dmc.method=none) becomes an ordinary model of its family; so
does one trained for a fixed window (dmc.decision=all), with the policy to serve it with in its card. The weights are read
one tensor at a time; memory holds one file of the output.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from checkpoints import peft
from checkpoints.convert import load_hf_state
from checkpoints.export_hf import export, export_plain
from checkpoints.files import DTYPES, SHARD_BYTES, parse_size
from checkpoints.model_card import plain_card
from dmc import hub
from dmc.families import by_type
from dmc.training.config import recorded


def make_parser(program: str = "dmc export") -> argparse.ArgumentParser:
    """The flags of the command, whose name in help and errors is ``program``."""
    parser = argparse.ArgumentParser(prog=program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="directory of a training checkpoint")
    parser.add_argument("out", help="directory to create; must not exist")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: as in training)")
    parser.add_argument("--push-to-hub", metavar="ORG/NAME", help="upload OUT to this repository of the Hugging Face Hub as well")
    parser.add_argument("--private", action="store_true", help="with --push-to-hub: create the repository as private")
    parser.add_argument("--max-shard-size", default=str(SHARD_BYTES), help="maximum size of one weights file, as in 4GB (4GB)")
    return parser


def main(arguments: Sequence[str] | None = None, *, program: str = "dmc export") -> int:
    """Export, and return the exit code: 0, or 2 with one sentence on standard error.

    Args:
        arguments: of the command; those of the process if None.
        program: its name in help and errors.
    """
    args = make_parser(program).parse_args(arguments)
    try:
        limit = parse_size(args.max_shard_size)
        if args.push_to_hub is not None:
            hub.check_name(args.push_to_hub)
        elif args.private:
            raise ValueError("--private is of the repository that --push-to-hub makes: give both, or leave it out")
        print(_write(args, limit))
        if args.push_to_hub is not None:
            print(f"uploaded: {hub.push(args.out, args.push_to_hub, private=args.private)}")
    except (ValueError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    return 0


def _write(args: argparse.Namespace, limit: int) -> str:
    """Write the directory. → what was written, for the terminal."""
    tensors, meta = load_hf_state(args.checkpoint)
    dtype = DTYPES[args.dtype or ("bfloat16" if meta["config"]["run"]["precision"] == "bf16" else "float32")]
    policy = served_with(meta)
    if policy is not None or not meta["compressed"]:
        title = by_type(meta["hf_config"].get("model_type", "llama"), args.checkpoint).title
        card = plain_card(Path(args.out).name, meta, policy)
        out = export_plain(
            tensors,
            meta["hf_config"],
            out=args.out,
            tokenizer_dir=meta["tokenizer_dir"],
            card=card,
            dtype=dtype,
            max_shard_bytes=limit,
        )
        return f"wrote {out}: an ordinary {title}, " + (
            f"trained to be served with --policy {policy}" if policy else "since the checkpoint is not compressed"
        )
    names = ("method", "window", "looks_ahead", "decision", "offset", "gain", "target_cr", "measured_cr", "tokenizer_dir")
    settings, adapter = recorded(meta["config"]["dmc"]), None
    if settings.train == "lora":

        def adapter(directory: Path) -> None:
            peft.write(
                directory,
                tensors.updates(),
                base=meta["config"]["run"]["model"],
                rank=settings.lora_rank,
                alpha=settings.lora_alpha,
                dtype=dtype,
            )

    out = export(
        tensors,
        meta["hf_config"],
        out=args.out,
        **{name: meta[name] for name in names},
        card={"step": meta["step"], **meta["results"]},
        dtype=dtype,
        max_shard_bytes=limit,
        adapter=adapter,
    )
    return f"wrote {out}" + (f", its low-rank updates also as an adapter in {out / peft.FOLDER}" if adapter else "")


def served_with(meta: Mapping) -> str | None:
    """The policy of a compressed checkpoint whose tokens go by a rule of positions; None where the model decides.

    Args:
        meta: of `checkpoints.convert.load_hf_state`.

    Raises:
        ValueError: if no policy has that rule.
    """
    if not meta["compressed"]:  # the control of a rule as well
        return None
    rule = recorded(meta["config"]["dmc"]).rule(meta["config"]["data"]["sequence_length"])
    if rule is None:
        return None
    if rule.name == "all":
        return f"streaming:sinks={rule.sinks},recent={rule.window_at(meta['target_cr']) + 1}"
    raise ValueError(
        f"the checkpoint was trained with dmc.decision={rule.name}, a baseline that no serving policy carries out: its "
        "perplexity and CR are in metrics.jsonl of its run"
    )
