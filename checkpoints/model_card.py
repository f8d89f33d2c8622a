"""The README.md of an exported model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedConfig

_KEYS = ("base_model", "license", "summary", "step", "measured", "rows")

_USE = """\
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
inputs = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
out = model.generate(**inputs, max_new_tokens=64, return_dict_in_generate=True)
print(tokenizer.decode(out.sequences[0]))
print(out.past_key_values.compression_ratio())   # tokens per entry, overall
print(out.past_key_values.compression_ratios())  # per layer and key/value head
print(out.past_key_values.lengths())             # entries per layer, sequence and key/value head
```

Greedy decoding, sampling, beam search and batches (padded on the left) compress as they go. Assisted generation
is rejected, since such a cache cannot be rolled back. The code in this directory needs torch and transformers
(5.0 or newer) alone. It keeps the remaining entries, padded to the longest head of each layer; a serving engine with
pages per head is what turns the whole ratio into memory.
"""


def model_card(name: str, config: PreTrainedConfig, card: Mapping) -> str:
    """A model card in Markdown.

    Args:
        name: of the model.
        config: of the exported model; its `dmc` gives the compression ratios.
        card: what is known of the run, every key optional: `base_model` (name), `license` (identifier),
            `summary` (a paragraph), `step` (of training), `measured` (dict of name to number: a table of two
            columns), `rows` (list of dicts: a table with a column for every key).

    Raises:
        ValueError: if `card` has another key.
    """
    unknown = sorted(set(card) - set(_KEYS))
    if unknown:
        raise ValueError(f"the card knows no {unknown[0]!r}; known are {', '.join(_KEYS)}")
    front = _front_matter(card)
    if config.dmc["method"] == "dms":
        front = front.replace("- dynamic-memory-compression", "- dynamic-memory-sparsification")
    parts = [front, f"# {name}\n", _summary(config, card)]
    parts.append(_table([{"": "compression ratio", **_ratios(config)}]))
    if card.get("measured"):
        parts.append(_table([{"measured": key, "value": value} for key, value in card["measured"].items()]))
    if card.get("rows"):
        parts.append(_table(card["rows"]))
    return "\n".join([*parts, _USE.format(name=name)])


def plain_card(name: str, meta: Mapping, policy: str | None = None) -> str:
    """The model card of an ordinary model, from a checkpoint's meta data; ``policy``: what it was trained to be served with."""
    measured = {
        "held-out perplexity": round(meta["perplexity"], 4),
        "training steps": meta["step"],
        "training text": meta["corpus_hash"],
        "held-out text": meta["held_out_hash"],
    }
    kind = meta["hf_config"].get("model_type", "llama")
    text = f"A {kind} model, trained by dmc.\n"
    if policy is not None:
        measured = {"compression ratio": meta["measured_cr"]} | measured
        text = f"A {kind} model, trained by dmc to be served with `--policy {policy}`; the numbers are with that policy.\n"
    table = _table([{"measured": key, "value": value} for key, value in measured.items()])
    return "\n".join([_front_matter({}).replace("- dynamic-memory-compression\n", f"- {kind}\n"), f"# {name}\n", text, table])


def _front_matter(card: Mapping) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    lines += [f"{key}: {card[key]}" for key in ("license", "base_model") if card.get(key)]
    return "\n".join([*lines, "tags:", "- dynamic-memory-compression", "---", ""])


def _summary(config: PreTrainedConfig, card: Mapping) -> str:
    source = f"`{card['base_model']}`" if card.get("base_model") else f"A {config.model_type.removeprefix('dmc_')} model"
    read = "neuron 0 of its keys and queries" if config.dmc["decision"] == "neuron" else "a small linear layer"
    text = (
        f"{source}, retrofitted with Dynamic Memory Compression (arXiv 2403.09636): every key/value head merges\n"
        f"tokens into entries of its cache as it sees fit. It reads the decision from {read}.\n"
    )
    if config.dmc["method"] == "dms":
        read = "neuron 0 of its first query head" if config.dmc["decision"] == "neuron" else read
        text = (
            f"{source}, retrofitted with Dynamic Memory Sparsification (arXiv 2506.05345): every key/value head marks\n"
            f"tokens as it sees fit, and a marked token leaves its cache {config.dmc['window']} tokens later. It reads the "
            f"decision from\n{read}.\n"
        )
    if card.get("step") is not None:
        text += f"Trained for {card['step']} steps.\n"
    return text + (f"\n{card['summary'].strip()}\n" if card.get("summary") else "")


def _ratios(config: PreTrainedConfig) -> dict:
    return {"target": config.dmc["target_cr"], "measured": config.dmc["measured_cr"]}


def _table(rows: Sequence[Mapping]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")
