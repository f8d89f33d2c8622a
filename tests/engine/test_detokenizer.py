"""The text of generated tokens as it grows: for each kind of tokenizer, the pieces are decode(prompt + tokens) less
decode(prompt)."""

import functools
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dmc.engine.detokenizer import Detokenizer
from tests.engine import tokenizers

INVALID = "\ufffd"
WORDS = ["def", "return", "the", "text", "Don't", "isn't", " ", "  ", "    ", "\n", "\t", ":", ".", "(i)", "€", "é", "日本", "😀"]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=12).map("".join) | st.text(max_size=8)
PROMPTS = st.sampled_from(["", "def main(argv):", "def main(argv): ", "the text\n", "a 😀", "the\n\n        "])


@functools.cache
def tokenizer(kind):
    with tempfile.TemporaryDirectory() as folder:
        return tokenizers.load(Path(folder), kind)


def streamed(kind, prompt, tokens):
    """The pieces; checks on the way that none comes late and that together they are the text."""
    made, text, pieces = tokenizer(kind), Detokenizer(tokenizer(kind), prompt), []
    for i, token in enumerate(tokens):
        pieces.append(text.add(token))
        whole = difference(made, prompt, tokens[: i + 1])
        if whole is not None and INVALID not in made.decode([*prompt, *tokens[: i + 1]]):
            assert text.text == whole
    pieces.append(text.finish())
    assert "".join(pieces) == text.text and text.finish() == ""
    return pieces


def difference(made, prompt, tokens):
    """decode(prompt + tokens) less decode(prompt), which may end within a character; None if it is not a continuation."""
    before, whole = made.decode(prompt), made.decode([*prompt, *tokens])
    cut = [made.decode(prompt[: len(prompt) - bytes]) for bytes in (1, 2, 3)] if before.endswith(INVALID) else []
    for known in (before, *(text for text in cut if not text.endswith(INVALID)), before.rstrip(INVALID)):
        if whole.startswith(known):
            return whole[len(known) :]
    return None


@pytest.mark.parametrize("kind", tokenizers.KINDS)
def test_pieces_are_the_difference(kind):
    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(PROMPTS, TEXTS, st.integers(0, 30))
    @example("def main(argv):", "\n        return", 0)
    @example("", "    the text", 0)
    def run(before, after, cut):
        ids = tokenizer(kind).encode(before + after)
        cut = min(max(1, cut or len(tokenizer(kind).encode(before))), len(ids))
        assert "".join(streamed(kind, ids[:cut], ids[cut:])) == difference(tokenizer(kind), ids[:cut], ids[cut:])

    run()


@pytest.mark.parametrize("kind", tokenizers.KINDS)
def test_any_tokens(kind):
    """What a random model generates: bytes that are no text, special tokens anywhere."""
    made = tokenizer(kind)

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.lists(st.integers(0, len(made.inner) - 1), max_size=6), st.lists(st.integers(0, len(made.inner) - 1), max_size=12))
    def run(prompt, tokens):
        text = "".join(streamed(kind, prompt, tokens))
        wanted = difference(made, prompt, tokens)
        if wanted is not None and INVALID not in made.decode([*prompt, *tokens]):
            assert text == wanted

    run()


LLAMA = [kind for kind in tokenizers.KINDS if kind.startswith("llama-2")]


@pytest.mark.parametrize("kind", LLAMA)
def test_first_space_and_indentation(kind):
    made = tokenizer(kind)
    prompt, whole = made.encode("def main(argv):"), made.encode("def main(argv): return the text")
    assert whole[: len(prompt)] == prompt
    assert made.decode(whole[len(prompt) :]) == "return the text"  # what decoding the tokens by themselves gives
    assert streamed(kind, prompt, whole[len(prompt) :])[0].startswith(" ")
    code = made.encode("def main(argv):\n    return the")
    assert "".join(streamed(kind, code[:1], code[1:])) == "def main(argv):\n    return the"
    spaces = made.encode("a    b")
    for cut in range(2, len(spaces)):
        assert made.decode(spaces[:cut]) + "".join(streamed(kind, spaces[:cut], spaces[cut:])) == "a    b"


def bytes_of(kind, data):
    return [tokenizer(kind).inner.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in data]


@pytest.mark.parametrize("kind", [*LLAMA, "no-strip", "unigram-bytes"])
def test_characters_of_several_tokens(kind):
    made = tokenizer(kind)
    prompt = made.encode("the text")
    word = next(token for token in range(len(made.inner)) if made.piece(token)[:1] == " " != made.piece(token))
    euro, smile = bytes_of(kind, "€".encode()), bytes_of(kind, "😀".encode())
    assert streamed(kind, prompt, [*euro, *smile, word]) == ["", "", "€", "", "", "", "😀", made.piece(word), ""]
    line = bytes_of(kind, b"\n")
    assert streamed(kind, prompt, [*line, *euro, *line, word]) == ["\n", "", "", "€", "\n", made.piece(word), ""]
    # a prompt that ends within a character
    assert streamed(kind, [*prompt, *euro[:1]], [*euro[1:], *line, word]) == ["", "€", "\n", made.piece(word), ""]
    assert streamed(kind, [*prompt, *line, *smile[:3]], [smile[3], word]) == ["😀", made.piece(word), ""]


