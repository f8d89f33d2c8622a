"""Links of README and docs lead somewhere, and pages say which model is behind their numbers."""

import re

import pytest

from tests.docs.blocks import PAGES, ROOT

RESULTS = [page for page in PAGES if page.parent.name == "results"]


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(page, text):
    """Targets of relative links that are not there."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or anchor and anchor not in anchors(file.read_text()):
            found.append(target)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert broken(page, page.read_text()) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page):
    """Scripts, recipes and tests of the repository, in the text and in blocks."""
    named = re.findall(r"(?<![\w/.-])(?:scripts|configs|tests|deploy)/[\w/.-]+\.(?:sh|py|yaml|sbatch)\b", page.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


FOLDERS = ("dmc", "checkpoints", "data", "scripts", "tests", "integrations", "examples")
PYTHON = {f"/{path.relative_to(ROOT)}" for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_modules_that_a_page_names_exist(page):
    """Also where the page names them below a package of the repository, such as `prefill/loop.py`."""
    named = set(re.findall(r"`((?:[\w-]+/)+\w+\.py)`", page.read_text())) - {"pydoc_data/topics.py"}  # of Python's library
    assert [name for name in sorted(named) if not any(path.endswith(f"/{name}") for path in PYTHON)] == []


def test_broken_links_are_found():
    page, text = ROOT / "README.md", "[a](docs/none.md) [b](docs/serving.md#none) [c](docs/serving.md#bytes) [d](https://x.y)"
    assert broken(page, text) == ["docs/none.md", "docs/serving.md#none"]


def unnamed(text):
    """Headings of sections with a table of SmolLM2-135M that do not say, before its rows, what the weights are.

    It may say so in the heading, in the text before the table, in the table's own header, or in the page's first paragraph.
    """
    found, first = [], "\n\n".join(text.split("\n\n")[:2])
    for section in re.split(r"^(?=#+ )", text, flags=re.MULTILINE):
        start = section.find("\n|")
        if start >= 0 and re.search(r"^#.*SmolLM2-135M|^\w+.*\.py SmolLM2-135M", section, re.MULTILINE):
            before = first + section[: section.index("\n", start + 1)]
            if "nstruct" not in before or "4-bit GGUF" not in before:
                found.append(section.splitlines()[0])
    return found


@pytest.mark.parametrize("page", RESULTS, ids=lambda page: page.name)
def test_tables_of_smollm2_say_that_it_is_the_instruct_model_from_its_gguf_file(page):
    assert unnamed(page.read_text()) == []


def test_a_table_without_the_name_is_found():
    text = "# Page\n\nWords.\n\n## {}\n\n| a |\n|---|\n| 1 |\n"
    assert unnamed(text.format("SmolLM2-135M")) == ["## SmolLM2-135M"]
    assert unnamed(text.format("SmolLM2-135M-Instruct (4-bit GGUF)")) == unnamed(text.format("Base")) == []
