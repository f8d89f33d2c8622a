"""What an int8 ring of recent tokens would cost in quality: KL and perplexity on held-out text, ring in fp32, bf16 and int8.

    python scripts/ring_storage.py runs/late4-hf --output docs/results/late/ring.json

The cache stores the ring in the dtype of full-precision entries. Here each key and value that enters the ring is rounded to
bf16, or to int8 with one bf16 scale per token and head, and stored in fp32, so that only the ring differs. Models: an export
with late merging, and the base model under fitted decisions (policy gate). 8 windows of 512 + 512 tokens, every token
after the prompt through the cache.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.stdlib import documents, split  # noqa: E402
from dmc import LLM  # noqa: E402
from dmc.cache import codec  # noqa: E402
from dmc.cache.storage.rows import Metadata, Rows  # noqa: E402
from dmc.evaluation.measure import measure  # noqa: E402
from dmc.evaluation.provenance import commit, hardware, model_hash, versions  # noqa: E402
from dmc.evaluation.reference import reference  # noqa: E402
from dmc.evaluation.windows import cut_windows  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Wires only."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="export with late merging")
    parser.add_argument("--base", type=Path, default=ROOT / "checkpoints/base", help="the uncompressed model (checkpoints/base)")
    parser.add_argument(
        "--decisions",
        type=Path,
        default=ROOT / "checkpoints/decisions/base.safetensors",
        help="fitted decisions of the base (checkpoints/decisions/base.safetensors)",
    )
    parser.add_argument("--target-cr", type=float, default=3.0, help="of the fitted decisions (3)")
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the result")
    args = parser.parse_args()
    torch.set_num_threads(1)
    try:
        result = compare(args)
    except (ValueError, OSError) as error:
        print(f"ring_storage: {error}", file=sys.stderr)
        sys.exit(2)
    args.output.write_text(json.dumps(result, indent=1) + "\n")


def compare(args: argparse.Namespace) -> dict:
    """Rows of both models and all storages."""
    _, texts = split(documents(("guide",)))
    windows = cut_windows([text.text for text in texts], args.base, name="stdlib, held out", prompt=512, scored=512, count=8)
    wanted, rows = reference(args.base, windows, store=None), []
    gate = {"policy": "gate", "decisions": str(args.decisions), "target_cr": args.target_cr}
    for name, model, given in (("late merging", args.model, {}), ("gate", args.base, gate)):
        for storage in ("fp32", "bf16", "int8"):
            llm = LLM(model, device="cpu", dtype="fp32", exact_dtype="fp32", max_batch=8, **given)
            if llm.cache.policy.ring is None:
                raise ValueError(f"{model} has no window of recent tokens")
            write = Rows.write_full
            try:
                Rows.write_full = through(write, storage, llm.cache.policy.ring)
                found = measure(llm, windows, reference=wanted)
            finally:
                Rows.write_full = write
            rows.append(
                {
                    "method": name,
                    "ring": storage,
                    "window": llm.cache.policy.ring,
                    "perplexity": found.perplexity,
                    "kl": found.kl,
                    "kl_stderr": found.kl_stderr,
                    "kl_windows": found.kl_windows,
                    "cr": found.cr,
                    "model_hash": model_hash(model),
                }
            )
            print({key: value for key, value in rows[-1].items() if key != "kl_windows"}, flush=True)
    return {
        "rows": rows,
        "base_perplexity": found.base_perplexity,
        "prompt": 512,
        "scored": 512,
        "windows": 8,
        "hardware": hardware("cpu"),
        "commit": commit(),
        "versions": versions(),
        "command": " ".join(["python", *sys.argv]),
    }


def through(write, storage: str, ring: int):  # noqa: ANN001, ANN201 - methods of Rows
    """`Rows.write_full` whose entries of the ring are rounded to a storage first."""

    def rounded(self: Rows, rows: Tensor, offsets: Tensor, keys: Tensor, values: Tensor, metadata: Metadata) -> None:
        inside = (offsets < ring)[..., None]
        keys, values = (torch.where(inside, round_to(x, storage), x) for x in (keys, values))
        write(self, rows, offsets, keys, values, metadata)

    return rounded


def round_to(x: Tensor, storage: str) -> Tensor:
    """``[..., D]`` as it reads from a storage, in the dtype of x."""
    if storage == "int8":
        int8, flat = codec("int8"), x.reshape(1, -1, x.shape[-1])
        return int8.decode(int8.encode(flat, flat))[0].to(x.dtype).view(x.shape)
    return x.to({"fp32": torch.float32, "bf16": torch.bfloat16}[storage]).to(x.dtype)


if __name__ == "__main__":
    main()
