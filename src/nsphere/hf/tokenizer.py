"""A run's tokenizer as transformers' PreTrainedTokenizerFast."""

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from nsphere.train.tokenizer import ByteTokenizer, SubwordTokenizer, Tokenizer


def byte_backend() -> Backend:
    r"""UTF-8 bytes as a tokenizer.json: token i is byte i, and byte 0 ends a document.

    A BPE without merges over the 256 characters that stand for bytes there. Byte 0 is the special token "\0", which no
    other text is taken for, so that every text gets its own bytes and gets them back.
    """
    characters = _byte_characters()
    vocabulary = {"\0": 0} | {characters[byte]: byte for byte in range(1, 256)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("\0", special=True, normalized=False)])
    return backend


def _byte_characters() -> list[str]:
    """The character that byte-level BPE writes for each byte: itself where it is printable, else one from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def hf_tokenizer(tokenizer: Tokenizer, context: int) -> PreTrainedTokenizerFast:
    """The tokenizer for transformers: the same tokens, and the separator as end and padding token.

    Args:
        tokenizer: of a run.
        context: the model's, kept as model_max_length.

    Raises:
        ValueError: a tokenizer of another kind.
    """
    separator: str | None
    if isinstance(tokenizer, ByteTokenizer):
        backend, separator = byte_backend(), "\0"
    elif isinstance(tokenizer, SubwordTokenizer):
        backend, separator = tokenizer.backend, tokenizer.separator
    else:
        raise ValueError(f"a {type(tokenizer).__name__} has no form in transformers; bytes and subwords have one")
    ends = {} if separator is None else {"eos_token": separator, "pad_token": separator}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        **ends,
    )
