"""Files at the edge of their formats, read alike by training on files and by scripts/prepare_data.py."""

import bz2
import gzip
import json
import lzma
import sys

import pyarrow as pa
import pytest
from pyarrow import feather, ipc, parquet

from data import packed, readers, sources
from data.column import Column
from data.files import read_files
from data.skipped import Skipped
from data.sources import Progress, Request
from scripts.prepare_data import main
from tests.data.prepared import texts, write_jsonl
from tests.training.helpers import TOKENIZER

BOM = b"\xef\xbb\xbf"


def read(*paths, **settings):
    """Texts and what was left out; by prepare_data.py's reader and, with its defaults, by that of data.text."""
    progress = Progress()
    found = list(sources.documents(Request([str(p) for p in paths], **settings), progress))
    if not settings:
        docs, skipped = read_files(",".join(map(str, paths)))
        assert ([d.text for d in docs], skipped) == (found, progress.skipped)
    return found, progress.skipped


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def arrow(table, *, stream):
    sink = pa.BufferOutputStream()
    with (ipc.new_stream if stream else ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def as_parquet(table):
    sink = pa.BufferOutputStream()
    parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def table(rows, kind=None, **others):
    return pa.table({"id": list(range(len(rows))), "text": pa.array(rows, kind), **others})


# ------------------------------------------------------------------------------------------- what a text is


ODD = ["NA", "None", "null", "nan", "N/A", "#N/A", "<NA>", "-1.#IND", "True", "1e5", "007", "2024-01-01", "-inf"]


def in_every_kind(rows):
    """Name → bytes of files that hold the same texts."""
    plain = table(rows)
    fields = [("id", "text"), *((i, '"' + row.replace('"', '""') + '"') for i, row in enumerate(rows))]
    quoted, tabs = ("".join(f"{a}{delimiter}{b}\n" for a, b in fields) for delimiter in ",\t")
    return {
        "a.jsonl": lines(*({"id": i, "text": row} for i, row in enumerate(rows))),
        "a.json": json.dumps([{"text": row} for row in rows]).encode(),
        "b.json": json.dumps(rows).encode(),
        "c.json": json.dumps([{"text": row} for row in rows], indent=2).encode(),
        "a.csv": quoted.encode(),
        "b.csv": quoted.replace("\n", "\r\n").encode(),
        "a.tsv": tabs.encode(),
        "a.parquet": as_parquet(plain),
        "b.parquet": as_parquet(table(rows, pa.large_string())),
        "c.parquet": as_parquet(table(rows, pa.dictionary(pa.int32(), pa.string()))),
        "a.arrow": arrow(plain, stream=True),
        "b.arrow": arrow(plain, stream=False),
    }


KINDS = list(in_every_kind(["a"]))


@pytest.mark.parametrize("name", KINDS)
def test_text_is_text_whatever_it_reads(tmp_path, name):
    (tmp_path / name).write_bytes(in_every_kind(ODD)[name])
    assert read(tmp_path / name) == (ODD, Skipped())


@pytest.mark.parametrize("name", [n for n in KINDS if "csv" not in n and "tsv" not in n])
def test_null_is_not_a_text_and_not_the_word_none(tmp_path, name):
    rows = ["one", None, "None", "", " \n", None, "two"]
    if name == "a.json":
        rows[1] = {}  # a field that is left out is null too
    (tmp_path / name).write_bytes(in_every_kind_with_null(rows)[name])
    assert read(tmp_path / name) == (["one", "None", "two"], Skipped(blank=2, null=2))


def in_every_kind_with_null(rows):
    plain = [None if isinstance(row, dict) else row for row in rows]
    objects = [row if isinstance(row, dict) else {"text": row} for row in rows]
    return {
        "a.jsonl": lines(*objects),
        "a.json": json.dumps(objects).encode(),
        "c.json": json.dumps(objects, indent=1).encode(),
        "b.json": json.dumps([{"text": None} if row is None else row for row in rows]).encode(),
        "a.parquet": as_parquet(table(plain)),
        "b.parquet": as_parquet(table(plain, pa.large_string())),
        "c.parquet": as_parquet(table(plain, pa.dictionary(pa.int32(), pa.string()))),
        "a.arrow": arrow(table(plain), stream=True),
        "b.arrow": arrow(table(plain), stream=False),
    }


def test_an_empty_field_of_a_table_of_text_is_blank(tmp_path):
    (tmp_path / "a.csv").write_text('text,id\none,1\n,2\n"",3\ntwo,4\n\n')
    assert read(tmp_path / "a.csv") == (["one", "two"], Skipped(blank=2))


def test_a_row_that_ends_early_has_a_null_text(tmp_path):
    (tmp_path / "a.csv").write_text("id,text\n1,one\n2\n")
    assert read(tmp_path / "a.csv") == (["one"], Skipped(null=1))


def test_a_column_of_nulls_alone_is_null_texts(tmp_path):
    parquet.write_table(table([None, None]), tmp_path / "a.parquet")
    write_jsonl(tmp_path / "b.jsonl", ["one"])
    assert read(tmp_path / "a.parquet", tmp_path / "b.jsonl") == (["one"], Skipped(null=2))


# ------------------------------------------------------------------------------------------- what holds nothing


EMPTY = {
    "a.txt": b"",
    "a.jsonl": b"",
    "b.jsonl": b"\n\n  \n",
    "c.jsonl": BOM,
    "a.json": b"",
    "b.json": b"[]",
    "a.csv": b"",
    "b.csv": b"id,text\r\n",
    "c.csv": b"other\n",
    "a.parquet": b"",
    "b.parquet": as_parquet(table([])),
    "c.parquet": as_parquet(pa.table({})),
    "a.arrow": b"",
    "b.arrow": arrow(table([]), stream=True),
    "c.arrow": arrow(pa.table({"other": pa.array([], pa.int8())}), stream=False),
    "a.jsonl.xz": b"",
    "b.jsonl.xz": lzma.compress(b""),
    "a.jsonl.gz": b"",
    "b.jsonl.gz": gzip.compress(b"", mtime=0),
    "a.jsonl.bz2": b"",
    "a.parquet.gz": gzip.compress(as_parquet(table([])), mtime=0),
    "d.parquet.gz": gzip.compress(b"", mtime=0),
}


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_file_among_others_is_counted(tmp_path, name):
    (tmp_path / name).write_bytes(EMPTY[name])
    before, after = write_jsonl(tmp_path / "A.jsonl", ["one"]), write_jsonl(tmp_path / "z.jsonl", ["two"])
    assert read(before, tmp_path / name, after) == (["one", "two"], Skipped(files=1))
    assert read(tmp_path / name) == ([], Skipped(files=1))


def test_counts_are_said_at_the_end_and_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *_: None)
    data = tmp_path / "data"
    data.mkdir()
    write_jsonl(data / "a.jsonl", [*texts(4), None, " ", ""])
    (data / "b.jsonl").write_bytes(b"")
    parquet.write_table(table([]), data / "c.parquet")
    arguments = [str(data), "--tokenizer", str(TOKENIZER), "--output", str(tmp_path / "out"), "--workers", "1"]
    assert main(arguments) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1:] == ["left out: 2 blank documents, 1 null document, 2 empty files"]
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert (meta["blank_documents"], meta["null_documents"], meta["empty_files"]) == (2, 1, 2)
    assert main(["--verify", str(tmp_path / "out")]) == 0 and capsys.readouterr().out.splitlines() == said


