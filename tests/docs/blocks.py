"""The fenced blocks of README and docs, and the commands of a shell block."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_BLOCK = re.compile(r"(?:^<!-- (?P<mark>[^\n]*?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_OPTIONAL = re.compile(r"\[(-[^\[\]]*)\]")  # [--flag VALUE]: an optional flag, as in a usage line
_SEPARATORS = ("\n", ";", "&&", "||", "|", "&")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: path of the page below the repository's root.
        line: number of the line that opens the block.
        language: such as "bash"; "" for plain output.
        mark: text of an HTML comment in the line before: "run", "run slow", or "needs FILE FILE".
        text: the lines between the fences.
    """

    page: str
    line: int
    language: str
    mark: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass
class Command:
    """A simple command of a shell block: the words after the assignments, and the assignments before them."""

    words: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)


def blocks(text: str, page: str = "page") -> Iterator[Block]:
    """The blocks of a page, in order."""
    for found in _BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("language")) + 1
        yield Block(page, line, found["language"], found["mark"] or "", found["text"])


def all_blocks() -> list[Block]:
    """The blocks of every page."""
    return [block for page in PAGES for block in blocks(page.read_text(), str(page.relative_to(ROOT)))]


def commands(text: str) -> Iterator[Command]:
    """The simple commands of a shell block. Variables that hold a command (``B="..."``, then ``$B``) are replaced.

    Raises:
        ValueError: if a quote is not closed.
    """
    variables: dict[str, str] = {}
    for words in _simple(_OPTIONAL.sub(r"\1", text)):
        command = Command()
        while words and (name := re.match(r"([A-Za-z_]\w*)=", words[0])):
            command.environment[name[1]] = words.pop(0)[name.end() :]
        if words and words[0].removeprefix("$") in variables and words[0].startswith("$"):
            words[:1] = next(_simple(variables[words[0][1:]]))
        if not words:
            variables |= command.environment
            continue
        command.words = words
        yield command


def _simple(text: str) -> Iterator[list[str]]:
    """Words of each simple command; keywords of loops, groups and ``[ tests ]`` are left out."""
    words: list[str] = []
    for word in [*_words(text), "\n"]:
        if word not in _SEPARATORS:
            words.append(word)
            continue
        while words and words[0] in ("do", "then", "{", "else", "(", "!"):
            words.pop(0)
        if words and words[0] not in ("for", "if", "while", "done", "fi", "}", ")", "[", "case", "esac"):
            yield words
        words = []


def _words(text: str) -> Iterator[str]:
    """Words and separators; comments, quotes and continued lines are resolved as a shell does."""
    word, inside, place = "", False, 0
    while place < len(text):
        char, two = text[place], text[place : place + 2]
        if two == "\\\n":
            place += 2
            continue
        if char in "'\"":
            end = place + 1
            while end < len(text) and text[end] != char:
                end += 2 if char == '"' and text[end] == "\\" else 1
            if end >= len(text):
                raise ValueError(f"a quote that is not closed: {text[place : place + 30]!r}")
            word, inside, place = word + text[place + 1 : end], True, end + 1
            continue
        if char == "#" and not inside:
            place = text.find("\n", place) if "\n" in text[place:] else len(text)
            continue
        separator = next((each for each in (*_SEPARATORS[2:4], *_SEPARATORS) if text.startswith(each, place)), None)
        if separator or char in " \t":
            if inside:
                yield word
            if separator:
                yield separator
            word, inside, place = "", False, place + len(separator or " ")
            continue
        if char == "\\" and place + 1 < len(text):
            place, char = place + 1, text[place + 1]
        word, inside, place = word + char, True, place + 1
    if inside:
        yield word
