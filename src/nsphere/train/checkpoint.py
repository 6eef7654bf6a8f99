"""Checkpoints: a folder that is complete or does not exist, and from which nothing is unpickled.

    RUN/checkpoints/step-00000600/
        model/shard-00001-….safetensors      parameters and persistent buffers under canonical names, tied ones once
        optimizer/shard-00001-….safetensors  state.<parameter name>.<key>, all optimizers together
        state.json                           step, the caller's state, tied names, optimizers' groups and numbers
        manifest.json                        size and sha256 of all the others, and its own sha256; written last

One file a rank and folder; a process by itself has one of each. Everything is written into a hidden folder beside
the others and flushed to the disk; one rename then makes it a checkpoint. Any number of ranks, in any layout, can
load it. See docs/checkpoints.md.
"""

import json
import logging
import shutil
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nsphere.train import optimizer_state, tensor_files
from nsphere.train.checkpoint_folders import (
    by_step,
    clean,
    clean_if_unused,
    final_folder,
    is_complete,
    keep,
    publish,
    temporary_folder,
    under_way,
)
from nsphere.train.files import RunLock, atomic_write_text, fsync_folder
from nsphere.train.manifest import (
    MANIFEST_FILE,
    MODEL_FOLDER,
    OPTIMIZER_FOLDER,
    STATE_FILE,
    STEP_FOLDER,
    Broken,
    entry,
    verify,
    write_manifest,
)
from nsphere.train.model_state import Mismatch, check_fit, live_tensors, tied_names
from nsphere.train.optimizer_state import as_list
from nsphere.train.ranks import ALONE, Ranks
from nsphere.train.tensor_files import Unreadable

logger = logging.getLogger(__name__)

_PARTS = (MODEL_FOLDER, OPTIMIZER_FOLDER)


def _none_usable(checkpoints: Path, faults: list[str]) -> ValueError:
    return ValueError(f"no checkpoint in {checkpoints} can be used: {'; '.join(faults)}")


def latest_checkpoint(run_folder: Path | str) -> Path | None:
    """The newest checkpoint of a run whose files are all there with the right sizes; None if it has no checkpoint.

    Contents are verified by `load_checkpoint`; give that the run folder if it may fall back on an older one.

    Raises:
        ValueError: there are checkpoints and all are incomplete (each is named), or the newest is of another
            schema: starting over would lose what can perhaps be saved.
    """
    checkpoints = Path(run_folder) / "checkpoints"
    clean_if_unused(checkpoints)
    faults = []
    for _, folder in by_step(checkpoints):
        try:
            verify(folder, hashes=False)
            return folder
        except Broken as fault:
            faults.append(f"{folder.name}: {fault}")
    if faults:
        raise _none_usable(checkpoints, faults)
    return None


def _not_written(folder: Path, step: int, error: OSError) -> OSError:
    """The error of a failed save: why, what is left, and what to do."""
    last = next((path for _, path in by_step(folder / "checkpoints") if is_complete(path)), None)
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


