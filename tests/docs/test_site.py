"""The site: every page is in its navigation, links out of docs/ are rewritten, and it builds without a warning."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
import yaml
from packaging.requirements import Requirement

from scripts.check_site import problems
from scripts.site_hooks import lists, rewrite
from tests.docs.blocks import ROOT
from tests.docs.programs import setup_arguments

NEEDED = ("mkdocs", "material", "mkdocstrings")


class Loader(yaml.SafeLoader):
    """Reads mkdocs.yml without what its tags ``!!python/...`` name."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)
SITE = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)


def pages(nav):
    """The pages of a navigation, in order."""
    for entry in nav:
        for value in entry.values():
            yield from [value] if isinstance(value, str) else pages(value)


def test_every_page_is_in_the_navigation_once():
    there = sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md"))
    assert sorted(pages(SITE["nav"])) == there


def test_the_groups():
    groups = [name for entry in SITE["nav"] for name in entry]
    assert groups == ["Home", "Tutorials", "How-to", "Reference", "Explanation", "Results", "Glossary"]


TEXT = """See [the recipe](../../configs/a.yaml),
[`tests/x.py`](../../tests/x.py), [rooms](../../dmc#parts), [page](../method.md).

```bash
echo '[no](../../configs/a.yaml)'
```

`[code](../../configs/a.yaml)`, ![plot](../../p.png) and [away](https://x.y/../../z)."""


@pytest.mark.parametrize(
    ("address", "first"),
    [
        (None, "See the recipe (`configs/a.yaml`),\n`tests/x.py`, rooms (`dmc`), [page](../method.md)."),
        (
            "https://h.z/o/r/",
            "See [the recipe](https://h.z/o/r/blob/main/configs/a.yaml),\n[`tests/x.py`](https://h.z/o/r/blob/main/"
            "tests/x.py), [rooms](https://h.z/o/r/tree/main/dmc#parts), [page](../method.md).",
        ),
    ],
)
def test_links_out_of_docs(address, first):
    done = rewrite(TEXT, "docs/results", address, ROOT)
    assert done.split("\n\n", 1) == [first, TEXT.split("\n\n", 1)[1]]


def test_a_link_out_of_the_repository_is_left_for_mkdocs_to_report():
    assert rewrite("[x](../../y)", "docs", None, ROOT) == "[x](../../y)"


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("words\n- a\n  b\n- c", "words\n\n- a\n    b\n- c"),
        ("- a\n  - b\n    c\n- d\n\nwords", "- a\n    - b\n        c\n- d\n\nwords"),
        ("1. a\n\n   | t |\n   |---|\n   words\n2. b", "1. a\n\n    | t |\n    |---|\n    words\n\n2. b"),
        ("- a\n\n  ```x\n  - y\n    z\n  ```\n# h", "- a\n\n    ```x\n    - y\n      z\n    ```\n# h"),
        ("```x\nw\n- y\n  - z\n```\n\n    code - x", "```x\nw\n- y\n  - z\n```\n\n    code - x"),
        ("a (b -\n2) c\n1. d\n2. e", "a (b -\n2) c\n\n1. d\n2. e"),
        ("- a\nlazy\n\n  - b", "- a\n    lazy\n\n    - b"),
    ],
)
def test_lists(text, made):
    assert lists(text) == made


def test_no_address_is_made_up():
    """There is no public repository yet; see mkdocs.yml."""
    assert SITE["repo_url"] is None


def test_what_builds_the_site_is_pinned():
    pinned = dict(re.findall(r"^([\w.-]+)==(.+)$", (ROOT / "constraints-docs.txt").read_text(), re.MULTILINE))
    asked = [Requirement(line) for line in setup_arguments()["extras_require"]["docs"]]
    assert asked and all(one.specifier.contains(pinned[one.name]) for one in asked)
    both = set(pinned) & set(re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert both == set()


def test_it_builds_without_a_warning(tmp_path):
    """With this Python, or with that of a virtual environment that DMC_DOCS_PYTHON names."""
    python = os.environ.get("DMC_DOCS_PYTHON", sys.executable)
    if python == sys.executable and not all(map(importlib.util.find_spec, NEEDED)):
        pytest.skip("mkdocs is not installed: pip install -c constraints.txt -c constraints-docs.txt -e '.[docs]'")
    done = subprocess.run(
        [python, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    built = {path.relative_to(tmp_path / "site").as_posix() for path in (tmp_path / "site").rglob("*.html")}
    assert {page.replace(".md", ".html") for page in pages(SITE["nav"])} <= built
    text = (tmp_path / "site" / "reference" / "api.html").read_text()
    assert 'id="dmc.cache.policies.base.Policy.keep"' in text
    assert 'class="mermaid"' in (tmp_path / "site" / "architecture.html").read_text()
    assert problems(tmp_path / "site")[0] == []


def test_wrong_links_are_found(tmp_path):
    (tmp_path / "a.html").write_text('<h1 id="x">A</h1><a href="b.html#y">b</a><a href="#x">x</a><img src="p.png">')
    (tmp_path / "b.html").write_text('<p id="z"><p id="z"><a href="a.html#x">a</a><a href="https://h.z/c">c</a>')
    found, links, away = problems(tmp_path)
    assert found == [
        "a.html: the image p.png has no description",
        "a.html: b.html#y: that page has no such heading",
        "a.html: p.png leads nowhere",
        "b.html: the id z is there 2 times",
    ]
    assert (links, away) == (4, 1)
    with pytest.raises(ValueError, match="no pages"):
        problems(tmp_path / "none")
