"""What a run trains on: the configuration, and from it the tokens of both splits.

Text comes from `texts.py` and becomes tokens by `tokenizer.py`, kept in a cache; ready tokens come from
`token_files.py`; `batches.py` makes batches of either.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from nsphere.train.batches import Batch, Batches, Tokens, TokenShards, TokenSplit, val_batches
from nsphere.train.files import atomic_write_json
from nsphere.train.texts import (
    Piece,
    Texts,
    dataset_texts,
    file_texts,
    folder_texts,
    hash_texts,
    is_saved_dataset,
    stdlib_texts,
)
from nsphere.train.token_cache import cached_folder
from nsphere.train.token_files import (
    TokenDtype,
    check_and_hash,
    is_token_data,
    join,
    open_tokens,
    split_tail,
    stated_vocab_size,
    token_paths,
)
from nsphere.train.tokenizer import (
    SubwordTokenizer,
    Tokenizer,
    bpe_size,
    open_tokenizer,
    train_bpe,
)

__all__ = ["Batch", "Batches", "Corpus", "DataConfig", "TokenSplit", "load_corpus", "val_batches"]

logger = logging.getLogger(__name__)

# Byte tokens of less text than this are made anew each time: that is quicker than to check a cache of them.
_CACHE_BYTES_FROM = 64 << 20
_PIECES_PER_BATCH = 256
_STRETCH = 1 << 20


@dataclass(frozen=True)
class DataConfig:
    """The text or tokens of a run, and how text becomes tokens.

    Text is split into training and validation text by whole files where there are several: "stdlib" by a list, a folder
    by the hash of their relative paths. A dataset's split "validation" is used if it has one; otherwise rows spread
    evenly are held out. Of a single file it is the tail; of .bin files those with "train" and "val" in their names.

    A saved configuration can be read where its data is not: what `data` and `tokenizer` name is looked for by
    `load_corpus`.

    Raises:
        ValueError: If a value is not allowed.
    """

    # One line each, because tyro keeps the line breaks of longer help.
    data: str = "stdlib"
    """stdlib (Python's own source), a text file, a folder of texts, .bin tokens (file, folder) or hf:NAME_OR_PATH."""
    file_pattern: str = "*"
    """Which files of a folder of texts to read, by name, as in "*.txt"."""
    dataset_split: str = "train"
    """Split of a Hugging Face dataset to train on."""
    dataset_config: str | None = None
    """Configuration of a Hugging Face dataset that has several."""
    text_field: str = "text"
    """Column of a Hugging Face dataset that has the text."""
    tokenizer: str = "bytes"
    """bytes, bpe:SIZE (trained on the text), a tokenizer.json or its folder, or hf:NAME. For .bin: what made them."""
    token_dtype: TokenDtype = "uint16"
    """Type of the numbers in .bin files."""
    vocab_size: int | None = None
    """Vocabulary of .bin files; the tokenizer's, or "vocab_size" in a meta.json beside them, if not given."""
    val_fraction: float = 0.05
    """Share to hold out, at most 0.5, where the data has no validation split of its own."""
    document_mask: bool = False
    """Keep attention within documents where several share a sequence."""
    separator_id: int | None = None
    """Token that ends a document in .bin files, for the document mask; the tokenizer's if not given."""

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction <= 0.5:
            raise ValueError(f"val_fraction must be above 0 and at most 0.5, got {self.val_fraction}")
        if self.token_dtype not in ("uint16", "uint32"):
            raise ValueError(f"token_dtype must be 'uint16' or 'uint32', got {self.token_dtype!r}")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, got {self.vocab_size}")
        if self.separator_id is not None and self.separator_id < 0:
            raise ValueError(f"separator_id must be at least 0, got {self.separator_id}")
        if self.tokenizer.startswith("bpe:"):
            bpe_size(self.tokenizer)


@dataclass(frozen=True)
class Corpus:
    """The tokens that a run trains on and is evaluated on.

    Attributes:
        train: The training tokens.
        val: The validation tokens.
        vocab_size: Tokens are from 0 to vocab_size - 1.
        tokenizer: What turns them into text; None for .bin files without one.
        sha256: Over the text of both splits, or over their tokens for .bin files. Equal for equal data, whatever the
            paths and the tokenizer.
        name: What to call the data in a report.
        bytes_per_token: UTF-8 bytes of the validation text per validation token, so that nats per token divided by
            ln 2 and by this are bits per byte. Separators count as tokens and have no bytes. None if it is unknown.
    """

    train: TokenSplit
    val: TokenSplit
    vocab_size: int
    tokenizer: Tokenizer | None
    sha256: str
    name: str
    bytes_per_token: float | None


def load_corpus(config: DataConfig, *, cache_dir: Path | None = None) -> Corpus:
    """Read the data that a configuration names.

    Args:
        config: What to read.
        cache_dir: Where to keep tokens and trained tokenizers from one run to the next; None keeps nothing.

    Raises:
        ValueError: If the data is missing, empty or not what the configuration says it is.
    """
    kind = _kind(config.data)
    if kind == "tokens":
        return _load_token_files(config, cache_dir)
    for name in ("vocab_size", "separator_id"):
        if getattr(config, name) is not None:
            raise ValueError(f"{name} is for .bin files; for text, as in {config.data!r}, the tokenizer sets it")
    return _load_texts(config, _open_texts(config, kind), cache_dir)


def _kind(data: str) -> Literal["stdlib", "dataset", "tokens", "file", "folder"]:
    if data == "stdlib":
        return "stdlib"
    if data == "hf:":
        raise ValueError("data 'hf:' names no dataset; give 'hf:NAME', or 'hf:' and a local folder")
    if data.startswith("hf:"):
        return "dataset"
    path = Path(data)
    if not path.exists():
        raise ValueError(
            f"data {data!r} does not exist; give the path of a text file, a folder of texts or .bin tokens, or "
            f"'stdlib', or 'hf:NAME'"
        )
    if is_token_data(path):
        return "tokens"
    if is_saved_dataset(path):
        raise ValueError(f"data {data!r} is a Hugging Face dataset saved to disk; give it as 'hf:{data}'")
    return "folder" if path.is_dir() else "file"


def _load_texts(config: DataConfig, texts: Texts, cache_dir: Path | None) -> Corpus:
    tokenizer = None if config.tokenizer.startswith("bpe:") else open_tokenizer(config.tokenizer)
    sha256, train_bytes, val_bytes = hash_texts(texts)
    for size, side in ((train_bytes, "train"), (val_bytes, "validate")):
        if size == 0:
            raise ValueError(f"data {config.data!r} leaves no text to {side} on; give more text")
    if tokenizer is None:
        tokenizer = _trained_bpe(texts, bpe_size(config.tokenizer), sha256, cache_dir)
    if config.tokenizer == "bytes" and train_bytes + val_bytes < _CACHE_BYTES_FROM:
        cache_dir = None
    train, val = _encode(texts, tokenizer, sha256, cache_dir)
    separator_id = _separator(config, tokenizer.separator_id, train)
    return Corpus(
        train=TokenSplit("training", train, separator_id),
        val=TokenSplit("validation", val, separator_id),
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer,
        sha256=sha256,
        name=texts.name,
        bytes_per_token=val_bytes / len(val),
    )


def _open_texts(config: DataConfig, kind: str) -> Texts:
    if kind == "stdlib":
        return stdlib_texts()
    if kind == "dataset":
        name = config.data.removeprefix("hf:")
        return dataset_texts(name, config.dataset_split, config.dataset_config, config.text_field, config.val_fraction)
    if kind == "folder":
        return folder_texts(Path(config.data), config.val_fraction, config.file_pattern)
    return file_texts(Path(config.data), config.val_fraction)


def _separator(config: DataConfig, separator_id: int | None, train: Tokens | TokenShards) -> int | None:
    """The token that documents are masked at, or None where they are not masked."""
    if not config.document_mask:
        return None
    received = f"data {config.data!r} with tokenizer {config.tokenizer!r}"
    if separator_id is None:
        raise ValueError(
            f"document_mask needs a token that ends a document, and {received} names none; set separator_id (for "
            f".bin files) or choose another tokenizer"
        )
    stretches = (train[start : start + _STRETCH] for start in range(0, len(train), _STRETCH))
    if not any((stretch == separator_id).any() for stretch in stretches):
        raise ValueError(
            f"document_mask has nothing to mask: {received} has no separator (token {separator_id}); a folder of "
            f"files has one after each, a single file has none"
        )
    return separator_id


def _trained_bpe(texts: Texts, size: int, sha256: str, cache_dir: Path | None) -> Tokenizer:
    def train() -> SubwordTokenizer:
        logger.info("training a BPE of %d tokens on %s", size, texts.name)
        bpe = train_bpe((piece.text for piece in texts.train()), size)
        if bpe.vocab_size < size:
            logger.warning("the text of %s has pairs for %d tokens only, not %d", texts.name, bpe.vocab_size, size)
        return bpe

    if cache_dir is None:
        return train()
    folder = cached_folder(cache_dir / f"bpe-{size}-{sha256[:16]}", lambda folder: train().save(folder))
    return open_tokenizer(str(folder))


def _encode(texts: Texts, tokenizer: Tokenizer, sha256: str, cache_dir: Path | None) -> tuple[Tokens, Tokens]:
    """The tokens of both splits, from the cache if there is one."""
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1).newbyteorder("<")
    if cache_dir is None:
        arrays = []
        for read in (texts.train, texts.val):
            buffer = io.BytesIO()
            _write_tokens(read(), tokenizer, dtype, buffer)
            arrays.append(np.frombuffer(buffer.getbuffer(), dtype=dtype))
        return arrays[0], arrays[1]

    def build(folder: Path) -> None:
        logger.info("turning %s into tokens", texts.name)
        for name, read in (("train", texts.train), ("val", texts.val)):
            with open(folder / f"{name}.bin", "wb") as file:
                _write_tokens(read(), tokenizer, dtype, file)

    folder = cached_folder(cache_dir / f"tokens-{sha256[:16]}-{tokenizer.sha256[:16]}", build)
    train, val = (np.memmap(folder / f"{name}.bin", dtype=dtype, mode="r") for name in ("train", "val"))
    return np.asarray(train), np.asarray(val)


