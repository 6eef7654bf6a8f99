"""manifest.json: which files a checkpoint has, their sizes and hashes. Written last, read first.

Nothing in a checkpoint is opened before the manifest has vouched for it.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from nsphere.train.files import atomic_write_text, fsync_file, sha256_of_file
from nsphere.train.ranks import ALONE, Ranks

SCHEMA_VERSION = 2
MANIFEST_FILE, STATE_FILE = "manifest.json", "state.json"
MODEL_FOLDER, OPTIMIZER_FOLDER = PARTS = "model", "optimizer"

STEP_FOLDER = re.compile(r"step-(\d{8,})")
_FILE = re.compile(rf"{re.escape(STATE_FILE)}|({MODEL_FOLDER}|{OPTIMIZER_FOLDER})/[\w-]+\.safetensors")


class Broken(ValueError):
    """A checkpoint that is not what was written; an older one may be used in its place."""


def entry(path: Path) -> dict[str, Any]:
    """What the manifest says of a file, which is flushed to the disk first."""
    fsync_file(path)
    return {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}


def write_manifest(folder: Path, step: int, files: dict[str, dict[str, Any]]) -> None:
    """Write it, with its own hash; `files`: relative path -> `entry`."""
    manifest = {"schema_version": SCHEMA_VERSION, "step": step, "files": dict(sorted(files.items()))}
    atomic_write_text(folder / MANIFEST_FILE, manifest_text(manifest))


def manifest_text(manifest: dict[str, Any]) -> str:
    """How a manifest is written; the same in every schema, so that damage shows before a version is believed."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    own = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    return json.dumps(manifest | {"sha256": own}, indent=2) + "\n"


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        text = (folder / MANIFEST_FILE).read_bytes()
        manifest = json.loads(text)
        sound = isinstance(manifest, dict) and text == manifest_text(manifest).encode()
    except FileNotFoundError:
        raise Broken(f"{MANIFEST_FILE} is missing") from None
    except OSError as error:
        raise Broken(f"{MANIFEST_FILE} can't be read ({error.strerror})") from error
    except ValueError:
        sound = False
    if not sound:
        raise Broken(f"{MANIFEST_FILE} is damaged: it is not what was written")
    version = manifest["schema_version"]
    if version > SCHEMA_VERSION:
        raise ValueError(
            f"checkpoint {folder} has schema version {version}, and this nsphere reads up to {SCHEMA_VERSION}; "
            "update nsphere, or load a checkpoint from before"
        )
    if version < SCHEMA_VERSION:
        raise ValueError(
            f"checkpoint {folder} has schema version {version}, from before nsphere's first release, and this nsphere "
            f"reads {SCHEMA_VERSION}; train the run again, into another folder"
        )
    return manifest


def verify(folder: Path, *, hashes: bool, ranks: Ranks = ALONE) -> None:
    """Check a checkpoint against its manifest.

    Args:
        folder: the checkpoint's.
        hashes: whether to read all bytes, or to look at presence and sizes only.
        ranks: share out the hashing; then all raise what one finds. Collective.

    Raises:
        Broken: with the file and what is wrong with it.
        ValueError: sound, but of another schema.
    """

    def mine() -> None:
        files = _check_presence(folder)
        if hashes:
            for name in list(files)[ranks.rank :: ranks.size]:
                _check_hash(folder, name, files[name]["sha256"])

    ranks.all(mine)


def _check_presence(folder: Path) -> dict[str, dict[str, Any]]:
    """All that can be said without reading the files; the manifest's list of them."""
    manifest = _read_manifest(folder)
    files: dict[str, dict[str, Any]] = manifest["files"]
    odd = [name for name in files if not _FILE.fullmatch(name)]
    if odd or STATE_FILE not in files:
        raise Broken(f"{MANIFEST_FILE} does not list the files of a checkpoint ({odd[0] if odd else STATE_FILE})")
    for name, written in files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if path.suffix == ".safetensors" and _is_pickle(path):
                raise Broken(f"{name} is a pickle, which could run code when read; it was not read")
        except FileNotFoundError:
            raise Broken(f"{name} is missing") from None
        except OSError as error:
            raise Broken(f"{name} can't be read ({error.strerror})") from error
        if size != written["bytes"]:
            raise Broken(f"{name} has {size} bytes, {written['bytes']} were written")
    for part in PARTS:
        for path in sorted((folder / part).glob("*")):
            if f"{part}/{path.name}" not in files:
                raise Broken(f"{part}/{path.name} is not in {MANIFEST_FILE}; take it away")
    named = STEP_FOLDER.fullmatch(folder.name)
    if named and int(named[1]) != manifest["step"]:
        raise Broken(f"the folder is named for step {int(named[1])} and holds step {manifest['step']}")
    return files


def _check_hash(folder: Path, name: str, sha256: str) -> None:
    try:
        found = sha256_of_file(folder / name)
    except OSError as error:
        raise Broken(f"{name} can't be read ({error.strerror})") from error
    if found != sha256:
        raise Broken(f"{name} is damaged: its sha256 is not that of what was written")


def _is_pickle(path: Path) -> bool:
    """Whether a .safetensors file starts as torch.save's archives or bare pickles do."""
    with open(path, "rb") as file:
        start = file.read(9)
    # a safetensors header opens with "{" after its 8-byte length, which may itself begin with 0x80
    return start.startswith((b"PK", b"\x80")) and start[8:] != b"{"
