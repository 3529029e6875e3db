"""Encoding of documents: letters of special tokens, long texts, lost characters."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from data_prep.format import text_encoder
from data_prep.format.text_encoder import TextEncoder
from data_prep.format.tokenizer import control_ids, special_ids, train_bpe

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "naïve 日本 🙂"] * 3
SPELLED = "the <|endoftext|> and<|endoftext|>s < |endoftext|>, <|EndOfText|> <|mask|>"


def encoder_of(tokenizer: Tokenizer, **names: str) -> TextEncoder:
    return TextEncoder(tokenizer, control_ids(special_ids(tokenizer, **names)))


def byte_level(normalizer: normalizers.Normalizer | None = None, **flags: bool) -> Tokenizer:
    """A BPE whose end of text and mask are added tokens with these flags; ``<tool>`` is no special token."""
    tokenizer = train_bpe(TEXTS, 300)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.add_tokens([AddedToken("<|endoftext|>", **flags), AddedToken("<|MASK|>", **flags), "<tool>"])
    return tokenizer


def unigram() -> Tokenizer:
    """A SentencePiece model as T5's: control tokens are entries of the model, with the best score."""
    letters = [(letter, -2.0) for letter in "ab<>/s\u2581"]
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *letters], unk_id=0))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.add_tokens(["<tool>"])
    return tokenizer


def word_piece() -> Tokenizer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "quick", "ca", "##fe", "[", "]", "mask", "sep"]
    tokenizer = Tokenizer(models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    tokenizer.add_special_tokens(words[:5])
    return tokenizer


def word_level(unknown: str | None = "[UNK]") -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<s>": 1, "[UNK]": 2}, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "[UNK]"])
    return tokenizer


@pytest.mark.parametrize(
    "flags",
    [{}, {"special": True}, *({key: True} for key in ("normalized", "lstrip", "rstrip", "single_word"))],
    ids=str,
)
@pytest.mark.parametrize("normalizer", [None, normalizers.NFKC(), normalizers.Lowercase()], ids=str)
def test_special_tokens_spelled_out_in_a_text_stay_text(normalizer, flags):
    tokenizer = byte_level(normalizer, **flags)
    texts = [SPELLED, SPELLED.replace("<", "\uff1c"), "the <tool>"]
    encoder = encoder_of(tokenizer, bos="<|endoftext|>", eos="<|endoftext|>", mask="<|MASK|>")
    spelled, wide, tool = encoder.encode(texts)
    assert not {*encoder.controls} & {*spelled, *wide}
    for text, ids in zip(texts, (spelled, wide)):
        assert tokenizer.decode(ids, skip_special_tokens=False) == (
            normalizer.normalize_str(text) if normalizer else text
        )
    assert tokenizer.token_to_id("<tool>") in tool


def test_a_model_that_has_the_letters_as_an_entry_does_not_use_it():
    encoder = encoder_of(unigram())
    spelled, wide, tool = encoder.encode(["a <s> b</s>", "a \uff1cs\uff1e b\uff1c/s\uff1e", "a <tool> b"])
    assert not {*encoder.controls} & {*spelled, *wide}
    assert encoder.tokenizer.decode(spelled) == encoder.tokenizer.decode(wide) == "a <s> b</s>"
    assert encoder.tokenizer.token_to_id("<tool>") in tool
    assert list(encoder_of(word_level()).encode(["a <s>"])[0]) == [0, 2]
    merged = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "aba": 3}, [("a", "b"), ("ab", "a")]))
    merged.add_special_tokens(["ab"])
    assert list(encoder_of(merged, bos="ab").encode(["aba", "abb"])[1]) == [0, 1, 1]


def test_a_text_that_still_gives_a_control_id_has_none():
    """The end of text is an ordinary word, or stands for unknown words as well."""
    reason, ids = encoder_of(word_level(), bos="a").encode(["a b", "b"])
    assert reason.startswith("the text gives the id 0 of a, which no text may give; choose other tokens with --bos")
    assert list(ids) == [2]
    (reason,) = encoder_of(word_level(), bos="[UNK]").encode(["a b"])
    assert reason.startswith("the text gives the id 2 of [UNK]")


