"""Files that survive a kill: whole-file writes by rename, metrics lines that are never torn, one job per run folder."""

import contextlib
import errno
import hashlib
import json
import logging
import os
import secrets
import socket
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"
_BINARY = getattr(os, "O_BINARY", 0)  # Windows would otherwise turn \n into \r\n


def fsync_file(path: Path) -> None:
    """Wait until the file's bytes are on the disk."""
    # read and write: Windows flushes only what is open for writing
    descriptor = os.open(path, os.O_RDWR | _BINARY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(path: Path) -> None:
    """Wait until the folder's entries (what was created, renamed or removed in it) are on the disk."""
    if sys.platform == "win32":
        return  # a folder can't be opened there; the file system's journal orders its entries
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of_file(path: Path) -> str:
    """The sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def atomic_write_bytes(path: Path | str, data: bytes) -> None:
    """Replace a file: after a kill at any moment it holds its old content or all of `data`, never a part.

    Written beside the target, flushed to the disk, then renamed over it; the folder is flushed last.

    Raises:
        OSError: it can't be written (full disk, no permission); the old content is still there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def atomic_write_text(path: Path | str, text: str) -> None:
    """`atomic_write_bytes` of the text in UTF-8, its newlines as they are."""
    atomic_write_bytes(path, text.encode())


def atomic_write_json(path: Path | str, value: Any) -> None:
    """`atomic_write_bytes` of indented JSON. Floats come back with the same bits; NaN and infinities are kept."""
    atomic_write_text(path, json.dumps(value, indent=2) + "\n")


def _complete_records(path: Path, data: bytes) -> list[tuple[bytes, dict[str, Any]]]:
    """Each whole line with its record. What follows the last newline was torn by a crash and is left out."""
    records = []
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append((line + b"\n", record))
        else:
            logger.warning("%s: line %d is damaged and is left out", path, number)
    return records


def read_jsonl(path: Path | str) -> list[dict[str, Any]]:
    """The records of a JSONL file, oldest first; a torn last line is left out, a damaged one is warned of."""
    path = Path(path)
    return [record for _, record in _complete_records(path, path.read_bytes())]


class JsonlWriter:
    """Appends records to a JSONL file, one line each, whole or not at all.

    Args:
        path: the file; created if missing, otherwise continued.
        resume_step: drop what was recorded after this step, so that a resumed run doubles nothing. A line
            without a "step" belongs to the line before it. The file is replaced in one piece: a kill meanwhile
            leaves the old or the new one. None keeps every whole line.

    Raises:
        OSError: the file can't be written. A line that didn't fit on the disk is taken back whole.
    """

    def __init__(self, path: Path | str, *, resume_step: int | None = None) -> None:
        self.path = Path(path)
        if self.path.exists():
            self._drop_what_is_torn_or_later(resume_step)
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _BINARY, 0o666)
        self._size = os.fstat(self._descriptor).st_size

    def _drop_what_is_torn_or_later(self, resume_step: int | None) -> None:
        before = self.path.read_bytes()
        kept, keep = [], True
        for line, record in _complete_records(self.path, before):
            if resume_step is not None and "step" in record:
                keep = record["step"] <= resume_step
            if keep:
                kept.append(line)
        after = b"".join(kept)
        if after != before:
            atomic_write_bytes(self.path, after)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record. A kill keeps it (the kernel has it); call `sync` against a power cut."""
        line = json.dumps(record).encode() + b"\n"
        try:
            # one system call for the whole line, so that a kill can't come in the middle
            written = os.write(self._descriptor, line)
            if written != len(line):
                os.ftruncate(self._descriptor, self._size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise OSError(
                f"{self.path}: a line could not be written ({error.strerror}); free some disk space and resume the run"
            ) from error
        self._size += written

    def sync(self) -> None:
        """Wait until all lines are on the disk. Before saving a checkpoint, so that none of its past is missing."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Flush and close; a second call does nothing."""
        if self._descriptor >= 0:
            self.sync()
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> "JsonlWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _system_lock(descriptor: int) -> bool:
    """Take the operating system's lock on an open file without waiting. False: another process has it."""
    if sys.platform == "win32":
        import msvcrt

        # Windows locks bytes, and nobody else can read those: one far behind the text
        os.lseek(descriptor, 1 << 30, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
        return True

    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class RunLock:
    """One job per run folder: `with RunLock(folder): ...` refuses the second.

    The lock is the operating system's, on `folder/.lock`, so it ends with the process, however that ends; the
    file stays and says who had it last. It refuses a second job of the same process too. Some network file
    systems have no locks: there it warns and protects nothing.

    Args:
        folder: the run folder; created if missing.

    Raises (on entering):
        ValueError: another job has the folder; names its process and host.
        OSError: the lock file can't be created.
    """

    _held: ClassVar[set[tuple[int, Path]]] = set()  # by process id: a forked child holds nothing

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.path = self.folder / LOCK_NAME
        self._descriptor = -1

    @classmethod
    def is_held_here(cls, folder: Path | str) -> bool:
        """Whether this process has the folder's lock."""
        return (os.getpid(), Path(folder).resolve()) in cls._held

    def __enter__(self) -> "RunLock":
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | _BINARY, 0o666)
        try:
            locked = _system_lock(descriptor)
        except OSError as error:
            logger.warning("%s can't be locked (%s): make sure that no second job uses this folder", self.path, error)
            locked = True
        if not locked:
            os.close(descriptor)
            raise ValueError(
                f"run folder {self.folder} is in use by {self._holder()}; wait until that job ends, stop it, "
                "or choose another folder"
            )
        self._descriptor = descriptor
        self._held.add((os.getpid(), self.folder.resolve()))
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        with contextlib.suppress(OSError):  # on a full disk the lock still holds, without a name in it
            os.write(descriptor, json.dumps(holder).encode())
        return self

    def _holder(self) -> str:
        try:
            holder = json.loads(self.path.read_bytes())
            return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"  # it is just now writing its name

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.discard((os.getpid(), self.folder.resolve()))
        # closing ends the lock; the file is not removed, for another job may just have opened it
        os.close(self._descriptor)
        self._descriptor = -1
