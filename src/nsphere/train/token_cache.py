"""A folder of derived files that is complete or does not exist, and is checked before it is used."""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from nsphere.train.files import fsync_file, fsync_folder, sha256_of_file

logger = logging.getLogger(__name__)

_MANIFEST = "manifest.json"


def data_cache() -> Path:
    """Where tokenised data is kept between runs: $NSPHERE_CACHE, or the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = os.environ.get("NSPHERE_CACHE") or f"{base}/nsphere"
    return Path(os.path.expanduser(folder))  # which, unlike Path's, leaves ~ alone where there is no home


def cached_folder(folder: Path, build: Callable[[Path], None]) -> Path:
    """A folder that `build` fills, built once.

    It is filled under another name and renamed when complete, with a manifest of every file's size and
    sha256. A folder that disagrees with its manifest is reported and built again. Processes that build the
    same folder at the same time do the work twice; the first to end wins.

    Args:
        folder: Where it lies; its name must say everything that its content depends on.
        build: Writes the files into the empty folder it is given, the same ones each time.

    Returns:
        `folder`.

    Raises:
        ValueError: If nothing can be created where it lies.
        OSError: If it cannot be written to its end (full disk); nothing is left then.
    """
    if folder.exists():
        damage = _damage(folder)
        if damage is None:
            return folder
        logger.warning("the cache %s is damaged (%s) and is built again", folder, damage)
        shutil.rmtree(folder)
    building = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    try:
        building.mkdir(parents=True)
    except OSError as error:
        raise ValueError(
            f"the cache folder {folder.parent} cannot be written ({error.strerror}); "
            "choose another with the environment variable NSPHERE_CACHE"
        ) from error
    try:
        build(building)
        manifest = {path.name: _fingerprint(path) for path in sorted(building.iterdir())}
        (building / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for path in building.iterdir():
            fsync_file(path)
        fsync_folder(building)
        try:
            os.rename(building, folder)
        except OSError:
            if not folder.exists() or _damage(folder) is not None:
                raise
        fsync_folder(folder.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _fingerprint(path: Path) -> dict[str, int | str]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}


def _damage(folder: Path) -> str | None:
    """What is wrong with the folder, or None."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        wrong = [name for name, expected in manifest.items() if _fingerprint(folder / name) != expected]
    except (OSError, ValueError, AttributeError) as error:
        return str(error)
    return f"{', '.join(wrong)} changed since it was written" if wrong else None
