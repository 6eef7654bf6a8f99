import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from nsphere.train.tokenizer import (
    SEPARATOR,
    ByteTokenizer,
    SubwordTokenizer,
    bpe_size,
    load_tokenizer,
    open_tokenizer,
    train_bpe,
)

TEXTS = ["the cat sat on the mat\n" * 20, "naïve cafés, 東京 and \U0001f600\n" * 20, "def f(x):\n    return x\n" * 20]


@pytest.fixture(scope="module")
def bpe() -> SubwordTokenizer:
    return train_bpe(TEXTS, 300)


def words(*extra: str) -> Backend:
    """A tokenizer of whole words, numbered from 0."""
    names = ["the", "cat", "[UNK]", *extra]
    backend = Backend(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


@given(st.text().map(lambda text: text.replace("\0", "")))
def test_bytes_are_utf8_and_come_back(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(text) == list(text.encode("utf-8"))
    assert [array.tolist() for array in tokenizer.encode_batch([text, "é"])] == [tokenizer.encode(text), [0xC3, 0xA9]]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bytes_of_half_a_character_do_not_stop_the_decoding():
    assert ByteTokenizer().decode([0xC3, 0xA9, 0xC3, 65, 0, 66]) == "é\ufffdAB"
    with pytest.raises(ValueError, match="token 300 is no byte: the model has more tokens than the tokenizer"):
        ByteTokenizer().decode([65, 300])


def test_a_byte_0_in_text_is_refused():
    with pytest.raises(ValueError, match=r"the text has a byte 0 \(after 'caf'\), which separates documents") as caught:
        ByteTokenizer().encode("caf\0é")
    assert "\n" not in str(caught.value)


@given(text=st.text().filter(lambda text: SEPARATOR not in text))
@settings(max_examples=200, deadline=None)
def test_every_text_can_be_written_in_a_trained_bpe(bpe, text):
    assert bpe.decode(bpe.encode(text)) == text
    assert [array.tolist() for array in bpe.encode_batch([text])] == [bpe.encode(text)]


def test_a_trained_bpe_has_the_separator_the_bytes_and_the_most_frequent_pairs(bpe):
    assert (bpe.vocab_size, bpe.separator_id, bpe.separator) == (300, 0, SEPARATOR)
    vocabulary = bpe.backend.get_vocab()
    assert {vocabulary[character] for character in pre_tokenizers.ByteLevel.alphabet()} == set(range(1, 257))
    # "a" + "t" comes 5 times, then " " + "at" 3 times, "x" + "y" twice; nothing is merged across words.
    small = train_bpe(["at at at at xy", "at xy"], 259)
    assert [small.backend.id_to_token(number) for number in (257, 258)] == ["at", "Ġat"]
    assert len(bpe.encode("the cat sat on the mat\n")) < 10


def test_training_a_bpe_twice_gives_the_same_one(bpe):
    again = train_bpe(iter(TEXTS), 300)
    assert again.backend.to_str() == bpe.backend.to_str()
    assert again.sha256 == bpe.sha256 != train_bpe(TEXTS, 301).sha256


@pytest.mark.parametrize("name", ["bpe:256", "bpe:", "bpe:4k", "bpe:-1", "bpe:1e4"])
def test_bpe_sizes_that_are_none_are_refused(name):
    with pytest.raises(ValueError, match=rf"tokenizer '{name}': the size must be a whole number of at least 257"):
        bpe_size(name)
    assert bpe_size("bpe:257") == 257


def test_a_saved_tokenizer_is_loaded_as_it_was(bpe, tmp_path):
    text = "the cat — naïve\n"
    for name, tokenizer in [
        ("bytes", ByteTokenizer()),
        ("bpe", bpe),
        ("words", SubwordTokenizer(words("</doc>"), "</doc>")),
    ]:
        folder = tmp_path / name
        folder.mkdir()
        tokenizer.save(folder)
        for loaded in (load_tokenizer(folder), open_tokenizer(str(folder))):
            assert type(loaded) is type(tokenizer)
            assert loaded.encode(text) == tokenizer.encode(text)
            assert loaded.decode(loaded.encode(text)) == tokenizer.decode(tokenizer.encode(text))
            assert (loaded.vocab_size, loaded.separator_id) == (tokenizer.vocab_size, tokenizer.separator_id)
            assert loaded.sha256 == tokenizer.sha256


def test_padding_and_truncation_of_a_file_are_switched_off(tmp_path):
    backend = words(SEPARATOR)
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert open_tokenizer(str(tmp_path / "tokenizer.json")).encode("the cat the cat") == [0, 1, 0, 1]


def test_separators_spelled_out_in_text_are_recognised(bpe):
    assert bpe.encode(f"a{SEPARATOR}b") == [*bpe.encode("a"), 0, *bpe.encode("b")]
    assert bpe.decode([*bpe.encode("a"), 0, *bpe.encode("b")]) == "ab"


@pytest.mark.parametrize(
    ("config", "names", "expected"),
    [
        (None, ["</s>"], 3),
        (None, ["</s>", SEPARATOR], 4),
        (None, ["x"], None),
        ({"eos_token": "<stop>"}, ["</s>", "<stop>"], 4),
        ({"eos_token": {"content": "<stop>"}}, ["</s>", "<stop>"], 4),
        ({"eos_token": None}, ["</s>"], 3),
    ],
)
def test_which_token_ends_a_document(tmp_path, config, names, expected):
    words(*names).save(str(tmp_path / "tokenizer.json"))
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert open_tokenizer(str(path)).separator_id == expected


def test_a_vocabulary_with_gaps_is_as_large_as_its_largest_token():
    backend = Backend(models.WordLevel({"a": 0, "b": 70_000, "[UNK]": 5}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = SubwordTokenizer(backend)
    assert tokenizer.vocab_size == 70_001
    assert np.concatenate(list(tokenizer.encode_batch(["a b", "b"]))).tolist() == [0, 70_000, 70_000]


def test_what_is_no_tokenizer_is_refused_in_one_line(tmp_path):
    (tmp_path / "broken.json").write_text("{}")
    words().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<stop>"}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer" / "nsphere_tokenizer.json").write_text('{"kind": "runes"}')
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "nsphere_tokenizer.json").write_text('{"kind": ')
    for name, message in [
        ("byte", 'unknown tokenizer \'byte\': no such path; allowed are "bytes", "bpe:SIZE", "hf:NAME"'),
        (str(tmp_path / "broken.json"), "broken.json cannot be read as a file of the tokenizers library"),
        (str(tmp_path), "names '<stop>' as its end of text, and its vocabulary lacks it"),
        (str(tmp_path / "newer"), "unknown kind of tokenizer 'runes', allowed are 'bytes' and 'subwords'"),
        (str(tmp_path / "torn"), "has no saved tokenizer that can be read: nsphere_tokenizer.json"),
        (f"hf:{tmp_path / 'empty'}", "no tokenizer "),
    ]:
        with pytest.raises(ValueError) as caught:
            open_tokenizer(name)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_published_tokenizer_is_read_through_transformers(bpe, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the hf extra")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe.backend, eos_token=SEPARATOR)
    fast.save_pretrained(tmp_path)
    text = "the naïve cat\n"
    for name in (f"hf:{tmp_path}", str(tmp_path)):
        tokenizer = open_tokenizer(name)
        assert tokenizer.encode(text) == fast(text, add_special_tokens=False)["input_ids"] == bpe.encode(text)
        assert (tokenizer.separator_id, tokenizer.vocab_size) == (0, 300)


def test_without_the_extra_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"tokenizer 'gpt2' needs transformers: pip install 'nsphere\[hf\]'"):
        open_tokenizer("hf:gpt2")
