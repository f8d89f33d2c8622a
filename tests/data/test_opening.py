"""data.bos: documents begin as served prompts do, the corpus says so, and a mismatch is refused by name."""

import json
import shutil

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from data import corpus, prepare, sources, tokens
from data.opening import opening
from data.prepare import HeldOut
from data.stdlib import Document, corpus_hash
from dmc.engine.tokenizer import Tokenizer
from scripts.prepare_data import main
from tests.data.prepared import bos_tokenizer, texts, write_jsonl
from tests.training.helpers import TOKENIZER, tiny_model, tiny_text, train

END, BOS = 0, 1
DOCUMENTS = [Document(f"d{i}", text) for i, text in enumerate(texts(5))]


@pytest.fixture(scope="module")
def adding(tmp_path_factory):
    """A tokenizer that puts a BOS token before each text."""
    return tokens.load_tokenizer(bos_tokenizer(tmp_path_factory.mktemp("adding") / "model"))


@pytest.fixture(scope="module")
def plain():
    """The base model's, which adds nothing."""
    return tokens.load_tokenizer(TOKENIZER)


def firsts(found):
    """First tokens of documents, and how many tokens each has."""
    ((starts, stops),) = found.document_spans()
    assert all(found.tokens[stop - 1] == END for stop in stops)
    return [int(found.tokens[start]) for start in starts], [int(stop - start) for start, stop in zip(starts, stops, strict=True)]


# ------------------------------------------------------------------------------------------- which tokens


def test_auto_is_what_served_prompts_begin_with(adding, plain, tmp_path):
    served = Tokenizer(bos_tokenizer(tmp_path / "model"), 2048)
    bare = served.inner.encode("some text", add_special_tokens=False)
    assert served.encode("some text") == [*opening(adding), *bare] == [BOS, *bare]
    assert opening(plain) == [] and plain.encode("some text") == bare


@pytest.mark.parametrize(("bos", "of_adding", "of_plain"), [("auto", [BOS], []), (True, [BOS], [END]), (False, [], [])])
def test_every_choice(adding, plain, bos, of_adding, of_plain):
    assert (opening(adding, bos), opening(plain, bos)) == (of_adding, of_plain)


def test_a_tokenizer_that_has_a_bos_and_does_not_add_it(tmp_path):
    made = tokens.load_tokenizer(bos_tokenizer(tmp_path / "model", adds=False))
    assert (opening(made), opening(made, True)) == ([], [BOS])


def test_what_a_tokenizer_adds_at_the_end_is_not_put_at_the_beginning(tmp_path):
    directory = bos_tokenizer(tmp_path / "model")
    changed = json.loads((directory / "tokenizer.json").read_text())
    changed["post_processor"]["single"].append({"SpecialToken": {"id": "<|pad|>", "type_id": 0}})
    (directory / "tokenizer.json").write_text(json.dumps(changed))
    made = tokens.load_tokenizer(directory)
    assert made.encode("a")[-1] == BOS and opening(made) == [BOS]


def test_no_bos_token_to_ask_for(tmp_path):
    shutil.copy(TOKENIZER / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}'
    )
    made = tokens.load_tokenizer(tmp_path)
    assert opening(made) == []
    with pytest.raises(ValueError, match="data.bos is true, but the tokenizer has no BOS token: set data.bos=auto"):
        opening(made, True)
    with pytest.raises(ValueError, match="data.bos is 'yes': it must be auto, true or false"):
        opening(made, "yes")


# ------------------------------------------------------------------------------------------- files


def test_documents_of_files_begin_with_it(tmp_path, adding):
    path = write_jsonl(tmp_path / "a.jsonl", texts(45))
    with_it, held = (m.corpora[0] for m in tokens.corpora(path, "", adding, tmp_path / "cache"))
    without, _ = (m.corpora[0] for m in tokens.corpora(path, "", adding, tmp_path / "cache", False))
    begun, lengths = firsts(with_it)
    assert set(begun) == set(firsts(held)[0]) == {BOS} and BOS not in firsts(without)[0]
    assert lengths == [n + 1 for n in firsts(without)[1]]
    assert with_it.hash != without.hash  # a run of the one is not resumed on the other


def test_the_cache_and_the_hash_of_documents_without_it_are_as_ever(tmp_path, plain, monkeypatch):
    kept = tokens.tokenize(DOCUMENTS, plain, tmp_path)
    assert kept.hash == corpus_hash(DOCUMENTS)
    monkeypatch.setattr(tokens, "_write", lambda *_: pytest.fail("tokenised again"))
    assert tokens.tokenize(DOCUMENTS, plain, tmp_path, begin=[]).hash == kept.hash


# ------------------------------------------------------------------------------------------- prepared corpora


def prepared(directory, tokenizer, rows=None, **settings):
    path = write_jsonl(directory.with_suffix(".jsonl"), texts(30) if rows is None else rows)
    prepare.prepare(sources.Request([path]), tokenizer, directory, held_out=HeldOut(count=5), **settings)
    return directory


@pytest.mark.parametrize("workers", [1, 2])
def test_a_prepared_corpus_begins_with_it_and_says_so(tmp_path, adding, workers):
    made = prepared(tmp_path / "corpus", adding, workers=workers)
    assert corpus.verify(made)["begin"] == [BOS]
    for part in ("train", "held_out"):
        documents = IndexedDataset(str(made / part))
        assert all(d[0] == BOS and d[-1] == END and BOS not in d[1:] for d in documents)
    without = prepared(tmp_path / "without", adding, bos=False)
    assert corpus.read_meta(without)["begin"] == [] and not any(d[0] == BOS for d in IndexedDataset(str(without / "train")))


