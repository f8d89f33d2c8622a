"""Conversations: tokens and assistant turns are those of transformers' apply_chat_template, in files and prepared corpora."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from tokenizers import processors

from data import batches, corpus, sources, tokens
from data.chat import ChatTemplate, Messages
from data.column import Unreadable
from data.encode import Encoder
from data.prepare import HeldOut, prepare
from dmc.training.config import LogConfig, OptimConfig
from scripts.prepare_data import main
from tests.data.chats import ALTERNATING, BLOCKS, COUNTED, PLAIN, THINKING, chat_tokenizer, conversations, write_chats
from tests.data.prepared import make, texts

ROWS = conversations(40)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Tokenizers by their template."""
    root = tmp_path_factory.mktemp("tokenizers")
    named = {"plain": PLAIN, "blocks": BLOCKS, "thinking": THINKING, "counted": COUNTED, "alternating": ALTERNATING, "none": None}
    return {name: tokens.load_tokenizer(chat_tokenizer(root / name, template)) for name, template in named.items()}


def read(tokenizer, path, cache, loss_on="assistant", **settings):
    """``(ids, scored)`` of each document of a file, held-out ones last."""
    both = tokens.corpora(str(path), "", tokenizer, cache, chat=True, loss_on=loss_on, **settings)
    return [document for mixture in both for document in documents(mixture.corpora[0])]


def documents(found):
    ((starts, stops),) = found.document_spans()
    return [
        (found.tokens[a:b].tolist(), None if found.scored is None else found.scored[a:b].tolist())
        for a, b in zip(starts.tolist(), stops.tolist(), strict=True)
    ]


def in_order(rows):
    return [row for i, row in enumerate(rows) if i % 20 != 19] + [row for i, row in enumerate(rows) if i % 20 == 19]


# ------------------------------------------------------------------------------------------- tokens and turns


@pytest.mark.parametrize("name", ["plain", "blocks", "thinking", "counted"])
def test_tokens_are_those_of_transformers(made, tmp_path, name):
    tokenizer = made[name]
    found = read(tokenizer, write_chats(tmp_path / "a.jsonl", ROWS), tmp_path / "cache", "everything")
    assert found == [(tokenizer.apply_chat_template(row)["input_ids"], None) for row in in_order(ROWS)]


def test_turns_are_those_of_the_templates_blocks(made, tmp_path):
    found = read(made["blocks"], write_chats(tmp_path / "a.jsonl", ROWS), tmp_path / "cache")
    for (ids, scored), row in zip(found, in_order(ROWS), strict=True):
        theirs = made["blocks"].apply_chat_template(row, return_assistant_tokens_mask=True)
        assert (ids, scored) == (theirs["input_ids"], theirs["assistant_masks"])


def by_pieces(tokenizer, row):
    """Tokens and scores of a conversation of the template PLAIN, its pieces encoded one by one: special tokens part them."""
    ids, scored = [], []
    for message in row:
        head = tokenizer.encode(f"<|pad|>{message['role']}\n", add_special_tokens=False)
        body = tokenizer.encode(message["content"] + "<|endoftext|>", add_special_tokens=False)
        end = tokenizer.encode("\n", add_special_tokens=False)
        ids += head + body + end
        scored += [0] * len(head) + [int(message["role"] == "assistant")] * len(body + end)
    return ids, scored


def test_turns_of_a_template_without_blocks_are_those_of_a_loop_over_messages(made, tmp_path):
    found = read(made["plain"], write_chats(tmp_path / "a.jsonl", ROWS), tmp_path / "cache")
    assert found == [by_pieces(made["plain"], row) for row in in_order(ROWS)]
    assert any(0 in scored and 1 in scored for _, scored in found)


def test_a_last_turn_that_is_rendered_differently(made):
    """The turns of both kinds are found in the full text: from the prompt to what closes the turn."""
    row = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", " b\n"), ("user", "b"), ("assistant", "c"))]
    text = ChatTemplate(made["thinking"], "assistant")(row, "it")
    assert text == made["thinking"].apply_chat_template(row, tokenize=False)
    assert [text[a:b] for a, b in text.turns] == [" b\n<|endoftext|>\n", "<think></think>c<|endoftext|>\n"]


def test_thinking_that_is_left_out_of_earlier_turns(tmp_path):
    """As Qwen3's template does with what stands before ``</think>``, in all turns but the last."""
    forgets = PLAIN.replace("m.content", "(m.content if loop.last else m.content.split('</think>')[-1])")
    template = ChatTemplate(tokens.load_tokenizer(chat_tokenizer(tmp_path / "m", forgets)), "assistant")
    row = [
        {"role": r, "content": c}
        for r, c in (("user", "a"), ("assistant", "<think>x</think>b"), ("user", "b"), ("assistant", "<think>y</think>c"))
    ]
    text = template(row, "it")
    assert [text[a:b] for a, b in text.turns] == ["b<|endoftext|>\n", "<think>y</think>c<|endoftext|>\n"]


