"""Where text comes from: the embedded corpus, a file, a folder, a Hugging Face dataset.

Text is streamed, in pieces, so that a corpus need not fit in memory.
"""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nsphere.train.corpus import read_stdlib

if TYPE_CHECKING:
    import datasets

PIECE_BYTES = 1 << 16


class Piece(NamedTuple):
    """A stretch of text; the last of a document says so, and a separator follows it."""

    text: str
    ends_document: bool


@dataclass(frozen=True)
class Texts:
    """The text of both splits.

    Attributes:
        name: What to call it in a report.
        train: Starts reading the training text, from its beginning.
        val: The same of the validation text.
    """

    name: str
    train: Callable[[], Iterator[Piece]]
    val: Callable[[], Iterator[Piece]]


def stdlib_texts() -> Texts:
    """Python's own standard library; a module is a document."""
    train, val = read_stdlib()
    return Texts("stdlib", lambda: _documents(train), lambda: _documents(val))


def file_texts(path: Path, val_fraction: float) -> Texts:
    """One text file. Its tail is the validation text, from a line's start on; it is one stream, without separators.

    Raises:
        ValueError: If the file is empty. While reading: if it is not UTF-8.
    """
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path} is empty; give a file with text")
    cut = _tail_start(path, size, val_fraction)
    return Texts(path.name, lambda: _stretch(path, 0, cut), lambda: _stretch(path, cut, size))


def folder_texts(folder: Path, val_fraction: float, pattern: str) -> Texts:
    """A folder of text files, read in the order of their relative paths; a file is a document.

    Whole files are held out, chosen by the hash of their relative paths: on another machine they are the same
    ones. Hidden files and folders are left out, and so are empty files. A folder with a single file is read
    as that file.

    Args:
        folder: The folder; folders inside it are searched too.
        val_fraction: Share of the bytes to hold out.
        pattern: Which file names to read, as in a shell.

    Raises:
        ValueError: If there are no texts. While reading: if one is not UTF-8.
    """
    sizes = {name: size for name, size in _files_below(folder, pattern) if size > 0}
    if not sizes:
        raise ValueError(
            f"folder {folder} has no text: no file that matches {pattern!r} and has content, hidden ones aside"
        )
    if len(sizes) == 1:
        return file_texts(folder / next(iter(sizes)), val_fraction)
    held_out = held_out_files(sizes, val_fraction)

    def read(held: bool) -> Iterator[Piece]:
        for name, size in sizes.items():
            if (name in held_out) == held:
                *pieces, last = _stretch(folder / name, 0, size)
                yield from pieces
                yield last._replace(ends_document=True)

    return Texts(folder.resolve().name, lambda: read(False), lambda: read(True))


def held_out_files(sizes: dict[str, int], val_fraction: float) -> set[str]:
    """Choose the files to validate on: in the order of their names' sha256, until they have their share of the bytes.

    A file that would take the share beyond one and a half times what was asked is passed over; if that leaves
    none, the smallest file is chosen. A file added later moves few others from one side to the other.

    Args:
        sizes: Bytes of each file, by its relative path with "/" between the parts.
        val_fraction: Share of the bytes, at most 0.5.
    """
    target = val_fraction * sum(sizes.values())
    chosen: set[str] = set()
    total = 0
    for name in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if total < target and total + sizes[name] <= 1.5 * target:
            chosen.add(name)
            total += sizes[name]
    return chosen or {min(sizes, key=lambda name: (sizes[name], name))}


