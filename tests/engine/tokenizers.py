"""Small tokenizers of the kinds that models have, as directories that transformers loads."""

import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from dmc.engine.tokenizer import Tokenizer as Ours

TEXT = (
    "def main(argv):\n    for i in range(10):\n        print(i, argv[i])  # the end\n    return None\n\n"
    "class Reader(Base):\n    def read(self, name: str) -> bytes:\n        with open(name, 'rb') as file:\n"
    "            return file.read()\n\n\"Don't stop,\" said the reader of the text; it isn't the end. He read the whole text "
    "again and again, with the other readers of the other texts.\n"
) * 4
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
BOS = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
STRIP = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])


def _bpe(*, split, normalizer=None, decoder, fallback, size=700, **kind):
    made = Tokenizer(models.BPE(unk_token="<unk>" if fallback else None, byte_fallback=fallback, fuse_unk=fallback, **kind))
    made.pre_tokenizer, made.decoder = split, decoder
    if normalizer:
        made.normalizer = normalizer
    special = SPECIAL + (BYTES if fallback else [])
    more = {"end_of_word_suffix": kind["end_of_word_suffix"]} if "end_of_word_suffix" in kind else {}
    alphabet = pre_tokenizers.ByteLevel.alphabet() if isinstance(decoder, decoders.ByteLevel) else []
    made.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False, initial_alphabet=alphabet, **more),
    )
    fields = json.loads(made.to_str())  # the byte tokens of the vocabulary are not special tokens
    fields["added_tokens"] = [token for token in fields["added_tokens"] if token["content"] in SPECIAL]
    return Tokenizer.from_str(json.dumps(fields))


def byte_level(prefix):
    return _bpe(split=pre_tokenizers.ByteLevel(add_prefix_space=prefix), decoder=decoders.ByteLevel(), fallback=False)


def sentencepiece(decoder=STRIP):
    """Llama 2's: BPE with byte fallback, a space before the text, and the first space stripped again by the decoder."""
    sp = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made = _bpe(split=pre_tokenizers.Split("▁", "merged_with_next"), normalizer=sp, decoder=decoder, fallback=True)
    made.pre_tokenizer = None
    return made


def metaspace(scheme):
    decoder = decoders.Metaspace(prepend_scheme=scheme)
    return _bpe(split=pre_tokenizers.Metaspace(prepend_scheme=scheme), decoder=decoder, fallback=True)


def word_ends():
    return _bpe(
        split=pre_tokenizers.WhitespaceSplit(), decoder=decoders.BPEDecoder("</w>"), fallback=False, end_of_word_suffix="</w>"
    )


def unigram(fallback):
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.train_from_iterator(
        [TEXT], trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    )
    if not fallback:
        made.decoder = decoders.Metaspace()
        return made
    fields = json.loads(made.to_str())
    fields["model"]["vocab"] += [[name, -20.0] for name in BYTES]
    fields["model"]["byte_fallback"] = True
    made = Tokenizer.from_str(json.dumps(fields))
    made.decoder = STRIP
    return made


def word_piece(cleanup):
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(cleanup=cleanup)
    made.train_from_iterator([TEXT], trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False))
    return made


KINDS = {
    "byte-level": (lambda: byte_level(False), {}),
    "byte-level-prefix": (lambda: byte_level(True), {}),
    "llama-2": (sentencepiece, {"tokenizer_class": "LlamaTokenizer", "legacy": False}),
    "llama-2-legacy": (sentencepiece, {"tokenizer_class": "LlamaTokenizer", "legacy": True}),
    "llama-2-fast": (sentencepiece, {}),
    "no-strip": (
        lambda: sentencepiece(decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])),
        {},
    ),
    "metaspace-always": (lambda: metaspace("always"), {}),
    "metaspace-first": (lambda: metaspace("first"), {}),
    "metaspace-never": (lambda: metaspace("never"), {}),
    "word-ends": (word_ends, {}),
    "unigram": (lambda: unigram(False), {}),
    "unigram-bytes": (lambda: unigram(True), {}),
    "unigram-t5": (lambda: unigram(False), {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}),
    "word-piece": (lambda: word_piece(False), {}),
    "word-piece-cleanup": (lambda: word_piece(True), {}),
    "word-piece-bert": (lambda: word_piece(True), {"tokenizer_class": "BertTokenizer"}),
}


def write(directory, kind, **settings):
    """Writes a tokenizer of a kind into a directory; → the number of its entries."""
    make, own = KINDS[kind]
    made = make()
    made.add_special_tokens(SPECIAL)
    made.post_processor = BOS
    directory.mkdir(parents=True, exist_ok=True)
    made.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
                "add_bos_token": True,
                "clean_up_tokenization_spaces": False,
            }
            | own
            | settings
        )
    )
    return made.get_vocab_size()


def load(directory, kind):
    """The tokenizer of a kind, as the engine loads it."""
    write(directory, kind)
    return Ours(directory, 1 << 20)