class _Save:
    """A training state as it was when this was made, and how it gets to the disk. Each rank has its part."""

    def __init__(
        self,
        folder: Path,
        step: int,
        model: nn.Module,
        optimizers: list[Optimizer],
        state: dict[str, Any],
        keep_last: int,
        keep_every: int | None,
        ranks: Ranks,
    ) -> None:
        if step < 0 or keep_last < 1 or (keep_every is not None and keep_every < 1):
            raise ValueError(
                f"step must be >= 0, keep_last and keep_every >= 1; got {step}, {keep_last} and {keep_every}"
            )
        self.folder, self.step, self.ranks = folder, step, ranks
        self.keep_last, self.keep_every = keep_last, keep_every
        live = live_tensors(model)
        tied = tied_names(live)
        moments, contents = optimizer_state.collect(model, optimizers)
        content = {"step": step, "state": state, "tied": tied, "optimizers": contents}
        try:
            self.state_text = json.dumps(content, indent=1)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"the state to save is not JSON ({error}); give numbers, strings, lists and dicts"
            ) from None
        self.tensors = {
            MODEL_FOLDER: {n: t for n, (_, t) in live.items() if n not in tied},
            OPTIMIZER_FOLDER: moments,
        }
        self.shards = {part: tensor_files.snapshot(tensors) for part, tensors in self.tensors.items()}
        self.checkpoints = folder / "checkpoints"
        self.final = final_folder(self.checkpoints, step)
        self.temporary = temporary_folder(self.checkpoints, step)

    def write(self) -> Path:
        """Write it. Collective; touches neither the model nor a device, so that it may run beside the training."""
        ranks = self.ranks
        try:
            with ExitStack() as held:
                ranks.first(lambda: self._begin(held))
                try:
                    ranks.all(self._see)
                    for part in _PARTS:
                        tensor_files.write(self.temporary / part, self.tensors[part], self.shards[part], ranks)
                    entries = ranks.all(self._own_entries)
                    ranks.first(lambda: self._complete(entries))
                except BaseException:
                    if ranks.is_first:
                        clean(self.checkpoints)
                    raise
                if ranks.is_first:
                    keep(self.checkpoints, self.step, self.keep_last, self.keep_every)
        except OSError as error:
            raise _not_written(self.folder, self.step, error) from error
        return self.final

    def _begin(self, held: ExitStack) -> None:
        if not RunLock.is_held_here(self.folder):
            held.enter_context(RunLock(self.folder))
        under_way.add(self.checkpoints)
        held.callback(under_way.discard, self.checkpoints)
        clean(self.checkpoints)
        for part in _PARTS:
            (self.temporary / part).mkdir(parents=True)
        fsync_folder(self.folder)

    def _see(self) -> None:
        if not self.temporary.is_dir():
            raise OSError(
                f"rank {self.ranks.rank} does not see {self.temporary}, which rank 0 has made: "
                "the run folder must be on a file system that all ranks share"
            )

    def _own_entries(self) -> dict[str, dict[str, Any]]:
        # flushed here although DCP flushes too: it does so before Python's own buffer is empty
        return {
            f"{part}/{path.name}": entry(path)
            for part in _PARTS
            for path in tensor_files.written_by(self.ranks.rank, self.temporary / part)
        }

    def _complete(self, entries: list[dict[str, dict[str, Any]]]) -> None:
        state = self.temporary / STATE_FILE
        atomic_write_text(state, self.state_text)
        for part in _PARTS:
            fsync_folder(self.temporary / part)
        files = {name: told for mine in entries for name, told in mine.items()}
        write_manifest(self.temporary, self.step, files | {STATE_FILE: entry(state)})
        publish(self.temporary, self.final)


def save_checkpoint(
    folder: Path | str,
    *,
    step: int,
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None,
    state: dict[str, Any],
    keep_last: int = 2,
    keep_every: int | None = None,
    ranks: Ranks = ALONE,
) -> Path:
    """Save a training state as `folder/checkpoints/step-XXXXXXXX`.

    A kill at any moment leaves every checkpoint that was there, and the new one whole or not at all. One of the
    same step is replaced. Older ones beyond `keep_last` are removed once the new one is complete, so there must be
    room for one more, and in memory for two copies of what this rank holds. Takes the run folder's lock unless this
    process has it.

    Args:
        folder: the run folder; of several ranks the same, on a file system that they share.
        step: how many steps have been made; >= 0.
        model: may be compiled, sharded (DTensors) or wrapped in DDP; names are saved without that. Tied tensors are
            saved once.
        optimizer: one, several that share out the model's parameters, or None.
        state: whatever else a resume needs, as JSON can hold it (tuples come back as lists), the same on all ranks.
            "architecture" in it is what `load_checkpoint` compares.
        keep_last: how many complete checkpoints to keep; >= 1.
        keep_every: keep those of every so many steps besides, for good.
        ranks: who holds the model together; then all call this. This process alone if not given.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: an argument is not as above, or another job has the run folder.
        OSError: it could not be written; names the last good checkpoint, which is untouched.
    """
    return _Save(Path(folder), step, model, as_list(optimizer), state, keep_last, keep_every, ranks).write()


