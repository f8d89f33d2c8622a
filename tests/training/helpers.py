"""Tiny models, tiny texts and runs of train.py in processes of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from checkpoints.convert import load_hf_state
from dmc.families import ModelShape, shape_of

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "checkpoints" / "base"


def tiny_config(**changes) -> LlamaConfig:
    settings = dict(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    return LlamaConfig(**(settings | changes))


def tiny_shape(**changes) -> ModelShape:
    """The same as the training side reads it."""
    return shape_of(tiny_config(**changes).to_dict())


def tiny_model(directory: Path, seed: int = 0, **changes) -> Path:
    """A random Llama in HF format with the base model's tokenizer."""
    torch.manual_seed(seed)
    LlamaForCausalLM(tiny_config(**changes)).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, directory / name)
    return directory


def tiny_text(path: Path, documents: int = 40, words: int = 150) -> Path:
    """JSONL documents of repetitive words: enough for a few steps and a held-out split."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = ["alpha", "beta", "return", "import", "self", "value", "None", "for", "in", "x"]
    with path.open("w") as file:
        for _ in range(documents):
            picks = torch.randint(len(vocabulary), (words,), generator=generator).tolist()
            file.write(json.dumps({"text": " ".join(vocabulary[i] for i in picks)}) + "\n")
    return path


def train(*arguments: object, processes: int = 1, check: bool = True, timeout: float = 300) -> subprocess.CompletedProcess:
    """Run train.py as a user does; stdout and stderr as text."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    if processes == 1:
        command = [sys.executable]
    else:
        command += ["--master-port", str(20000 + os.getpid() % 20000)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(ROOT / "train.py"), *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=timeout
    )
    if check and done.returncode:
        raise AssertionError(f"train.py failed ({done.returncode}):\n{done.stdout}\n{done.stderr}")
    return done


def metrics(output: Path) -> list[dict]:
    """The step lines of metrics.jsonl, in order."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def evaluations(output: Path) -> list[dict]:
    """The evaluation lines of metrics.jsonl, in order."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval_cr" in line]


SMALL = (
    "data.sequence_length=64",
    "log.eval_sequences=4",
    "optim.micro_batch=1",
    "optim.global_batch=4",
    "run.threads=1",
    "dmc.ramp_steps_per_unit=6",
    "dmc.hold_steps=2",
    "dmc.integer_hold_steps=0",
    "dmc.gain=100",
    "dmc.offset=5",
    "dmc.cr_weight=1",
    "optim.lr=3e-3",
    "optim.decay_steps=0",
    "--target-cr",
    "2",
)


def arguments(tmp: Path, output: Path) -> tuple[object, ...]:
    """The command line of a `small_run`."""
    return (
        "--model",
        tmp / "model",
        "--output",
        output,
        f"data.text={tmp / 'text.jsonl'}",
        f"data.cache={tmp / 'cache'}",
        *SMALL,
    )


def small_run(tmp: Path, name: str, *extra: object, processes: int = 1) -> Path:
    """A retrofit of eight steps of the tiny model under ``tmp``; its output directory."""
    model = tmp / "model"
    if not model.exists():
        tiny_model(model)
        tiny_text(tmp / "text.jsonl")
    output = tmp / name
    train(*arguments(tmp, output), *extra, processes=processes)
    return output


def weights(output: Path, name: str = "final") -> dict[str, torch.Tensor]:
    """The weights of a run's checkpoint, by their Hugging Face names."""
    return load_hf_state(output / "checkpoints" / name)[0]


def assert_same_run(output: Path, reference: Path, *, tolerance: float, absolute: float = 0.0, steps: int | None = None) -> None:
    """The step lines of two runs are equal (the last ``steps`` of them): losses, norms, targets and measured CR."""
    ours, theirs = metrics(output), metrics(reference)
    if steps is not None:
        ours, theirs = ours[-steps:], theirs[-steps:]
    assert [m["step"] for m in ours] == [m["step"] for m in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for key in ("loss", "lm_loss", "grad_norm", "measured_cr", "soft_cr", "target_cr"):
            assert mine.get(key) == pytest.approx(other.get(key), rel=tolerance, abs=absolute), (mine["step"], key)