@pytest.mark.parametrize("trims", [False, True])
def test_spaces_and_bytes_of_a_turn_belong_to_it(made, trims):
    """Tokens of white space, which post-processors trim to no characters, and of parts of one character."""
    backend = made["plain"].backend_tokenizer
    backend = type(backend).from_str(backend.to_str())
    if trims:
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    encode = Encoder(backend.to_str(), 0, "uint16", parse_special=True, loss_on="assistant")
    row = [{"role": "user", "content": "hi  \n🙂"}, {"role": "assistant", "content": "x    \n\n   🙂🙃\n   "}]
    found = encode([ChatTemplate(made["plain"], "assistant")(row, "it")])
    assert (found.ids.tolist(), found.scored.tolist()) == by_pieces(made["plain"], row)
    row[1]["content"] = "    x"  # its first spaces are one token with the line's end before them, which counts
    found = encode([ChatTemplate(made["plain"], "assistant")(row, "it")])
    scored = [made["plain"].decode([i]) for i, counts in zip(found.ids, found.scored, strict=True) if counts]
    assert "".join(scored) == "\n    x<|endoftext|>\n"


def test_today_is_no_part_of_a_text(tmp_path):
    """Llama 3.2's and SmolLM3's templates write the date: a resumed run must find the same tokens on another day."""
    dated = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}\n" + PLAIN
    tokenizer = tokens.load_tokenizer(chat_tokenizer(tmp_path / "dated", dated))
    assert ChatTemplate(tokenizer)(ROWS[0], "it").startswith("26 Jul 2024")
    assert ChatTemplate(tokenizer)(ROWS[0], "it").endswith(tokenizer.apply_chat_template(ROWS[0], tokenize=False)[11:])
    timed = tokens.load_tokenizer(chat_tokenizer(tmp_path / "timed", dated.replace("%d", "%H:%M %d")))
    with pytest.raises(Unreadable, match="rejects it: the format of the date is %H:%M %d %b %Y"):
        ChatTemplate(timed)(ROWS[0], "it")


# ------------------------------------------------------------------------------------------- files and prepared corpora