# ------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "c.json", "a.csv", "b.csv", "a.tsv"])
def test_a_byte_order_mark_is_not_text(tmp_path, name):
    (tmp_path / name).write_bytes(BOM + in_every_kind(["one", "two"])[name])
    assert read(tmp_path / name) == (["one", "two"], Skipped())


@pytest.mark.parametrize("documents", readers.TXT_DOCUMENTS)
def test_a_byte_order_mark_of_a_text_file(tmp_path, documents):
    (tmp_path / "a.txt").write_bytes(BOM + b"one")
    assert read(tmp_path / "a.txt", txt_documents=documents)[0] == ["one"] == read(tmp_path / "a.txt")[0]
    (tmp_path / "a.txt").write_bytes(BOM)
    assert read(tmp_path / "a.txt") == ([], Skipped(blank=1))


def test_joined_files_may_hold_marks_in_the_middle(tmp_path):
    one = BOM + lines({"text": "one"})
    (tmp_path / "a.jsonl").write_bytes(one + one)
    assert read(tmp_path / "a.jsonl")[0] == ["one", "one"]


def test_line_ends_of_windows(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "one\r\ntwo"}).replace(b"\n", b"\r\n") * 2)
    (tmp_path / "b.txt").write_bytes(b"one\r\ntwo\rthree\n")
    (tmp_path / "c.csv").write_bytes(b'text\r\n"one\r\ntwo"\r\n')
    assert read(tmp_path / "a.jsonl")[0] == ["one\r\ntwo"] * 2  # within a text they are the text's own
    assert read(tmp_path / "b.txt")[0] == ["one\ntwo\nthree\n"]
    assert read(tmp_path / "c.csv")[0] == ["one\r\ntwo"]


