"""Words that must not come back into the documentation: each has a term of the field in its place.

Code spans, code blocks and targets of links are not read. `EXCEPTIONS` names the sentences that need such a word. In code,
docstrings, comments and strings are read, for the words of `CODE_WORDS`: the other words have a meaning of their own there
("in place", the mark of an event, a refusal of OpenAI's interface).
"""

import ast
import io
import re
import tokenize

import pytest

from tests.docs.blocks import ROOT

PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])

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
    r"by (?:itself|themselves)": "automatically, alone, separately",
    r"(?:nats|bytes|bits|numbers?|sequences?|tokens|entries|ms|ranks?|rows?|lines?|steps|weights?|values?|times|launches)"
    r" a (?:token|step|head|layer|page|row|rank|core|unit|value|element|code|second|query|node|GPU|sequence|document)": "per",
    r"(?<!there )(?<!There )is no (?!longer|more)\w+": "is not a",
    r"(?<![\w.])\.\d+": "a leading 0",
}

CODE_WORDS = {
    word: instead
    for word, instead in WORDS.items()
    if instead
    in {
        "reference implementation",
        "CPU kernels",
        "all-reduce",
        "boundaries",
        "checkpoint",
        "baseline",
        "token-matched",
        "most likely, more likely",
        "sinks and recent window in bf16",
        "full-precision entries",
        "again",
        "attention statistics",
        "next to, in addition to",
        "atomically",
        "automatically",
        "automatically, alone, separately",
        "playground",
        "per",
    }
}
CODE_WORDS |= {
    r"open entr(?:y|ies)": "accumulating entry",
    r"(?<!there )(?<!There )is no (?!longer|more)\w+": "is not a",
    r"pictures?": "plots, figures",
    r"refuse[sd]?": "rejects, raises",
    r"lies?": "is, is stored",
    r"for want of": "for lack of",
    r"of before": "older",
    r"(?:[GMK]i?B|bytes|tokens|entries|windows?|heads?|pages?|samples?|prompts?)"
    r" an? (?:rank|window|request|prompt|needle|entry|head|layer|page|row|step)": "per",
}
_ANY = re.compile(rf"(?<![\w-])(?:{'|'.join(CODE_WORDS)})(?![\w-])")
CODE = sorted(path for folder in ("dmc", "checkpoints", "data", "scripts") for path in (ROOT / folder).rglob("*.py"))
CODE_EXCEPTIONS = {
    "dmc/cache/kv.py": ["with ``beside``"],  # the name of a parameter
    "dmc/server/schema.py": ["in which it refused to answer"],  # OpenAI's field
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


def in_code(source):
    """(line, text) of docstrings, strings of several words and comments of a module."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value


def found_in_code(source, allowed=()):
    """One line for every word of `CODE_WORDS`, with the line's number and the term to write."""
    for sentence in allowed:
        assert sentence in source, f"nothing needs the exception {sentence!r} any more"
        source = source.replace(sentence, "")
    return sorted(
        {
            f"line {line + number}: {hit.group()!r}; write: {instead}"
            for line, text in in_code(source)
            if _ANY.search(text)
            for number, prose in enumerate(re.sub(r"`+[^`\n]*`+", "", text).split("\n"))
            for word, instead in CODE_WORDS.items()
            for hit in re.finditer(rf"(?<![\w-])(?:{word})(?![\w-])", prose)
        }
    )


def test_texts_of_the_code_use_them_too():
    wrong = {
        str(path.relative_to(ROOT)): found_in_code(path.read_text(), CODE_EXCEPTIONS.get(str(path.relative_to(ROOT)), ()))
        for path in CODE
    }
    assert {name: lines for name, lines in wrong.items() if lines} == {}


def test_docstrings_begin_with_what_they_describe():
    """'Number of entries in a page.', not 'Of a page.'"""
    nodes = (ast.AsyncFunctionDef, ast.ClassDef, ast.FunctionDef, ast.Module)
    texts = [
        (path.name, ast.get_docstring(node))
        for path in CODE
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, nodes)
    ]
    assert [(name, text) for name, text in texts if text and text.startswith("Of ")] == []


def test_words_are_found_in_texts_of_code():
    source = 'x = "made anew"  # a twin\n\n\ndef f():\n    """Of `twin`:\n\n    nats a token."""\n    return "all anew"\n'
    assert [line.split(";")[0] for line in found_in_code(source)] == [
        "line 1: 'anew'",
        "line 1: 'twin'",
        "line 7: 'nats a token'",
        "line 8: 'anew'",
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_use_the_terms_of_the_field(page):
    assert found(page.read_text(), EXCEPTIONS.get(page.name, ())) == []


def test_words_are_found_in_prose_alone():
    text = "A twin.\n\n```bash\ntwin anew\n```\n\n`twin` of [it](twin.md) costs .05, nats a token; there is none. It is no tail."
    assert [line.split(";")[0] for line in found(text)] == [
        "line 1: 'twin'",
        "line 7: 'tail'",
        "line 7: 'nats a token'",
        "line 7: 'is no tail'",
        "line 7: '.05'",
    ]
    assert found("A twin.", ["A twin"]) == []
