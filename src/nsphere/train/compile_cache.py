"""What a killed process can leave in torch.compile's cache: a library that was never written, and is taken for one."""

from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout


def remove_unwritten_libraries() -> list[Path]:
    """Remove libraries whose compiler was killed, so that they are built again; the paths of what was removed.

    torch builds each library in its place and then trusts that it is there. What a killed linker left here was empty
    (29 of 34 kills) or had zeros for a header (4; one seemed to lack its build id alone, and such a file is kept), and
    every later start would fail on it. What another process is building now is left to it: torch holds a lock on it.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    cache = Path(cache_dir())
    (cache / "locks").mkdir(exist_ok=True)
    removed = []
    for library in cache.glob("??/c*.so"):  # those that torch names by the hash of what it locks; no other's
        with suppress(Timeout, OSError):  # at work, gone meanwhile, or another user's: torch names what it can't load
            if _is_written(library):
                continue
            with FileLock(cache / "locks" / f"{library.name.partition('.')[0]}.lock", timeout=0):
                if not _is_written(library):  # now that nobody is at it
                    library.unlink()
                    removed.append(library)
    return removed


def _is_written(library: Path) -> bool:
    with library.open("rb") as file:
        return any(file.read(4))
