"""scripts/bench_serve.py: other engines answer from processes of their own, and one that fails is one sentence."""

import sys

import pytest

from scripts.bench_serve import Peer

ENGINE = """
import os
from types import SimpleNamespace

print("loaded")  # on stdout, where the answers must stay readable
__version__ = "1.2"
ggml_type = SimpleNamespace(GGML_TYPE_F32=0)

def CommonParams():
    return SimpleNamespace(model=SimpleNamespace(), cpuparams=SimpleNamespace(), cpuparams_batch=SimpleNamespace())

class Server:
    def __init__(self, params):
        assert (params.n_parallel, params.n_ctx, params.cpuparams.n_threads) == (2, 2 * 256, 1)
        if params.model.path == "none":
            raise SystemExit(3)

    def handle_completions(self, asked):
        os.write(1, b"generating\\n")
        if asked["prompt"] == [0]:
            os._exit(4)
        return {"usage": {"completion_tokens": min(asked["n_predict"], 8)}}
"""


@pytest.fixture
def peer(tmp_path, monkeypatch):
    """Starts scripts/bench_peer.py with a llama.cpp of a few lines, which generates at most 8 tokens; ends what it started."""
    (tmp_path / "xllamacpp.py").write_text(ENGINE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    started = []

    def start(model):
        started.append(Peer(sys.executable, "llama.cpp", model, "--batch", 2, "--tokens", 40, threads=1))
        return started[-1]

    yield start
    for one in started:
        one.close()
        assert one.process.poll() is not None


def test_a_peer_answers_with_its_times_whatever_it_prints(peer):
    engine = peer("some.gguf")
    assert engine.version == "xllamacpp 1.2" and engine.held() is None
    for new in (1, 8):
        wall, cpu = engine.run([[1, 2, 3], [4]], new)
        assert wall > 0 and cpu > 0
    engine.close()
    assert engine.process.returncode == 0


def test_a_peer_that_generates_too_little_is_not_counted(peer):
    with pytest.raises(ValueError, match=r"^llama\.cpp did not generate 9 tokens for each prompt$"):
        peer("some.gguf").run([[1], [2]], 9)


def test_a_peer_that_ends_is_named_with_its_code(peer):
    with pytest.raises(ValueError, match=r"bench_peer\.py llama\.cpp ended with code 3; its messages are above$"):
        peer("none")
    engine = peer("some.gguf")
    for _ in range(2):  # while it answers, and when it is gone
        with pytest.raises(ValueError, match=r"bench_peer\.py llama\.cpp ended with code 4; its messages are above$"):
            engine.run([[0]], 1)


def test_an_interpreter_that_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no-python cannot be started: No such file or directory$"):
        Peer(str(tmp_path / "no-python"), "llama.cpp", "some.gguf", threads=1)
