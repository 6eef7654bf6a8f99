"""From text to token numbers and back: bytes, a published tokenizer, or a BPE trained on the spot.

A tokenizer is saved with its run, so that text can be generated from the run folder alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from nsphere.train.files import atomic_write_json, atomic_write_text

if TYPE_CHECKING:
    import tokenizers

    from nsphere.train.batches import Tokens

SEPARATOR = "<|endoftext|>"
# The names under which published tokenizers know the end of a document, for files that do not say which it
# is.
_SEPARATORS = (SEPARATOR, "<|end_of_text|>", "</s>", "<eos>")
MIN_BPE_SIZE = 256 + 1  # every byte, and the separator
FORMS = '"bytes", "bpe:SIZE", "hf:NAME", or the path of a tokenizer.json or of a folder with one'

_STATE_FILE = "nsphere_tokenizer.json"


class Tokenizer(Protocol):
    """What the data, the run folder and generation need of a tokenizer.

    Attributes:
        vocab_size: Token numbers are from 0 to vocab_size - 1.
        separator_id: The token that ends a document, or None if the tokenizer has none.
        sha256: Equal for tokenizers that give equal tokens.
    """

    vocab_size: int
    separator_id: int | None
    sha256: str

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without a separator."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> Iterable[Tokens]:
        """As `encode`, of several texts, faster; integer arrays."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens, without separators; bytes that are not UTF-8 become U+FFFD."""
        ...

    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer(folder)` needs."""
        ...


class ByteTokenizer:
    """UTF-8 bytes are the tokens; byte 0, which text does not have, ends a document."""

    vocab_size = 256
    separator_id: int | None = 0
    sha256 = hashlib.sha256(b"bytes").hexdigest()

    def encode(self, text: str) -> list[int]:
        """The bytes of a text.

        Raises:
            ValueError: If the text has a byte 0.
        """
        return list(self._bytes(text))

    def encode_batch(self, texts: Sequence[str]) -> Iterable[Tokens]:
        """As `encode`; uint8."""
        return (np.frombuffer(self._bytes(text), dtype=np.uint8) for text in texts)

    def _bytes(self, text: str) -> bytes:
        encoded = text.encode("utf-8")
        position = encoded.find(0)
        if position >= 0:
            near = encoded[max(0, position - 20) : position].decode("utf-8", errors="replace")
            raise ValueError(
                f"the text has a byte 0 (after {near!r}), which separates documents in byte tokens; remove it "
                f"from the text, or choose another tokenizer"
            )
        return encoded

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some bytes, without separators; what is not UTF-8 becomes U+FFFD.

        Raises:
            ValueError: If a token is no byte, as a model of more tokens than the tokenizer may make one.
        """
        if max(tokens, default=0) > 255:
            raise ValueError(
                f"token {max(tokens)} is no byte: the model has more tokens than the tokenizer, which is another's; "
                "give the one that it was trained with (nsphere import takes --tokenizer)"
            )
        return bytes(tokens).replace(b"\0", b"").decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer(folder)` needs."""
        atomic_write_json(folder / _STATE_FILE, {"kind": "bytes"})


class SubwordTokenizer:
    """A tokenizer of the `tokenizers` library, which also holds transformers' fast ones.

    Special tokens that are spelled out in a text are recognised as such, as is usual: a file that separates
    its documents by "<|endoftext|>" is understood.

    Args:
        backend: The tokenizer. Its padding and truncation are switched off.
        separator: The token that ends a document, as text; by default one of the usual names, if it has one.

    Raises:
        ValueError: If `separator` is not in the vocabulary.
    """

    def __init__(self, backend: tokenizers.Tokenizer, separator: str | None = None) -> None:
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        vocabulary = backend.get_vocab(with_added_tokens=True)
        if separator is None:
            separator = next((name for name in _SEPARATORS if name in vocabulary), None)
        elif separator not in vocabulary:
            raise ValueError(f"the tokenizer names {separator!r} as its end of text, and its vocabulary lacks it")
        self.separator = separator
        self.separator_id: int | None = None if separator is None else vocabulary[separator]
        # Not the number of entries: published vocabularies have gaps.
        self.vocab_size = max(vocabulary.values()) + 1
        state = json.dumps([separator, backend.to_str()])
        self.sha256 = hashlib.sha256(state.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without a separator."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> Iterable[Tokens]:
        """As `encode`, over all cores; uint32."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return (np.array(encoding.ids, dtype=np.uint32) for encoding in encodings)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens, without special ones; bytes that are not UTF-8 become U+FFFD."""
        return self.backend.decode([int(token) for token in tokens], skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`, as other tools read it, and what `load_tokenizer(folder)` needs beside it."""
        atomic_write_text(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        atomic_write_json(folder / _STATE_FILE, {"kind": "subwords", "separator": self.separator})


def bpe_size(name: str) -> int:
    """The vocabulary size in a name of the form "bpe:SIZE".

    Raises:
        ValueError: If it is not a number of at least `MIN_BPE_SIZE`.
    """
    size = name.removeprefix("bpe:")
    if not size.isdecimal() or int(size) < MIN_BPE_SIZE:
        raise ValueError(
            f"tokenizer {name!r}: the size must be a whole number of at least {MIN_BPE_SIZE} (256 bytes and the "
            f"separator), as in bpe:4096"
        )
    return int(size)


def open_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a name; a BPE to be trained is not one yet, see `train_bpe`.

    Args:
        name: "bytes", "hf:NAME" (a published one, through transformers), or the path of a `tokenizer.json`,
            of a transformers folder, or of a run folder.

    Raises:
        ValueError: If there is no such tokenizer, or it cannot be read.
    """
    if name == "bytes":
        return ByteTokenizer()
    if name.startswith("bpe:"):
        raise ValueError(f"the tokenizer {name!r} is made from the text that is trained on; give the folder it is in")
    if name.startswith("hf:"):
        return _from_transformers(name.removeprefix("hf:"))
    path = Path(name)
    if not path.exists():
        raise ValueError(f"unknown tokenizer {name!r}: no such path; allowed are {FORMS}")
    if path.is_file():
        return _from_file(path)
    if (path / _STATE_FILE).is_file():
        return load_tokenizer(path)
    if (path / "tokenizer.json").is_file():
        return _from_file(path / "tokenizer.json")
    return _from_transformers(str(path))


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that was saved with a run.

    Raises:
        ValueError: If the folder has none, or it cannot be read.
    """
    path = folder / _STATE_FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        kind, separator = state["kind"], state.get("separator")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} has no saved tokenizer that can be read: {path.name}: {error}") from error
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "subwords":
        return SubwordTokenizer(_backend(folder / "tokenizer.json"), separator)
    raise ValueError(f"{path}: unknown kind of tokenizer {kind!r}, allowed are 'bytes' and 'subwords'")


def train_bpe(texts: Iterable[str], size: int) -> SubwordTokenizer:
    """Train a byte-level BPE: every text can be written in it, and it has no unknown token.

    Token 0 is the separator, then come the 256 bytes, then the merges, most frequent first. The same texts
    give the same tokenizer. Texts that have too few distinct pairs give fewer than `size` tokens.

    Args:
        texts: The training text.
        size: Tokens in all, at least `MIN_BPE_SIZE`.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return SubwordTokenizer(backend, SEPARATOR)


def _backend(path: Path) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Backend

    try:
        return Backend.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(
            f"tokenizer {path} cannot be read as a file of the tokenizers library (tokenizer.json): {error}"
        ) from error


def _from_file(path: Path) -> SubwordTokenizer:
    return SubwordTokenizer(_backend(path), _end_of_text(path.with_name("tokenizer_config.json")))


def _end_of_text(config: Path) -> str | None:
    """What transformers' `tokenizer_config.json` calls the end of a text, if there is one."""
    if not config.is_file():
        return None
    try:
        token: Any = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{config} is not a JSON object: {error}") from error
    return token.get("content") if isinstance(token, dict) else token


def _from_transformers(name: str) -> SubwordTokenizer:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ValueError(f"tokenizer {name!r} needs transformers: pip install 'nsphere[hf]'") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"no tokenizer {name!r}: {reason}; allowed are {FORMS}") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"tokenizer {name!r} has no fast version, and only fast ones are supported")
    return SubwordTokenizer(backend, tokenizer.eos_token)