def test_a_text_that_a_chat_template_wrote_gets_no_second_one(tmp_path, adding):
    made = prepared(tmp_path / "corpus", adding, [f"<|pad|>{text}" for text in texts(30)], parse_special=True)
    assert all(d[0] == BOS and BOS not in d[1:] for d in IndexedDataset(str(made / "train")))
    written = prepared(tmp_path / "text", adding, [f"<|pad|>{text}" for text in texts(30)])  # here it is text
    assert all(d[0] == BOS and BOS not in d[1:] for d in IndexedDataset(str(written / "train")))
    assert len(IndexedDataset(str(written / "train"))[0]) > len(IndexedDataset(str(made / "train"))[0])


@pytest.mark.parametrize(
    ("made_with", "trained_with", "words"),
    [
        (
            False,
            "auto",
            "holds documents without a BOS token, data.bos asks for documents that begin with tokens .1.: set "
            "data.bos=false, or prepare it again with --bos true",
        ),
        (
            "auto",
            False,
            "holds documents that begin with tokens .1., data.bos asks for documents without a BOS token: set "
            "data.bos=true, or prepare it again with --bos false",
        ),
    ],
)
def test_a_corpus_made_otherwise_is_refused_by_name(tmp_path, adding, made_with, trained_with, words):
    made = prepared(tmp_path / "corpus", adding, bos=made_with)
    for text, held_out in ((str(made), ""), (f"0.5:{made},0.5:stdlib", str(made)), ("stdlib", str(made))):
        with pytest.raises(ValueError, match=f"corpus {words}"):
            tokens.corpora(text, held_out, adding, tmp_path / "cache", trained_with)
    tokens.corpora(str(made), "", adding, tmp_path / "cache", made_with)
    assert not (tmp_path / "cache").exists()


def test_a_corpus_of_before_the_setting_has_none(tmp_path, adding, plain):
    for tokenizer, name in ((adding, "a"), (plain, "b")):
        made = prepared(tmp_path / name, tokenizer, bos=False)
        meta = json.loads((made / "meta.json").read_text())
        del meta["begin"]
        (made / "meta.json").write_text(json.dumps(meta))
        corpus.verify(made)
    tokens.corpora(str(tmp_path / "b"), "", plain, tmp_path / "cache")
    with pytest.raises(ValueError, match="a holds documents without a BOS token"):
        tokens.corpora(str(tmp_path / "a"), "", adding, tmp_path / "cache")


def test_verify_finds_documents_that_do_not_begin_so(tmp_path, adding):
    made = prepared(tmp_path / "corpus", adding, bos=False)
    meta = json.loads((made / "meta.json").read_text())
    (made / "meta.json").write_text(json.dumps(meta | {"begin": [BOS]}))
    with pytest.raises(ValueError, match="25 documents of .*train do not begin with tokens .1.: prepare it again"):
        corpus.verify(made)


@pytest.mark.parametrize(
    ("choice", "begin"), [([], [BOS]), (["--bos", "auto"], [BOS]), (["--bos", "true"], [BOS]), (["--bos", "false"], [])]
)
def test_the_command_has_the_setting(tmp_path, monkeypatch, choice, begin):
    monkeypatch.setattr("signal.signal", lambda *_: None)
    path, model = write_jsonl(tmp_path / "a.jsonl", texts(4)), bos_tokenizer(tmp_path / "model")
    assert main([path, "--tokenizer", str(model), "--output", str(tmp_path / "out"), "--workers", "1", *choice]) == 0
    assert corpus.read_meta(tmp_path / "out")["begin"] == begin


@pytest.mark.slow
def test_a_run_says_what_it_trains_on_and_keeps_it(tmp_path):
    model, text = tiny_model(tmp_path / "model"), tiny_text(tmp_path / "text.jsonl")
    for path in bos_tokenizer(tmp_path / "tokenizer").glob("tokenizer*"):
        path.replace(model / path.name)
    text.write_text('{"text": null}\n{"text": " "}\n' + text.read_text())
    (tmp_path / "empty.jsonl").write_text("")

    def run(*more, check=True):
        return train(
            "--model",
            model,
            "--output",
            tmp_path / "out",
            f"data.text={text},{tmp_path / 'empty.jsonl'}",
            f"data.cache={tmp_path / 'cache'}",
            "data.sequence_length=64",
            "dmc.method=none",
            "optim.decay_steps=0",
            "optim.global_batch=4",
            "log.eval_sequences=4",
            "run.threads=1",
            *more,
            check=check,
        )

    said = run("run.steps=1").stdout
    assert "  documents that begin with tokens [1] (data.bos=auto)\n" in said
    assert "text.jsonl,{}: 1 blank document, 1 null document, 1 empty file\n".format(tmp_path / "empty.jsonl") in said
    refused = run("run.steps=2", "--resume", "auto", "data.bos=false", check=False)
    assert refused.returncode == 2 and "here with []: set data.bos=true, which a resumed run keeps" in refused.stderr
    run("run.steps=2", "--resume", "auto", "data.bos=true")
