"""Training and loading tokenizers, and finding the ids the objective needs."""

import json

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from bd3_common.formats.tokenizer_file import LibraryError, library_errors, read_tokenizer
from data_prep.errors import DataError
from data_prep.format.tokenizer import SpecialIds, load_tokenizer, remarks, special_ids, token_dtype, train_bpe

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
    assert tokenizer.decode(tokenizer.encode(unseen).ids) == unseen


def test_bpe_needs_room_for_the_bytes():
    with pytest.raises(DataError, match="use bpe:259"):
        train_bpe(TEXTS, 258)


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        (("[CLS]", "[SEP]", "[MASK]"), SpecialIds(3, 4, 5, 6)),
        (("<s>", "</s>", "<mask>"), SpecialIds(3, 4, 5, 6)),
        (("<s>", "</s>"), SpecialIds(3, 4, 5, 6)),  # a new last id is the mask
        (("<|endoftext|>",), SpecialIds(3, 3, 4, 5)),  # GPT-2: one token for both ends
        (("</s>", "<|MASK|>"), SpecialIds(3, 3, 4, 5)),
        (("<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>"), SpecialIds(3, 4, 5, 6)),
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
    assert special_ids(tokenizer, bos="<x>", mask="a", pad="b") == SpecialIds(3, 3, 0, 4, pad=1)
    with pytest.raises(DataError, match=r"--mask b: is the token of --bos"):
        special_ids(tokenizer, bos="b", mask="b")
    with pytest.raises(DataError, match="it has no tokens"):
        special_ids(Tokenizer(models.BPE()))


def test_two_tokens_of_one_id_are_told():
    """With holes, `tokenizers` gives an added token the number of entries, which may be the id of another."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "z": 2}, unk_token="a"))
    tokenizer.add_special_tokens(["<s>"])
    with pytest.raises(DataError, match="id 2 has two tokens, <s> and z"):
        special_ids(tokenizer)


def test_dtype_is_the_smallest_that_holds_every_id():
    assert (token_dtype(65536), token_dtype(65537)) == (np.uint16, np.uint32)


def test_loading_switches_truncation_and_padding_off(tmp_path):
    tokenizer = word_level("<s>")
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "t.json"))
    assert json.loads((tmp_path / "t.json").read_text())["truncation"]
    assert load_tokenizer(tmp_path / "t.json").encode("a b c a").ids == [0, 1, 2, 0]


def test_dropout_is_removed_and_told(tmp_path):
    path, plain = tmp_path / "t.json", train_bpe(TEXTS, 300)
    content = json.loads(plain.to_str())
    content["model"]["dropout"] = 0.9
    path.write_text(json.dumps(content))
    ids = {tuple(load_tokenizer(path).encode(TEXTS[0]).ids) for _ in range(4)}
    assert ids == {tuple(plain.encode(TEXTS[0]).ids)}
    assert remarks(path, special_ids(plain)) == [
        f"{path}: model.dropout=0.9 is not used: one text always gives the same ids"
    ]
    file = read_tokenizer(path)
    assert Tokenizer.from_buffer(file.data).to_str() == plain.to_str()
    plain.save(str(path))
    assert read_tokenizer(path).data == path.read_bytes()


def test_masks_that_are_not_used_are_told(tmp_path):
    path = tmp_path / "t.json"

    def told(tokenizer, mask=None):
        tokenizer.save(str(path))
        return [line.removeprefix(f"{path}: ") for line in remarks(path, special_ids(tokenizer, mask=mask), mask)]

    assert told(word_level("<s>", "[MASK]")) == []
    (line,) = told(word_level("<s>", words="a <mask>"))
    assert line == "<mask>: not used as the mask, which is a new last id (3); to use it, name it with --mask"
    (line,) = told(word_level("<s>", "[MASK]", "<|my_mask|>"))
    assert line.startswith("<|my_mask|>: not used as the mask, which is [MASK] (4)")
    assert told(word_level("<s>", "[MASK]", "<|my_mask|>"), mask="<|my_mask|>") == []


def test_an_added_token_with_another_id_than_the_file_states_is_told(tmp_path):
    path, tokenizer = tmp_path / "t.json", word_level("<s>")
    content = json.loads(tokenizer.to_str())
    content["added_tokens"][0]["id"] = 9
    path.write_text(json.dumps(content))
    (line,) = remarks(path, special_ids(load_tokenizer(path)))
    assert line == f"{path}: added token <s>: its id is 3, as `tokenizers` counts, not 9 as the file says"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is no JSON"),
        ("[" * 300 + "]" * 300, "is no JSON"),
        ("[]", "should be an object"),
        ('{"model": 1}', "model: value 1"),
        ('{"model": {"type": "BPE", "vocab": {"a": 2147483648}, "merges": []}}', "model.vocab.a: value 2147483648"),
        ('{"model": {"type": "BPE", "vocab": {"a": "x"}, "merges": []}}', "model.vocab.a: value x"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "dropout": 7}}', "model.dropout: value 7"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["q", "z"]]}}', "out of vocabulary"),
        ('{"added_tokens": [{"id": 2147483648, "content": "x"}], "model": {}}', "added_tokens[0].id: value 2147483648"),
        ('{"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, "model": {}}', "is damaged: 3 bytes"),
    ],
)
def test_a_strange_file_is_one_line(text, reason, tmp_path):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(DataError) as caught:
        load_tokenizer(tmp_path / "t.json")
    assert str(caught.value).startswith(f"{tmp_path}/t.json: not a tokenizer (")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_panic_of_the_library_is_an_error(tmp_path):
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    with pytest.raises(LibraryError, match="retry-limit-in-match over"), library_errors():
        tokenizer.encode("a" * 28 + "b")


def test_loading_what_is_no_tokenizer(tmp_path):
    with pytest.raises(DataError, match="no such tokenizer file"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(DataError, match="not a tokenizer"):
        load_tokenizer(tmp_path / "t.json")
