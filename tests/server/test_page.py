"""The page to try the model on: what feeds it, and the page itself in headless Chromium."""

import json
import re
import shutil
import subprocess

import httpx
import pytest
import torch

from tests.model import tiny
from tests.server.helpers import model_directory, serving

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


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


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_in_chromium(server, tmp_path):
    """The page generates by itself when its address ends in #go; the picture is there to be looked at."""
    common = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile",
              "--virtual-time-budget=20000", "--window-size=1000,800"]
    dom = subprocess.run([*common, "--dump-dom", f"{server.url}/#go"], capture_output=True, text=True, timeout=180).stdout
    assert 'data-done="1"' in dom, dom[-2000:]
    spans = re.findall(r'<span class="([^"]*)"[^>]*title="token (\d+), entry (\d+)"[^>]*>', dom)
    assert len(spans) > 60 and spans[0] == ("prompt open", "0", "0")
    entries = [int(entry) for _, _, entry in spans]
    assert entries == sorted(entries) and entries[-1] < len(spans) - 1  # some were merged
    assert re.search(r"\d+ tokens cached\. Held [\d,]+ bytes of [\d,]+ \(dense bf16\)", dom)
    assert re.search(r'id="error" role="alert"></p>', dom)
    picture = tmp_path / "page.png"
    subprocess.run([*common, f"--screenshot={picture}", f"{server.url}/#go"], capture_output=True, timeout=180)
    assert picture.stat().st_size > 20_000
    server.wait_idle()
