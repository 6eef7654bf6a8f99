"""Saving: a training state as it is now, and how it gets to the disk."""

import json
import logging
import shutil
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn
from torch.optim import Optimizer

from nsphere.train.checkpoint import optimizer_state, tensor_files
from nsphere.train.checkpoint.folders import (
    by_step,
    clean,
    final_folder,
    is_complete,
    keep,
    publish,
    temporary_folder,
    under_way,
)
from nsphere.train.checkpoint.manifest import (
    MODEL_FOLDER,
    OPTIMIZER_FOLDER,
    PARTS,
    STATE_FILE,
    entry,
    write_manifest,
)
from nsphere.train.checkpoint.optimizer_state import as_list
from nsphere.train.files import RunLock, atomic_write_text, fsync_folder
from nsphere.train.model_state import live_tensors, tied_names
from nsphere.train.ranks import ALONE, Ranks

logger = logging.getLogger(__name__)


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
                    for part in PARTS:
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
        for part in PARTS:
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
            for part in PARTS
            for path in tensor_files.written_by(self.ranks.rank, self.temporary / part)
        }

    def _complete(self, entries: list[dict[str, dict[str, Any]]]) -> None:
        state = self.temporary / STATE_FILE
        atomic_write_text(state, self.state_text)
        for part in PARTS:
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
