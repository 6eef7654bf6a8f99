"""Muon for matrices that FSDP has split: each is put together on one rank, orthogonalised there, and sent back."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nsphere.collectives import Group, exchange, local, split_axes


class ShardedMuon(torch.optim.Muon):
    """`torch.optim.Muon` of DTensors, with its arithmetic: Newton-Schulz needs whole matrices, and the rest does not.

    The ranks of a shard group share out the matrices by what they cost. Every step sends each rank's part of each
    update to the matrix's owner and the result's parts back, all matrices in one all-to-all there and one back, in
    bf16, to which Newton-Schulz rounds anyway. Its momentum is split like the weights, and a checkpoint of either
    class goes on in the other. A step size of `match_rms_adamw` is meant.

    Args:
        params: matrices, as for torch.optim.Muon; DTensors split along at most one axis of their mesh.
        **options: torch.optim.Muon's.

    Source: Muon, Keller Jordan, 2024; step size: arXiv 2502.16982.
    """

    saved_as = "Muon"

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure`, if given, computes the loss again, which is then returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            assert group["adjust_lr_fn"] == "match_rms_adamw"
            held = [p for p in group["params"] if p.grad is not None]
            directions = orthogonalized(held, [self._update(p, group) for p in held])
            for p, direction in zip(held, directions, strict=True):
                weight = local(p)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(direction, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape)))
        return loss

    def _update(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """This rank's part of what is to be orthogonalised: Nesterov's momentum."""
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p.grad)
        grad, momentum = local(p.grad), local(state["momentum_buffer"])
        momentum.lerp_(grad, 1 - group["momentum"])
        return grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum


def orthogonalized(like: list[Tensor], parts: list[Tensor]) -> list[Tensor]:
    """This rank's parts of the orthogonalised matrices, in bf16.

    Args:
        like: DTensors of the matrices' shapes and placements, or plain tensors, which are whole.
        parts: this rank's part of each matrix.
    """
    parts = [part.bfloat16() for part in parts]
    split = [split_axes(tensor) for tensor in like]
    done = [part if axes else newton_schulz(part) for part, axes in zip(parts, split, strict=True)]
    ours = [i for i, axes in enumerate(split) if axes]
    if not ours:
        return done
    assert all(list(split[i]) == list(split[ours[0]]) and len(split[i]) == 1 for i in ours)
    (group,) = split[ours[0]].values()
    dims = [next(d for d in (0, 1) if split_axes(like[i], d)) for i in ours]
    deal = _Deal([like[i].shape for i in ours], dims, group)
    mine = [newton_schulz(matrix) for matrix in deal.to_owners([parts[i] for i in ours])]
    for i, part in zip(ours, deal.from_owners(mine, like=parts[0]), strict=True):
        done[i] = part
    return done


class _Deal:
    """Matrices of which every rank has a part, each of them put together on one rank.

    Args:
        shapes: of the whole matrices.
        dims: the dim that each is split along, as torch.chunk does.
        group: the ranks.
    """

    def __init__(self, shapes: list[torch.Size], dims: list[int], group: Group) -> None:
        self.shapes, self.dims, self.group, self.ranks = shapes, dims, group, range(group.size())
        self.owner = owners(shapes, group.size())

    def of(self, owner: int) -> list[int]:
        """The matrices that a rank puts together."""
        return [i for i, rank in enumerate(self.owner) if rank == owner]

    def part_shape(self, i: int, rank: int) -> list[int]:
        """The shape of a rank's part of matrix i."""
        shape, dim = list(self.shapes[i]), self.dims[i]
        most = -(-shape[dim] // len(self.ranks))
        shape[dim] = max(0, min(most, shape[dim] - rank * most))
        return shape

    def to_owners(self, parts: list[Tensor]) -> list[Tensor]:
        """From this rank's part of every matrix the matrices that are its own, whole."""
        own, me = self.of(self.group.rank()), self.group.rank()
        sent = [[parts[i] for i in self.of(rank)] for rank in self.ranks]
        assert all(list(part.shape) == self.part_shape(i, me) for i, part in enumerate(parts))
        shapes = [[self.part_shape(i, rank) for i in own] for rank in self.ranks]
        received = exchange(sent, shapes, self.group, like=parts[0])
        return [torch.cat([received[rank][j] for rank in self.ranks], self.dims[i]) for j, i in enumerate(own)]

    def from_owners(self, matrices: list[Tensor], like: Tensor) -> list[Tensor]:
        """From the matrices that are this rank's own its part of every matrix."""
        me = self.group.rank()
        cuts = []
        for i, matrix in zip(self.of(me), matrices, strict=True):
            cuts.append(matrix.split([self.part_shape(i, rank)[self.dims[i]] for rank in self.ranks], self.dims[i]))
        sent = [[cut[rank] for cut in cuts] for rank in self.ranks]
        shapes = [[self.part_shape(i, me) for i in self.of(rank)] for rank in self.ranks]
        received = exchange(sent, shapes, self.group, like)
        by_matrix = {i: part for rank in self.ranks for i, part in zip(self.of(rank), received[rank], strict=True)}
        return [by_matrix[i] for i in range(len(self.shapes))]


def newton_schulz(matrix: Tensor) -> Tensor:
    """A bf16 matrix with its singular values brought near 1, by torch's own Muon.

    That is what a step of size 1 from zero, without momentum and decay, takes away.
    """
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix  # of a tall one Muon would change the step size
    direction = torch.nn.Parameter(torch.zeros_like(wide, memory_format=torch.contiguous_format))
    direction.grad = wide
    torch.optim.Muon([direction], lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.0).step()
    negative = direction.detach().neg_()
    return negative.T if wide is not matrix else negative


def owners(shapes: list[torch.Size], num_ranks: int) -> list[int]:
    """Which rank orthogonalises each matrix: the costly ones first, each to who has least to do."""
    costs = [min(shape) ** 2 * max(shape) for shape in shapes]
    busy, owner = [0] * num_ranks, [0] * len(shapes)
    for i in sorted(range(len(shapes)), key=lambda i: -costs[i]):
        owner[i] = busy.index(min(busy))
        busy[owner[i]] += costs[i]
    return owner
