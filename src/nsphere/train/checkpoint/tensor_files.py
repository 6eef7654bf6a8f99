"""Tensors in safetensors files, through torch's distributed checkpointing (DCP) and its Hugging Face storage.

Each rank writes the shards that it holds into a file of its own, and reads what its shards need from whichever
files have it; so what one layout wrote, any other can read. Nothing is pickled: DCP's own metadata would be, and
the Hugging Face storage has none; shapes and offsets stand in the headers of the safetensors files.
"""

import os
import re
import warnings
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from nsphere.collectives import local
from nsphere.train.ranks import Ranks


class Unreadable(ValueError):
    """A file that is not what `write` makes."""


@torch.no_grad()
def snapshot(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """This rank's shards in CPU memory of their own, contiguous; training may go on to change the originals."""
    return {
        name: torch.empty(local(t).shape, dtype=t.dtype, device="cpu").copy_(local(t)) for name, t in tensors.items()
    }


class _FromSnapshot(DefaultSavePlanner):
    """Plans by the live tensors, of which it looks at shapes and placements only, and writes their snapshot."""

    def __init__(self, shards: dict[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.shards = shards

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.shards[index.fqn]


def write(folder: Path, tensors: dict[str, Tensor], shards: dict[str, Tensor], ranks: Ranks) -> None:
    """Write this rank's shards into a folder; what several ranks hold is written by one of them. Collective.

    Args:
        folder: exists, is empty, and is seen by all ranks.
        tensors: the live ones, the same names on all ranks.
        shards: their `snapshot`.
        ranks: all that hold a part.

    Raises:
        OSError: it can't be written.
    """
    if not tensors:
        return
    _expect_no_group(ranks)
    try:
        dcp.save(
            tensors,
            storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
            planner=_FromSnapshot(shards),
            process_group=ranks.group,
            no_dist=ranks.group is None,
        )
    except CheckpointException as failed:
        raise _cause(failed, ranks) from None


def written_by(rank: int, folder: Path) -> list[Path]:
    """The files of a rank in a folder that `write` has written."""
    return sorted(folder.glob(f"shard-{rank + 1:05d}-*.safetensors"))


def describe(folder: Path) -> dict[str, Tensor]:
    """The tensors in a folder by name, whole, on the meta device: shapes and dtypes.

    Raises:
        Unreadable: a file is not safetensors, or the files hold only a part of a tensor.
    """
    found = {}
    for name, stored in _metadata(folder).items():
        if sum(prod(chunk.sizes) for chunk in stored.chunks) != prod(stored.size):
            raise Unreadable(f"{folder.name} holds {name} in part only")
        found[name] = torch.empty(stored.size, dtype=stored.properties.dtype, device="meta")
    return found


def _metadata(folder: Path) -> dict[str, TensorStorageMetadata]:
    try:
        return HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata  # type: ignore[return-value]
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise Unreadable(f"{_first_unreadable(folder)} is not a readable safetensors file ({error})") from error


def _first_unreadable(folder: Path) -> str:
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                file.keys()
        except SafetensorError:
            return f"{folder.name}/{path.name}"
    return folder.name


def read_into(folder: Path, targets: dict[str, Tensor]) -> None:
    """Copy stored tensors into live ones, of whatever layout, on whatever device; each rank by itself.

    Shapes and dtypes must have been compared with `describe` before: a copy would convert.
    """
    if not targets:
        return
    _expect_no_group(None)
    try:
        dcp.load(
            {name: target.detach() for name, target in targets.items()},
            storage_reader=HuggingFaceStorageReader(str(folder)),
            planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            no_dist=True,
        )
    except CheckpointException as failed:
        raise _cause(failed, None) from None


def read_whole(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder, whole, on the CPU."""
    targets = {name: torch.empty_like(t, device="cpu") for name, t in describe(folder).items()}
    read_into(folder, targets)
    return targets


def _expect_no_group(ranks: Ranks | None) -> None:
    """DCP warns of what is meant here: that a process saves or reads by itself."""
    if ranks is None or ranks.group is None:
        # for good, because what saves in the background must not restore filters under the main thread's feet
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


def _cause(failed: CheckpointException, ranks: Ranks | None) -> Exception:
    """The error of the lowest rank that failed."""
    rank, (error, _) = min(failed.failures.items(), key=lambda failure: failure[0])
    where = f" (rank {rank})" if ranks is not None and ranks.size > 1 else ""
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, SafetensorError) and (told := re.search(r"os error (\d+)", str(error))):
        number = int(told[1])
    if number is not None:
        return OSError(number, os.strerror(number) + where)
    return RuntimeError(f"{type(error).__name__}: {error}{where}")
