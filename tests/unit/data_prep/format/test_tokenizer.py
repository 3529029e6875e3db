"""Training and loading tokenizers, and finding the ids the objective needs."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from data_prep.errors import DataError
from data_prep.format import tokenizer as tokenize
from data_prep.format.tokenizer import SpecialIds, encode, load_tokenizer, special_ids, token_dtype, train_bpe

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "naïve 日本 🙂"] * 3


def word_level(*special: str, words: str = "a b c") -> Tokenizer:
    """Ids: the words first, then the special tokens."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words.split())}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def test_trained_bpe_is_deterministic_and_lossless():
    tokenizer = train_bpe(TEXTS, 300)
    assert tokenizer.to_str() == train_bpe(iter(TEXTS), 300).to_str()
    assert special_ids(tokenizer) == SpecialIds(bos=0, eos=1, mask=2, vocab_size=tokenizer.get_vocab_size())
    assert 259 < tokenizer.get_vocab_size() <= 300
    unseen = "Ünseen\ttext\u2028 \x00 with 🐈"
    assert tokenizer.decode(encode(tokenizer, [unseen])[0]) == unseen


def test_bpe_needs_room_for_the_bytes():
    with pytest.raises(DataError, match="use bpe:259"):
        train_bpe(TEXTS, 258)


def test_special_tokens_spelled_out_in_a_text_stay_text():
    tokenizer = train_bpe(TEXTS, 300)
    ids = encode(tokenizer, ["the <|eos|> and <|mask|>"])[0]
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.decode(ids) == "the <|eos|> and <|mask|>"


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        (("[CLS]", "[SEP]", "[MASK]"), SpecialIds(3, 4, 5, 6)),
        (("<s>", "</s>", "<mask>"), SpecialIds(3, 4, 5, 6)),
        (("<s>", "</s>"), SpecialIds(3, 4, 5, 6)),  # a new last id is the mask
        (("<|endoftext|>",), SpecialIds(3, 3, 4, 5)),  # GPT-2: one token for both ends
        (("</s>", "<|MASK|>"), SpecialIds(3, 3, 4, 5)),
    ],
)
def test_usual_names_are_found(special, expected):
    assert special_ids(word_level(*special)) == expected


def test_ordinary_words_are_not_taken_for_special_tokens():
    assert special_ids(word_level("<bos>", words="a <s> <mask>")) == SpecialIds(3, 3, 4, 5)


def test_vocab_size_counts_ids_where_ids_have_gaps():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "z": 9}, unk_token="a"))
    tokenizer.add_special_tokens(["z"])
    assert special_ids(tokenizer, bos="z") == SpecialIds(9, 9, 10, 11)


def test_names_can_be_given_and_missing_ones_are_errors():
    tokenizer = word_level("<x>")
    assert special_ids(tokenizer, bos="b", eos="<x>") == SpecialIds(1, 3, 4, 5)
    with pytest.raises(DataError, match=r"--eos <nope>: the tokenizer has no such token"):
        special_ids(tokenizer, eos="<nope>")
    with pytest.raises(DataError, match=r"\(<x>\); name them with --bos and --eos"):
        special_ids(tokenizer)


def test_dtype_is_the_smallest_that_holds_every_id():
    assert (token_dtype(65536), token_dtype(65537)) == (np.uint16, np.uint32)


def test_loading_switches_truncation_and_padding_off(tmp_path):
    tokenizer = word_level("<s>")
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "t.json"))
    assert json.loads((tmp_path / "t.json").read_text())["truncation"]
    assert encode(load_tokenizer(tmp_path / "t.json"), ["a b c a"]) == [[0, 1, 2, 0]]


def test_loading_what_is_no_tokenizer(tmp_path):
    with pytest.raises(DataError, match="no such tokenizer file"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(DataError, match="not a tokenizer"):
        load_tokenizer(tmp_path / "t.json")


def test_added_tokens_that_are_not_special_still_match_text():
    """The case that prep must refuse: the tokenizer itself turns text into the mask."""
    tokenizer = word_level("<s>")
    tokenizer.add_tokens([AddedToken("<mask>", special=False)])
    assert special_ids(tokenizer).mask in encode(tokenizer, ["a <mask> b"])[0]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_bpe([*TEXTS, "it's a truth universally acknowledged, 3.14"] * 3, 320)


BITS = ["a", "truth", " ", "  ", "\n\n", "it's", "3.14", ",", "日本語", "。", "éé"]


@settings(deadline=None, max_examples=60)
@given(words=st.lists(st.sampled_from(BITS), max_size=80))
def test_a_long_text_in_chunks_has_the_ids_of_the_whole(trained, words):
    tokenizer, text = trained, " ".join(words) + "".join(words)
    (whole,) = encode(tokenizer, [text])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize, "CHUNK", 12)
        patch.setattr(tokenize, "AROUND", 24)
        short, chunks = encode(tokenizer, ["it", text])
    assert short == encode(tokenizer, ["it"])[0]
    assert list(chunks) == list(whole)


def test_a_long_text_that_cannot_be_cut(trained, monkeypatch):
    monkeypatch.setattr(tokenize, "CHUNK", 50)
    monkeypatch.setattr(tokenize, "LONGEST_CHUNK", 200)
    word = "truth" * 60
    assert encode(trained, [word, "it"]) == [None, encode(trained, ["it"])[0]]
    assert list(encode(trained, [word[:190]])[0]) == trained.encode(word[:190], add_special_tokens=False).ids


def test_a_tokenizer_that_changes_the_beginning_of_a_text_is_not_cut(monkeypatch):
    """Every text it is given gets a leading space, and so would every chunk."""
    model = train_bpe(["a truth universally acknowledged"] * 3, 280)
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    text = "a truth, universally acknowledged\n" * 6
    (whole,) = encode(model, [text])
    monkeypatch.setattr(tokenize, "CHUNK", 20)
    assert list(encode(model, [text])[0]) == whole
