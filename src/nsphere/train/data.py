"""What a run trains on: the configuration, and from it the tokens of both splits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from nsphere.train.batches import Batch, Batches, TokenSplit, val_batches
from nsphere.train.corpus import read_stdlib
from nsphere.train.tokenizer import ByteTokenizer, Tokenizer

__all__ = ["Batch", "Batches", "Corpus", "DataConfig", "TokenSplit", "load_corpus", "val_batches"]


@dataclass(frozen=True)
class DataConfig:
    """The text or tokens of a run, and how text becomes tokens."""

    data: str = "stdlib"
    """What to train on: "stdlib" (Python's own standard library, embedded)."""

    tokenizer: str = "bytes"
    """How text becomes tokens: "bytes"."""

    token_dtype: Literal["uint16", "uint32"] = "uint16"
    """The type of the numbers in .bin files."""

    vocab_size: int | None = None
    """Vocabulary of .bin tokens."""

    val_fraction: float = 0.05
    """Share of the data that is held out for validation."""

    document_mask: bool = False
    """Mask the documents that share a row from each other in attention."""


@dataclass(frozen=True)
class Corpus:
    """The tokens that a run trains and is evaluated on."""

    train: TokenSplit
    val: TokenSplit
    vocab_size: int
    tokenizer: Tokenizer | None
    sha256: str
    name: str
    bytes_per_token: float | None


def load_corpus(config: DataConfig, *, cache_dir: Path | None = None) -> Corpus:
    """Read the data that a configuration names."""
    if config.data != "stdlib" or config.tokenizer != "bytes":
        raise ValueError(f"unknown data {config.data!r} with tokenizer {config.tokenizer!r}")
    tokenizer = ByteTokenizer()
    train, val = read_stdlib()
    digest = hashlib.sha256()
    for label, documents in ((b"train", train), (b"val", val)):
        digest.update(label)
        for document in documents:
            encoded = document.encode()
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
    val_tokens = _byte_tokens(val, tokenizer)
    separator_id = tokenizer.separator_id if config.document_mask else None
    return Corpus(
        train=TokenSplit("training", _byte_tokens(train, tokenizer), separator_id),
        val=TokenSplit("validation", val_tokens, separator_id),
        vocab_size=256,
        tokenizer=tokenizer,
        sha256=digest.hexdigest(),
        name="stdlib",
        bytes_per_token=sum(len(text.encode()) for text in val) / len(val_tokens),
    )


def _byte_tokens(documents: Iterable[str], tokenizer: ByteTokenizer) -> np.ndarray:
    return np.frombuffer(b"".join(tokenizer.encode_bytes(text) + b"\0" for text in documents), dtype=np.uint8)
