"""The folder `checkpoints` of a run: what is in it, what is put there and what is taken away."""

import logging
import os
import secrets
import shutil
from contextlib import nullcontext
from pathlib import Path

from nsphere.train.checkpoint.manifest import STEP_FOLDER, verify
from nsphere.train.files import RunLock, fsync_folder

logger = logging.getLogger(__name__)

_TEMPORARY, _REPLACED = ".tmp-", ".replaced-"


under_way: set[Path] = set()
"""The `checkpoints` folders that this process is saving to just now, perhaps in the background."""


def final_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return checkpoints / f"step-{step:08d}"


def temporary_folder(checkpoints: Path, step: int) -> Path:
    """Where it is until it is complete."""
    return checkpoints / f"{_TEMPORARY}{final_folder(checkpoints, step).name}"


def by_step(checkpoints: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint, newest first, sound or not."""
    folders = checkpoints.iterdir() if checkpoints.is_dir() else ()
    found = [(int(match[1]), f) for f in folders if (match := STEP_FOLDER.fullmatch(f.name)) and f.is_dir()]
    return sorted(found, reverse=True)


def is_complete(folder: Path) -> bool:
    """Whether all files are there with their sizes."""
    try:
        verify(folder, hashes=False)
    except ValueError:
        return False
    return True


def _discard(folder: Path) -> None:
    """Remove a folder; first it loses its name, so that a kill leaves no half of a checkpoint."""
    hidden = folder.with_name(f"{_TEMPORARY}{folder.name.lstrip('.')}-{secrets.token_hex(4)}")
    try:
        os.rename(folder, hidden)
        shutil.rmtree(hidden)
    except OSError as error:
        logger.warning("%s could not be removed (%s)", folder, error.strerror)


def clean(checkpoints: Path) -> None:
    """Remove what a killed save left, and undo a replacement that it had half done."""
    for path in list(checkpoints.iterdir()) if checkpoints.is_dir() else ():
        if path.name.startswith(_REPLACED):
            original = path.with_name(path.name.removeprefix(_REPLACED))
            if original.exists():
                _discard(path)
            else:
                os.rename(path, original)
        elif path.name.startswith(_TEMPORARY):
            shutil.rmtree(path, ignore_errors=True)


def clean_if_unused(checkpoints: Path) -> None:
    """`clean`, unless a save is at work in the run folder, of this process or of another job."""
    hidden = (_TEMPORARY, _REPLACED)
    if (
        checkpoints in under_way
        or not checkpoints.is_dir()
        or not any(path.name.startswith(hidden) for path in checkpoints.iterdir())
    ):
        return
    run_folder = checkpoints.parent
    try:
        with nullcontext() if RunLock.is_held_here(run_folder) else RunLock(run_folder):
            clean(checkpoints)
    except (ValueError, OSError) as error:
        logger.info("unfinished checkpoints in %s stay: %s", checkpoints, error)


def publish(temporary: Path, final: Path) -> None:
    """Give a finished checkpoint its name. One that had the name before is there until that moment."""
    replaced = final.with_name(_REPLACED + final.name)
    if final.exists():
        os.rename(final, replaced)
    os.rename(temporary, final)
    fsync_folder(final.parent)
    if replaced.exists():
        _discard(replaced)


def keep(checkpoints: Path, step: int, keep_last: int, keep_every: int | None) -> None:
    """Remove what is older than the newest `keep_last` complete checkpoints up to `step`.

    Those of every `keep_every`-th step stay in any case.
    """
    complete = 0
    for other, folder in by_step(checkpoints):
        if other > step:
            if is_complete(folder):
                logger.warning(
                    "%s is newer than step %d, which was just saved: resuming this run takes it; move it away if "
                    "the run went back on purpose",
                    folder,
                    step,
                )
        elif complete < keep_last:
            complete += is_complete(folder)
        elif keep_every is None or other % keep_every:
            _discard(folder)
