"""The few reductions that sharded norms, gradients and losses need, each one function with the gradient it has.

Every sum over ranks that the numbers depend on is here and has one name, so that a test can leave any of them out
and see that it is missed. Those that are used inside a model are traced by torch.compile.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

Group: TypeAlias = Any
"""A torch.distributed.ProcessGroup."""

Tensors: TypeAlias = list[list[Tensor]]
"""For each rank some tensors."""


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, in the same memory; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def split_axes(tensor: Any, dim: int | None = None) -> dict[str, Group]:
    """The mesh axes that split a DTensor (along `dim`, if given), by name; none for any other tensor."""
    if not hasattr(tensor, "device_mesh"):
        return {}
    mesh = tensor.device_mesh
    names = mesh.mesh_dim_names or tuple(map(str, range(mesh.ndim)))
    # a strided shard, which FSDP makes on top of tensor parallelism, is no Shard, but has a dim
    split = [getattr(placement, "dim", None) for placement in tensor.placements]
    return {
        name: mesh.get_group(i)
        for i, name in enumerate(names)
        if split[i] is not None and dim in (None, split[i]) and mesh.size(i) > 1
    }


# The functional forms of the collectives, which the compiler traces. What wraps them in Python changes its names.
_ops = torch.ops._c10d_functional


def _all_reduce(x: Tensor, op: str, group: Group) -> Tensor:
    return _ops.wait_tensor(_ops.all_reduce(x.contiguous(), op, group.group_name))


def _gather(x: Tensor, group: Group) -> Tensor:
    """[B, T/ranks, …] → [B, T, …]."""
    ranks = group.size()
    parts = _ops.wait_tensor(_ops.all_gather_into_tensor(x.contiguous(), ranks, group.group_name))
    return parts.unflatten(0, (ranks, -1)).transpose(0, 1).flatten(1, 2)


def _reduce_scatter(x: Tensor, group: Group) -> Tensor:
    """[B, T, …], summed over ranks → this rank's [B, T/ranks, …]."""
    ranks = group.size()
    parts = x.unflatten(1, (ranks, -1)).transpose(0, 1).flatten(0, 1)
    return _ops.wait_tensor(_ops.reduce_scatter_tensor(parts.contiguous(), "sum", ranks, group.group_name))


class _SumStatistic(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _all_reduce(x, "sum", group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # every rank's result depends on the sum, so every rank's gradient of it counts
        return _all_reduce(grad, "sum", ctx.group), None


def sum_statistic(x: Tensor, group: Group) -> Tensor:
    """The sum over ranks of a norm's statistic; its gradient is summed over ranks too."""
    return _SumStatistic.apply(x, group)


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, "sum", ctx.group), None


def sum_gradient(weight: Tensor, group: Group) -> Tensor:
    """The weight itself; its gradient is summed over ranks, each of which used a part of it or for a part."""
    return _SumGradient.apply(weight, group)


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(grad, ctx.group), None


def gather_sequence(x: Tensor, group: Group) -> Tensor:
    """[B, T/ranks, …] → [B, T, …]; every rank gives a part of the gradient, and they are summed."""
    return _GatherSequence.apply(x, group)


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gather(grad, ctx.group), None


def scatter_sum(x: Tensor, group: Group) -> Tensor:
    """[B, T, …], a part of a sum on every rank → [B, T/ranks, …], this rank's positions of the sum."""
    return _ScatterSum.apply(x, group)


def largest_logit(x: Tensor, group: Group) -> Tensor:
    """The elementwise maximum over ranks; no gradient."""
    return _all_reduce(x, "max", group)


def sum_over_words(x: Tensor, group: Group) -> Tensor:
    """The softmax's sums over the words that all ranks hold; no gradient."""
    return _all_reduce(x, "sum", group)


def sum_squares_(partial: Tensor, groups: Sequence[Group]) -> None:
    """Partial sums of squares of split rows or columns, completed in place: the projection's one reduction."""
    for group in groups:
        dist.all_reduce(partial, group=group)


def sum_totals(totals: Tensor, group: Group = None) -> Tensor:
    """Shares of a loss or a squared gradient norm, summed over all ranks of the job (or of a group)."""
    total = totals.clone()
    dist.all_reduce(total, group=group)
    return total


def sum_gradients_(gradients: Sequence[Tensor], group: Group, average: bool = False) -> None:
    """Gradients summed (or averaged) over ranks in place, in fp32 and one message: those of what is small and whole.

    These are the learned scales and norm weights: too small to be worth splitting, kept on every rank.
    """
    if not gradients:
        return
    flat = torch.cat([g.detach().flatten().float() for g in gradients])
    dist.all_reduce(flat, group=group)
    if average:
        flat /= dist.get_world_size(group)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def exchange(
    sent: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[Sequence[int]]], group: Group, like: Tensor
) -> Tensors:
    """What every rank sends to this one, where each sends some tensors to each, in one all-to-all.

    Args:
        sent: for each rank what goes to it.
        shapes: for each rank the shapes of what comes from it.
        group: the ranks.
        like: a tensor of the dtype and device of all that is sent.

    Returns:
        For each rank the tensors that came from it.
    """
    out = torch.cat([like.new_empty(0), *(t.flatten() for to_rank in sent for t in to_rank)])
    sizes = [[prod(shape) for shape in from_rank] for from_rank in shapes]
    come = out.new_empty(sum(map(sum, sizes)))
    leave = [sum(t.numel() for t in to_rank) for to_rank in sent]
    dist.all_to_all_single(come, out, [sum(numbers) for numbers in sizes], leave, group=group)
    parts = iter(come.split([n for numbers in sizes for n in numbers]))
    return [[next(parts).view(*shape) for shape in from_rank] for from_rank in shapes]
