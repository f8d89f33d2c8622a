"""The steps of docs/chat.md on a small random model: conversations, retrofit, export, an answer."""

import os
import subprocess
import sys

import pytest

from dmc.engine.llm import LLM
from dmc.engine.params import SamplingParams
from dmc.engine.tokenizer import Tokenizer
from tests.data.chats import PLAIN, conversations, write_chats
from tests.docs.blocks import ROOT, all_blocks
from tests.training.helpers import SMALL, evaluations, tiny_model

# Smaller than in the recipe: lengths, and what the CPU has not.
SMALLER = (*SMALL, "dmc.window=8", "run.precision=fp32", "log.tensorboard=false", "run.save_every=0", "optim.warmup_steps=0")
STAND_INS = {
    "HuggingFaceH4/ultrachat_200k --split train_sft": "chats.jsonl",
    "--held-out 1000": "--held-out 20",
    "torchrun ": "python ",
}


@pytest.mark.slow
def test_the_steps_of_the_page(tmp_path):
    lines = next(block for block in all_blocks() if block.page == "docs/chat.md").text.replace("\\\n", " ").splitlines()
    assert lines[0].startswith("hf download") and lines[-1].startswith("dmc serve")
    model = tmp_path / "models" / "Llama-3.1-8B-Instruct"
    tiny_model(model, num_hidden_layers=4, max_position_embeddings=4096, pad_token_id=None)
    (model / "chat_template.jinja").write_text(PLAIN)
    write_chats(tmp_path / "chats.jsonl", conversations(300))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for line in lines[1:-1]:
        for shown, run in STAND_INS.items():
            line = line.replace(shown, run)
        program, *words = line.split()
        assert program == "python"
        words[0] = str(ROOT / words[0])
        if "--config" in words and "--dry-run" not in words:
            words += SMALLER
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        assert "--config" not in words or "--dry-run" in words or "its assistant turns" in done.stdout
    assert evaluations(tmp_path / "runs" / "llama3.1-8b-instruct-lora")[-1]["name"] == "final"
    served = tmp_path / "runs" / "llama3.1-8b-instruct-cr4"
    prompt = Tokenizer(served, 2048).chat([{"role": "user", "content": "import alpha"}])
    (answer,) = LLM(served, kv_memory=2**26).generate([prompt], SamplingParams(max_tokens=4, temperature=0))
    assert 1 <= len(answer.token_ids) <= 4
