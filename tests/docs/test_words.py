"""Words that must not come back into the documentation: each has a term of the field in its place.

Code spans, code blocks and targets of links are not read. `EXCEPTIONS` names the sentences that need such a word.
"""

import re

import pytest

from tests.docs.blocks import ROOT

PAGES = sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "methods").glob("*.md")])

WORDS = {
    r"twins?": "reference implementation",
    r"compiled loops?": "CPU kernels",
    r"(?<!in )places?": "position (of a token), slot (of a page)",
    r"(?:sums?|summed) over ranks": "all-reduce",
    r"borders?": "boundaries",
    r"resume points?": "checkpoint",
    r"rivals?": "baseline",
    r"same-token": "token-matched",
    r"likeliest|likelier": "most likely, more likely",
    r"layered cache": "sinks and recent window in bf16",
    r"exact (?:entries|entry|part|pages?)": "full-precision entries",
    r"open entr(?:y|ies)|tails?": "accumulating entry",
    r"holes?": "evicted slots",
    r"anew": "again",
    r"watche[sd]": "attention statistics",
    r"marks?|marked": "eviction decision, per-entry metadata",
    r"refuse[sd]?|refusal": "rejects, raises",
    r"mend(?:s|ed|ing)?": "fix",
    r"beside": "next to, in addition to",
    r"lies?": "is stored",
    r"whole or not at all": "atomically",
    r"further ado": "automatically",
    r"page to try it": "playground",
    r"(?:nats|bytes|bits|numbers?|sequences?|tokens|entries|ms|ranks?|rows?|lines?|steps|weights?|values?|times|launches)"
    r" a (?:token|step|head|layer|page|row|rank|core|unit|value|element|code|second|query|node|GPU|sequence|document)": "per",
    r"(?<!there )(?<!There )is no (?!longer|more)\w+": "is not a",
    r"(?<![\w.])\.\d+": "a leading 0",
}

EXCEPTIONS = {
    "families.md": ["## What is refused"],  # other pages link to the heading
    "serving.md": ["a `refusal` without content", "`refusal` may be null"],  # the name of a field
}


def prose(text: str) -> str:
    """The text of a page without code and targets of links; lines stay where they are."""
    for pattern in (r"^ *```.*?^ *```$", r"`[^`]*`", r"\]\([^)]*\)"):
        text = re.sub(pattern, lambda found: "\n" * found.group().count("\n"), text, flags=re.MULTILINE | re.DOTALL)
    return text


def found(text: str, allowed: tuple[str, ...] | list[str] = ()) -> list[str]:
    """One line for every word of `WORDS` in the prose of a page, with the line's number and the term to write."""
    for sentence in allowed:
        assert sentence in text, f"no page needs the exception {sentence!r} any more"
        text = text.replace(sentence, "")
    return [
        f"line {number}: {hit.group()!r}; write: {instead}"
        for number, line in enumerate(prose(text).splitlines(), 1)
        for word, instead in WORDS.items()
        for hit in re.finditer(rf"(?<![\w-])(?:{word})(?![\w-])", line)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_use_the_terms_of_the_field(page):
    assert found(page.read_text(), EXCEPTIONS.get(page.name, ())) == []


def test_words_are_found_in_prose_alone():
    text = "A twin.\n\n```bash\ntwin anew\n```\n\n`twin` of [it](twin.md) costs .05, nats a token; there is none. It is no tail."
    assert [line.split(";")[0] for line in found(text)] == [
        "line 1: 'twin'", "line 7: 'tail'", "line 7: 'nats a token'", "line 7: 'is no tail'", "line 7: '.05'",
    ]
    assert found("A twin.", ["A twin"]) == []