def test_only_line_feeds_end_a_line_of_json(tmp_path):
    row = "one\u2028two\x85three\x0cfour\u2029"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": row}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read(tmp_path / "a.jsonl")[0] == [row]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.txt", b"caf\xe9", "a.txt is not readable as UTF-8 .UnicodeDecodeError: .* convert it"),
        ("a.txt", "one".encode("utf-16"), "a.txt is not readable as UTF-8"),
        ("a.jsonl", lines({"text": "one"}) + b'{"text": "caf\xe9"}\n', "line 2 of .*a.jsonl is not UTF-8 .*convert the file"),
        ("a.jsonl", '{"text": "one"}'.encode("utf-16"), "line 1 of .*a.jsonl is not UTF-8"),
        ("a.csv", b"text\ncaf\xe9\n", "a.csv is not readable as UTF-8"),
        ("a.jsonl", b'{"text": "one"}\n{"text": "\\ud800"}', "line 2 of .*a.jsonl has half a surrogate pair in column 'text'"),
        ("a.json", b'["one", "\\udc00"]', "record 1 of .*a.json has half a surrogate pair"),
        ("a.jsonl", lines({"text": "one"}) + b"\x00\x00\x00", "line 2 of .*a.jsonl is not JSON"),
        ("a.jsonl", b'{"text": "one"}\n' + b"[" * 10**5, "line 2 of .*a.jsonl is not JSON .RecursionError"),
        ("a.jsonl", b'\n{"text": "one"}\n\n{"text": "tw', "line 4 of .*a.jsonl is not JSON .JSONDecodeError.*fix or remove it"),
        ("a.jsonl", b'{"text": "tw', "line 1 of .*a.jsonl is not JSON"),
        ("a.jsonl", b'"text"', 'record 0 of .*a.jsonl is not an object|line 1 of .*a.jsonl is not an object such as ."text"'),
        ("a.jsonl", b"3", "line 1 of .*a.jsonl is not an object"),
        ("a.jsonl", b"[3]", "record 0 of .*a.jsonl is not an object"),
        ("a.jsonl", lines({"text": 5}), "line 1 of .*a.jsonl has a int in column 'text': it must be text"),
        ("a.json", b"[{", "a.json is not JSON"),
        ("a.json", b'{"text":\n', "a.json is not JSON"),
        ("a.csv", b'text\n"one\ntwo', "line 3 of .*a.csv is not CSV .unexpected end of data.: fix its quotes"),
        ("a.csv", b"text,id\none,two,3\n", "line 2 of .*a.csv has 3 fields, the header 2: put texts that hold ',' in quotes"),
        ("a.csv", b"body,id\none,2\n", "a.csv has no column 'text', it has body, id: choose one with --text-column"),
        (
            "a.parquet",
            as_parquet(pa.table({"text": [1]})),
            "a.parquet has values of type int64 in column 'text': they must be text",
        ),
        ("a.parquet", as_parquet(pa.table({"body": ["one"]})), "a.parquet has no column 'text', it has body"),
        ("a.arrow", arrow(pa.table({"body": ["one"]}), stream=True), "a.arrow has no column 'text', it has body"),
        ("a.parquet", as_parquet(table(["one"]))[:-9], "a.parquet is not readable .ArrowInvalid"),
        ("a.arrow", b"ARROW1 and no more", "a.arrow is not readable .ArrowInvalid"),
        ("a.txt.xz", b"no xz", "a.txt.xz is not readable .LZMAError"),
        ("a.txt.xz", lzma.compress(b"words" * 100)[:-20], "a.txt.xz is not readable .EOFError"),
        ("a.txt.gz", gzip.compress(b"words" * 100, mtime=0)[:-9], "a.txt.gz is not readable .EOFError"),
        ("a.txt.bz2", bz2.compress(b"words" * 100)[:-9], "a.txt.bz2 is not readable .EOFError"),
        ("a.md", b"words", "a.md is of no kind that is read: .txt, .jsonl.*rename plain text to .txt"),
    ],
)
def test_both_readers_refuse_the_same_in_the_same_words(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=words) as prepared:
        list(sources.documents(Request([str(tmp_path / name)]), Progress()))
    with pytest.raises(ValueError, match=words) as trained:
        read_files(str(tmp_path / name))
    assert str(prepared.value) == str(trained.value) and "\n" not in str(prepared.value)


