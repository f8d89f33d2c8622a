"""Tokenizers and models read by transformers, without a question on the terminal.

A directory whose ``config.json`` names Python code of its own (``auto_map``), as that of an exported model does, makes
``from_pretrained`` ask whether to run the code, and the command waits for an answer. The functions here never run such
code and never ask. Every command of the project loads through them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # transformers takes seconds to import
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local directory, from its files alone: no Python code of the directory is run.

    Raises:
        ValueError: one sentence, if there is none, it is damaged, or it needs Python code of the directory.
    """
    from transformers import AutoTokenizer

    try:
        # transformers reads config.json, and asks about its code, unless it is given a configuration.
        return AutoTokenizer.from_pretrained(
            str(directory), config=_any_configuration(directory), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # its parsers raise many types, bare Exception among them
        said = " ".join(str(error).split())
        raise ValueError(f"the tokenizer in {directory} cannot be read ({type(error).__name__}: {said})") from None


def _any_configuration(directory: str | Path):  # noqa: ANN202
    """A configuration of the family that config.json names, and of a Llama if there is none: where tokenizer_config.json names
    no class, transformers takes the family's."""
    import transformers

    from dmc.families import by_type, families, read_fields

    path = Path(directory) / "config.json"
    try:
        family = by_type(read_fields(path).get("model_type"), path, exports=True)
    except ValueError:
        family = families()["llama"]
    return getattr(transformers, f"{family.title}Config")()


def load_model(directory: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """A causal language model by transformers' own code, in evaluation mode.

    Raises:
        ValueError: one sentence, if the directory has no such model, or its model needs Python code of the directory.
    """
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(str(directory), dtype=dtype, trust_remote_code=False).eval()
    except (ValueError, OSError) as error:
        said = " ".join(str(error).split())
        raise ValueError(
            f"transformers cannot load {directory} with its own code: name a plain model directory, such as the model that "
            f"an export was made from ({type(error).__name__}: {said})"
        ) from None
