"""The page to try the model on: what feeds it, and the page itself in headless Chromium."""

import json
import re

import httpx
import pytest
import torch

from tests.model import tiny
from tests.server import chromium
from tests.server.helpers import model_directory, serving


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return model_directory(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture(scope="module")
def server(directory):
    with serving(directory, prefill_tokens=16) as running:
        yield running


def events(server, **body):
    answer = httpx.post(f"{server.url}/try", json=body, timeout=60)
    assert answer.status_code == 200
    return [json.loads(event[6:]) for event in answer.text.split("\n\n") if event]


def test_merges_are_those_of_the_model(server, directory):
    """Against Algorithm 1 run token by token: the entries that each head holds after every token."""
    first, *rest = events(server, prompt="a prompt of some length, in chunks", max_tokens=20, temperature=0)
    assert (first["layers"], first["heads"]) == (tiny.LAYERS, 2) and "".join(first["pieces"]).startswith("a")
    merges = [digits for event in rest for digits in event["merges"]]
    pieces = first["pieces"] + [piece for event in rest for piece in event["pieces"]]
    assert len(merges) == len(pieces) - 1  # the last token is never fed
    fields = json.loads((directory / "config.json").read_text())
    ids = server.llm.tokenizer.encode("a prompt of some length, in chunks")
    ids += [server.llm.tokenizer.inner.convert_tokens_to_ids(piece) for event in rest for piece in event["pieces"]]
    bits = torch.tensor([[int(bit) for bit in f"{int(digits, 16):04b}"] for digits in merges]).view(-1, tiny.LAYERS, 2)
    for count in (1, 2, 20, len(merges)):
        _, lengths = tiny.token_by_token(fields, tiny.weights(fields), ids[:count])
        opened = 1 - bits[:count]
        opened[0] = 1
        assert torch.equal(opened.sum(0), lengths)
    assert rest[-1]["finish"] and rest[-1]["held"] > 0 and rest[-1]["dense"] == server.llm.cache.dense_bytes(len(merges))
    server.wait_idle()


def test_what_is_refused(server):
    assert httpx.post(f"{server.url}/try", json={"prompt": "x", "max_tokens": 9999}).status_code == 400
    assert httpx.post(f"{server.url}/try", json={"prompt": "x", "top_k": 3}).status_code == 422


def test_the_page_asks_nobody_else(server):
    answer = httpx.get(f"{server.url}/")
    assert answer.headers["content-type"].startswith("text/html") and "tiny" in answer.text
    assert not re.search(r"""(src|href|url\()\s*=?\s*["']?(https?:)?//""", answer.text)


@pytest.mark.skipif(chromium.PATH is None, reason="needs Chromium")
def test_in_chromium(server, tmp_path):
    """A prompt is typed, the answer comes, colours change with the head; the picture is there to be looked at."""
    spans = "[...document.querySelectorAll('#text span[title]')].map(s => [s.className, s.title, s.style.background])"
    with chromium.Page(f"{server.url}/", tmp_path / "profile") as page:
        page.wait("document.readyState === 'complete' && !!document.getElementById('go')")
        page.evaluate("document.getElementById('prompt').value = 'def read_lines(path): return open(path).read()'")
        page.evaluate("document.getElementById('go').click()")
        page.wait("document.body.dataset.done === '1'")
        assert page.evaluate("document.getElementById('error').textContent") == ""
        shown = page.evaluate(spans)
        assert len(shown) > 50 and shown[0][:2] == ["prompt open", "token 0, entry 0"]
        entries = [int(title.split()[-1]) for _, title, _ in shown]
        assert entries == sorted(entries) and entries[-1] < len(shown) - 1  # some were merged
        for (style, _, colour), entry, before in zip(shown[1:], entries[1:], entries, strict=False):
            assert ("open" in style) == (entry > before) and colour
        figures = page.evaluate("document.getElementById('figures').textContent")
        assert re.search(rf"{len(shown)} tokens cached. Held [\d,]+ bytes of [\d,]+ \(dense bf16\): [\d.]+ x smaller", figures)
        page.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 20_000
        page.evaluate("const l = document.getElementById('layer'); l.value = '1'; l.dispatchEvent(new Event('change'))")
        assert [int(title.split()[-1]) for _, title, _ in page.evaluate(spans)] != entries
        page.evaluate("document.getElementById('tokens').value = '9999'; document.getElementById('go').click()")
        page.wait("document.getElementById('error').textContent.includes('more than the 512 positions')")
    server.wait_idle()
