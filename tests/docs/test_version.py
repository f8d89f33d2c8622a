"""The version stands in three files: the package, the changelog and the citation."""

import re

import yaml

import dmc
from tests.docs.blocks import ROOT


def test_changelog_and_citation_name_the_version_of_the_package():
    heading = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heading and heading[1] == dmc.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == dmc.__version__


def test_hooks_of_pre_commit_run_tools_of_the_test_command():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    command = (ROOT / "scripts" / "test.sh").read_text()
    assert {"ruff", "mypy"} <= {hook["entry"].split()[0] for hook in hooks}
    assert all(re.search(rf"^{tool}\b", command, re.MULTILINE) for tool in ("ruff check", "mypy"))
    for hook in hooks:
        assert hook["entry"].split()[0] != "python" or (ROOT / hook["entry"].split()[1]).is_file()