def test_texts_and_lines_of_many_megabytes(tmp_path):
    big = "word, 'é' \"x\"\n" * 400_000
    for name, data in in_every_kind([big, "small"]).items():
        if name == "b.csv":
            continue  # its line ends are changed in the texts as well
        (tmp_path / name).write_bytes(data)
        assert read(tmp_path / name)[0] == [big, "small"]
    (tmp_path / "a.txt").write_text("x" * 3_000_000 + "\n\n" + "y" * 3_000_000)
    assert [len(text) for text in read(tmp_path / "a.txt", txt_documents="paragraph")[0]] == [3_000_000] * 2


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 1000])
def test_paragraphs_do_not_depend_on_the_size_of_the_pieces(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(readers, "_CHUNK", chunk)
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\n\nthree\n\n\nfour\n")
    assert read(tmp_path / "a.txt", txt_documents="paragraph")[0] == ["one\ntwo", "three", "\nfour\n"]


# ------------------------------------------------------------------------------------------- columns


def test_a_column_that_is_not_asked_for_may_hold_anything(tmp_path):
    odd = [None, 1, "later", {"a": 1}, [1, "b"], 10**400, 1e400, True, {"deep": [[[{}]]]}, "2024-01-01"]
    rows = [json.dumps({"text": f"text {i}", "meta": value}) for i, value in enumerate(odd)]
    rows += ['{"meta": ' + "9" * 5000 + ', "text": "long", "new": NaN}', '{"text": "twice", "meta": -Infinity, "late": 5}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    expected = [*(f"text {i}" for i in range(len(odd))), "long", "twice"]
    assert read(tmp_path / "a.jsonl") == (expected, Skipped())
    (tmp_path / "a.csv").write_text("meta,text,meta\n1,one,\n2024-01-01,two,x\nNA,three,1e999\n")
    assert read(tmp_path / "a.csv")[0] == ["one", "two", "three"]


def test_files_with_other_columns_than_the_first(tmp_path):
    parquet.write_table(pa.table({"text": ["one"], "meta": [1]}), tmp_path / "a.parquet")
    parquet.write_table(pa.table({"meta": ["x"], "more": [{"a": 1}], "text": ["two"]}), tmp_path / "b.parquet")
    assert read(tmp_path / "a.parquet", tmp_path / "b.parquet")[0] == ["one", "two"]


@pytest.mark.parametrize("stream", [True, False])
def test_other_columns_of_arrow_files_are_not_read(tmp_path, stream):
    """They hold bytes that would not validate."""
    broken = pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")])
    (tmp_path / "a.arrow").write_bytes(arrow(pa.table({"meta": broken, "text": ["one", "two"]}), stream=stream))
    assert read(tmp_path / "a.arrow")[0] == ["one", "two"]


def test_columns_whose_names_begin_alike(tmp_path):
    parquet.write_table(pa.table({"text.raw": ["x"], "text": ["one"], "text_raw": ["y"]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")[0] == ["one"]
    assert read(tmp_path / "a.parquet", column="text.raw")[0] == ["x"]


def test_a_text_field_that_first_appears_late(tmp_path):
    """Writers leave null fields out: a record without the column is a null text."""
    (tmp_path / "a.jsonl").write_bytes(lines(*({"id": i} for i in range(500)), {"id": 500, "text": "one"}))
    (tmp_path / "b.jsonl").write_bytes(lines(*({"id": i} for i in range(5000))))
    assert read(tmp_path / "a.jsonl", tmp_path / "b.jsonl") == (["one"], Skipped(null=5500))


def test_a_column_that_no_record_has_is_missing(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"body": "one", "id": 1}, {"id": 2}))
    with pytest.raises(ValueError, match="line 1 of .*a.jsonl has no column 'text', it has body, id: choose one with --text-col"):
        read(tmp_path / "a.jsonl")
    taken = []

    def endless():
        for i in range(10**6):
            taken.append(i)
            yield {"body": "x"}

    column = Column("text")
    with pytest.raises(ValueError, match="where has no column 'text', it has body"):
        for record in endless():
            column.of(record, "where")
    assert len(taken) == 1000  # a wrong name is not found out after hours


# ------------------------------------------------------------------------------------------- compressed files


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("suffix", "pack"), [(".xz", lzma.compress), (".gz", gzip.compress), (".bz2", bz2.compress)])
def test_every_kind_compressed(tmp_path, name, suffix, pack):
    (tmp_path / (name + suffix)).write_bytes(pack(in_every_kind(ODD)[name]))
    assert read(tmp_path / (name + suffix)) == (ODD, Skipped())


def test_feather_is_an_arrow_file(tmp_path):
    feather.write_feather(table(["one"]), str(tmp_path / "a.arrow"), compression="uncompressed")
    assert read(tmp_path / "a.arrow")[0] == ["one"]


@pytest.mark.parametrize(("suffix", "pack"), [(".xz", lzma.compress), (".gz", gzip.compress), (".bz2", bz2.compress)])
def test_members_one_after_the_other(tmp_path, suffix, pack):
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(lines({"text": "one"})) + pack(b"") + pack(lines({"text": "two"})))
    assert read(tmp_path / f"a.jsonl{suffix}")[0] == ["one", "two"]


def test_zst_without_its_package_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    first = write_jsonl(tmp_path / "a.jsonl", ["one"])
    (tmp_path / "b.jsonl.zst").write_bytes(b"")
    words = "b.jsonl.zst is compressed with Zstandard: install the package zstandard .pip install zstandard; .*extra 'data'"
    with pytest.raises(ValueError, match=words):
        next(sources.documents(Request([first, str(tmp_path / "b.jsonl.zst")]), Progress()))
    with pytest.raises(ValueError, match=words):
        read_files(f"{first},{tmp_path / 'b.jsonl.zst'}")


def test_the_package_of_zst_is_in_an_extra_and_pinned():
    from tests.training.helpers import ROOT

    assert '"data": ["zstandard' in (ROOT / "setup.py").read_text()
    assert "\nzstandard==" in (ROOT / "constraints.txt").read_text()


@pytest.fixture
def zstandard():
    return pytest.importorskip("zstandard")


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_zst(tmp_path, zstandard, name):
    data = in_every_kind(ODD)[name]
    half = len(data) // 2
    pack = zstandard.ZstdCompressor().compress
    skippable = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"
    (tmp_path / f"{name}.zst").write_bytes(pack(data[:half]) + skippable + pack(b"") + pack(data[half:]))
    assert read(tmp_path / f"{name}.zst") == (ODD, Skipped())


def test_a_cut_or_damaged_zst_is_said(tmp_path, zstandard):
    data = zstandard.ZstdCompressor(write_checksum=True).compress(lines(*({"text": text} for text in texts(100))))
    for changed in (data[:-1], data[: len(data) // 2], data[:-8] + b"12345678", b"words"):
        (tmp_path / "a.jsonl.zst").write_bytes(changed)
        with pytest.raises(ValueError, match="a.jsonl.zst is not readable"):
            read(tmp_path / "a.jsonl.zst")


def test_zst_of_a_large_window(tmp_path, zstandard):
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=31, enable_ldm=True, write_content_size=False)
    writer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(writer.compress(lines({"text": "one"})) + writer.flush())
    assert read(tmp_path / "a.jsonl.zst")[0] == ["one"]


@pytest.mark.parametrize("suffix", packed.PACKED)
def test_the_size_of_a_compressed_file_is_estimated(suffix):
    if suffix == ".zst":
        pack = pytest.importorskip("zstandard").ZstdCompressor().compress
    else:
        pack = {".xz": lzma.compress, ".gz": gzip.compress, ".bz2": bz2.compress}[suffix]
    data = "".join(f"{i} " for i in range(400_000)).encode()
    whole = pack(data)
    assert packed.unpacked_size(whole, len(whole), "a" + suffix) == len(data)
    assert packed.unpacked_size(b"damaged", 7, "a" + suffix) == 7 == packed.unpacked_size(b"", 7, "a" + suffix)