def _write_tokens(pieces: Iterator[Piece], tokenizer: Tokenizer, dtype: np.dtype, file: BinaryIO) -> None:
    separator = [] if tokenizer.separator_id is None else [tokenizer.separator_id]
    while batch := list(islice(pieces, _PIECES_PER_BATCH)):
        for piece, tokens in zip(batch, tokenizer.encode_batch([piece.text for piece in batch]), strict=True):
            file.write(tokens.astype(dtype).tobytes())
            if piece.ends_document:
                file.write(np.array(separator, dtype=dtype).tobytes())


def _load_token_files(config: DataConfig, cache_dir: Path | None) -> Corpus:
    if config.tokenizer.startswith("bpe:"):
        raise ValueError(f"tokenizer {config.tokenizer!r} is trained on text, and data {config.data!r} holds tokens")
    path = Path(config.data)
    train_paths, val_paths = token_paths(path)
    train = [open_tokens(name, config.token_dtype) for name in train_paths]
    val = [open_tokens(name, config.token_dtype) for name in val_paths]
    if not val:
        train, val = split_tail(train, config.val_fraction)
        if not train or not val:
            raise ValueError(f"data {config.data!r} is too short to hold a tail out; give more tokens")
    tokenizer = None if config.tokenizer == "bytes" else open_tokenizer(config.tokenizer)
    vocab_size = config.vocab_size
    if vocab_size is None:
        vocab_size = stated_vocab_size(path) if tokenizer is None else tokenizer.vocab_size
    separator_id = config.separator_id
    if separator_id is None and tokenizer is not None:
        separator_id = tokenizer.separator_id
    if separator_id is not None and separator_id >= vocab_size:
        raise ValueError(f"separator_id must be in the vocabulary of {vocab_size}, got {separator_id}")
    train_tokens, val_tokens = join(train), join(val)
    paths, splits = [*train_paths, *val_paths], {"training": train, "validation": val}
    sha256 = _checked_sha256(config, paths, splits, vocab_size, cache_dir)
    separator_id = _separator(config, separator_id, train_tokens)
    return Corpus(
        train=TokenSplit("training", train_tokens, separator_id),
        val=TokenSplit("validation", val_tokens, separator_id),
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        sha256=sha256,
        name=path.resolve().name,
        bytes_per_token=None if tokenizer is None else _bytes_per_token(val_tokens, tokenizer),
    )


def _checked_sha256(
    config: DataConfig, paths: list[Path], splits: dict[str, list[Tokens]], vocab_size: int, cache_dir: Path | None
) -> str:
    """Check all tokens and hash them; not again while neither size nor time of a file changes."""
    if cache_dir is None:
        return check_and_hash(splits, vocab_size)
    seen = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    state = json.dumps([seen, config.token_dtype, config.val_fraction, vocab_size])
    record = cache_dir / f"checked-{hashlib.sha256(state.encode()).hexdigest()[:16]}.json"
    try:
        return json.loads(record.read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    sha256 = check_and_hash(splits, vocab_size)
    with contextlib.suppress(OSError):  # without a record the next start checks again, and no more than that
        cache_dir.mkdir(parents=True, exist_ok=True)
        atomic_write_json(record, {"sha256": sha256, "files": seen})
    return sha256


def _bytes_per_token(tokens: Tokens | TokenShards, tokenizer: Tokenizer) -> float:
    """Measured by decoding, on the first million tokens."""
    measured = tokens[:_STRETCH]
    return len(tokenizer.decode(measured.tolist()).encode("utf-8")) / len(measured)
