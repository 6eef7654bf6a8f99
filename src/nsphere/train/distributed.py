"""The ranks of a job: how they are arranged, who this one is, and what they decide together.

A job is started by `torchrun`, one process (rank) per device. The ranks form a mesh of three axes:

    dp_replicate   copies of the model, each on data of its own
    dp_shard       the model's matrices and optimizer state split among ranks, each on data of its own (FSDP)
    tp             every layer's heads and hidden units split among ranks that work on the same data

One process without torchrun is a world of one, with the same methods.
"""

import contextlib
import os
import secrets
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nsphere.collectives import sum_totals
from nsphere.train.machine import choose_device
from nsphere.train.ranks import ALONE, LostRank, Ranks, is_communication_error

AXES = ("dp_replicate", "dp_shard", "tp")


@dataclass(frozen=True)
class Layout:
    """How the ranks of a job started by torchrun are arranged: dp_replicate × dp_shard × tp of them."""

    dp_replicate: int = 1
    """Copies of the model, each on data of its own."""
    dp_shard: int | None = None
    """Ranks that split the matrices and the optimizer's state, each on data of its own; what is left if not given."""
    tp: int = 1
    """Ranks that split every layer's heads and hidden units, and work on the same data."""
    timeout: float = 600.0
    """Seconds that a rank waits for the others before it gives up and ends the job."""
    activation_checkpointing: bool = False
    """Keep only each block's input for the backward pass and compute the rest again."""

    def __post_init__(self) -> None:
        for name in AXES:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 < self.timeout < float("inf"):
            raise ValueError(f"timeout must be a positive number of seconds, got {self.timeout:g}")

    def resolve(self, world_size: int) -> "Layout":
        """The layout with `dp_shard` filled in.

        Raises:
            ValueError: it does not make up `world_size` ranks.
        """
        others = self.dp_replicate * self.tp
        shard = self.dp_shard if self.dp_shard is not None else max(1, world_size // others)
        if others * shard != world_size:
            ranks = f"torchrun started {world_size} ranks" if world_size > 1 else "this is one process"
            raise ValueError(
                f"dp_replicate {self.dp_replicate} x dp_shard {shard} x tp {self.tp} is {others * shard} ranks and "
                f"{ranks}; start torchrun --nproc-per-node {others * shard} -m nsphere, or change the layout"
            )
        return replace(self, dp_shard=shard)

    def describe(self) -> str:
        """The mesh in words."""
        return " x ".join(f"{name} {getattr(self, name) or 1}" for name in AXES)


class World(Ranks):
    """The ranks of this job, how they are arranged, and this one's place among them.

    Args:
        layout: resolved.
        device: of this rank.
        mesh: of the axes dp_replicate, dp_shard and tp; None for one process.
        group: that decisions travel through: gloo, so that they need no accelerator's stream.
        beside: the same ranks in a group of its own, whose messages can't meet the training's: for what is done
            beside it, such as writing a checkpoint.
    """

    def __init__(
        self,
        layout: Layout,
        device: torch.device,
        mesh: DeviceMesh | None = None,
        group: dist.ProcessGroup | None = None,
        beside: Ranks = ALONE,
    ) -> None:
        super().__init__(group)
        self.layout, self.device, self.mesh, self.beside = layout, device, mesh, beside
        self.tp = layout.tp
        self.dp = layout.dp_replicate * (layout.dp_shard or 1)
        # ranks are numbered with tp fastest, so that the ranks of a tp group are neighbours on one node
        self.dp_rank, self.tp_rank = divmod(self.rank, self.tp)

    def sum(self, numbers: Tensor) -> Tensor:
        """Numbers on the CPU, summed over all ranks."""
        return numbers if self.mesh is None else sum_totals(numbers, self.group)

    def mean_loss(self, loss: Tensor) -> Tensor:
        """The loss of the global batch, from the loss of each data-parallel rank's equal part."""
        if self.mesh is None:
            return loss
        return sum_totals(loss.double() / self.dp * (self.tp_rank == 0))

    def describe(self) -> str:
        """The mesh, its backend and this rank's device, for the start of a run."""
        if self.mesh is None:
            return "one process"
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        checkpointing = ", activation checkpointing" if self.layout.activation_checkpointing else ""
        return (
            f"{self.size} ranks, {self.layout.describe()} ({backend}, timeout {self.layout.timeout:g} s{checkpointing})"
        )


def launched_world_size() -> int:
    """How many ranks torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """The number that torchrun gave this process; 0 without it."""
    return int(os.environ.get("RANK", "0"))


@contextlib.contextmanager
def start(layout: Layout, device_name: str = "auto") -> Iterator[World]:
    """Join the job that torchrun started, for the time of the context; a world of one without torchrun.

    A process group that is there already is used and left.

    Args:
        layout: how the ranks are arranged.
        device_name: auto, cpu, cuda or cuda:N; under torchrun each rank takes the GPU of its local rank.

    Raises:
        ValueError: the layout does not fit the number of ranks, or no such device.
        LostRank: not all of them came within the layout's timeout.
    """
    size = launched_world_size()
    layout = layout.resolve(size)
    device = choose_device(device_name)
    if size == 1:
        yield World(layout, device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    joined = dist.is_initialized()
    try:
        yield _arrive(layout, device, joined)
    finally:
        if not joined and dist.is_initialized():
            dist.destroy_process_group()


def _arrive(layout: Layout, device: torch.device, joined: bool) -> World:
    """Meet the other ranks, unless the process group is there, and arrange them."""
    wait = timedelta(seconds=layout.timeout)
    try:
        if not joined:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                timeout=wait,
                device_id=device if device.type == "cuda" else None,
                store=_store(wait),
                rank=launched_rank(),
                world_size=launched_world_size(),
            )
        shape = (layout.dp_replicate, layout.dp_shard or 1, layout.tp)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=AXES)
        for axis in AXES:
            _set_timeout(wait, mesh.get_group(axis))
        decisions, beside = (dist.new_group(backend="gloo", timeout=wait) for _ in range(2))
    except RuntimeError as error:
        if not is_communication_error(error):
            raise
        reason = str(error).partition("\n")[0]
        raise LostRank(f"{_late('a rank', launched_world_size(), wait)} ({reason})") from error
    return World(layout, device, mesh, decisions, Ranks(beside))


def _late(who: str, size: int, wait: timedelta) -> str:
    return f"{who} of {size} did not come within {wait.total_seconds():g} s; start the job again"


def _store(wait: timedelta) -> dist.Store:
    """The job's store, without what the ranks of an earlier start left in it."""
    store, _, _ = next(dist.rendezvous("env://", timeout=wait))
    return dist.PrefixStore(name_of_this_start(store, launched_rank(), launched_world_size(), wait), store)


def name_of_this_start(store: dist.Store, rank: int, size: int, wait: timedelta) -> str:
    """A name that all ranks of this start of the job agree on, and that no earlier start had.

    torchrun keeps one store over its restarts, on which gloo would read the addresses of ranks that are gone, and the
    nodes of a job don't number their restarts alike. So rank 0 calls with a word just made up; each rank answers that
    call with a word of its own, and begins when it finds this confirmed: neither end can be from before.

    Raises:
        LostRank: not all came in time; rank 0 knows which.
    """
    mine, end = secrets.token_hex(8), time.monotonic() + wait.total_seconds()

    def read(key: str) -> str:
        return store.get(f"nsphere/{key}").decode() if store.check([f"nsphere/{key}"]) else ""

    if rank > 0:
        answered = ""
        while not (name := read(f"begin/{mine}")):
            if time.monotonic() > end:
                raise LostRank(_late("a rank", size, wait))
            if (call := read("call")) != answered:
                store.set(f"nsphere/answer/{rank}", f"{call} {mine}")
                answered = call
            time.sleep(0.05)
        return name
    store.set("nsphere/call", mine)
    words: dict[int, str] = {}
    while missing := [other for other in range(1, size) if other not in words]:
        if time.monotonic() > end:
            raise LostRank(_late(f"rank {', '.join(map(str, missing))}", size, wait))
        for other in missing:
            call, _, word = read(f"answer/{other}").partition(" ")
            if call == mine:
                words[other] = word
        time.sleep(0.05)
    for word in words.values():
        store.set(f"nsphere/begin/{word}", mine)
    return mine


def _set_timeout(wait: timedelta, group: Any) -> None:
    """Groups of a mesh take the backend's default of up to 30 minutes otherwise."""
    from torch.distributed import distributed_c10d

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the world of a backend that has no time-out to set
        distributed_c10d._set_pg_timeout(wait, group)
