"""Checkpoints: a folder that is complete or does not exist, and from which nothing is unpickled.

    RUN/checkpoints/step-00000600/
        model.safetensors       parameters and persistent buffers under canonical names, tied ones once
        optimizer.safetensors   state.<parameter name>.<key>, all optimizers together
        state.json              step, the caller's state, tied names, the optimizers' groups and numbers
        manifest.json           size and sha256 of the three above, and its own sha256; written last

Everything is written into a hidden folder beside the others and flushed to the disk; one rename then makes it a
checkpoint. `_write_tensors` and `_read_tensors` alone know how tensors are stored.
"""

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from nsphere.train import optimizer_state
from nsphere.train.files import RunLock, atomic_write_text, fsync_file, fsync_folder, sha256_of_file
from nsphere.train.model_state import Mismatch, check_fit, live_tensors, tied_names, unwrapped
from nsphere.train.optimizer_state import as_list

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
MODEL_FILE, OPTIMIZER_FILE, STATE_FILE = "model.safetensors", "optimizer.safetensors", "state.json"
MANIFEST_FILE = "manifest.json"

_STEP_FOLDER = re.compile(r"step-(\d{8,})")
_TEMPORARY, _REPLACED = ".tmp-", ".replaced-"


class _Broken(ValueError):
    """A checkpoint that is not what was written; an older one may be used in its place."""


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file and flush it. Raises OSError when it can't be written."""
    storages: set[int] = set()
    packed = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        # safetensors takes whole storages that nobody shares: a view gets its own copy
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        packed[name] = tensor
    try:
        save_file(packed, path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
    # safetensors makes files that only their owner can read; take what the folder was created with
    os.chmod(path, path.parent.stat().st_mode & 0o666)
    fsync_file(path)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise _Broken(f"{path.name} is not a readable safetensors file ({error})") from error


def _own_sha256(manifest: dict[str, Any]) -> str:
    """The sha256 that a manifest states of itself."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _manifest_text(manifest: dict[str, Any]) -> str:
    """How a manifest is written; the same in every schema, so that damage shows before a version is believed."""
    return json.dumps(manifest | {"sha256": _own_sha256(manifest)}, indent=2) + "\n"


def _write_manifest(folder: Path, step: int) -> None:
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of_file(folder / name)}
        for name in (MODEL_FILE, OPTIMIZER_FILE, STATE_FILE)
    }
    manifest = {"schema_version": SCHEMA_VERSION, "step": step, "files": files}
    atomic_write_text(folder / MANIFEST_FILE, _manifest_text(manifest))


def _is_pickle(path: Path) -> bool:
    """Whether a .safetensors file starts as torch.save's archives or bare pickles do."""
    with open(path, "rb") as file:
        start = file.read(9)
    # a safetensors header opens with "{" after its 8-byte length, which may itself begin with 0x80
    return start.startswith((b"PK", b"\x80")) and start[8:] != b"{"


def _verify(folder: Path, *, hashes: bool) -> None:
    """Check a checkpoint against its manifest; without `hashes` only presence and sizes.

    Raises:
        _Broken: with the file and what is wrong with it.
        ValueError: sound, but written by a newer nsphere.
    """
    try:
        text = (folder / MANIFEST_FILE).read_bytes()
        manifest = json.loads(text)
        sound = isinstance(manifest, dict) and text == _manifest_text(manifest).encode()
    except FileNotFoundError:
        raise _Broken(f"{MANIFEST_FILE} is missing") from None
    except OSError as error:
        raise _Broken(f"{MANIFEST_FILE} can't be read ({error.strerror})") from error
    except ValueError:
        sound = False
    if not sound:
        raise _Broken(f"{MANIFEST_FILE} is damaged: it is not what was written")
    if manifest["schema_version"] > SCHEMA_VERSION:
        raise ValueError(
            f"checkpoint {folder} has schema version {manifest['schema_version']}, and this nsphere reads up to "
            f"{SCHEMA_VERSION}; update nsphere, or load a checkpoint from before"
        )
    for name in sorted({MODEL_FILE, OPTIMIZER_FILE, STATE_FILE} | set(manifest["files"])):
        if name not in manifest["files"] or Path(name).name != name:
            raise _Broken(f"{MANIFEST_FILE} does not list the files of a checkpoint ({name})")
        path, written = folder / name, manifest["files"][name]
        try:
            size = path.stat().st_size
            if path.suffix == ".safetensors" and _is_pickle(path):
                raise _Broken(f"{name} is a pickle, which could run code when read; it was not read")
            if size != written["bytes"]:
                raise _Broken(f"{name} has {size} bytes, {written['bytes']} were written")
            if hashes and sha256_of_file(path) != written["sha256"]:
                raise _Broken(f"{name} is damaged: its sha256 is not that of what was written")
        except FileNotFoundError:
            raise _Broken(f"{name} is missing") from None
        except OSError as error:
            raise _Broken(f"{name} can't be read ({error.strerror})") from error
    named = _STEP_FOLDER.fullmatch(folder.name)
    if named and int(named[1]) != manifest["step"]:
        raise _Broken(f"the folder is named for step {int(named[1])} and holds step {manifest['step']}")


def _is_complete(folder: Path) -> bool:
    try:
        _verify(folder, hashes=False)
    except ValueError:
        return False
    return True


def _by_step(checkpoints: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint, newest first, sound or not."""
    folders = checkpoints.iterdir() if checkpoints.is_dir() else ()
    found = [(int(match[1]), f) for f in folders if (match := _STEP_FOLDER.fullmatch(f.name)) and f.is_dir()]
    return sorted(found, reverse=True)


def _discard(folder: Path) -> None:
    """Remove a folder; first it loses its name, so that a kill leaves no half of a checkpoint."""
    hidden = folder.with_name(f"{_TEMPORARY}{folder.name.lstrip('.')}-{secrets.token_hex(4)}")
    try:
        os.rename(folder, hidden)
        shutil.rmtree(hidden)
    except OSError as error:
        logger.warning("%s could not be removed (%s)", folder, error.strerror)


def _clean(checkpoints: Path) -> None:
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


def _clean_if_unused(checkpoints: Path) -> None:
    """`_clean`, unless another job is at work in the run folder, whose unfinished save this might be."""
    hidden = (_TEMPORARY, _REPLACED)
    if not checkpoints.is_dir() or not any(path.name.startswith(hidden) for path in checkpoints.iterdir()):
        return
    run_folder = checkpoints.parent
    try:
        with nullcontext() if RunLock.is_held_here(run_folder) else RunLock(run_folder):
            _clean(checkpoints)
    except (ValueError, OSError) as error:
        logger.info("unfinished checkpoints in %s stay: %s", checkpoints, error)


def _publish(temporary: Path, final: Path) -> None:
    """Give a finished checkpoint its name. One that had the name before is there until that moment."""
    replaced = final.with_name(_REPLACED + final.name)
    if final.exists():
        os.rename(final, replaced)
    os.rename(temporary, final)
    fsync_folder(final.parent)
    if replaced.exists():
        _discard(replaced)


def _keep_last(checkpoints: Path, step: int, keep_last: int) -> None:
    """Remove what is older than the newest `keep_last` complete checkpoints up to `step`."""
    complete = 0
    for other, folder in _by_step(checkpoints):
        if other > step:
            if _is_complete(folder):
                logger.warning(
                    "%s is newer than step %d, which was just saved: resuming this run takes it; move it away if "
                    "the run went back on purpose",
                    folder,
                    step,
                )
        elif complete >= keep_last:
            _discard(folder)
        else:
            complete += _is_complete(folder)


def _none_usable(checkpoints: Path, faults: list[str]) -> ValueError:
    return ValueError(f"no checkpoint in {checkpoints} can be used: {'; '.join(faults)}")


def latest_checkpoint(run_folder: Path | str) -> Path | None:
    """The newest checkpoint of a run whose files are all there with the right sizes; None if it has no checkpoint.

    Contents are verified by `load_checkpoint`; give that the run folder if it may fall back on an older one.

    Raises:
        ValueError: there are checkpoints and all are incomplete (each is named), or a newer nsphere saved the
            newest: starting over would lose what can perhaps be saved.
    """
    checkpoints = Path(run_folder) / "checkpoints"
    _clean_if_unused(checkpoints)
    faults = []
    for _, folder in _by_step(checkpoints):
        try:
            _verify(folder, hashes=False)
            return folder
        except _Broken as fault:
            faults.append(f"{folder.name}: {fault}")
    if faults:
        raise _none_usable(checkpoints, faults)
    return None


def _not_written(folder: Path, step: int, error: OSError) -> OSError:
    """The error of a failed save: why, what is left, and what to do."""
    last = next((path for _, path in _by_step(folder / "checkpoints") if _is_complete(path)), None)
    reason = error.strerror or str(error)
    try:
        free = f" ({shutil.disk_usage(folder).free / 2**20:.0f} MiB free)"
    except OSError:
        free = ""
    left = f"the last good checkpoint is {last}" if last else "there is no earlier checkpoint"
    clear = OSError(
        f"the checkpoint of step {step} could not be written to {folder}: {reason}{free}; {left}; "
        "make room or give write access there, then resume the run"
    )
    clear.errno = error.errno
    return clear


def save_checkpoint(
    folder: Path | str,
    *,
    step: int,
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None,
    state: dict[str, Any],
    keep_last: int = 2,
) -> Path:
    """Save a training state as `folder/checkpoints/step-XXXXXXXX`.

    A kill at any moment leaves every checkpoint that was there, and the new one whole or not at all. One of the
    same step is replaced. Older ones beyond `keep_last` are removed once the new one is complete, so there must be
    room for one more. Takes the run folder's lock unless this process has it.

    Args:
        folder: the run folder.
        step: how many steps have been made; >= 0.
        model: may be compiled or wrapped in DDP; names are saved without that. Tied tensors are saved once.
        optimizer: one, several that share out the model's parameters, or None.
        state: whatever else a resume needs, as JSON can hold it (tuples come back as lists).
            "architecture" in it is what `load_checkpoint` compares.
        keep_last: how many complete checkpoints to keep; >= 1.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: an argument is not as above, or another job has the run folder.
        OSError: it could not be written; names the last good checkpoint, which is untouched.
    """
    folder = Path(folder)
    if step < 0 or keep_last < 1:
        raise ValueError(f"step must be >= 0 and keep_last >= 1, got {step} and {keep_last}")
    live = live_tensors(model)
    tied = tied_names(live)
    optimizer_tensors, contents = optimizer_state.collect(model, as_list(optimizer))
    content = {"step": step, "state": state, "tied": tied, "optimizers": contents}
    try:
        text = json.dumps(content, indent=1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the state to save is not JSON ({error}); give numbers, strings, lists and dicts") from None

    checkpoints = folder / "checkpoints"
    final = checkpoints / f"step-{step:08d}"
    temporary = checkpoints / f"{_TEMPORARY}{final.name}-{secrets.token_hex(4)}"
    try:
        with nullcontext() if RunLock.is_held_here(folder) else RunLock(folder):
            _clean(checkpoints)
            try:
                temporary.mkdir(parents=True)
                fsync_folder(folder)
                _write_tensors(temporary / MODEL_FILE, {n: t for n, (_, t) in live.items() if n not in tied})
                _write_tensors(temporary / OPTIMIZER_FILE, optimizer_tensors)
                atomic_write_text(temporary / STATE_FILE, text)
                _write_manifest(temporary, step)
                _publish(temporary, final)
            except BaseException:
                _clean(checkpoints)
                raise
            _keep_last(checkpoints, step, keep_last)
    except OSError as error:
        raise _not_written(folder, step, error) from error
    return final


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A verified checkpoint in memory.

    Attributes:
        path: its folder.
        step: steps made when it was saved.
        model_tensors: canonical name -> tensor on the CPU; tied tensors under every name they had.
        optimizer_tensors: "state.<parameter name>.<key>" -> tensor on the CPU.
        state: what the caller gave to `save_checkpoint`.
        optimizer_groups: for each saved optimizer its class, groups (names and options) and numbers.
        tied: each tied name -> the name its tensor was saved under.
    """

    path: Path
    step: int
    model_tensors: dict[str, Tensor]
    optimizer_tensors: dict[str, Tensor]
    state: dict[str, Any]
    optimizer_groups: list[dict[str, Any]]
    tied: dict[str, str]

    def restore(
        self, model: nn.Module, optimizers: Optimizer | Sequence[Optimizer] | None = None, *, strict: bool = True
    ) -> Mismatch:
        """Copy the saved bits into a model and its optimizers; nothing is converted, projected or replaced.

        Everything is checked before anything is changed. Parameters keep their identity; gradients, requires_grad
        and hooks are left alone. An optimizer ends up with exactly the saved state and options (learning rate,
        betas, ...), except how it computes (fused, foreach, capturable), which stays its own.

        Args:
            model: of the saved architecture, on any device, compiled or wrapped or not.
            optimizers: one or several, with the saved classes and groups of parameters, in any order; None
                restores the model alone.
            strict: names must be the same on both sides. Otherwise only common ones are copied. Shapes and dtypes
                must always agree.

        Returns:
            The names passed over; none when strict.

        Raises:
            ValueError: with the first mismatches.
        """
        live = live_tensors(model)
        try:
            mismatch = check_fit(live, self.model_tensors, strict)
            plans = []
            if optimizers is not None:
                plans = optimizer_state.plan(
                    model, as_list(optimizers), self.optimizer_tensors, self.optimizer_groups, self.tied
                )
        except ValueError as error:
            raise ValueError(f"checkpoint {self.path} does not fit: {error}") from None
        saved = {raw: self.model_tensors[name] for name, (raw, _) in live.items() if name in self.model_tensors}
        unwrapped(model).load_state_dict(saved, strict=False)
        optimizer_state.carry_out(plans)
        return mismatch


def _read(folder: Path, expect_architecture: str | None) -> Checkpoint:
    """Verify and read one checkpoint. Raises as `_verify`, and ValueError for another architecture."""
    _verify(folder, hashes=True)
    try:
        content = json.loads((folder / STATE_FILE).read_bytes())
        step, state, tied, optimizers = (content[key] for key in ("step", "state", "tied", "optimizers"))
    except (ValueError, KeyError, TypeError) as error:
        raise _Broken(f"{STATE_FILE} is not a checkpoint's ({error!r})") from error
    architecture = state.get("architecture")
    if expect_architecture is not None and architecture != expect_architecture:
        raise ValueError(
            f"checkpoint {folder} holds the architecture {architecture!r}, and {expect_architecture!r} was asked for; "
            "choose the same architecture, or another checkpoint"
        )
    model_tensors = _read_tensors(folder / MODEL_FILE)
    model_tensors.update({name: model_tensors[owner] for name, owner in tied.items()})
    return Checkpoint(folder, step, model_tensors, _read_tensors(folder / OPTIMIZER_FILE), state, optimizers, tied)


def load_checkpoint(path: Path | str, *, expect_architecture: str | None = None) -> Checkpoint:
    """Read and verify a checkpoint.

    Args:
        path: one checkpoint's folder, which then must be sound; or a run folder, of which the newest sound one is
            taken: a broken one is warned of by name, and the one before it used.
        expect_architecture: what "architecture" in the saved state must be; None takes any.

    Returns:
        The checkpoint, on the CPU. Nothing in it was unpickled.

    Raises:
        ValueError: there is none, none is sound (each is named with its fault), it was saved by a newer nsphere,
            or it is of another architecture.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; give a run folder, or one of its checkpoints/step-XXXXXXXX")
    checkpoints = path / "checkpoints"
    if _STEP_FOLDER.fullmatch(path.name) or ((path / MANIFEST_FILE).exists() and not checkpoints.is_dir()):
        try:
            return _read(path, expect_architecture)
        except _Broken as fault:
            raise ValueError(
                f"checkpoint {path} can't be used: {fault}; give the run folder to take the newest sound one"
            ) from fault
    _clean_if_unused(checkpoints)
    faults = []
    for _, folder in _by_step(checkpoints):
        try:
            return _read(folder, expect_architecture)
        except _Broken as fault:
            faults.append(f"{folder.name}: {fault}")
            logger.warning("checkpoint %s can't be used: %s; trying the one before it", folder, fault)
    if faults:
        raise _none_usable(checkpoints, faults)
    raise ValueError(f"{path} holds no checkpoint; give a run folder, or one of its checkpoints/step-XXXXXXXX")
