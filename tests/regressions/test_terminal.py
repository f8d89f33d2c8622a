"""No command waits for an answer on the terminal."""

import ast
import builtins
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dmc import pretrained
from dmc.engine.tokenizer import Tokenizer
from scripts import prepare_data
from tests.checkpoints.tiny import tiny, write
from tests.data.prepared import texts, write_jsonl

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def asked(monkeypatch):
    """The questions that were asked on the terminal; each is answered with yes."""
    questions = []
    monkeypatch.setattr(builtins, "input", lambda question="": questions.append(question) or "y")
    return questions


@pytest.fixture
def export(tmp_path):
    """An exported model: its config.json names the Python code next to it. The tokenizer's vocabulary is two words."""
    return write(tiny("neuron", heads=2), tmp_path)


# https://github.com/IST-DASLab/sparsegpt/pull/38: loading the tokenizer of a local model asked whether to run the code of
# the model, each time.
def test_the_tokenizer_of_an_export_is_read_without_a_question(tmp_path, export, asked, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    path = write_jsonl(tmp_path / "a.jsonl", texts(3))
    command = [path, "--tokenizer", str(export), "--output", str(tmp_path / "out"), "--workers", "1"]
    assert prepare_data.main(command) == 0 and (tmp_path / "out" / "meta.json").is_file()
    assert Tokenizer(export, 10**6).encode("w1") and asked == []


# https://github.com/ml-explore/mlx-lm/pull/383: a training command asked whether to run the code of the model directory.
def test_a_model_with_code_of_its_own_is_refused_in_one_sentence(export, asked):
    with pytest.raises(ValueError, match=f"cannot load {export} with its own code: name a plain model directory") as caught:
        pretrained.load_model(export, torch.float32)
    assert asked == [] and "\n" not in str(caught.value)


def unsure(source):
    """Line numbers of calls of ``from_pretrained`` of an Auto class that leave the question about code open."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    loads = [
        call
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and call.func.attr == "from_pretrained"
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id.startswith("Auto")
    ]
    return [call.lineno for call in loads if "trust_remote_code" not in {keyword.arg for keyword in call.keywords}]


# https://github.com/huggingface/transformers/issues/28501: from_pretrained asked three times about the code of a tokenizer.
def test_every_load_says_whether_code_is_run():
    assert unsure("a = AutoModel.from_pretrained(x)\nb = AutoModel.from_pretrained(x, trust_remote_code=False)") == [1]
    files = [ROOT / "train.py", *(p for part in ("checkpoints", "data", "dmc", "scripts") for p in (ROOT / part).rglob("*.py"))]
    found = {str(path.relative_to(ROOT)): unsure(path.read_text()) for path in files}
    assert len(found) > 100 and {path: lines for path, lines in found.items() if lines} == {}


REPORT_TO_WANDB = """
import sys
from pathlib import Path

from dmc.training.config import LogConfig
from dmc.training.metrics import Reporter

try:
    Reporter(LogConfig(wandb="project"), Path(sys.argv[1]), {}, rank=0, steps=1)
except ValueError as error:
    print(f"error: {error}")
"""


# https://github.com/wandb/wandb/issues/592: workers without a login waited at a prompt for an answer.
@pytest.mark.slow
def test_wandb_without_a_login_is_one_sentence(tmp_path):
    pytest.importorskip("wandb")
    environment = {k: v for k, v in os.environ.items() if k not in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_SILENT")}
    environment |= {"PYTHONPATH": str(ROOT), "TERM": "xterm"}
    environment |= {name: str(tmp_path / name) for name in ("HOME", "NETRC", "WANDB_CONFIG_DIR")}
    ours, terminal = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", REPORT_TO_WANDB, str(tmp_path)],
        stdin=terminal,
        stderr=terminal,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        timeout=240,
    )
    os.close(ours)
    os.close(terminal)
    assert re.search("error: log.wandb=project could not start .*run `wandb login`.*WANDB_MODE=offline", done.stdout)