def test_a_text_that_the_model_refuses_has_none():
    reason, ids = encoder_of(word_level(unknown=None)).encode(["a b", "a a"])
    assert reason.startswith("the tokenizer cannot encode the text (WordLevel error: Missing [UNK] token")
    assert list(ids) == [0, 0]


@pytest.mark.parametrize(
    ("tokenizer", "text", "expected"),
    [
        (byte_level(), "Ünseen\ttext \u65e5\u672c <tool>", (18, 0)),
        (byte_level(normalizers.Lowercase()), "THE \u00c9", (4, 0)),
        (unigram(), "ab  \uff21 \u65e5\u672c", (5, 3)),  # the wide A becomes A, which has no token
        (word_piece(), "The Caf\u00e9 [MASK]", (13, 0)),
        (word_piece(), "the zzz caf", (9, 6)),
        (word_level(), "a <s> b", (5, 4)),
        (Tokenizer(models.BPE({"a": 0, "b": 1}, [])), "a\u65e5b\u672ca", (5, 2)),  # dropped without an unknown token
    ],
    ids=["bytes", "lower case", "unigram", "word piece", "unknown words", "spelled", "no unknown token"],
)
def test_lost_characters(tokenizer, text, expected):
    controls = control_ids(special_ids(tokenizer)) if tokenizer.get_added_tokens_decoder() else ()
    assert TextEncoder(tokenizer, controls).lost(text) == expected


def test_bytes_without_a_token_are_lost():
    tokenizer = Tokenizer(models.BPE({"a": 0, "\u00e6": 1, "\u0139": 2}, []))  # two of the three bytes of a character
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    assert TextEncoder(tokenizer).lost("\u65e5\u65e5") == (2, 2)
    tokenizer.normalizer = normalizers.Replace("a", "")
    assert TextEncoder(tokenizer).lost("aa a") == (3, 3)


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_bpe([*TEXTS, "it's a truth universally acknowledged, 3.14"] * 3, 320)


BITS = ["a", "truth", " ", "  ", "\n\n", "it's", "3.14", ",", "日本語", "。", "éé"]


@settings(deadline=None, max_examples=60)
@given(words=st.lists(st.sampled_from(BITS), max_size=80))
def test_a_long_text_in_chunks_has_the_ids_of_the_whole(trained, words):
    tokenizer, text = trained, " ".join(words) + "".join(words)
    encoder = TextEncoder(tokenizer)
    (whole,) = encoder.encode([text])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_encoder, "CHUNK", 12)
        patch.setattr(text_encoder, "AROUND", 24)
        short, chunks = encoder.encode(["it", text])
    assert short == encoder.encode(["it"])[0]
    assert chunks == whole


def test_a_long_text_that_cannot_be_cut(trained, monkeypatch):
    monkeypatch.setattr(text_encoder, "CHUNK", 50)
    monkeypatch.setattr(text_encoder, "LONGEST_CHUNK", 200)
    word = "truth" * 60
    encoder = TextEncoder(trained)
    reason, short = encoder.encode([word, "it"])
    assert reason == "a text of 300 characters that this tokenizer cannot encode in chunks; split it into documents"
    assert short == encoder.encode(["it"])[0]
    assert list(encoder.encode([word[:190]])[0]) == trained.encode(word[:190], add_special_tokens=False).ids


def test_a_tokenizer_that_changes_the_beginning_of_a_text_is_not_cut(monkeypatch):
    """Every text it is given gets a leading space, and so would every chunk."""
    model = train_bpe(["a truth universally acknowledged"] * 3, 280)
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    text = "a truth, universally acknowledged\n" * 6
    encoder = TextEncoder(model)
    (whole,) = encoder.encode([text])
    monkeypatch.setattr(text_encoder, "CHUNK", 20)
    assert encoder.encode([text])[0] == whole
