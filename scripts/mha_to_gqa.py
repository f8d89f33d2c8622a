"""Writes a Llama with fewer key/value heads: those of a group are averaged, for grouped-query up-training.

    python scripts/mha_to_gqa.py IN OUT --kv-heads 8
    torchrun train.py --config configs/gqa-uptrain.yaml --model OUT

IN and OUT are Hugging Face directories; IN may be multi-head or grouped already. The result needs training: its
quality right after the conversion is poor.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dmc.extras import needed_by_script  # noqa: E402

with needed_by_script("the conversion"):
    from checkpoints import gqa
    from checkpoints.export_hf import free, staged
    from checkpoints.files import DTYPES, SHARD_BYTES, parse_size


def main(arguments: list[str] | None = None) -> int:
    """Convert, and return the exit code: 0, or 2 with one sentence on standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="IN", type=Path, help="Hugging Face Llama directory with safetensors")
    parser.add_argument("out", metavar="OUT", help="directory to create; must not exist")
    parser.add_argument("--kv-heads", type=int, required=True, help="key/value heads of the result")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights written (default: each as it is stored)")
    parser.add_argument("--max-shard-size", default=str(SHARD_BYTES), help="of one file of weights, as in 4GB (4GB)")
    args = parser.parse_args(arguments)
    try:
        out, limit = free(args.out), parse_size(args.max_shard_size)
        with staged(out) as staging:
            gqa.convert(args.source, staging, args.kv_heads, dtype=args.dtype and DTYPES[args.dtype], limit=limit)
    except (ValueError, OSError) as error:
        print(f"mha_to_gqa: {error}", file=sys.stderr)
        return 2
    print(f"wrote {out}: {args.kv_heads} key/value heads")
    return 0


if __name__ == "__main__":
    sys.exit(main())
