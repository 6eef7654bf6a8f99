"""Gradients across ranks: those of what every rank holds whole are reduced, and the norm of all of them is taken."""

import torch
from torch import Tensor, nn

from nsphere.collectives import local, split_axes, sum_gradients_, sum_totals
from nsphere.train.distributed import AXES, World


@torch.no_grad()
def reduce_vectors_(model: nn.Module, world: World) -> None:
    """Complete the gradients of scales and norm weights, in place, once a step.

    FSDP leaves them alone: each rank has those of its own data, to be averaged. Under tensor parallelism a vector that
    is not split has been used by each rank for its own heads, words or positions: those parts are summed.
    """
    if world.mesh is None:
        return
    vectors = [p for p in model.parameters() if p.dim() < 2 and p.grad is not None]
    if world.tp > 1:
        whole = [local(p.grad) for p in vectors if p.grad is not None and "tp" not in split_axes(p)]
        sum_gradients_(whole, world.mesh.get_group("tp"))
    for axis in ("dp_replicate", "dp_shard"):
        group = world.mesh.get_group(axis)
        if group.size() > 1:
            sum_gradients_([local(p.grad) for p in vectors if p.grad is not None], group, average=True)


@torch.no_grad()
def global_norm(model: nn.Module, world: World) -> Tensor:
    """The norm of all gradients of the job together, the same on every rank, whatever each is split along."""
    held = [p for p in model.parameters() if p.grad is not None]
    if world.mesh is not None:
        held = [p for p in held if _counts_here(p, world)]
    norm = torch.nn.utils.get_total_norm([local(p.grad) for p in held if p.grad is not None])
    if world.mesh is None:
        return norm
    return sum_totals(norm.to(world.device).double() ** 2).sqrt().float()


def _counts_here(p: nn.Parameter, world: World) -> bool:
    """Whether this rank is the one of those that hold the same part which adds it to the norm: the first."""
    assert world.mesh is not None
    split = split_axes(p)
    return all(axis in split or world.mesh.get_local_rank(axis) == 0 for axis in AXES)


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float, world: World) -> Tensor:
    """Scale all gradients together to a global norm of at most `max_norm` (0: leave them); their norm before."""
    norm = global_norm(model, world)
    if max_norm > 0:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([local(p.grad) for p in model.parameters() if p.grad is not None], factor)
    return norm
