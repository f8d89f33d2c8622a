import json
import re

import pytest
import torch

from dmc.analysis.segments import segments_html

TOKENS = ["Hi", " <b>&amp;", "</script><script>alert(1)</script>", "\n", "\té"]


def _page(directory, alpha):
    segments_html(TOKENS, alpha, directory / "page.html")
    return (directory / "page.html").read_text(encoding="utf-8")


def test_page_holds_tokens_and_decisions(tmp_path):
    alpha = torch.tensor([[[0, 1, 0, 1, 1], [0, 0, 0, 0, 0]], [[1, 1, 1, 1, 1], [0, 0, 1, 0, 1]]]).float()
    data = json.loads(re.search(r'id="data">(.*?)</script>', _page(tmp_path, alpha), re.S).group(1))
    assert data["tokens"] == TOKENS
    assert data["merges"] == [["01011", "00000"], ["11111", "00101"]]


def test_page_is_safe_and_needs_no_network(tmp_path):
    page = _page(tmp_path, torch.zeros(1, 1, 5))
    assert "alert(1)" in page and "<script>alert" not in page and "<b>" not in page
    assert page.count("</script>") == 2
    assert "http" not in page and "src=" not in page and "innerHTML" not in page


@pytest.mark.parametrize(
    ("alpha", "words"),
    [
        (torch.zeros(1, 1, 4), r"\[L, H, 5\]"),
        (torch.zeros(1, 5), r"\[L, H, 5\]"),
        (torch.zeros(0, 1, 5), r"\[L, H, 5\]"),
        (torch.full((1, 1, 5), 0.5), "0 or 1"),
        (torch.full((1, 1, 5), float("nan")), "0 or 1"),
    ],
)
def test_bad_decisions_are_refused(tmp_path, alpha, words):
    with pytest.raises(ValueError, match=words):
        _page(tmp_path, alpha)
    assert not (tmp_path / "page.html").exists()


def test_no_tokens_are_refused(tmp_path):
    with pytest.raises(ValueError, match="0 tokens"):
        segments_html([], torch.zeros(1, 1, 0), tmp_path / "page.html")
