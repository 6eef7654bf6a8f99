"""Loading: which checkpoint is sound, and its bits into a model and its optimizers."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nsphere.train.checkpoint import optimizer_state, tensor_files
from nsphere.train.checkpoint.folders import by_step, clean_if_unused
from nsphere.train.checkpoint.manifest import (
    MANIFEST_FILE,
    MODEL_FOLDER,
    OPTIMIZER_FOLDER,
    PARTS,
    STATE_FILE,
    STEP_FOLDER,
    Broken,
    verify,
)
from nsphere.train.checkpoint.optimizer_state import as_list
from nsphere.train.checkpoint.tensor_files import Unreadable
from nsphere.train.model_state import Mismatch, check_fit, live_tensors
from nsphere.train.ranks import ALONE, Ranks

logger = logging.getLogger(__name__)


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
        stored = {part: tensor_files.describe(folder / part) for part in PARTS}
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


def _none_usable(checkpoints: Path, faults: list[str]) -> ValueError:
    return ValueError(f"no checkpoint in {checkpoints} can be used: {'; '.join(faults)}")