def test_every_kind_of_file_gives_the_same_corpus(made, tmp_path):
    rows = [[{**m, "name": None} for m in row] for row in ROWS]
    lines = write_chats(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    (tmp_path / "c.json").write_text(json.dumps([{"messages": row} for row in rows], indent=1))
    parquet.write_table(pa.table({"messages": rows}), tmp_path / "d.parquet")
    with pa.ipc.new_file(tmp_path / "e.arrow", (table := pa.table({"messages": rows})).schema) as writer:
        writer.write_table(table)
    found = [read(made["plain"], path, tmp_path / "cache") for path in sorted(tmp_path.glob("?.*"))]
    assert len(found) == 5 and all(other == found[0] for other in found)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_prepared_corpus_holds_what_files_give(made, tmp_path, workers):
    path = write_chats(tmp_path / "a.jsonl", ROWS)
    out = tmp_path / "corpus"
    meta = prepare(
        sources.Request([str(path)], column="messages"),
        made["plain"],
        out,
        held_out=HeldOut.parse("8", []),
        workers=workers,
        loss_on="assistant",
    )
    parts = [corpus.open_part(out, part) for part in ("train", "held_out")]
    found = [document for part in parts for document in documents(part)]
    assert sorted(found) == sorted(by_pieces(made["plain"], row) for row in ROWS)
    assert [len(documents(part)) for part in parts] == [32, 8]
    assert meta["parts"]["train"]["scored"] == parts[0].scored_tokens == int(parts[0].scored.sum()) > 0
    assert corpus.verify(out) == meta | {"format": 1}


def test_the_hash_of_a_part_is_one_of_its_turns_too(made, tmp_path):
    path = write_chats(tmp_path / "a.jsonl", ROWS)
    found = {}
    for loss_on in ("everything", "assistant"):
        meta = prepare(
            sources.Request([str(path)], column="messages"),
            made["plain"],
            tmp_path / loss_on,
            held_out=HeldOut(),
            loss_on=loss_on,
        )
        found[loss_on] = meta["parts"]["train"]
    assert found["everything"]["files"]["train.bin"] == found["assistant"]["files"]["train.bin"]
    assert found["everything"]["hash"] != found["assistant"]["hash"]
    scored = tmp_path / "assistant" / "train.scored"
    scored.write_bytes(bytes(1 - b for b in scored.read_bytes()))
    with pytest.raises(ValueError, match="train.scored has SHA-256"):
        corpus.verify(tmp_path / "assistant")
    scored.write_bytes(scored.read_bytes()[:-1])
    with pytest.raises(ValueError, match="train.scored has .* bytes, it must have"):
        corpus.open_part(tmp_path / "assistant", "train")


def test_the_command_prepares_conversations(made, tmp_path, capsys):
    path = write_chats(tmp_path / "a.jsonl", ROWS)
    directory = chat_tokenizer(tmp_path / "model")
    arguments = [str(path), "--tokenizer", str(directory), "--workers", "1"]
    assert main([*arguments, "--output", str(tmp_path / "out"), "--chat", "--loss-on", "assistant"]) == 0
    assert "tokens in assistant turns" in capsys.readouterr().out
    for extra, said in (
        (["--loss-on", "assistant"], "--loss-on assistant is for conversations: give --chat too"),
        (["--chat", "--bos", "true"], "--bos true is for texts, and a chat template writes the first tokens itself"),
    ):
        assert main([*arguments, "--output", str(tmp_path / "bad"), *extra]) == 2
        assert said in capsys.readouterr().err
    (directory / "chat_template.jinja").unlink()
    assert main([*arguments, "--output", str(tmp_path / "bad"), "--chat"]) == 2
    assert "the model's tokenizer has no chat template: take an instruct model" in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()


# ------------------------------------------------------------------------------------------- what a run reads


def test_batches_score_the_labels_of_assistant_turns(made, tmp_path):
    """Of a blend with a text, whose labels all count; the evaluation set is of packed conversations."""
    chats = tmp_path / "chats"
    prepare(
        sources.Request([str(write_chats(tmp_path / "a.jsonl", ROWS))], column="messages"),
        made["plain"],
        chats,
        held_out=HeldOut.parse("8", []),
        loss_on="assistant",
    )
    plain = make(tmp_path, texts(30), name="plain")
    training, held_out = tokens.corpora(
        f"0.5:{chats},0.5:{plain}", str(chats), made["plain"], tmp_path / "cache", loss_on="assistant"
    )
    source = batches.Source(training, held_out, 64, OptimConfig(global_batch=8), LogConfig(eval_sequences=4), 0)
    stream = {
        tuple(d.tokens[i : i + 65].tolist()): d.scores(i + 1, 64) for d in training.corpora for i in range(0, len(d) - 64, 64)
    }
    kinds = set()
    for batch in source.micro_batches(0, rank=0, ranks=1):
        assert batch.scored.shape == batch.labels.shape == (2, 64) and batch.scored.dtype == batch.starts.dtype
        for row, labels, scored in zip(batch.tokens, batch.labels, batch.scored, strict=True):
            assert scored.equal(stream[tuple([*row.tolist(), int(labels[-1])])])
            kinds.add(bool(scored.all()))
    assert kinds == {False, True}
    parts = [part for rank in (0, 1) for part in source.evaluation(rank=rank, ranks=2)]
    assert sum(len(part.tokens) for part in parts) == 4 and all(part.scored is not None for part in parts)
    assert all(part.starts[:, 1:].any() for part in parts)


def test_loss_on_everything_reads_a_corpus_of_turns_as_text(made, tmp_path):
    chats = tmp_path / "chats"
    prepare(
        sources.Request([str(write_chats(tmp_path / "a.jsonl", ROWS))], column="messages"),
        made["plain"],
        chats,
        held_out=HeldOut.parse("8", []),
        loss_on="assistant",
    )
    training, _ = tokens.corpora(str(chats), "", made["plain"], tmp_path / "cache")
    assert batches.Sequences(training, 64).batch([0]).scored is None


# ------------------------------------------------------------------------------------------- bad input

SAID = [
    ([], "line 2 of a.jsonl has no messages"),
    ("hello", "line 2 of a.jsonl has str in its messages: it must be a list of messages"),
    ([["user", "hello"]], "line 2 of a.jsonl has list in its messages"),
    ([{"role": "human", "content": "a"}], "message 0 of line 2 of a.jsonl has the role 'human': known are system, developer,"),
    ([{"from": "user", "value": "a"}], "message 0 of line 2 of a.jsonl has the role None"),
    ([{"role": "user", "content": "a"}, {"role": "assistant", "content": " \n"}], "message 1 of line 2 of a.jsonl is empty"),
    ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], "message 0 of line 2 of a.jsonl has list as its content"),
    ([{"role": "user", "content": "a"}], "line 2 of a.jsonl has no assistant turn"),
    ([{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "b"}], "line 2 of a.jsonl has half a surrogate"),
]


