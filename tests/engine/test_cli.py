"""The console command: what it prints, and one sentence and exit code 2 for wrong use."""

import json
import re

import pytest

from dmc import cli
from dmc.commands.common import memory
from tests.model import tiny


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    fields = tiny.config("head")
    return str(tiny.write(tmp_path_factory.mktemp("model"), fields, tiny.weights(fields)))


def run(capsys, *arguments):
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_generate_prints_text_and_figures(capsys, directory, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("some-text-of-a-file")
    common = (
        "--policy",
        "dmc",
        "--codec",
        "tcq",
        "--bits",
        "4",
        "--page-size",
        "8",
        "--max-tokens",
        25,
        "--temperature",
        0.9,
        "--top-p",
        0.9,
        "--top-k",
        40,
        "--seed",
        3,
        "--device",
        "cpu",
        "--dtype",
        "fp32",
    )
    code, out, err = run(capsys, "generate", directory, "--prompt", "hello", *common)
    assert code == 0 and err == ""
    text = out.split("\n\n")[0]
    assert text and re.search(r"\d+ tokens after 5 of prompt in [\d.]+ s: [\d.]+ tokens/s", out)
    assert re.search(r"measured CR [\d.]+ \(tokens / entries\)", out)
    held, *parts, dense, ratio = re.search(
        r"held ([\d,]+) bytes \(encoded pages ([\d,]+), full-precision pages ([\d,]+), accumulating entries ([\d,]+), "
        r"block tables ([\d,]+)\); "
        r"dense bf16 ([\d,]+) bytes: ([\d.]+) x",
        out,
    ).groups()
    held, dense, *parts = (int(number.replace(",", "")) for number in (held, dense, *parts))
    assert held == sum(parts) and float(ratio) == pytest.approx(dense / held, abs=0.01)
    code, out, _ = run(capsys, "generate", directory, "--prompt", "hello", "--prompt-file", file, *common)
    assert code == 0 and out.startswith(f"--- 1\n{text}\n--- 2\n") and "of prompt" in out


@pytest.mark.parametrize(
    "policy, entries",
    [("h2o:heavy=9,recent=8", 16), ("tova:budget=17", 16), ("streaming:sinks=2,recent=15", 16), ("h2o:share=0.25", 17)],
)
def test_evicting_policies_by_name(capsys, directory, policy, entries):
    """60 tokens and 10 more: between two steps a head holds what the next query may see, but itself."""
    code, out, err = run(
        capsys, "inspect", directory, "--prompt", "a" * 60, "--policy", policy, "--max-tokens", 11, "--device", "cpu", "--json"
    )
    assert code == 0, err
    figures = json.loads(out)
    assert figures["tokens"] == 70 and figures["entries"] == entries * tiny.LAYERS * 2


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((), "COMMAND"),
        (("serv",), "invalid choice: 'serv'"),
        (("generate",), "DIR"),
        (("generate", "DIR"), "--prompt TEXT or --prompt-file FILE"),
        (
            ("generate", "DIR", "--prompt", "x", "--bites", "4"),
            "unknown argument --bites for generate; its flags: --help, --policy",
        ),
        (("generate", "DIR", "--prompt", "x", "--codec", "tcq", "--bits", "5"), "2, 3, 4, 8"),
        (("generate", "DIR", "--prompt", "x", "--codec", "tcq", "--bits", "four"), "invalid int value: 'four'"),
        (("generate", "DIR", "--prompt", "x", "--bits", "4"), "the dense codec has no setting bits"),
        (("generate", "DIR", "--prompt", "x", "--policy", "lru"), "known: full, dmc"),
        (("generate", "DIR", "--prompt", "x", "--policy", "h2o:heavy=none"), "heavy=none must be a whole number"),
        (("generate", "DIR", "--prompt", "x", "--temperature", "-1"), "temperature"),
        (("generate", "DIR", "--prompt", "x", "--kv-memory", "5parsec"), "'5parsec' is not a size"),
        (("generate", "DIR", "--prompt", "x", "--max-tokens", "9999"), "10000 are more than the 256 positions"),
        (("generate", "DIR", "--prompt-file", "/no/such/file"), "/no/such/file cannot be read"),
        (("generate", "/no/such/directory", "--prompt", "x"), "is not a model directory: it has no config.json"),
        (("generate", "DIR", "--prompt", ""), "at least 1"),
    ],
)
def test_wrong_use(capsys, directory, arguments, said):
    code, out, err = run(capsys, *(directory if argument == "DIR" else argument for argument in arguments))
    assert code == 2 and out == ""
    assert said in err and err.count("\n") == 1


def test_help_names_every_flag_and_needs_no_torch(capsys):
    import subprocess
    import sys

    code, out, _ = run(capsys, "generate", "--help")
    assert code == 0 and all(flag in out for flag in ("--prompt-file", "--codec", "--kv-memory", "--top-p", "--device"))
    code, out, _ = run(capsys, "--help")
    assert code == 0 and all(command in out for command in (*cli.COMMANDS, *cli.PROGRAMS))
    check = "import sys, dmc.cli; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_the_module_shows_every_command():
    assert all(f"    dmc {command} " in cli.__doc__ for command in (*cli.COMMANDS, *cli.PROGRAMS))


@pytest.mark.parametrize("text, size", [("512", 512), ("3KiB", 3072), ("2MB", 2_000_000), ("1GiB", 2**30)])
def test_memory_sizes(text, size):
    assert memory(text) == size


def test_inspect(capsys, directory, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("some-text-of-a-file" * 5)
    common = ("inspect", directory, "--prompt-file", file, "--codec", "tcq", "--page-size", "8", "--device", "cpu")
    code, out, err = run(capsys, *common)
    assert code == 0 and err == ""
    assert "dmc x tcq: pages of 8 entries" in out and "codec error" in out and out.count("\n") == 8 + tiny.LAYERS
    code, out, _ = run(capsys, *common, "--json")
    figures = json.loads(out)
    assert figures["tokens"] == 95 and figures["held_bytes"] == sum(figures["held"].values())
    assert figures["cr"] == pytest.approx(95 * 4 / figures["entries"]) and len(figures["cr_per_head"]) == tiny.LAYERS
    assert 0 < figures["codec_error"]["keys"] < 0.3 and figures["byte_ratio"] > 0
    code, out, err = run(capsys, *common, "--kv-memory", "2KiB")
    assert code == 2 and err.count("\n") == 1 and "kv_memory" in err


def test_policy_with_settings(capsys, directory):
    common = ("generate", directory, "--prompt", "hello" * 9, "--device", "cpu", "--max-tokens", 20, "--seed", 1)
    code, out, _ = run(capsys, *common, "--policy", "streaming:sinks=2,recent=10")
    assert code == 0 and "measured CR 5." in out  # 45 + 19 tokens in 11 entries
    code, _, err = run(capsys, *common, "--policy", "streaming:budget=3")
    assert code == 2 and "no setting budget" in err