class CheckpointSaver:
    """Saves the checkpoints of a run, beside the training if asked.

    `save` takes a copy into CPU memory and returns; the copy is written in the background. At most one is on its
    way: a `save` that comes too early waits. What goes wrong is raised by the next call of any method.

    Args:
        folder: the run folder.
        keep_last: as for `save_checkpoint`.
        keep_every: as for `save_checkpoint`.
        background: False: `save` returns when all is on the disk.
        ranks: as for `save_checkpoint`; all ranks call `save` and `wait` at the same steps.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        keep_last: int = 2,
        keep_every: int | None = None,
        background: bool = True,
        ranks: Ranks = ALONE,
    ) -> None:
        self.folder, self.keep_last, self.keep_every = Path(folder), keep_last, keep_every
        self.background, self.ranks = background, ranks
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self, *, step: int, model: nn.Module, optimizer: Optimizer | Sequence[Optimizer] | None, state: dict[str, Any]
    ) -> None:
        """As `save_checkpoint`. Raises also what the save before it failed with."""
        self.wait()
        save = _Save(self.folder, step, model, as_list(optimizer), state, self.keep_last, self.keep_every, self.ranks)
        if not self.background:
            save.write()
            return
        self._thread = threading.Thread(target=self._carry_out, args=(save,), name=f"checkpoint of step {step}")
        self._thread.start()

    def _carry_out(self, save: _Save) -> None:
        try:
            save.write()
        except BaseException as error:
            self._error = error

    @property
    def has_failed(self) -> bool:
        """Whether `wait` is going to raise. Ranks may see it at different steps, and must agree before they call it."""
        return self._error is not None

    def wait(self) -> None:
        """Until nothing is on its way. Raises what it failed with, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def __enter__(self) -> "CheckpointSaver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except Exception as unsaved:
            if error is None:
                raise
            logger.warning("%s", unsaved)  # beside what ends the run anyway


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A verified checkpoint. Tensors are read from its files when they are asked for.

    Attributes:
        path: its folder.
        step: steps made when it was saved.
        state: what the caller gave to `save_checkpoint`.
        optimizer_groups: for each saved optimizer its class, groups (names and options) and numbers.
        tied: each tied name -> the name its tensor was saved under.
    """

    path: Path
    step: int
    state: dict[str, Any]
    optimizer_groups: list[dict[str, Any]]
    tied: dict[str, str]
    _stored: dict[str, dict[str, Tensor]] = field(repr=False)

    @cached_property
    def model_tensors(self) -> dict[str, Tensor]:
        """Canonical name -> the whole tensor, on the CPU; tied tensors under every name they had."""
        tensors = tensor_files.read_whole(self.path / MODEL_FOLDER)
        return tensors | {name: tensors[owner] for name, owner in self.tied.items()}

    @cached_property
    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The name "state.<parameter name>.<key>" -> the whole tensor, on the CPU."""
        return tensor_files.read_whole(self.path / OPTIMIZER_FOLDER)

    @torch.no_grad()
    def restore(
        self, model: nn.Module, optimizers: Optimizer | Sequence[Optimizer] | None = None, *, strict: bool = True
    ) -> Mismatch:
        """Copy the saved bits into a model and its optimizers; nothing is converted, projected or replaced.

        Everything is checked before anything is changed. Parameters keep their identity; gradients, requires_grad
        and hooks are left alone. An optimizer ends up with exactly the saved state and options (learning rate,
        betas, ...), except how it computes (fused, foreach, capturable), which stays its own. A rank reads what its
        shards need; the layout may be another than the saved one.

        Args:
            model: of the saved architecture, on any device, compiled, sharded or wrapped or not.
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
        stored = self._stored[MODEL_FOLDER]
        stored = stored | {name: stored[owner] for name, owner in self.tied.items()}
        try:
            mismatch = check_fit(live, stored, strict, self._same_bits)
            plans = []
            if optimizers is not None:
                plans = optimizer_state.plan(
                    model, as_list(optimizers), self._stored[OPTIMIZER_FOLDER], self.optimizer_groups, self.tied
                )
        except ValueError as error:
            raise ValueError(f"checkpoint {self.path} does not fit: {error}") from None
        targets: dict[str, Tensor] = {}
        again = []
        for name in (name for name in live if name in stored):
            tensor = live[name].tensor
            first = targets.setdefault(self.tied.get(name, name), tensor)
            if first is not tensor:
                again.append((tensor, first))
        tensor_files.read_into(self.path / MODEL_FOLDER, targets)
        for tensor, first in again:  # tied in the checkpoint, apart in the model
            tensor.copy_(first)
        tensor_files.read_into(self.path / OPTIMIZER_FOLDER, optimizer_state.carry_out(plans))
        return mismatch

    def _same_bits(self, a: str, b: str) -> bool:
        one, other = (self.model_tensors[name].flatten().view(torch.uint8) for name in (a, b))
        return torch.equal(one, other)


def _open(folder: Path, expect_architecture: str | None, ranks: Ranks) -> Checkpoint:
    """Verify a checkpoint and read what it says of itself.

    Raises as `verify`, and ValueError for another architecture.
    """
    verify(folder, hashes=True, ranks=ranks)
    try:
        content = json.loads((folder / STATE_FILE).read_bytes())
        step, state, tied, optimizers = (content[key] for key in ("step", "state", "tied", "optimizers"))
    except (ValueError, KeyError, TypeError) as error:
        raise Broken(f"{STATE_FILE} is not a checkpoint's ({error!r})") from error
    architecture = state.get("architecture")
    if expect_architecture is not None and architecture != expect_architecture:
        raise ValueError(
            f"checkpoint {folder} holds the architecture {architecture!r}, and {expect_architecture!r} was asked for; "
            "choose the same architecture, or another checkpoint"
        )
    try:
        stored = {part: tensor_files.describe(folder / part) for part in _PARTS}
    except Unreadable as error:
        raise Broken(str(error)) from error
    return Checkpoint(folder, step, state, optimizers, tied, stored)


def load_checkpoint(path: Path | str, *, expect_architecture: str | None = None, ranks: Ranks = ALONE) -> Checkpoint:
    """Find and verify a checkpoint.

    Args:
        path: one checkpoint's folder, which then must be sound; or a run folder, of which the newest sound one is
            taken: a broken one is warned of by name, and the one before it used.
        expect_architecture: what "architecture" in the saved state must be; None takes any.
        ranks: who loads it together: they share out the verifying, and agree on what they load. All call this.

    Returns:
        The checkpoint, whose `restore` fills a model. Nothing in it was unpickled.

    Raises:
        ValueError: there is none, none is sound (each is named with its fault), it is of another schema, or of
            another architecture.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; give a run folder, or one of its checkpoints/step-XXXXXXXX")
    checkpoints = path / "checkpoints"
    if STEP_FOLDER.fullmatch(path.name) or ((path / MANIFEST_FILE).exists() and not checkpoints.is_dir()):
        try:
            return _open(path, expect_architecture, ranks)
        except Broken as fault:
            raise ValueError(
                f"checkpoint {path} can't be used: {fault}; give the run folder to take the newest sound one"
            ) from fault
    ranks.first(lambda: clean_if_unused(checkpoints))
    faults = []
    for _, folder in ranks.first(lambda: by_step(checkpoints)):
        try:
            return _open(folder, expect_architecture, ranks)
        except Broken as fault:
            faults.append(f"{folder.name}: {fault}")
            if ranks.is_first:
                logger.warning("checkpoint %s can't be used: %s; trying the one before it", folder, fault)
    if faults:
        raise _none_usable(checkpoints, faults)
    raise ValueError(f"{path} holds no checkpoint; give a run folder, or one of its checkpoints/step-XXXXXXXX")
