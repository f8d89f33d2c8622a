"""Writes a training checkpoint as a self-contained Hugging Face directory.

    python scripts/export_hf.py CHECKPOINT OUT

OUT then loads with AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True) where only torch and
transformers are installed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checkpoints.convert import load_hf_state  # noqa: E402
from checkpoints.export_hf import export  # noqa: E402

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: list[str] | None = None) -> int:
    """Export, and return the exit code: 0, or 2 with one sentence on standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="directory of a training checkpoint")
    parser.add_argument("out", help="directory to create; must not exist")
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="of the weights (default: bfloat16)")
    args = parser.parse_args(arguments)
    try:
        tensors, meta = load_hf_state(args.checkpoint)
        names = ("decision", "offset", "gain", "target_cr", "measured_cr", "tokenizer_dir")
        out = export(
            tensors, meta["hf_config"], out=args.out, **{name: meta[name] for name in names},
            card={"step": meta["step"], **meta["results"]}, dtype=_DTYPES[args.dtype],
        )
    except (ValueError, OSError) as error:
        print(f"export_hf: {error}", file=sys.stderr)
        return 2
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
