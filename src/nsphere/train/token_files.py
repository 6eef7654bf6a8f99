"""Token files: raw unsigned integers, as nanoGPT and nGPT's authors write them, and llm.c's shards.

nanoGPT: `train.bin` and `val.bin`, uint16, no header. llm.c and modded-nanogpt: any number of `*train*.bin`
and `*val*.bin`, each with 256 int32 before its tokens: magic, version, number of tokens.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal

import numpy as np

from nsphere.train.batches import Tokens, TokenShards

TokenDtype = Literal["uint16", "uint32"]

_HEADER_BYTES = 256 * 4
_HEADER_DTYPES = {20240520: "uint16", 20240801: "uint32"}  # by magic
_SCAN_TOKENS = 1 << 22


def is_token_data(path: Path) -> bool:
    """Whether a path is a token file, or a folder with some."""
    return path.suffix == ".bin" if path.is_file() else next(path.glob("*.bin"), None) is not None


def token_paths(path: Path) -> tuple[list[Path], list[Path]]:
    """The files of the training and of the validation split; the latter may be none.

    Raises:
        ValueError: If a folder's files do not say which of them are for training.
    """
    if path.is_file():
        return [path], []
    names = sorted(path.glob("*.bin"))
    train = [name for name in names if "train" in name.name]
    val = [name for name in names if "val" in name.name and name not in train]
    if not train and len(names) == 1:
        return names, []
    if not train:
        raise ValueError(
            f"folder {path} has {len(names)} .bin files and none with 'train' in its name; name them train.bin and "
            f"val.bin, or give one file"
        )
    return train, val


def _refuse_wider_numbers(path: Path, dtype: TokenDtype, start: int, num_tokens: int) -> None:
    """Refuse uint32 or int64 tokens read as uint16: every other number, or three of four, would be 0.

    Raises:
        ValueError: that is so at the head of the file.
    """
    if dtype != "uint16" or num_tokens < 64:
        return
    with open(path, "rb") as file:
        file.seek(start)
        head = np.frombuffer(file.read(1 << 17), dtype="<u2")
    if head.any() and not head[1::2].any():
        wider = "int64" if not head[2::4].any() else "uint32"
        advice = "give --token-dtype uint32" if wider == "uint32" else "write it again as uint16 or uint32"
        raise ValueError(f"{path} looks like {wider} tokens, read as uint16 every second token would be 0; {advice}")


def open_tokens(path: Path, dtype: TokenDtype) -> Tokens:
    """Map a token file.

    Returns:
        Little-endian unsigned integers [num_tokens], mapped from the file.

    Raises:
        ValueError: If the file is empty, or its size or header disagrees with the dtype.
    """
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path} is empty; give a file with tokens")
    header = np.fromfile(path, dtype="<i4", count=min(3, size // 4))
    width = np.dtype(dtype).itemsize
    start, num_tokens = 0, size // width
    if len(header) == 3 and size >= _HEADER_BYTES and int(header[0]) in _HEADER_DTYPES:
        stored = _HEADER_DTYPES[int(header[0])]
        if stored != dtype:
            raise ValueError(f"{path} says in its header that its tokens are {stored}, not {dtype}; set token_dtype")
        start, num_tokens = _HEADER_BYTES, int(header[2])
    if num_tokens == 0 or size != start + num_tokens * width:
        promised = f"its header promises {num_tokens} tokens" if start else f"not a multiple of {width}"
        raise ValueError(
            f"{path} has {size} bytes, {promised} ({dtype} tokens have {width} bytes each); check token_dtype, "
            f"'uint16' or 'uint32', and that the file is complete"
        )
    # A plain array over the map: a slice of np.memmap itself costs several times as much.
    little_endian = np.dtype(dtype).newbyteorder("<")
    _refuse_wider_numbers(path, dtype, start, num_tokens)
    return np.asarray(np.memmap(path, dtype=little_endian, mode="r", offset=start, shape=num_tokens))


def stated_vocab_size(path: Path) -> int:
    """The vocabulary size that a `meta.json` beside the tokens states.

    nanoGPT's `meta.pkl` is not read: to unpickle a file is to run it.

    Args:
        path: The token file or folder.

    Raises:
        ValueError: If there is none, or it has no "vocab_size".
    """
    folder = path if path.is_dir() else path.parent
    meta = folder / "meta.json"
    if not meta.is_file():
        pickled = folder / "meta.pkl"
        advice = f"; {pickled} is not read, for a pickle can run code" if pickled.exists() else ""
        raise ValueError(
            f"{path} holds tokens, and nothing says how large their vocabulary is; set vocab_size (50257 for "
            f'GPT-2\'s) or the tokenizer, or write it as "vocab_size" into {meta}{advice}'
        )
    try:
        size = json.loads(meta.read_text(encoding="utf-8"))["vocab_size"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{meta} should be a JSON object with a "vocab_size": {error!r}') from error
    if type(size) is not int or size < 1:
        raise ValueError(f"{meta}: vocab_size must be a positive whole number, got {size!r}")
    return size


def split_tail(parts: list[Tokens], fraction: float) -> tuple[list[Tokens], list[Tokens]]:
    """Cut the last `fraction` of the tokens off."""
    cut = round(sum(map(len, parts)) * (1 - fraction))
    before, after = [], []
    for part in parts:
        before.append(part[: max(0, cut)])
        after.append(part[max(0, cut) :])
        cut -= len(part)
    return [part for part in before if len(part)], [part for part in after if len(part)]


def check_and_hash(splits: dict[str, list[Tokens]], vocab_size: int) -> str:
    """Read all tokens once, a stretch at a time.

    Args:
        splits: The token arrays of each split, by its name.
        vocab_size: Tokens must be below it.

    Returns:
        The sha256 over the splits' lengths, dtypes and bytes; how they are cut into files does not enter.

    Raises:
        ValueError: If a token is not below `vocab_size`; names the first one.
    """
    digest = hashlib.sha256()
    for name, parts in splits.items():
        digest.update(f"{name} {sum(map(len, parts))} {parts[0].dtype}\n".encode())
        passed = 0
        for part in parts:
            for start in range(0, len(part), _SCAN_TOKENS):
                stretch = part[start : start + _SCAN_TOKENS]
                digest.update(stretch.tobytes())
                if stretch.max() >= vocab_size:
                    first = int(np.argmax(stretch >= vocab_size))
                    raise ValueError(
                        f"the {name} data has token {stretch[first]} at position {passed + start + first}, outside "
                        f"the vocabulary of {vocab_size}; check vocab_size, the tokenizer and token_dtype"
                    )
            passed += len(part)
    return digest.hexdigest()


def join(parts: list[Tokens]) -> Tokens | TokenShards:
    """One row of tokens from one or several files."""
    return parts[0] if len(parts) == 1 else TokenShards(parts)
