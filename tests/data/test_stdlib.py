"""The standard library as a corpus: what is in it, how it is split, and what its hash stands for."""

import hashlib
import json
import re
import sysconfig
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

from data import guides, stdlib
from data.stdlib import Document, corpus_hash


@pytest.fixture(scope="module")
def documents():
    return stdlib.documents(("src", "topic", "api"))


def test_documents_are_sorted_and_have_names_of_their_own(documents):
    names = [d.name for d in documents]
    assert names == sorted(names) and len(set(names)) == len(names)
    assert all(d.text.strip() for d in documents)
    assert all(re.fullmatch(r"(src/[\w./+-]+\.py|topic/.+|api/\w+)", name) for name in names)


def test_names_hold_no_path_of_this_machine(documents):
    root = sysconfig.get_paths()["stdlib"]
    for doc in documents:
        assert not doc.name.split("/", 1)[1].startswith("/") and root not in doc.name and ".." not in doc.name


def test_there_are_sources_language_reference_and_built_in_docstrings(documents):
    texts = {d.name: d.text for d in documents}
    assert texts["src/json/decoder.py"] == Path(json.decoder.__file__).read_text()
    assert "isinstance" not in texts["topic/for"] and '"for"' in texts["topic/for"]
    assert texts["api/math"].startswith("module math\n") and "\ncos(" in texts["api/math"]
    assert "    append(self, object, /)" in texts["api/builtins"]
    kinds = [name.split("/")[0] for name in texts]
    assert kinds.count("src") > 400 and kinds.count("topic") > 50 and kinds.count("api") > 20
    assert sum(len(text) for text in texts.values()) > 5e6


def test_tests_installed_packages_and_generated_tables_are_left_out(documents):
    for doc in documents:
        directories = doc.name.split("/")[1:-1]
        assert not {"site-packages", "dist-packages", "test", "tests", "encodings", "__pycache__"} & set(directories), doc.name
        assert "_sysconfigdata" not in doc.name and not any(d.startswith("config-") for d in directories)
    assert not any("torch" in d.name or "pytest" in d.name for d in documents)


def test_the_text_does_not_name_this_machine(documents):
    """A path of the installation in the text would give every machine a hash of its own."""
    assert not [d.name for d in documents if sysconfig.get_paths()["stdlib"] in d.text]


def test_the_split_goes_by_top_level_module(documents):
    training, held_out = stdlib.split(documents)
    assert sorted([*training, *held_out], key=lambda d: d.name) == documents
    sides = defaultdict(set)
    for doc in documents:
        module = doc.name.split("/")[1].removesuffix(".py").lstrip("_")
        sides[module].add(doc.held_out)
    assert all(len(found) == 1 for found in sides.values())
    share = sum(len(d.text) for d in held_out) / sum(len(d.text) for d in documents)
    assert 0.01 < share < 0.15


@pytest.mark.parametrize(
    ("name", "same_side_as"),
    [("src/json/decoder.py", "src/json/__init__.py"), ("api/_json", "src/json/tool.py"), ("src/_pydecimal.py", "api/pydecimal")],
)
def test_a_module_and_its_accelerator_are_on_one_side(name, same_side_as):
    assert Document(name, "").held_out == Document(same_side_as, "something else").held_out


def test_the_split_is_a_fixed_choice(documents):
    """Moving a module to the other side would make every number incomparable."""
    modules = {d.name.split("/")[1].removesuffix(".py"): d.held_out for d in documents if d.name.startswith("src/")}
    chosen = {m for m in modules if hashlib.sha256(m.lstrip("_").encode()).digest()[0] % 20 == 7}
    assert {m for m, held_out in modules.items() if held_out} == chosen != set()


def test_the_hash_changes_with_every_text_and_name():
    docs = [Document("a", "one"), Document("b", "two")]
    others = [
        [replace(docs[0], text="One"), docs[1]],
        [replace(docs[0], name="c"), docs[1]],
        docs[:1],
        docs[::-1],
        [Document("a", "onetwo"), Document("b", "")],
        [Document("a", "one\0b"), Document("two", "")],
    ]
    hashes = {corpus_hash(d) for d in [docs, *others]}
    assert len(hashes) == 1 + len(others) and all(re.fullmatch("[0-9a-f]{16}", h) for h in hashes)
    assert corpus_hash(docs) == corpus_hash([Document("a", "one"), Document("b", "two")])


def test_the_corpus_is_the_same_every_time(documents):
    again = stdlib.documents(("topic", "api"))
    assert again == [d for d in documents if not d.name.startswith("src/")]


def test_a_python_without_sources_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(stdlib.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ValueError, match=f"the standard library under {tmp_path} has no .py sources.*data.text=FILE"):
        stdlib.documents()


@pytest.fixture
def library(monkeypatch, tmp_path):
    """A standard library of a few files."""
    (tmp_path / "package" / "tests").mkdir(parents=True)
    (tmp_path / "site-packages").mkdir()
    for name, data in {
        "good.py": b"x = 1\n",
        "latin.py": b"# -*- coding: latin-1 -*-\n# caf\xe9\n",
        "broken.py": b"\xff\xfe\x00",
        "coding.py": b"# -*- coding: no-such -*-\n",
        "empty.py": b" \n",
        "package/__init__.py": b'def f(x):\n    """What f is."""\n    return x\n',
        "syntax.py": b"def (:\n",
        "package/tests/a.py": b"z = 3\n",
        "site-packages/b.py": b"z = 4\n",
        "_sysconfigdata_x.py": b"z = 5\n",
    }.items():
        (tmp_path / name).write_bytes(data)
    monkeypatch.setattr(stdlib.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})


def test_broken_and_empty_sources_are_skipped(library):
    assert {d.name: d.text for d in stdlib.documents(("src",))} == {
        "src/good.py": "x = 1\n",
        "src/latin.py": "# -*- coding: latin-1 -*-\n# café\n",
        "src/syntax.py": "def (:\n",
        "src/package/__init__.py": 'def f(x):\n    """What f is."""\n    return x\n',
    }


def test_guides_stand_for_the_sources_with_definitions(library):
    assert stdlib.documents(("guide",)) == [
        Document(
            "guide/package/__init__.py",
            (
                '# package/__init__.py: reference\n\ndef f(x):\n    """What f is."""\n\n'
                '# package/__init__.py: source\n\ndef f(x):\n    """What f is."""\n    return x\n'
            ),
        )
    ]
    assert {d.name.split("/")[0] for d in stdlib.documents()} <= {"guide", "topic", "api"}


def test_a_guide_shows_every_definition_of_a_module_twice(documents):
    """Its source in pages, and before or after each page the signatures and docstrings of that page."""
    source = next(d.text for d in documents if d.name == "src/textwrap.py")
    text = guides.guide("textwrap.py", source)
    assert text == guides.guide("textwrap.py", source)
    heads = re.findall(r"^# textwrap.py: (reference|source)$", text, re.MULTILINE)
    pages = len(heads) // 2
    assert pages > 3 and heads == (["reference", "source", "source", "reference"] * pages)[: 2 * pages]
    definitions = re.findall(r"^(?:    )?def .*$", source, re.MULTILINE)  # of the module and its classes
    nested = ["    def prefixed_lines():"]
    assert len(definitions) > 10 and [line for line in definitions if text.count(line) != 2] == nested
    assert text.count("return ' '.join(text.strip().split())") == source.count("return ' '.join(text.strip().split())")
