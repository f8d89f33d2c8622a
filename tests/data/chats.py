"""Conversations and chat templates for tests, with the special tokens of the base model's tokenizer."""

import json
import random
import shutil
from pathlib import Path

from tests.training.helpers import TOKENIZER

# As ChatML, with <|pad|> for its opening token.
PLAIN = (
    "{% for m in messages %}{{ '<|pad|>' + m.role + '\\n' + m.content + '<|endoftext|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|pad|>assistant\\n' }}{% endif %}"
)
BLOCKS = (
    "{% for m in messages %}{{ '<|pad|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|endoftext|>\\n' }}{% endgeneration %}{% else %}{{ m.content + '<|endoftext|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|pad|>assistant\\n' }}{% endif %}"
)
# As Qwen3's: the last turn is rendered with an empty thinking block, earlier ones without.
THINKING = PLAIN.replace(
    "m.role + '\\n' + m.content",
    "m.role + '\\n' + ('<think></think>' if m.role == 'assistant' and loop.last else '') + m.content",
)
# No part of a conversation is rendered as in the longer one.
COUNTED = "{{ messages | length }} messages\n" + PLAIN
ALTERNATING = "{% if messages[0].role != 'user' %}{{ raise_exception('the first turn must be a user turn') }}{% endif %}" + PLAIN


def chat_tokenizer(directory: Path, template: str | None = PLAIN) -> Path:
    """A directory with the base model's tokenizer and a chat template."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, directory / name)
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    return directory


def conversations(count: int, *, seed: int = 0, words: int = 12) -> list[list[dict]]:
    """Conversations of one to three exchanges, some after a system message."""
    pick = random.Random(seed)
    vocabulary = ["alpha", "beta", "return", "import", "x = 1", "def f():\n    pass", "Zürich", "9,000", "None"]

    def text() -> str:
        return " ".join(pick.choice(vocabulary) for _ in range(pick.randint(1, words)))

    found = []
    for _ in range(count):
        head = [{"role": "system", "content": text()}] if pick.random() < 0.3 else []
        roles = ["user", "assistant"] * pick.randint(1, 3)
        found.append(head + [{"role": role, "content": text()} for role in roles])
    return found


def write_chats(path: Path, rows: list, column: str = "messages") -> Path:
    """One record per line."""
    path.write_text("".join(json.dumps({"id": i, column: row}) + "\n" for i, row in enumerate(rows)))
    return path
