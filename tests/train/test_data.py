import dataclasses
import hashlib
import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from nsphere.train.corpus import read_stdlib
from nsphere.train.data import Batches, Corpus, DataConfig, load_corpus
from nsphere.train.texts import PIECE_BYTES, held_out_files
from nsphere.train.tokenizer import SEPARATOR, SubwordTokenizer, Tokenizer, train_bpe


def load(data: Path | str, cache_dir: Path | None = None, **settings) -> Corpus:
    return load_corpus(DataConfig(data=str(data), **settings), cache_dir=cache_dir)


def tokens_of(corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of both splits, as they lie in memory or on disk."""
    return corpus.train.tokens[:], corpus.val.tokens[:]


def text_of(corpus: Corpus) -> tuple[bytes, bytes]:
    """The bytes of both splits of a corpus in byte tokens, separators included."""
    train, val = tokens_of(corpus)
    return train.tobytes(), val.tobytes()


def tokenizer_of(corpus: Corpus) -> Tokenizer:
    assert corpus.tokenizer is not None
    return corpus.tokenizer


def write_folder(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())
    return folder


FILES = {
    f"part{number % 3}/{number:02}.txt": f"file {number}: " + "é and so on\n" * (10 + number) for number in range(40)
}


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "texts", FILES)


def refusal(data: Path | str, **settings) -> str:
    with pytest.raises(ValueError) as caught:
        load(data, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestEmbedded:
    def test_tokens_are_the_bytes_of_the_modules_each_with_a_separator(self):
        corpus = load_corpus(DataConfig())
        train, val = read_stdlib()
        assert text_of(corpus) == tuple("".join(f"{text}\0" for text in side).encode() for side in (train, val))
        assert (corpus.name, corpus.vocab_size) == ("stdlib", 256)
        val_bytes = sum(len(text.encode()) for text in val)
        assert corpus.bytes_per_token == pytest.approx(val_bytes / (val_bytes + len(val)), abs=1e-15)

    def test_the_hash_is_that_of_the_text(self):
        digest = hashlib.sha256()
        for side in read_stdlib():
            for text in side:
                digest.update(text.encode() + b"\xff")
            digest.update(b"\xfe")
        assert load_corpus(DataConfig()).sha256 == digest.hexdigest()

    def test_documents_are_masked_only_on_request(self):
        assert load_corpus(DataConfig()).train.separator_id is None
        corpus = load_corpus(DataConfig(document_mask=True))
        batch = Batches(corpus.train, context=2000, batch_size=20, seed=0)(0)
        assert batch.document_ids is not None
        borders = (batch.inputs == 0)[:, :-1].sum(1)
        assert borders.sum() > 0
        assert batch.document_ids[:, -1].tolist() == borders.tolist()


class TestTextFile:
    def test_the_tail_is_held_out_from_a_line_on(self, tmp_path):
        lines = "".join(f"line {number} é\n" for number in range(1000)).encode()
        (tmp_path / "text.txt").write_bytes(lines)
        train, val = text_of(load(tmp_path / "text.txt", val_fraction=0.1))
        assert train + val == lines
        assert train.endswith(b"\n")
        assert 0 <= 0.1 * len(lines) - len(val) < 14

    def test_without_lines_it_is_cut_between_characters(self, tmp_path):
        text = "東京" * 500
        for shift in range(3):
            (tmp_path / "text.txt").write_bytes(("a" * shift + text).encode())
            train, val = text_of(load(tmp_path / "text.txt"))
            assert train.decode() + val.decode() == "a" * shift + text
            assert abs(len(val) - 150) <= 3

    def test_a_long_file_is_read_in_pieces_that_change_nothing(self, tmp_path):
        text = "".join(f"{number} é\n" for number in range(PIECE_BYTES // 3)).encode()
        assert len(text) > 2 * PIECE_BYTES
        (tmp_path / "text.txt").write_bytes(text)
        corpus = load(tmp_path / "text.txt")
        train, val = text_of(corpus)
        assert train + val == text
        assert corpus.sha256 == hashlib.sha256(train + b"\xfe" + val + b"\xfe").hexdigest()
        assert corpus.bytes_per_token == 1.0

    def test_errors(self, tmp_path):
        assert refusal(tmp_path / "none.txt").endswith(
            "none.txt' does not exist; give the path of a text file, a folder of texts or .bin tokens, or 'stdlib', or "
            "'hf:NAME'"
        )
        (tmp_path / "empty.txt").touch()
        assert "empty.txt is empty; give a file with text" in refusal(tmp_path / "empty.txt")
        (tmp_path / "short.txt").write_text("a")
        assert "leaves no text to validate on" in refusal(tmp_path / "short.txt")
        (tmp_path / "zero.txt").write_text("some text\n" * 20 + "and a\0\n")
        assert "the text has a byte 0 (after 'and a')" in refusal(tmp_path / "zero.txt")
        assert "document_mask has nothing to mask" in refusal(self.lines(tmp_path), document_mask=True)
        assert "vocab_size is for .bin files" in refusal(self.lines(tmp_path), vocab_size=256)
        assert "separator_id is for .bin files" in refusal(self.lines(tmp_path), separator_id=0)
        assert "unknown tokenizer 'letters'" in refusal(self.lines(tmp_path), tokenizer="letters")

    @staticmethod
    def lines(folder: Path) -> Path:
        (folder / "lines.txt").write_text("a line\n" * 100)
        return folder / "lines.txt"

    def test_what_is_not_utf8_is_refused_with_its_position(self, tmp_path):
        (tmp_path / "latin.txt").write_bytes(b"plain\n" * (PIECE_BYTES // 3) + "caf\xe9\n".encode("latin-1"))
        position = 6 * (PIECE_BYTES // 3) + 3
        assert f"latin.txt is not UTF-8 text: byte 0xe9 at position {position};" in refusal(tmp_path / "latin.txt")


class TestFolder:
    def test_whole_files_are_held_out_and_nothing_is_lost(self, folder):
        corpus = load(folder, val_fraction=0.2)
        train, val = (side.decode().split("\0") for side in text_of(corpus))
        assert train.pop() == val.pop() == ""
        assert sorted(train + val) == sorted(FILES.values())
        in_order = [FILES[name] for name in sorted(FILES)]
        assert train == [text for text in in_order if text in train] and len(train) > len(val) > 0
        share = sum(len(text.encode()) for text in val) / sum(len(text.encode()) for text in FILES.values())
        assert 0.2 <= share <= 0.3

    def test_the_hash_knows_the_content_and_not_the_place(self, folder, tmp_path):
        sha256 = load(folder).sha256
        assert load(write_folder(tmp_path / "elsewhere" / "copy", FILES)).sha256 == sha256
        for name, text in [("part0/00.txt", FILES["part0/00.txt"] + "!"), ("part9/99.txt", "one more\n")]:
            assert load(write_folder(tmp_path / name, {**FILES, name: text})).sha256 != sha256
        assert load(folder, val_fraction=0.2).sha256 != sha256
        assert load(folder, tokenizer="bpe:300").sha256 == sha256

    def test_text_moved_across_a_border_between_documents_changes_the_hash(self, tmp_path):
        names = ["a.txt", "b.txt", "c.txt"]
        one = load(write_folder(tmp_path / "one", dict(zip(names, ["xy\n", "z\n", "x" * 50], strict=True))))
        two = load(write_folder(tmp_path / "two", dict(zip(names, ["x\n", "yz\n", "x" * 50], strict=True))))
        assert one.sha256 != two.sha256

    def test_hidden_and_empty_files_are_left_out_and_a_pattern_chooses(self, folder):
        expected = load(folder).sha256
        write_folder(folder, {".hidden": "x", ".git/config": "x", "part0/empty.txt": "", "part1/.notes.txt": "x"})
        assert load(folder).sha256 == expected
        (folder / "picture.png").write_bytes(b"\x89PNG\xff")
        assert "picture.png is not UTF-8 text: byte 0x89 at position 0; convert it" in refusal(folder)
        assert load(folder, file_pattern="*.txt").sha256 == expected

    def test_a_folder_with_one_file_is_that_file(self, tmp_path):
        write_folder(tmp_path / "one", {"only.txt": "a line\n" * 100})
        assert text_of(load(tmp_path / "one")) == text_of(load(tmp_path / "one" / "only.txt"))

    def test_errors(self, tmp_path):
        (tmp_path / "empty").mkdir()
        assert "has no text: no file that matches '*' and has content" in refusal(tmp_path / "empty")
        write_folder(tmp_path / "texts", {"a.md": "text\n"})
        assert "no file that matches '*.txt'" in refusal(tmp_path / "texts", file_pattern="*.txt")


def test_held_out_files_follow_their_names_hashes():
    sizes = {f"{number}.txt": 100 for number in range(100)}
    in_order = sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    assert held_out_files(sizes, 0.1) == set(in_order[:10])
    # A file that is too large for the share is passed over, one more file leaves the others where they are.
    assert held_out_files({**sizes, in_order[1]: 5000}, 0.02) == {in_order[0], in_order[2], in_order[3]}
    assert held_out_files({**sizes, "new.txt": 100}, 0.1) - {"new.txt"} <= set(in_order[:11])
    # Where none fits the smallest is taken.
    assert held_out_files({"a": 50, "b": 40, "c": 60}, 0.05) == {"b"}


class TestTokenFiles:
    TOKENS = np.random.default_rng(0).integers(0, 500, 4000)

    def write(self, folder: Path, **splits: int) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        start = 0
        for name, count in splits.items():
            self.TOKENS[start : start + count].astype("<u2").tofile(folder / f"{name}.bin")
            start += count
        return folder

    def test_train_and_val_files(self, tmp_path):
        corpus = load(self.write(tmp_path / "data", train=3000, val=1000), vocab_size=500)
        assert tokens_of(corpus)[0].tolist() == self.TOKENS[:3000].tolist()
        assert tokens_of(corpus)[1].tolist() == self.TOKENS[3000:].tolist()
        assert (corpus.vocab_size, corpus.tokenizer, corpus.bytes_per_token) == (500, None, None)
        assert corpus.name == "data"

    @pytest.mark.parametrize("dtype", ["uint16", "uint32"])
    def test_one_file_gives_its_tail(self, tmp_path, dtype):
        self.TOKENS.astype(dtype).tofile(tmp_path / "tokens.bin")
        for data in (tmp_path, tmp_path / "tokens.bin"):
            corpus = load(data, vocab_size=500, token_dtype=dtype, val_fraction=0.25)
            assert tokens_of(corpus)[0].tolist() == self.TOKENS[:3000].tolist()
            assert tokens_of(corpus)[1].tolist() == self.TOKENS[3000:].tolist()

    @pytest.mark.parametrize(("magic", "version", "dtype"), [(20240520, 1, "uint16"), (20240801, 7, "uint32")])
    def test_shards_with_headers(self, tmp_path, magic, version, dtype):
        cuts = {
            "train_000001": (0, 700),
            "train_000002": (700, 701),
            "train_000003": (701, 3000),
            "val_000000": (3000, 4000),
        }
        for name, (start, stop) in cuts.items():
            header = np.zeros(256, dtype="<i4")
            header[:3] = magic, version, stop - start
            content = header.tobytes() + self.TOKENS[start:stop].astype(dtype).tobytes()
            (tmp_path / f"fineweb_{name}.bin").write_bytes(content)
        corpus = load(tmp_path, vocab_size=500, token_dtype=dtype)
        assert tokens_of(corpus)[0].tolist() == self.TOKENS[:3000].tolist()
        assert tokens_of(corpus)[1].tolist() == self.TOKENS[3000:].tolist()
        other = "uint32" if dtype == "uint16" else "uint16"
        assert f"says in its header that its tokens are {dtype}, not {other}; set token_dtype" in refusal(
            tmp_path, vocab_size=500, token_dtype=other
        )
        torn = tmp_path / "fineweb_train_000003.bin"
        torn.write_bytes(torn.read_bytes()[:-4])
        assert "its header promises 2299 tokens" in refusal(tmp_path, vocab_size=500, token_dtype=dtype)

    @pytest.mark.parametrize("cut", [1, 500, 2999, 3000, 3001, 3999])
    def test_shards_without_validation_give_the_tail_of_them_all(self, tmp_path, cut):
        corpus = load(self.write(tmp_path, train_1=cut, train_2=4000 - cut), vocab_size=500, val_fraction=0.25)
        assert tokens_of(corpus)[0].tolist() == self.TOKENS[:3000].tolist()
        assert tokens_of(corpus)[1].tolist() == self.TOKENS[3000:].tolist()

    def test_the_hash_knows_the_tokens_and_not_the_files(self, tmp_path):
        sha256 = load(self.write(tmp_path / "a", train=3000, val=1000), vocab_size=500).sha256
        assert load(self.write(tmp_path / "b", train_1=500, train_2=2500, val=1000), vocab_size=500).sha256 == sha256
        assert load(self.write(tmp_path / "c", train=2999, val=1001), vocab_size=500).sha256 != sha256

    def test_where_the_vocabulary_comes_from(self, tmp_path):
        folder = self.write(tmp_path, train=3000, val=1000)
        message = refusal(folder)
        assert "nothing says how large their vocabulary is; set vocab_size (50257 for GPT-2's)" in message
        assert "meta.pkl" not in message
        (folder / "meta.pkl").write_bytes(b"cos\nsystem\n(S'echo unpickled > /tmp/never'\ntR.")
        assert "meta.pkl is not read, for a pickle can run code" in refusal(folder)
        (folder / "meta.json").write_text('{"vocab_size": 512}')
        assert load(folder).vocab_size == 512
        assert load(folder, vocab_size=600).vocab_size == 600
        for content in ['{"vocab_size": "many"}', "{}", "[]", "{"]:
            (folder / "meta.json").write_text(content)
            assert "meta.json" in refusal(folder) and "vocab_size" in refusal(folder)

    @pytest.mark.parametrize("cache", [False, True])
    @pytest.mark.parametrize(("split", "position"), [("training", 1234), ("validation", 999)])
    def test_a_token_outside_the_vocabulary_is_named(self, tmp_path, split, position, cache):
        folder = self.write(tmp_path / "data", train=3000, val=1000)
        file = folder / ("train.bin" if split == "training" else "val.bin")
        tokens = np.fromfile(file, dtype="<u2")
        tokens[position] = 500
        tokens.tofile(file)
        for _ in range(2):
            assert f"the {split} data has token 500 at position {position}, outside the vocabulary of 500" in refusal(
                folder, vocab_size=500, cache_dir=tmp_path / "cache" if cache else None
            )
        assert load(folder, vocab_size=501).vocab_size == 501

    def test_a_checked_file_is_checked_again_when_it_changes(self, tmp_path):
        folder, cache = self.write(tmp_path / "data", train=3000, val=1000), tmp_path / "cache"
        first = load(folder, cache, vocab_size=500)
        (record,) = cache.iterdir()
        assert json.loads(record.read_text())["sha256"] == first.sha256
        record.write_text(json.dumps({"sha256": "of the record"}))
        assert load(folder, cache, vocab_size=500).sha256 == "of the record"
        record.write_text("{")
        assert load(folder, cache, vocab_size=500).sha256 == first.sha256
        np.append(self.TOKENS[:2999], 500).astype("<u2").tofile(folder / "train.bin")
        with pytest.raises(ValueError, match="token 500 at position 2999"):
            load(folder, cache, vocab_size=500)

    def test_a_tokenizer_says_vocabulary_separator_and_bytes(self, tmp_path):
        texts = ["one document\n", "another é\n"] * 40
        bpe = train_bpe(texts, 270)
        bpe.save(tmp_path)
        tokens = [token for text in texts for token in [*bpe.encode(text), 0]]
        half = len(tokens) // 2
        for name, part in (("train", tokens[:half]), ("val", tokens[half:])):
            np.array(part, dtype="<u2").tofile(tmp_path / f"{name}.bin")
        corpus = load(tmp_path, tokenizer=str(tmp_path), document_mask=True)
        assert (corpus.vocab_size, corpus.train.separator_id) == (270, 0)
        assert corpus.bytes_per_token == pytest.approx(sum(len(text.encode()) for text in texts) / len(tokens))
        assert tokenizer_of(corpus).decode(tokens_of(corpus)[1].tolist()) == "".join(texts)[-len("".join(texts)) // 2 :]

    def test_the_separator_of_bare_tokens_has_to_be_given(self, tmp_path):
        folder = self.write(tmp_path, train=3000, val=1000)
        assert "names none; set separator_id" in refusal(folder, vocab_size=500, document_mask=True)
        assert load(folder, vocab_size=500, document_mask=True, separator_id=7).train.separator_id == 7
        assert load(folder, vocab_size=500, separator_id=7).train.separator_id is None
        assert "no separator (token 500)" in refusal(folder, vocab_size=501, document_mask=True, separator_id=500)
        assert "in the vocabulary of 500, got 500" in refusal(folder, vocab_size=500, separator_id=500)

    def test_errors(self, tmp_path):
        odd = tmp_path / "odd.bin"
        odd.write_bytes(b"\1\0\2")
        assert "has 3 bytes, not a multiple of 2 (uint16 tokens have 2 bytes each); check token_dtype" in refusal(odd)
        odd.write_bytes(b"\1\0\2\0\3\0")
        assert "has 6 bytes, not a multiple of 4 (uint32 tokens" in refusal(odd, token_dtype="uint32")
        odd.write_bytes(b"")
        assert "odd.bin is empty; give a file with tokens" in refusal(odd)
        odd.write_bytes(b"\1\0")
        assert "too short to hold a tail out" in refusal(odd, vocab_size=2)
        odd.write_bytes(b"\1")
        assert "has 1 bytes, not a multiple of 2" in refusal(odd)
        assert "is trained on text, and" in refusal(odd, tokenizer="bpe:300")
        (tmp_path / "even.bin").write_bytes(b"\1\0")
        assert "has 2 .bin files and none with 'train' in its name" in refusal(tmp_path, vocab_size=2)


class TestTokenizers:
    def test_a_bpe_is_trained_on_the_training_text_alone(self, folder):
        corpus = load(folder, tokenizer="bpe:300", val_fraction=0.2)
        train = text_of(load(folder, val_fraction=0.2))[0].decode().split("\0")[:-1]
        expected = train_bpe(train, 300)
        assert tokenizer_of(corpus).sha256 == expected.sha256
        assert tokens_of(corpus)[0].tolist() == [token for text in train for token in [*expected.encode(text), 0]]
        val = tokens_of(corpus)[1].tolist()
        assert corpus.bytes_per_token == len(tokenizer_of(corpus).decode(val).encode()) / len(val)
        assert (corpus.vocab_size, tokens_of(corpus)[0].dtype) == (300, np.uint16)

    def test_a_document_longer_than_a_piece_has_one_separator(self, tmp_path):
        long = "".join(f"{number} é\n" for number in range(PIECE_BYTES // 3))
        write_folder(tmp_path / "texts", {"a.txt": long, "b.txt": "short\n"})
        corpus = load(tmp_path / "texts", tokenizer="bpe:300", val_fraction=0.5)
        tokens = tokens_of(corpus)[0]
        assert np.flatnonzero(tokens == 0).tolist() == [len(tokens) - 1]
        assert tokenizer_of(corpus).decode(tokens.tolist()) == long

    def test_a_tokenizer_file_without_a_separator(self, folder, tmp_path):
        backend = Backend(models.WordLevel({"é": 0, "and": 1, "[UNK]": 2}, unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        backend.save(str(tmp_path / "tokenizer.json"))
        name = str(tmp_path / "tokenizer.json")
        corpus = load(folder, tokenizer=name)
        expected = [SubwordTokenizer(backend).encode(text) for text in text_of(load(folder))[0].decode().split("\0")]
        assert tokens_of(corpus)[0].tolist() == [token for text in expected for token in text]
        assert (corpus.vocab_size, tokens_of(corpus)[0].dtype) == (3, np.uint8)
        assert "document_mask needs a token that ends a document" in refusal(folder, document_mask=True, tokenizer=name)

    def test_separators_spelled_out_in_one_file_can_be_masked(self, tmp_path):
        (tmp_path / "stories.txt").write_text(f"a story\n{SEPARATOR}\nanother\n" * 50)
        corpus = load(tmp_path / "stories.txt", tokenizer="bpe:260", document_mask=True)
        assert (tokens_of(corpus)[0] == corpus.train.separator_id).sum() > 40


class TestCache:
    def test_a_second_start_reads_what_the_first_wrote(self, folder, tmp_path, monkeypatch):
        plain = load(folder, tokenizer="bpe:300")
        first = load(folder, tmp_path / "cache", tokenizer="bpe:300")
        monkeypatch.setattr("nsphere.train.data.train_bpe", None)
        monkeypatch.setattr(SubwordTokenizer, "encode_batch", None)
        second = load(folder, tmp_path / "cache", tokenizer="bpe:300")
        for corpus in (first, second):
            assert np.array_equal(tokens_of(corpus)[0], tokens_of(plain)[0])
            assert np.array_equal(tokens_of(corpus)[1], tokens_of(plain)[1])
            assert tokenizer_of(corpus).sha256 == tokenizer_of(plain).sha256
            assert (corpus.sha256, corpus.bytes_per_token) == (plain.sha256, plain.bytes_per_token)

    def test_large_byte_corpora_are_cached_too(self, folder, tmp_path, monkeypatch):
        load(folder, tmp_path / "cache")
        assert not (tmp_path / "cache").exists()
        monkeypatch.setattr("nsphere.train.data._CACHE_BYTES_FROM", 1000)
        assert text_of(load(folder, tmp_path / "cache")) == text_of(load(folder))
        assert len(list((tmp_path / "cache").iterdir())) == 1

    @pytest.mark.parametrize("damage", ["bits", "length", "missing", "manifest", "no manifest"])
    def test_a_damaged_cache_is_reported_and_built_again(self, folder, tmp_path, caplog, damage):
        cache = tmp_path / "cache"
        expected = tokens_of(load(folder, cache, tokenizer="bpe:300"))[0].copy()
        for built in sorted(cache.iterdir()):
            largest = max(built.iterdir(), key=lambda path: path.stat().st_size)
            content = bytearray(largest.read_bytes())
            if damage == "bits":
                content[len(content) // 2] ^= 1
                largest.write_bytes(content)
            elif damage == "length":
                largest.write_bytes(content[:-2])
            elif damage == "missing":
                largest.unlink()
            elif damage == "manifest":
                (built / "manifest.json").write_text("{")
            else:
                (built / "manifest.json").unlink()
        with caplog.at_level(logging.WARNING):
            corpus = load(folder, cache, tokenizer="bpe:300")
        assert [record.message.split(" (")[0] for record in caplog.records] == [
            f"the cache {built} is damaged" for built in sorted(cache.iterdir())
        ]
        assert all(record.message.endswith("and is built again") for record in caplog.records)
        assert np.array_equal(tokens_of(corpus)[0], expected)
        caplog.clear()
        load(folder, cache, tokenizer="bpe:300")
        assert not caplog.records

    def test_a_build_that_fails_leaves_nothing(self, folder, tmp_path, monkeypatch):
        def fail(*_):
            raise OSError(28, "No space left on device")

        cache = tmp_path / "cache"
        with monkeypatch.context() as broken:
            broken.setattr(SubwordTokenizer, "encode_batch", fail)
            with pytest.raises(OSError, match="No space left"):
                load(folder, cache, tokenizer="bpe:300")
        assert [path.name[:4] for path in cache.iterdir()] == ["bpe-"]
        load(folder, cache, tokenizer="bpe:300")
        assert sorted(path.name[:4] for path in cache.iterdir()) == ["bpe-", "toke"]

    def test_another_process_may_finish_first(self, folder, tmp_path, monkeypatch):
        cache = tmp_path / "cache"
        train = train_bpe

        def train_while_another_does(texts, size):
            with monkeypatch.context() as alone:
                alone.setattr("nsphere.train.data.train_bpe", train)
                load(folder, cache, tokenizer="bpe:300")
            return train(texts, size)

        monkeypatch.setattr("nsphere.train.data.train_bpe", train_while_another_does)
        corpus = load(folder, cache, tokenizer="bpe:300")
        assert tokenizer_of(corpus).sha256 == tokenizer_of(load(folder, tokenizer="bpe:300")).sha256
        assert len(list(cache.iterdir())) == 2

    def test_a_cache_that_cannot_be_written_is_named(self, folder, tmp_path):
        (tmp_path / "file").touch()
        assert "the cache folder" in refusal(folder, cache_dir=tmp_path / "file", tokenizer="bpe:300")


class TestConfig:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"val_fraction": 0.0}, "val_fraction must be above 0 and at most 0.5, got 0.0"),
            ({"val_fraction": 0.6}, "val_fraction must be above 0 and at most 0.5, got 0.6"),
            ({"val_fraction": float("nan")}, "val_fraction must be above 0 and at most 0.5, got nan"),
            ({"token_dtype": "int32"}, "token_dtype must be 'uint16' or 'uint32', got 'int32'"),
            ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
            ({"separator_id": -1}, "separator_id must be at least 0, got -1"),
            ({"tokenizer": "bpe:100"}, "tokenizer 'bpe:100': the size must be a whole number of at least 257"),
        ],
    )
    def test_values_out_of_range_are_refused(self, settings, message):
        with pytest.raises(ValueError) as caught:
            DataConfig(**settings)
        assert str(caught.value).startswith(message)

    def test_every_field_has_its_help_on_the_command_line(self, capsys):
        tyro = pytest.importorskip("tyro", reason="needs the train extra")
        with pytest.raises(SystemExit):
            tyro.cli(DataConfig, args=["--help"])
        shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
        for field in dataclasses.fields(DataConfig):
            assert f"--{field.name.replace('_', '-')}" in shown
        assert "Share to hold out, at most 0.5" in shown and "a Hugging Face dataset that has several" in shown


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    datasets = pytest.importorskip("datasets", reason="needs the hf extra")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))
        yield datasets


class TestDatasets:
    ROWS = tuple(f"row {number} é\n" for number in range(100))

    def documents(self, corpus: Corpus) -> tuple[tuple[str, ...], tuple[str, ...]]:
        train, val = (tuple(side.decode().split("\0")[:-1]) for side in text_of(corpus))
        return train, val

    def test_one_split_saved_to_disk(self, datasets, tmp_path):
        datasets.Dataset.from_dict({"text": list(self.ROWS)}).save_to_disk(tmp_path / "saved")
        train, val = self.documents(load(f"hf:{tmp_path / 'saved'}", val_fraction=0.1))
        assert val == self.ROWS[9::10]
        assert train == tuple(row for row in self.ROWS if row not in val)
        assert f"give it as 'hf:{tmp_path / 'saved'}'" in refusal(tmp_path / "saved")

    def test_splits_and_columns(self, datasets, tmp_path):
        rows = {
            name: datasets.Dataset.from_dict({"body": list(self.ROWS[start:stop]), "n": list(range(stop - start))})
            for name, start, stop in [("train", 0, 80), ("validation", 80, 90), ("extra", 90, 100)]
        }
        datasets.DatasetDict(rows).save_to_disk(tmp_path / "saved")
        data = f"hf:{tmp_path / 'saved'}"
        assert self.documents(load(data, text_field="body")) == (self.ROWS[:80], self.ROWS[80:90])
        extra = load(data, text_field="body", dataset_split="extra")
        assert self.documents(extra) == (self.ROWS[90:], self.ROWS[80:90])
        alone = load(data, text_field="body", dataset_split="validation", val_fraction=0.5)
        assert self.documents(alone) == (self.ROWS[80:90:2], self.ROWS[81:90:2])
        assert "has no column 'text'; text_field must be one of 'body', 'n'" in refusal(data)
        assert "row 0: 'n' is int, not text" in refusal(data, text_field="n")
        message = refusal(data, text_field="body", dataset_split="test")
        assert "has no split 'test'; it has 'train', 'validation', 'extra'" in message

    def test_a_folder_of_jsonl(self, datasets, tmp_path):
        lines = "".join(json.dumps({"text": row}) + "\n" for row in ["", *self.ROWS])
        (tmp_path / "train.jsonl").write_text(lines)
        train, val = self.documents(load(f"hf:{tmp_path}", val_fraction=0.1))
        assert len(val) == 10 and sorted(train + val) == sorted(self.ROWS)
        assert train == tuple(row for row in self.ROWS if row not in val)

    def test_errors(self, datasets, tmp_path):
        assert "no dataset '" in refusal(f"hf:{tmp_path / 'none'}")
        datasets.Dataset.from_dict({"text": ["one"]}).save_to_disk(tmp_path / "single")
        assert "has 1 rows; at least 2 are needed" in refusal(f"hf:{tmp_path / 'single'}")

    def test_without_the_extra_it_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        assert refusal("hf:wikitext") == "data 'hf:wikitext' needs datasets: pip install 'nsphere[hf]'"


@pytest.mark.parametrize(("written", "said"), [("uint32", "give --token-dtype uint32"), ("int64", "looks like int64")])
def test_wider_numbers_are_not_read_as_uint16(tmp_path, written, said):
    path = tmp_path / "tokens.bin"
    np.random.default_rng(0).integers(0, 300, 5000).astype(written).tofile(path)
    with pytest.raises(ValueError, match=said):
        load_corpus(DataConfig(data=str(path), vocab_size=300))
