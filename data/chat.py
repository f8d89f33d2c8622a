"""Conversations: records of messages, rendered by the tokenizer's own chat template.

A record has a column (``messages``) with a list of ``{"role", "content"}``. Its document is exactly what transformers'
``apply_chat_template(messages)`` gives: no BOS and no end-of-text token is added to what the template writes. With loss on
assistant turns alone, the characters of these turns come from the template's ``{% generation %}`` blocks or, where the template
has none, from renderings of the conversation that is cut before and after each turn (`ChatTemplate`).
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from data.column import Column, Unreadable
from data.encode import Conversation

if TYPE_CHECKING:
    import pyarrow

LOSS_ON = ("everything", "assistant")
ROLES = ("system", "developer", "user", "assistant", "tool")
COLUMN = "messages"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Some templates write today's date. Tokens must not depend on the day: a resumed run reads the same text.
_DAY = {"%Y": "2024", "%m": "07", "%d": "26", "%B": "July", "%b": "Jul", "%A": "Friday", "%a": "Fri", "%y": "24"}
_SAME_DAY = (
    "{% macro strftime_now(format) %}{% set day = format" + "".join(f"|replace('{k}', '{v}')" for k, v in _DAY.items()) + " %}"
    "{% if '%' in day %}{{ raise_exception('the format of the date is ' ~ format) }}{% endif %}{{ day }}{% endmacro %}"
)


class ChatTemplate:
    """Renders conversations.

    Args:
        tokenizer: its template; of several the one called "default".
        loss_on: one of `LOSS_ON`. With "assistant" every conversation gets its ``turns``.

    Raises:
        ValueError: if the tokenizer has no chat template, or ``loss_on`` is not known.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, loss_on: str = "everything") -> None:
        if loss_on not in LOSS_ON:
            raise ValueError(f"the loss is on {loss_on!r}: it must be one of {', '.join(LOSS_ON)}")
        self.loss_on, self._names = loss_on, tokenizer.special_tokens_map
        source = template_of(tokenizer)
        self._source = _SAME_DAY + source if "strftime_now" in source else source
        self._has_blocks = bool(_GENERATION.search(source))

    def __call__(self, messages: object, where: str) -> Conversation:
        """The conversation of a record.

        Args:
            messages: a list of ``{"role", "content"}``; other keys are handed to the template.
            where: names the record in an error.

        Raises:
            Unreadable: naming the record, if it is not a conversation with an assistant turn, if the template rejects it, or
                if its assistant turns cannot be found.
        """
        found = _checked(messages, where)
        text, blocks = self._render(found, where, blocks=self.loss_on == "assistant" and self._has_blocks)
        if not text:
            raise Unreadable(f"the chat template renders no text for {where}: fix or remove it")
        if self.loss_on == "everything":
            return Conversation(text)
        turns = (
            blocks
            if self._has_blocks
            else [
                self._turn(found, number, text, where) for number, message in enumerate(found) if message["role"] == "assistant"
            ]
        )
        turns = [(start, stop) for start, stop in turns if stop > start]
        if not turns:
            raise Unreadable(
                f"the chat template has {{% generation %}} blocks, but none for {where}: correct the template, or use loss on "
                "everything (data.loss_on=everything, --loss-on everything)"
            )
        return Conversation(text, tuple(turns))

    def _turn(self, messages: list[dict], number: int, text: str, where: str) -> tuple[int, int]:
        """``(start, stop)`` characters of an assistant turn in the text of a template without generation blocks.

        The turn starts where the prompt ends from which a server would generate it. It ends where the conversation ends that
        is cut after the turn. Some templates render the last turn differently (Qwen3 writes an empty thinking block): the end
        is then that of its content and of what follows its content in the shorter conversation.
        """
        before, _ = self._render(messages[:number], where, prompt=True)
        after, _ = self._render(messages[: number + 1], where)
        if text.startswith(before):
            if after.startswith(before) and text.startswith(after):
                return len(before), len(after)
            content = messages[number].get("content", "")
            # Many templates strip it, and some leave the thinking of earlier turns out.
            for shown in filter(None, (content, content.strip(), content.rpartition("</think>")[2].strip())):
                at = after.rfind(shown)
                if at >= len(before) and text.startswith(after[at:], len(before)):
                    return len(before), len(before) + len(after) - at
        raise Unreadable(
            f"the assistant turn in message {number} of {where} cannot be found in the rendered text: the chat template has no "
            "{% generation %} blocks and renders a conversation differently when it is cut; add the blocks to the template of "
            "the model's tokenizer, or use loss on everything (data.loss_on=everything, --loss-on everything)"
        )

    def _render(
        self, messages: list[dict], where: str, *, prompt: bool = False, blocks: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text and, if asked for, the characters of its generation blocks."""
        try:
            (text,), found = render_jinja_template(
                conversations=[messages],
                chat_template=self._source,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=blocks,
                **self._names,
            )
            text.encode()
        except UnicodeEncodeError as error:
            raise Unreadable(
                f"{where} has half a surrogate pair in its messages ({error.reason}), which is not a character: fix or remove it"
            ) from None
        except (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError) as error:
            raise Unreadable(f"the model's chat template rejects {where}: {' '.join(str(error).split())}") from None
        return text, found[0] if found else []


class Messages(Column):
    """The column of conversations; its values are `Conversation`s."""

    structured = True

    def __init__(self, name: str, template: ChatTemplate) -> None:
        super().__init__(name)
        self._template = template

    def text(self, value: object, where: str) -> Conversation | None:
        """The conversation of a value; None for null.

        Raises:
            Unreadable: as `ChatTemplate`.
        """
        return None if value is None else self._template(value, where)

    def of_type(self, kind: pyarrow.DataType, where: str) -> None:
        """Check that an Arrow column holds lists of structures.

        Raises:
            Unreadable: naming the type.
        """
        import pyarrow as pa

        listed = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        if not pa.types.is_null(kind) and not (listed and pa.types.is_struct(kind.value_type)):
            raise Unreadable(f"{where} has values of type {kind} in column {self.name!r}: they must be {_FORM}")


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template of a tokenizer; of several the one called "default".

    Raises:
        ValueError: if there is none.
    """
    found = tokenizer.chat_template
    if isinstance(found, dict):
        if "default" not in found:
            raise ValueError(
                f"the model's tokenizer has the chat templates {', '.join(sorted(found))} and none called 'default': rename one"
            )
        found = found["default"]
    if not found:
        raise ValueError(
            "the model's tokenizer has no chat template: take an instruct model, or add chat_template.jinja to the model's "
            "directory"
        )
    return found


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits that identify the chat template.

    Raises:
        ValueError: if there is none.
    """
    return hashlib.sha256(template_of(tokenizer).encode()).hexdigest()[:16]


_FORM = 'a list of messages such as {"role": "user", "content": "..."}'


def _checked(messages: object, where: str) -> list[dict]:
    """The messages without keys whose value is null, as transformers' ``apply_chat_template`` drops them."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise Unreadable(f"{where} has {type(messages).__name__} in its messages: it must be {_FORM}")
    if not messages:
        raise Unreadable(f"{where} has no messages: fix or remove it")
    found = [{key: value for key, value in message.items() if value is not None} for message in messages]
    for number, message in enumerate(found):
        at = f"message {number} of {where}"
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise Unreadable(f"{at} has the role {role!r}: known are {', '.join(ROLES)}")
        if content is None and role == "assistant" and message.get("tool_calls"):
            continue
        if not isinstance(content, str):
            raise Unreadable(f"{at} has {type(content).__name__} as its content: it must be text")
        if not content.strip() and not message.get("tool_calls"):
            raise Unreadable(f"{at} is empty: fix or remove it")
    if not any(message["role"] == "assistant" for message in found):
        raise Unreadable(f"{where} has no assistant turn: fix or remove it")
    return found
