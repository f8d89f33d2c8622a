"""The page of file formats of `scripts/make_reference.py`: fields from the classes that write the files."""

from __future__ import annotations

import dataclasses
import inspect
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open

from checkpoints import integrity
from dmc import fitted
from dmc.cache.codecs import layers
from dmc.commands.train import STOPPED
from dmc.evaluation.frontier import RESULTS, SCHEMA
from dmc.evaluation.long import Continued
from dmc.evaluation.measure import Measurement
from dmc.evaluation.needle import Trial
from dmc.evaluation.suite import Answered
from scripts.reference_text import attributes, escaped, table

ROOT = Path(__file__).resolve().parents[1]
ORIGIN = (
    "`dmc`, `commit`, `versions` (of Python and packages), `model`, `model_hash`, `policy`, `codec`, `settings`, `device`, "
    "`dtype` and `arguments`, all that the command was given"
)


def files() -> str:
    """All file formats."""
    return "\n\n".join(
        [
            "Formats of the files that commands write and read. All are written atomically: a file is there with its whole "
            "content, or it is not there.",
            "## Training checkpoint",
            _checkpoint(),
            "## Exported model",
            _export(),
            "## Decisions",
            _decisions(),
            "## Codec settings per layer",
            _layers(),
            f"## {RESULTS} of dmc frontier",
            _rows(),
            "## Report of dmc eval --json",
            _report(),
        ]
    )


def _checkpoint() -> str:
    return (
        "A directory in megatron-core's sharded format (`torch_dist`), with two more files. "
        f'`{integrity.MARKER}` is JSON, `{{"name": [bytes, "SHA-256"], ...}}` for every other file; it is written last, and '
        "a directory without it is not a checkpoint. `meta.json` has the step, the configuration, and hashes of model, text and "
        f"tokenizer. A run that a signal stopped leaves the file `{STOPPED}` in its output directory, with one sentence. "
        "[Checkpoints](../checkpoints.md) says how they are written, verified and kept."
    )


def _export() -> str:
    code = sorted(path.name for path in (ROOT / "checkpoints" / "hf_model").glob("*_dmc_llama.py"))
    names = ", ".join(f"`{name}`" for name in code)
    return (
        "A Hugging Face directory: `config.json`, whose object `dmc` has the settings of the method, `model.safetensors` (or "
        f"shards with their index), the tokenizer's files, a model card, and the model's "
        f"code: those of {names} that its method needs. "
        "[Checkpoints in and out](../checkpoints-hf.md)."
    )


def _decisions() -> str:
    made = fitted.FittedDecisions(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), torch.zeros(1, 1), 0, 0, torch.zeros(2), "hash", {})
    with tempfile.TemporaryDirectory() as folder:
        made.save(Path(folder) / "decisions.safetensors")
        with safe_open(Path(folder) / "decisions.safetensors", "pt") as file:
            tensors, notes = list(file.keys()), sorted(file.metadata())
    known = attributes(fitted.FittedDecisions) | {
        "format": f"`{fitted.FORMAT}`",
        "digest": "16 hex digits of tensors and metadata, checked when the file is read",
    }
    rows = [(f"`{name}`", "tensor", escaped(known[name])) for name in tensors]
    rows += [(f"`{name}`", "metadata", escaped(known[name])) for name in notes]
    return (
        "A safetensors file that `dmc calibrate --decisions` writes; `--policy gate` and `dmc.init` read it. "
        "Letters: L layers, H "
        "key/value heads, Q quantiles. `arrival` and `late` may be fp16 in the file.\n\n" + table(("name", "in", "meaning"), rows)
    )


def _layers() -> str:
    lines = inspect.getdoc(layers.read_layers).split("\n\n")[1].replace("\n", " ").replace("``", "`")
    return f"For `--codec-layers`; `dmc inspect --recommend` writes one. {lines}"


def _rows() -> str:
    own = [
        ("`schema`", f"{SCHEMA}; a higher number is of a later version and is rejected; rows of version 0.1 have none"),
        ("`key`", "hash of everything that the row depends on but the code; a run measures only what has no such row"),
        ("`model`, `policy`, `codec`", "as the command line writes them"),
        ("`result`", "the fields below; missing if the cell failed"),
        ("`error`", "one sentence; only if the cell failed"),
        ("`hardware`, `seconds`", "what it ran on; wall time of the cell"),
    ]
    return (
        "JSON, one row per line. `result.commit` and `result.versions` say what wrote a row; the codec names of version 0.1 are "
        "translated when they are read.\n\n"
        + table(("key", "meaning"), own)
        + "\n\nFields of `result`, the same in the report of `dmc eval`:\n\n"
        + _fields(Measurement)
    )


def _report() -> str:
    parts = [
        f"JSON. {ORIGIN}; then one key per measure:",
        table(
            ("key", "content"),
            [
                ("`text`", f"a list, one object per text, with the [fields above](#{RESULTS.replace('.', '')}-of-dmc-frontier)"),
                ("`needle`", "`trials`, one object per prompt (next table), and their means"),
                (
                    "`retrieval`, `long`",
                    '`"schema": 1`, `settings`, `haystack` with its hash, `cells` (means and '
                    "standard errors per kind and length), `all`, and `samples`",
                ),
                ("`tasks`", "results of the lm-evaluation-harness per task, with hashes of the questions"),
            ],
        ),
        "A needle's trial:",
        _fields(Trial),
        "A sample of the suites `quick` and `retrieval`:",
        _fields(Answered),
        "A sample of the suite `long`:",
        _fields(Continued),
    ]
    return "\n\n".join(parts)


def _fields(owner: type) -> str:
    known, rows = attributes(owner), []
    for field in dataclasses.fields(owner):
        rows.append((f"`{field.name}`", str(field.type).replace(" | None", " or null"), escaped(known.get(field.name, ""))))
    return table(("field", "type", "meaning"), rows)