def dataset_texts(name: str, split: str, config: str | None, field: str, val_fraction: float) -> Texts:
    """A Hugging Face dataset; a row is a document.

    If the dataset has a split called "validation", and training is not on that, it is the validation text.
    Otherwise rows spread evenly over the training split are held out.

    Args:
        name: On the hub, or a local path, of what `save_to_disk` wrote or of files that `load_dataset` reads.
        split: The split to train on.
        config: The dataset's configuration, if it has several.
        field: The column with the text.
        val_fraction: Share of the rows to hold out where there is no validation split.

    Raises:
        ValueError: If `datasets` is not installed, or there is no such dataset, split or column of text.
    """
    splits = _load_dataset(name, config)
    if split not in splits:
        raise ValueError(f"dataset {name!r} has no split {split!r}; it has {', '.join(map(repr, splits))}")
    train = splits[split]
    held_out = splits.get("validation") if split != "validation" else None
    for rows in [train] if held_out is None else [train, held_out]:
        if field not in rows.column_names:
            columns = ", ".join(map(repr, rows.column_names))
            raise ValueError(f"dataset {name!r} has no column {field!r}; text_field must be one of {columns}")

    def read(rows: datasets.Dataset, keep: Callable[[int], bool]) -> Iterator[Piece]:
        batches = rows.select_columns([field]).iter(batch_size=1000)
        for number, text in enumerate(itertools.chain.from_iterable(batch[field] for batch in batches)):
            if not isinstance(text, str):
                raise ValueError(f"dataset {name!r}, row {number}: {field!r} is {type(text).__name__}, not text")
            if text and keep(number):
                yield Piece(text, ends_document=True)

    title = Path(name).name
    if held_out is not None:
        return Texts(title, lambda: read(train, lambda _: True), lambda: read(held_out, lambda _: True))
    if len(train) < 2:
        raise ValueError(f"dataset {name!r} has {len(train)} rows; at least 2 are needed, to hold one out")
    every = min(round(1 / val_fraction), len(train))
    return Texts(
        title,
        lambda: read(train, lambda number: number % every != every - 1),
        lambda: read(train, lambda number: number % every == every - 1),
    )


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder is what `save_to_disk` of a Hugging Face dataset, or of several splits, wrote."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def hash_texts(texts: Texts) -> tuple[str, int, int]:
    """Read all text once.

    Returns:
        The sha256 over both splits and their documents' borders, and the bytes of the training and of the
        validation text. Neither names nor paths enter the hash; nor does how text is cut into pieces.
    """
    digest = hashlib.sha256()
    sizes = []
    for read in (texts.train, texts.val):
        size = 0
        for piece in read():
            encoded = piece.text.encode("utf-8")
            size += len(encoded)
            digest.update(encoded)
            if piece.ends_document:
                # A byte that UTF-8 does not have, and so a border that no text can imitate.
                digest.update(b"\xff")
        digest.update(b"\xfe")
        sizes.append(size)
    return digest.hexdigest(), sizes[0], sizes[1]


def _documents(documents: Iterable[str]) -> Iterator[Piece]:
    return (Piece(text, ends_document=True) for text in documents)


def _files_below(folder: Path, pattern: str) -> list[tuple[str, int]]:
    found = []
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and fnmatch.fnmatchcase(name, pattern):
                path = Path(where, name)
                found.append((path.relative_to(folder).as_posix(), path.stat().st_size))
    return sorted(found)


def _tail_start(path: Path, size: int, fraction: float) -> int:
    """Where the last `fraction` of a file starts: at a line if there is one left, else at a character."""
    start = max(1, round(size * (1 - fraction)))
    with open(path, "rb") as file:
        file.seek(start)
        file.readline()
        if file.tell() < size:
            return file.tell()
        file.seek(start)
        rest = itertools.takewhile(lambda byte: 0x80 <= byte < 0xC0, file.read(4))
        return start + len(list(rest))


def _stretch(path: Path, start: int, stop: int) -> Iterator[Piece]:
    """A file's bytes from start to stop, in pieces that end with a line."""
    with open(path, "rb") as file:
        file.seek(start)
        position = start
        while position < stop:
            piece = file.read(min(PIECE_BYTES, stop - position))
            if position + len(piece) < stop:
                piece += file.readline(stop - position - len(piece))
            if not piece:
                raise ValueError(f"{path} became shorter while it was read; start again when it is complete")
            yield Piece(_decode(path, piece, position), ends_document=False)
            position += len(piece)


def _decode(path: Path, piece: bytes, position: int) -> str:
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: byte 0x{piece[error.start]:02x} at position {position + error.start}; "
            "convert it, for example with iconv, or leave it out (of a folder, with --file-pattern '*.txt', say)"
        ) from error


def _load_dataset(name: str, config: str | None) -> dict[Any, Any]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"data 'hf:{name}' needs datasets: pip install 'nsphere[hf]'") from error
    try:
        loaded = datasets.load_from_disk(name) if is_saved_dataset(Path(name)) else datasets.load_dataset(name, config)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"no dataset {name!r}: {reason}") from error
    # One split, saved alone, has no name of its own.
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
