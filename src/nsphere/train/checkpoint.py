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
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from nsphere.train.files import RunLock, atomic_write_bytes, atomic_write_json, fsync_file, fsync_folder

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
MODEL_FILE, OPTIMIZER_FILE, STATE_FILE = "model.safetensors", "optimizer.safetensors", "state.json"
MANIFEST_FILE = "manifest.json"

_STEP_FOLDER = re.compile(r"step-(\d{8,})")
_TEMPORARY, _REPLACED = ".tmp-", ".replaced-"

# How a group's arithmetic is carried out is the resuming machine's choice, not the saving one's.
_MACHINE_OPTIONS = frozenset({"params", "param_names", "foreach", "fused", "capturable", "differentiable"})


class _Broken(ValueError):
    """A checkpoint that is not what was written; an older one may be used in its place."""


class Mismatch(NamedTuple):
    """Names that `restore(strict=False)` passed over: in the model only, and in the checkpoint only."""

    missing: list[str]
    unexpected: list[str]


def canonical_name(name: str) -> str:
    """A parameter's name without what compiling or checkpointing the modules on its way put into it.

    >>> canonical_name("blocks.0._orig_mod.attn.weight")
    'blocks.0.attn.weight'
    """
    return ".".join(part for part in name.split(".") if part not in ("_orig_mod", "_checkpoint_wrapped_module"))


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and (Distributed)DataParallel's wrappers."""
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def _named_tensors(model: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """Canonical name -> (name in the unwrapped model's state_dict, live tensor), tied tensors under every name."""
    named: dict[str, tuple[str, Tensor]] = {}
    for raw, tensor in _unwrapped(model).state_dict(keep_vars=True).items():
        name = canonical_name(raw)
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is a {type(tensor).__name__}; a checkpoint holds tensors (drop get_extra_state)")
        if name in named:
            raise ValueError(f"{named[name][0]} and {raw} both come to the name {name}; rename one of the modules")
        named[name] = raw, tensor
    return named


def _tied_names(named: dict[str, tuple[str, Tensor]]) -> dict[str, str]:
    """Each name that stands for the same tensor as an earlier name -> that earlier name."""
    first: dict[Any, str] = {}
    tied = {}
    for name, (_, tensor) in named.items():
        same = tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
        owner = first.setdefault(same if tensor.data_ptr() else id(tensor), name)
        if owner != name:
            tied[name] = owner
    return tied


def _parameter_names(model: nn.Module) -> dict[int, str]:
    """id(parameter) -> canonical name; the first one where it is tied."""
    return {id(p): canonical_name(name) for name, p in _unwrapped(model).named_parameters()}


def _as_list(optimizers: Optimizer | Sequence[Optimizer] | None) -> list[Optimizer]:
    if optimizers is None:
        return []
    return [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)


def _group_names(optimizer: Optimizer, names: dict[int, str]) -> list[list[str]]:
    """The canonical names of each group's parameters."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise ValueError(
                    f"{type(optimizer).__name__} holds a parameter of shape {list(parameter.shape)} that the model "
                    "does not have; build the optimizer from this model's parameters"
                )
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def _plain(value: Any, where: str) -> Any:
    """The value as JSON can hold it: a number, a string, None, or a list of them. 0-d tensors become numbers."""
    if isinstance(value, Tensor) and value.dim() == 0:
        return value.item()
    if isinstance(value, list | tuple):
        return [_plain(entry, where) for entry in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{where} is a {type(value).__name__}; a checkpoint holds tensors, numbers and strings")


def _optimizer_content(model: nn.Module, optimizers: list[Optimizer]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The optimizers' state as flat tensors, and for each optimizer its class, groups and numbers for JSON."""
    names = _parameter_names(model)
    tensors: dict[str, Tensor] = {}
    contents = []
    for optimizer in optimizers:
        kind = type(optimizer).__name__
        groups = [
            {
                "params": group_names,
                "options": {k: _plain(v, f"{kind}'s {k}") for k, v in group.items() if k not in _MACHINE_OPTIONS},
            }
            for group, group_names in zip(optimizer.param_groups, _group_names(optimizer, names), strict=True)
        ]
        numbers: dict[str, dict[str, Any]] = {}
        for parameter, state in optimizer.state.items():
            name = names.get(id(parameter))
            if name is None:
                raise ValueError(f"{kind} keeps state for something that is not one of the model's parameters")
            for key, value in state.items():
                if "." in key or f"state.{name}.{key}" in tensors:
                    raise ValueError(f"{kind}'s state {key!r} of {name} has a dot in its name, or is there twice")
                if isinstance(value, Tensor):
                    tensors[f"state.{name}.{key}"] = value
                else:
                    numbers.setdefault(name, {})[key] = _plain(value, f"{kind}'s state {key!r} of {name}")
        contents.append({"class": kind, "groups": groups, "numbers": numbers})
    return tensors, contents


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
        raise OSError(int(number[1]) if number else 0, str(error)) from error
    # safetensors makes files that only their owner can read; take what the folder was created with
    os.chmod(path, path.parent.stat().st_mode & 0o666)
    fsync_file(path)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise _Broken(f"{path.name} is not a readable safetensors file ({error})") from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _own_sha256(manifest: dict[str, Any]) -> str:
    """The sha256 a manifest states of itself; computed the same way in every schema, so that damage shows first."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _write_manifest(folder: Path, step: int) -> None:
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
        for name in (MODEL_FILE, OPTIMIZER_FILE, STATE_FILE)
    }
    manifest: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "step": step, "files": files}
    manifest["sha256"] = _own_sha256(manifest)
    atomic_write_json(folder / MANIFEST_FILE, manifest)


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
        manifest = json.loads((folder / MANIFEST_FILE).read_bytes())
        sound = isinstance(manifest, dict) and manifest.get("sha256") == _own_sha256(manifest)
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
            if hashes and _sha256(path) != written["sha256"]:
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


def latest_checkpoint(run_folder: Path | str) -> Path | None:
    """The newest checkpoint of a run whose files are all there with the right sizes, or None.

    Contents are verified by `load_checkpoint`; give that the run folder if it may fall back on an older one.
    """
    return next((folder for _, folder in _by_step(Path(run_folder) / "checkpoints") if _is_complete(folder)), None)


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


def _clean_if_unused(run_folder: Path, checkpoints: Path) -> None:
    """`_clean`, unless another job is at work in the run folder, whose unfinished save this might be."""
    if not any(path.name.startswith((_TEMPORARY, _REPLACED)) for path in checkpoints.iterdir()):
        return
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


def _not_written(folder: Path, step: int, error: OSError) -> OSError:
    """The error of a failed save: why, what is left, and what to do."""
    last = latest_checkpoint(folder)
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
    named = _named_tensors(model)
    tied = _tied_names(named)
    optimizer_tensors, contents = _optimizer_content(model, _as_list(optimizer))
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
                _write_tensors(temporary / MODEL_FILE, {n: t for n, (_, t) in named.items() if n not in tied})
                _write_tensors(temporary / OPTIMIZER_FILE, optimizer_tensors)
                atomic_write_bytes(temporary / STATE_FILE, text.encode())
                _write_manifest(temporary, step)
                _publish(temporary, final)
            except BaseException:
                _clean(checkpoints)
                raise
            _keep_last(checkpoints, step, keep_last)
    except OSError as error:
        raise _not_written(folder, step, error) from error
    return final


def _some(parts: Sequence[str]) -> str:
    return ", ".join(parts[:3]) + (f" and {len(parts) - 3} more" if len(parts) > 3 else "")


def _like(live: Any, stored: Any) -> Any:
    """A stored option as the live one is: tensors are filled in place, lists become tuples where it has a tuple."""
    if isinstance(live, Tensor):
        return live.fill_(stored)
    if isinstance(live, tuple) and len(live) == len(stored):
        return tuple(_like(old, new) for old, new in zip(live, stored, strict=True))
    return stored


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

    @torch.no_grad()
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
        named = _named_tensors(model)
        mismatch = self._check_model(named, strict)
        plan = list(self._plan(model, _as_list(optimizers))) if optimizers is not None else []

        saved = {raw: self.model_tensors[name] for name, (raw, _) in named.items() if name in self.model_tensors}
        _unwrapped(model).load_state_dict(saved, strict=False)
        for optimizer, group, options, states in plan:
            for key, value in options.items():
                group[key] = _like(group.get(key), value)
            for parameter in group["params"]:
                self._restore_state(optimizer, group, parameter, states[id(parameter)])
        return mismatch

    def _check_model(self, named: dict[str, tuple[str, Tensor]], strict: bool) -> Mismatch:
        live_tied = _tied_names(named)
        present = {live_tied.get(name, name) for name in named if name in self.model_tensors}
        missing = [name for name in named if live_tied.get(name, name) not in present]
        unexpected = [name for name in self.model_tensors if name not in named]
        wrong = []
        for name, (_, live) in named.items():
            saved = self.model_tensors.get(name)
            if saved is None:
                continue
            if (saved.shape, saved.dtype) != (live.shape, live.dtype):
                wrong.append(
                    f"{name} is {saved.dtype} {list(saved.shape)} in the checkpoint and {live.dtype} "
                    f"{list(live.shape)} in the model"
                )
            elif live.is_meta:
                wrong.append(f"{name} has no memory in the model (call to_empty first)")
            else:
                owner = self.model_tensors.get(live_tied.get(name, name), saved)
                if owner is not saved and not _same_bits(owner, saved):
                    wrong.append(f"{name} and {live_tied[name]} are one tensor in the model and two in the checkpoint")
        faults = [_some(wrong)] if wrong else []
        if strict and missing:
            faults.append(f"the checkpoint lacks {_some(missing)}")
        if strict and unexpected:
            faults.append(f"the model lacks {_some(unexpected)}")
        if faults:
            raise ValueError(f"checkpoint {self.path} does not fit this model: {'; '.join(faults)}")
        return Mismatch(missing, unexpected)

    def _plan(
        self, model: nn.Module, optimizers: list[Optimizer]
    ) -> Iterator[tuple[Optimizer, dict[str, Any], dict[str, Any], dict[int, dict[str, Any]]]]:
        """For each live group: its optimizer, the saved options, and the saved state by id(parameter)."""
        names = _parameter_names(model)
        groups = {
            frozenset(group["params"]): (content["class"], group["options"])
            for content in self.optimizer_groups
            for group in content["groups"]
        }
        states: dict[str, dict[str, Any]] = {}
        for flat, tensor in self.optimizer_tensors.items():
            name, _, key = flat.removeprefix("state.").rpartition(".")
            states.setdefault(name, {})[key] = tensor
        for content in self.optimizer_groups:
            for name, numbers in content["numbers"].items():
                states.setdefault(name, {}).update(numbers)

        for optimizer in optimizers:
            kind = type(optimizer).__name__
            for group, group_names in zip(optimizer.param_groups, _group_names(optimizer, names), strict=True):
                # where the model ties names that it lists in another order, the saved one is meant
                saved_names = [self.tied.get(name, name) for name in group_names]
                saved_kind, options = groups.pop(frozenset(saved_names), (None, {}))
                if saved_kind != kind:
                    was = f"saved from {saved_kind}" if saved_kind else "not a group in the checkpoint"
                    raise ValueError(
                        f"checkpoint {self.path} does not fit this optimizer: {kind}'s group of "
                        f"{_some(group_names)} is {was}; build the optimizers as in the saved run"
                    )
                by_id = {id(p): states.get(name, {}) for p, name in zip(group["params"], saved_names, strict=True)}
                yield optimizer, group, options, by_id
        if groups:
            kind, _ = next(iter(groups.values()))
            raise ValueError(
                f"checkpoint {self.path} does not fit these optimizers: nothing was given for {kind}'s group of "
                f"{_some(sorted(next(iter(groups))))}; build the optimizers as in the saved run"
            )

    @staticmethod
    def _restore_state(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor, saved: dict[str, Any]) -> None:
        before = optimizer.state.pop(parameter, {})
        if not saved:
            return
        state = optimizer.state[parameter] = {}
        for key, value in saved.items():
            if isinstance(value, Tensor):
                # torch keeps step counters on the CPU unless the kernel reads them
                # (Optimizer._process_value_according_to_param_policy)
                on_cpu = key == "step" and not (group.get("fused") or group.get("capturable"))
                device = torch.device("cpu") if on_cpu else parameter.device
                old = before.get(key)
                if isinstance(old, Tensor) and (old.shape, old.dtype, old.device) == (value.shape, value.dtype, device):
                    target = old
                elif value.shape == parameter.shape:
                    target = torch.empty_like(parameter, dtype=value.dtype, device=device, requires_grad=False)
                else:
                    target = torch.empty(value.shape, dtype=value.dtype, device=device)
                state[key] = target.copy_(value)
            else:
                state[key] = value


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shapes, dtypes and bits; NaNs of the same bits are equal."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


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
    if checkpoints.is_dir():
        _clean_if_unused(path, checkpoints)
    faults = []
    for _, folder in _by_step(checkpoints):
        try:
            return _read(folder, expect_architecture)
        except _Broken as fault:
            faults.append(f"{folder.name}: {fault}")
            logger.warning("checkpoint %s can't be used: %s; trying the one before it", folder, fault)
    if faults:
        raise ValueError(f"no checkpoint in {checkpoints} can be used: {'; '.join(faults)}")
    raise ValueError(f"{path} holds no checkpoint; give a run folder, or one of its checkpoints/step-XXXXXXXX")
