"""`dmc eval`: what it writes, and one sentence for wrong use."""

import json
from pathlib import Path

import pytest

from dmc import cli
from tests.model import tiny

TASKS = Path(__file__).parent / "tasks"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    fields = tiny.config("head")
    return tiny.write(tmp_path_factory.mktemp("model"), fields, tiny.weights(fields))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(f"line-{i}-of-the-text\n" for i in range(90)))
    return file


def run(capsys, *arguments):
    try:
        code = cli.main(["eval", *(str(argument) for argument in arguments)])
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_text_and_needle_in_one_report(capsys, directory, text, tmp_path):
    code, out, err = run(
        capsys,
        directory,
        "--codec",
        "tcq",
        "--bits",
        4,
        "--page-size",
        8,
        "--device",
        "cpu",
        "--text",
        text,
        "--prompt-tokens",
        40,
        "--scored-tokens",
        10,
        "--windows",
        2,
        "--needle",
        "--haystack",
        text,
        "--kinds",
        "constant",
        "--lengths",
        "120,160",
        "--depths",
        "0,50",
        "--trials",
        1,
        "--choices",
        3,
        "--plot",
        tmp_path / "map.png",
        "--json",
        tmp_path / "out.json",
        "--seed",
        5,
    )
    assert code == 0 and err == ""
    assert "2 windows of 40 + 10 tokens, perplexity" in out and "no --base: no KL" in out and "constant: exact" in out
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["policy"] == "dmc" and figures["codec"] == "tcq" and figures["arguments"]["bits"] == 4
    assert len(figures["model_hash"]) == 16 and figures["commit"] and figures["versions"]["torch"]
    assert figures["arguments"]["seed"] == 5 and figures["arguments"]["lengths"] == [120, 160]
    (measured,) = figures["text"]
    assert measured["cr"] > 1 and measured["held_bytes"] > 0 and len(measured["text_hash"]) == 16 and measured["kl"] is None
    needles = figures["needle"]
    assert needles["haystack_hash"] == measured["text_hash"] and len(needles["trials"]) == 4
    assert needles["kinds"]["constant"]["cr"] > 1 and needles["kinds"]["constant"]["encoded_bytes"] > 0
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((), "nothing to measure: give --text FILE, --needle, --tasks"),
        (("--needle", "--lengths", "1,x"), "'1,x' is not a list of numbers"),
        (("--needle", "--kinds", "pin"), "unknown kind of needle 'pin'; known: passkey"),
        (("--needle", "--depths", "140"), "needle depths must be"),
        (("--needle", "--lengths", "400"), "256 positions"),
        (("--needle", "--haystack", "/no/such"), "/no/such cannot be read"),
        (("--text", "/no/such"), "/no/such cannot be read"),
        (("--text", "TEXT", "--windows", "0"), "windows must be at least 1"),
        (("--text", "TEXT", "--base", "DIR", "--prompt-tokens", "20", "--scored-tokens", "5"), "holds a retrofitted model"),
        (("--text", "TEXT", "--json", "/no/such/out.json"), "there is no folder /no/such"),
        (("--text", "TEXT", "--plot", "x.png"), "--plot draws needle retrieval"),
        (("--suite", "all"), "unknown suite 'all'"),
        (("--text", "TEXT", "--apply-chat-template"), "--apply-chat-template is for tasks: add --tasks or --suite"),
        (("--text", "TEXT", "--system-instruction", "x"), "--system-instruction is for tasks: add --tasks or --suite"),
        (("--tasks", "x", "--task-dir", "/no/such"), "/no/such is not a folder"),
    ],
)
def test_wrong_use(capsys, directory, text, arguments, said):
    named = {"TEXT": text, "DIR": directory}
    code, out, err = run(capsys, directory, "--device", "cpu", *(named.get(argument, argument) for argument in arguments))
    assert code == 2 and out == "" and said in err and err.count("\n") == 1


@pytest.mark.parametrize("flag", ["--apply-chat-template", "--apply_chat_template"])
def test_chat_template_of_tasks(capsys, tmp_path, monkeypatch, flag):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[eval]'")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    fields = tiny.config("head")
    directory = tiny.write(tmp_path / "model", fields, tiny.weights(fields))
    asked = (directory, "--device", "cpu", "--tasks", "local_choice", "--task-dir", TASKS, "--limit", 1, flag)
    code, out, err = run(capsys, *asked, "--json", tmp_path / "out.json")
    assert code == 2 and out == "" and err.count("\n") == 1 and not (tmp_path / "out.json").exists()
    assert "has no chat template: leave --apply-chat-template out, or add chat_template to its tokenizer_config.json" in err
    config = directory / "tokenizer_config.json"
    config.write_text(
        json.dumps(
            json.loads(config.read_text())
            | {
                "chat_template": [
                    {"name": name, "template": f"{{{{ messages[0]['content'] }}}}{name}"} for name in ("default", "long")
                ]
            }
        )
    )
    counts = {}
    for name in ((), ("default",), ("long",)):
        code, out, err = run(capsys, *asked, *name, "--json", tmp_path / "out.json")
        assert code == 0 and "local_choice: acc" in out
        figures = json.loads((tmp_path / "out.json").read_text())
        assert figures["arguments"]["apply_chat_template"] == (name[0] if name else True)
        counts[name] = figures["tasks"]["cache"]["tokens"]
    assert counts[()] == counts["default",] == pytest.approx(counts["long",] + len("default") - len("long"))