@pytest.mark.parametrize(("row", "said"), SAID)
def test_a_bad_record_is_named(made, tmp_path, monkeypatch, row, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said):
        read(made["plain"], write_chats(tmp_path / "a.jsonl", [ROWS[0], row]).name, tmp_path / "cache")


def test_what_a_template_rejects_is_named(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
    with pytest.raises(ValueError, match="template rejects line 1 of a.jsonl: the first turn must be a user turn"):
        read(made["alternating"], write_chats(tmp_path / "a.jsonl", [row]).name, tmp_path / "cache")


def test_turns_that_cannot_be_found_are_named(made, tmp_path, monkeypatch):
    """With loss on everything the same template works: `test_tokens_are_those_of_transformers`."""
    monkeypatch.chdir(tmp_path)
    row = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))]
    with pytest.raises(ValueError, match="assistant turn in message 1 of line 1 of a.jsonl cannot be found in the rendered text"):
        read(made["counted"], write_chats(tmp_path / "a.jsonl", [row]).name, tmp_path / "cache")


def test_files_and_columns_without_conversations(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("messages\nhello\n")
    with pytest.raises(ValueError, match="a.csv cannot hold conversations: use .jsonl, .json, .parquet or .arrow"):
        read(made["plain"], "a.csv", tmp_path / "cache")
    with pytest.raises(ValueError, match="line 1 of a.jsonl has no column 'messages', it has id, chat"):
        read(made["plain"], write_chats(tmp_path / "a.jsonl", ROWS, "chat").name, tmp_path / "cache")
    parquet.write_table(pa.table({"messages": ["a"]}), "a.parquet")
    with pytest.raises(ValueError, match="a.parquet has values of type string in column 'messages': they must be a list of mess"):
        read(made["plain"], "a.parquet", tmp_path / "cache")


def test_settings_that_do_not_fit(made, tmp_path):
    path = write_chats(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(ValueError, match="the model's tokenizer has no chat template: take an instruct model"):
        read(made["none"], path, tmp_path / "cache")
    plain = make(tmp_path, texts(30), name="plain")
    with pytest.raises(ValueError, match="data.loss_on is assistant, and nothing in data.text holds conversations"):
        tokens.corpora(str(plain), "", made["plain"], tmp_path / "cache", loss_on="assistant")
    chats = tmp_path / "chats"
    prepare(
        sources.Request([str(path)], column="messages"),
        made["plain"],
        chats,
        held_out=HeldOut.parse("8", []),
        loss_on="everything",
    )
    with pytest.raises(ValueError, match="chats was prepared without the assistant turns, which data.loss_on=assistant needs"):
        tokens.corpora(str(chats), "", made["plain"], tmp_path / "cache", loss_on="assistant")
    with pytest.raises(ValueError, match="chats was made with another chat template"):
        tokens.corpora(str(chats), "", made["blocks"], tmp_path / "cache")


def test_an_evaluation_set_without_an_assistant_turn(made, tmp_path):
    long = [{"role": "user", "content": "a " * 400}, {"role": "assistant", "content": "b"}]
    training, held_out = tokens.corpora(
        str(write_chats(tmp_path / "a.jsonl", [long] * 20)), "", made["plain"], tmp_path / "cache", chat=True, loss_on="assistant"
    )
    with pytest.raises(ValueError, match="the 1 evaluation sequences hold no token of an assistant turn"):
        batches.Source(training, held_out, 32, OptimConfig(), LogConfig(eval_sequences=1), 0)
    with pytest.raises(ValueError, match="has 12 sequences of 32 tokens, log.eval_sequences asks for 99"):
        batches.Source(training, held_out, 32, OptimConfig(), LogConfig(eval_sequences=99), 0)


def test_numbers_of_a_message_reach_the_template(tmp_path):
    tokenizer = tokens.load_tokenizer(chat_tokenizer(tmp_path / "m", PLAIN.replace("m.content", "m.content + m.weight|string")))
    row = [{"role": "user", "content": "a", "weight": 12345}, {"role": "assistant", "content": "b", "weight": 0.25}]
    column = Messages("messages", ChatTemplate(tokenizer))
    path = write_chats(tmp_path / "a.jsonl", [row])
    (text,) = sources.documents(sources.Request([str(path)]), sources.Progress(), column)
    assert "a12345" in text and "b0.25" in text
    assert np.array_equal(text.turns, ())