@pytest.mark.parametrize("kind", LLAMA)
def test_bytes_that_are_no_text(kind):
    """What has been returned stays; each invalid byte is one replacement character, at the latest when the text ends."""
    prompt, word = tokenizer(kind).encode("the text"), tokenizer(kind).encode("the text the")[-1]
    line, cut, other = bytes_of(kind, b"\n"), bytes_of(kind, "€".encode())[:2], bytes_of(kind, b"A")
    assert streamed(kind, prompt, [*line, *cut]) == ["\n", "", "", INVALID * 2]
    assert "".join(streamed(kind, prompt, [*line, *cut, *other, word])) == "\n" + INVALID * 3 + " the"
    long = streamed(kind, prompt, [*line, *cut[:1] * 40])
    assert "".join(long) == "\n" + INVALID * 40 and "".join(long[:-1]) == "\n" + INVALID * 37  # shown without waiting for the end


def test_cost_does_not_grow(monkeypatch):
    """Neither with the text nor with special tokens, bytes that are no text or the prompt."""
    made = tokenizer("llama-2")
    word, invalid = made.encode("the text the")[-1], bytes_of("llama-2", b"\xe2")[0]
    longest = 0
    decode = made.decode

    def measured(tokens):
        nonlocal longest
        longest = max(longest, len(tokens))
        return decode(tokens)

    monkeypatch.setattr(made, "decode", measured)
    text = Detokenizer(made, [word] * 10_000)
    for token in [word] * 200 + [2] * 200 + [word]:
        text.add(token)
    assert text.text == " the" * 201 and longest < 20
    for token in [invalid] * 200:
        text.add(token)
    assert longest <= 210


@pytest.mark.parametrize("kind", LLAMA)
def test_stop_text_that_begins_with_a_space(kind):
    made = tokenizer(kind)
    prompt, whole = made.encode("def main(argv):"), made.encode("def main(argv): return the text")
    text = Detokenizer(made, prompt)
    text.add(whole[len(prompt)])
    first = text.text
    assert first.startswith(" ") and text.settled([first[:1] + "@"]) == len(first) and text.settled([first + "@"]) == 0
    assert text.cut([first], 0) and text.text == "" and text.add(whole[-1]) == text.finish() == ""


@pytest.mark.parametrize("kind", tokenizers.KINDS)
def test_pieces_of_a_whole_text(kind):
    made = tokenizer(kind)
    for text in ("def main(argv):\n    return the text", "the 😀 text", ""):
        ids = made.encode(text)
        pieces = made.pieces(ids)
        assert len(pieces) == len(ids)
        assert "".join(piece for token, piece in zip(ids, pieces, strict=True) if token not in made.special) == made.decode(ids)
    assert made.pieces([1, made.encode("the")[1], 2])[::2] == ["<s>", "</s>"]


@pytest.mark.parametrize("kind", tokenizers.KINDS)
def test_raw_bytes(kind):
    """Tokens that are only a part of a character have bytes, and these together are the character."""
    made = tokenizer(kind)
    euro = [token for token in made.encode("the€")[1:] if made.raw_bytes(token) is not None]
    can = made.decode(made.encode("€")).endswith("€")
    assert b"".join(made.raw_bytes(token) for token in euro) == ("€".encode() if can else b"")
    assert made.raw_bytes(1) is None and made.raw_bytes(made.encode("the")[1]) is None


@pytest.mark.parametrize("kind", LLAMA)
def test_texts_of_single_tokens_differ(kind):
    made = tokenizer(kind)
    vocabulary = made.inner.get_vocab()
    both = [name for name in vocabulary if "▁" not in name and f"▁{name}" in vocabulary]
    assert both and made.piece(2) == "</s>"
    for name in both:
        assert (made.piece(vocabulary[name]), made.piece(vocabulary[f"▁{name}"])) == (name, f" {name}")


def test_prompts_that_end_with_a_replacement_character():
    """Written out it is a whole character, which the completion must not repeat."""
    for kind in ("byte-level", "llama-2"):
        made = tokenizer(kind)
        prompt, whole = made.encode(f"the {INVALID}"), made.encode(f"the {INVALID} text")
        assert whole[: len(prompt)] == prompt and "".join(streamed(kind, prompt, whole[len(prompt) :])) == " text"


def test_text_before_an_incomplete_character():
    """Byte-level tokens may hold a space and the first bytes of a character."""
    made = tokenizer("byte-level")
    prompt, smile = made.encode("the"), made.encode(" 😀")[1:]
    assert len(smile) == 5 and streamed("byte-level", prompt, smile) == [" ", "", "", "", "😀", ""]
    assert streamed("byte-level", prompt, [*smile[:3], *made.encode("a")[1:]]) == [" ", "", "", f"{INVALID}a", ""]
