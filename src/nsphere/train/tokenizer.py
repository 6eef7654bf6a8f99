"""From text to token numbers and back: bytes, a tokenizer file, or a BPE trained on the spot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Tokenizer(Protocol):
    """What the data, the run folder and generation need of a tokenizer.

    Attributes:
        vocab_size: Token numbers are from 0 to vocab_size - 1.
        separator_id: The token that ends a document, or None.
    """

    vocab_size: int
    separator_id: int | None

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without a separator."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens; bytes that are not UTF-8 become U+FFFD."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Everything that `tokenizer_from_dict` needs, as plain JSON."""
        ...


class ByteTokenizer:
    """UTF-8 bytes are the tokens; byte 0, which text does not have, ends a document."""

    vocab_size = 256
    separator_id: int | None = 0

    def encode(self, text: str) -> list[int]:
        """The bytes of a text.

        Raises:
            ValueError: If the text has a byte 0.
        """
        return list(self.encode_bytes(text))

    def encode_bytes(self, text: str) -> bytes:
        """As `encode`, a byte per token."""
        encoded = text.encode("utf-8")
        position = encoded.find(0)
        if position >= 0:
            raise ValueError(
                f"the text has a byte 0 at byte {position}, which separates documents in byte tokens; "
                f"remove it from the text, or use another tokenizer"
            )
        return encoded

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some bytes; what is not UTF-8 becomes U+FFFD."""
        return bytes(tokens).decode("utf-8", errors="replace")

    def to_dict(self) -> dict[str, Any]:
        """The kind is all there is to say."""
        return {"kind": "bytes"}
