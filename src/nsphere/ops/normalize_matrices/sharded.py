"""The projection of matrices whose unit vectors are split among ranks: one batched all-reduce, never a gather."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nsphere.collectives import Group, local, split_axes, sum_squares_


@torch.no_grad()
def normalize_matrices_(matrices: Sequence[tuple[Tensor, int]]) -> None:
    """See `nsphere.ops.normalize_matrices`; every matrix is a DTensor that is split along its dim."""
    alike: dict[tuple[str, ...], tuple[list[Group], list[tuple[Tensor, int]]]] = {}
    for w, dim in matrices:
        axes = split_axes(w, dim)
        alike.setdefault(tuple(axes), (list(axes.values()), []))[1].append((local(w), dim))
    for groups, parts in alike.values():
        wide = [w.to(torch.promote_types(w.dtype, torch.float32)) for w, _ in parts]
        squares = [(w * w).sum(dim) for w, (_, dim) in zip(wide, parts, strict=True)]
        together = torch.cat(squares)
        sum_squares_(together, groups)
        for (w, dim), square in zip(parts, together.split([s.numel() for s in squares]), strict=True):
            norm = square.sqrt().unsqueeze(dim)
            w.div_(torch.where(norm > 0, norm, 1.0))


def norms(w: Any, dim: int) -> Tensor:
    """The lengths of a DTensor matrix's vectors along `dim`, in fp64, all of them on every rank.

    Args:
        w: DTensor [n, m].
        dim: 0 or 1, the one that is reduced.

    Returns:
        [m] or [n], the same on every rank.
    """
    from torch.distributed.tensor import DTensor  # which takes a second to import, and is loaded where one exists

    part = local(w)
    squares = (part.double() ** 2).sum(dim)
    sum_squares_(squares, list(split_axes(w, dim).values()))
    # a placement along the other dim stands; along the reduced one the sum has made the parts whole
    placements = [_of_vector(placement, dim) for placement in w.placements]
    shape = torch.Size([w.shape[1 - dim]])
    vector = DTensor.from_local(squares, w.device_mesh, placements, run_check=False, shape=shape, stride=(1,))
    return vector.full_tensor().sqrt()


def _of_vector(placement: Any, dim: int) -> Any:
    """How a matrix's placement splits the vector that is left of it when `dim` is reduced."""
    from torch.distributed.tensor import Replicate, Shard

    at = getattr(placement, "dim", None)
    if at is None or at == dim:
        return Replicate()
    factor = getattr(placement, "split_factor", None)
    return Shard(0) if factor is None else type(placement)(0, split_factor=factor)
