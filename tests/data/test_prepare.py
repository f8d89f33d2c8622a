"""Preparation: the same bytes for any number of workers, a split by hash, and nothing left of what failed."""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer

from data import encode, prepare, sources, tokens
from data.prepare import HeldOut
from scripts.prepare_data import main
from tests.data.killed import killed
from tests.data.prepared import make, texts, write_jsonl
from tests.training.helpers import TOKENIZER

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = [sys.executable, str(ROOT / "scripts/prepare_data.py")]


@pytest.fixture(scope="module")
def tokenizer():
    return tokens.load_tokenizer(TOKENIZER)


def spoken(directory, part):
    """The documents of a part as text, read by megatron and decoded by the tokenizer alone."""
    plain = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    documents = [d.tolist() for d in IndexedDataset(str(directory / part))]
    assert all(d[-1] == 0 for d in documents)
    return [plain.decode(d[:-1], skip_special_tokens=False) for d in documents]


def files(directory):
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


def run(*arguments, **settings):
    return subprocess.run([*SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=120, **settings)


# ------------------------------------------------------------------------------------------- what is written


def test_documents_come_back_in_order_with_their_numbers(tmp_path):
    rows = texts(30)
    made = make(tmp_path, [*rows[:10], " \n", *rows[10:], ""], held_out="0")
    assert spoken(made, "train") == rows
    meta = json.loads((made / "meta.json").read_text())
    part = meta["parts"]["train"]
    ids = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json")).encode_batch(rows, add_special_tokens=False)
    assert (part["documents"], part["characters"]) == (30, sum(map(len, rows)))
    assert part["tokens"] == sum(len(e.ids) + 1 for e in ids) == (made / "train.bin").stat().st_size // 2
    assert meta["blank_documents"] == 2 and list(meta["parts"]) == ["train"]
    assert meta["tokenizer"] == tokens.about(tokens.load_tokenizer(TOKENIZER)) and meta["source"]["column"] == "text"
    assert part["files"]["train.bin"]["sha256"] == hashlib.sha256((made / "train.bin").read_bytes()).hexdigest()


def test_any_number_of_workers_writes_the_same_bytes(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(encode, "CHUNK_DOCUMENTS", 7)
    path = write_jsonl(tmp_path / "a.jsonl", texts(300))
    found = []
    for workers in (1, 2, 3):
        out = tmp_path / str(workers)
        prepare.prepare(sources.Request([path]), tokenizer, out, held_out=HeldOut(fraction=0.1), workers=workers)
        found.append(files(out))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("sizes", [(1, 10), (1000, 10**9), (3, 10**9)])
def test_chunks_make_no_difference(tmp_path, monkeypatch, sizes):
    (tmp_path / "b").mkdir()
    expected = files(make(tmp_path, texts(60)))
    monkeypatch.setattr(encode, "CHUNK_DOCUMENTS", sizes[0])
    monkeypatch.setattr(encode, "CHUNK_CHARACTERS", sizes[1])
    found = files(make(tmp_path / "b", texts(60)))
    assert {n: d for n, d in found.items() if n != "meta.json"} == {n: d for n, d in expected.items() if n != "meta.json"}


def test_never_more_than_a_few_chunks_are_held():
    taken = []

    def chunks():
        for i in range(60):
            taken.append(i)
            yield [f"text {i}"]

    settings = {"tokenizer": (TOKENIZER / "tokenizer.json").read_text(), "end": 0, "dtype": "uint16", "parse_special": False}
    for done, encoded in enumerate(encode.encode_all(chunks(), settings, 2)):
        assert len(taken) - done <= 6 and encoded.characters == [len(f"text {done}")]
    assert done == 59


def test_special_tokens_in_a_text_are_text_unless_asked_for(tmp_path):
    rows = ["a<|endoftext|>b", "c"]
    for parse, ends in ((False, [0, 0]), (True, [1, 0])):
        made = make(tmp_path, rows, held_out="0", name=f"corpus{parse}", parse_special=parse)
        assert [(d[:-1] == 0).sum() for d in IndexedDataset(str(made / "train"))] == ends
        assert spoken(made, "train") == rows


def test_a_tokenizer_that_truncates_or_pads_does_neither_here(tmp_path):
    limited = tokens.load_tokenizer(TOKENIZER)
    limited.backend_tokenizer.enable_truncation(4)
    limited.backend_tokenizer.enable_padding(length=50)
    path = write_jsonl(tmp_path / "a.jsonl", texts(3))
    prepare.prepare(sources.Request([path]), limited, tmp_path / "out", held_out=HeldOut())
    assert spoken(tmp_path / "out", "train") == texts(3)


def test_a_killed_worker_is_said(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(encode, "_work", killed)
    path = write_jsonl(tmp_path / "a.jsonl", texts(3))
    with pytest.raises(ValueError, match="one of the 2 tokenising processes was killed.*use fewer --workers"):
        prepare.prepare(sources.Request([path]), tokenizer, tmp_path / "out", held_out=HeldOut(), workers=2)
    assert os.listdir(tmp_path) == ["a.jsonl"]


# ------------------------------------------------------------------------------------------- the split


@pytest.mark.parametrize("share", ["0.2", "12"])
def test_the_split_is_by_text_whatever_the_order(tmp_path, share):
    rows = texts(60)
    (tmp_path / "b").mkdir()
    made, turned = make(tmp_path, rows, held_out=share), make(tmp_path / "b", rows[::-1], held_out=share)
    kept = set(spoken(made, "held_out"))
    assert kept == set(spoken(turned, "held_out")) and sorted([*kept, *spoken(made, "train")]) == sorted(rows)
    if share == "12":
        by_hash = sorted(rows, key=lambda row: hashlib.sha256(row.encode()).digest())
        assert spoken(made, "held_out") == by_hash[:12] == spoken(turned, "held_out")
    else:
        assert kept == {r for r in rows if int(hashlib.sha256(r.encode()).hexdigest()[:16], 16) / 2**64 < 0.2}
        assert [r for r in rows if r not in kept] == spoken(made, "train")


@pytest.mark.parametrize("share", ["0.3", "9"])
def test_copies_of_a_document_are_on_one_side(tmp_path, share):
    rows = texts(30)
    made = make(tmp_path, [*rows, *rows], held_out=share)
    kept, trained = spoken(made, "held_out"), spoken(made, "train")
    assert not set(kept) & set(trained) and all(kept.count(k) == 2 for k in kept) and len(kept) + len(trained) == 60
    assert share == "0.3" or len(kept) == 18


def test_a_held_out_file_and_no_copy_of_it_in_training(tmp_path, tokenizer):
    rows = texts(20)
    trained, kept = write_jsonl(tmp_path / "a.jsonl", rows), write_jsonl(tmp_path / "b.jsonl", ["new", rows[4]])
    meta = prepare.prepare(sources.Request([trained]), tokenizer, tmp_path / "out", held_out=HeldOut(files=[kept]))
    assert spoken(tmp_path / "out", "held_out") == ["new", rows[4]]
    assert spoken(tmp_path / "out", "train") == [*rows[:4], *rows[5:]] and meta["copies_of_held_out"] == 1


@pytest.mark.parametrize(
    ("share", "words"),
    [
        ("1.5", "--held-out is 1.5: it must be"),
        ("-1", "--held-out is -1"),
        ("nan", "is nan"),
        ("a", "is a"),
        ("1.0", "is 1.0"),
        ("100000", "is 100000"),
        ("0.0", "is 0.0"),
    ],
)
def test_wrong_shares_are_refused(share, words):
    with pytest.raises(ValueError, match=words):
        HeldOut.parse(share, [])
    with pytest.raises(ValueError, match="exclude each other"):
        HeldOut.parse("0.5", ["a.txt"])


def test_empty_parts_are_refused(tmp_path):
    for rows, share, words in (
        (["", " "], "0", "of 0 documents .left out: 2 blank documents, .*none went into the train part"),
        (texts(3), "1e-9", "of 3 documents .*none went into the held-out part"),
        (texts(3), "3", "none went into the train part"),
    ):
        with pytest.raises(ValueError, match=words):
            make(tmp_path, rows, held_out=share)
        assert os.listdir(tmp_path) == ["corpus.jsonl"]


# ------------------------------------------------------------------------------------------- what fails


def test_what_exists_is_not_touched(tmp_path):
    made = make(tmp_path, texts(20))
    before = files(made)
    with pytest.raises(ValueError, match="corpus exists: remove it, or name another --output"):
        make(tmp_path, texts(30))
    assert files(made) == before


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", texts(400))

    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = run(path, "--tokenizer", TOKENIZER, "--output", tmp_path / "out", "--workers", 1, preexec_fn=small_disk)
    assert done.returncode == 2 and os.listdir(tmp_path) == ["a.jsonl"]
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("error")]
    assert line == (
        f"error: {tmp_path / 'out'} could not be written: File too large (free some space or name another --output); "
        "nothing of it was kept"
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_no_space_at_any_moment_leaves_nothing(tmp_path, tokenizer, monkeypatch, call):
    def full(*_):
        raise OSError(28, "No space left on device")

    owner, name = {"write": (prepare.PartWriter, "add"), "fsync": (os, "fsync"), "rename": (os, "rename")}[call]
    monkeypatch.setattr(owner, name, full if call != "write" else lambda *_, **__: full())
    path = write_jsonl(tmp_path / "a.jsonl", texts(5))
    with pytest.raises(ValueError, match="out could not be written: No space left on device .free some space"):
        prepare.prepare(sources.Request([path]), tokenizer, tmp_path / "out", held_out=HeldOut())
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_two_at_once_do_not_mix(tmp_path):
    with prepare.staged(tmp_path / "out"):
        with pytest.raises(ValueError, match="another process is writing .*out.partial"), prepare.staged(tmp_path / "out"):
            pass
        (tmp_path / "out.partial" / "x").touch()
    assert os.listdir(tmp_path / "out") == ["x"]


def test_the_rest_of_a_killed_run_is_cleared_away(tmp_path):
    (tmp_path / "corpus.partial").mkdir()
    (tmp_path / "corpus.partial" / "train.bin").write_bytes(b"half")
    (tmp_path / "corpus.partial" / "other.bin").write_bytes(b"half")
    made = make(tmp_path, texts(20))
    assert sorted(os.listdir(made)) == ["held_out.bin", "held_out.idx", "meta.json", "train.bin", "train.idx"]
    assert sorted(os.listdir(tmp_path)) == ["corpus", "corpus.jsonl"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_whatever_ends_it_the_staging_goes(tmp_path, error):
    with pytest.raises(error), prepare.staged(tmp_path / "out") as staging:
        (staging / "train.bin").write_bytes(b"half")
        raise error
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_leaves_no_corpus_and_no_process(tmp_path, sent):
    path = write_jsonl(tmp_path / "a.jsonl", texts(100_000))
    process = subprocess.Popen(
        [*SCRIPT, path, "--tokenizer", str(TOKENIZER), "--output", str(tmp_path / "out"), "--workers", "2"],
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    written = tmp_path / "out.partial" / "train.bin"
    deadline = time.monotonic() + 240
    while not (written.exists() and written.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(sent)
    assert process.wait(60) == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[sent]
    assert os.listdir(tmp_path) == ["a.jsonl"] or (sent == signal.SIGKILL and not (tmp_path / "out").exists())
    while _alive(process.pid):  # the workers end by themselves
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _alive(group):
    """Whether the group has a process that runs (a zombie whose parent is gone may wait to be reaped)."""
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = entry.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(pgrp) == group and state != "Z":
            return True
    return False


# ------------------------------------------------------------------------------------------- the command


def test_the_command_prepares_and_verifies(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", texts(40), column="body")
    done = run(
        path,
        "--tokenizer",
        TOKENIZER,
        "--output",
        tmp_path / "out",
        "--held-out",
        5,
        "--text-column",
        "body",
        "--workers",
        2,
        "--limit",
        30,
    )
    assert done.returncode == 0, done.stderr
    assert len(spoken(tmp_path / "out", "train")) == 25 and len(spoken(tmp_path / "out", "held_out")) == 5
    assert "documents: 100%" in done.stderr and "30/30" in done.stderr and "tokens/s" in done.stderr and "docs" in done.stderr
    verified = run("--verify", tmp_path / "out")
    assert (verified.returncode, verified.stdout) == (0, done.stdout) and "25 documents" in done.stdout
    data = np.fromfile(tmp_path / "out/train.bin", np.uint16)
    data[3] ^= 1
    data.tofile(tmp_path / "out/train.bin")
    verified = run("--verify", tmp_path / "out")
    said = [line for line in verified.stderr.splitlines() if "torch/utils/" not in line]  # of PyTorch: CUDA without a GPU
    assert verified.returncode == 2 and said[0].startswith("error: ") and len(said) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "SOURCE and --tokenizer and --output must be given"),
        (["a.txt", "--tokenizer", "T", "--output", "O", "--workers", "0"], "--workers is 0: it must be at least 1"),
        (["a.txt", "--tokenizer", "T", "--output", "O", "--limit", "0"], "--limit is 0"),
        (["missing.txt", "--tokenizer", str(TOKENIZER), "--output", "O"], "no file, directory or dataset at missing.txt"),
        (["a.txt", "--tokenizer", "nowhere", "--output", "O"], "nowhere has no tokenizer.json"),
        (["--verify", "nowhere"], "nowhere is not a prepared corpus"),
    ],
)
def test_wrong_use_is_one_sentence(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and words in error and os.listdir(tmp_path) == []
