"""The chat template of a tokenizer, of which it may have several with names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def choose_template(tokenizer: PreTrainedTokenizerBase, name: Literal[True] | str) -> str:
    """The template of this name; True: the only one, or the one that is called "default".

    Raises:
        ValueError: if there is no such template; one sentence.
    """
    templates = tokenizer.chat_template
    if not templates:
        raise ValueError(
            "the model's tokenizer has no chat template: leave --apply-chat-template out, or add chat_template to its "
            "tokenizer_config.json"
        )
    if isinstance(templates, str):
        if name is not True:
            raise ValueError(
                f"the model's tokenizer has one chat template, without a name: give --apply-chat-template without {name!r}"
            )
        return templates
    wanted = "default" if name is True else name
    if wanted not in templates:
        raise ValueError(
            f"the model's tokenizer has no chat template called {wanted!r}: give --apply-chat-template one of "
            f"{', '.join(sorted(templates))}"
        )
    return templates[wanted]
