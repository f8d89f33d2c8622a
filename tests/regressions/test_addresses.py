"""Every regression test cites the public report that it comes from."""

import ast
import re
from pathlib import Path

REPORT = re.compile(r"# https://\S+/\d+: \S.*\.")


def uncited(source):
    """Names of the test functions without a report's address in the comment lines directly above them."""
    lines, missing = source.splitlines(), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
            comment = []
            while first > 0 and lines[first - 1].lstrip().startswith("#"):
                first -= 1
                comment.insert(0, lines[first].strip().lstrip("# "))
            if not REPORT.match("# " + " ".join(comment)):
                missing.append(node.name)
    return missing


def test_uncited_is_found():
    cited = "# https://example.org/issues/7: what was\n# wrong.\n@pytest.mark.slow\ndef test_a(): ...\n"
    assert uncited(cited) == [] and uncited(f"{cited}\ndef test_b(): ...\n") == ["test_b"]
    assert uncited("# https://example.org/issues/7\ndef test_a(): ...\n") == ["test_a"]


def test_every_regression_cites_its_report():
    files = [path for path in Path(__file__).parent.glob("test_*.py") if path.name != Path(__file__).name]
    assert {path.name: uncited(path.read_text()) for path in files} == {path.name: [] for path in files}
