"""The fused operations on DTensors: each rank runs the op on its own part, and nothing is sent.

A rule says which dims of the input may be split: those along which the op does not mix. What is learned is held whole
or split along with the input; where the ranks' parts of its gradient have to be summed the gradient comes out
`Partial`, and whoever reads it, sums. A placement that no rule covers is an error, never a silent gather.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor


def any_dtensor(tensors: Sequence[Any]) -> bool:
    """Whether one of these is a DTensor; without importing what a process without them never loads."""
    return any(hasattr(t, "placements") and hasattr(t, "device_mesh") for t in tensors)


def check(name: str, x: Any, allowed: Collection[int], what: str, like: Any = None) -> None:
    """Raises ValueError for an input that is no DTensor, or is placed as no rule covers.

    Args:
        name: of the tensor, for the message.
        x: the DTensor.
        allowed: the dims that may be split, not negative.
        what: why the others may not.
        like: a DTensor with whose placements these must agree.
    """
    from torch.distributed.tensor import DTensor

    if not isinstance(x, DTensor):
        raise ValueError(f"{name} is a plain tensor beside DTensors; give a DTensor (DTensor.from_local)")
    for placement in x.placements:
        dim = getattr(placement, "dim", None)
        if not placement.is_replicate() and (type(placement).__name__ != "Shard" or dim not in allowed):
            raise ValueError(
                f"{name} of shape {tuple(x.shape)} is placed as {tuple(x.placements)}; {what}, so only dims "
                f"{sorted(allowed)} may be split: redistribute it to Replicate() or to one of those"
            )
    if like is not None and (x.device_mesh != like.device_mesh or tuple(x.placements) != tuple(like.placements)):
        raise ValueError(
            f"{name} is placed as {tuple(x.placements)} and what it goes with as {tuple(like.placements)}; "
            "redistribute one of them, on one mesh"
        )


def split_along(x: Any, dim: int) -> bool:
    """Whether ranks share this dim of a DTensor."""
    return any(placement.is_shard(dim) for placement in x.placements)


def local_part(x: Any) -> Tensor:
    """This rank's part; its gradient is placed as the DTensor is."""
    return x.to_local(grad_placements=x.placements)


def local_factor(w: Any, x: Any, missing: int) -> Tensor | None:
    """This rank's part of something that broadcasts against x.

    Args:
        w: a DTensor or a plain tensor that every rank holds whole, or None. Its dims are x's last ones, those of size
            1 being stretched.
        x: a DTensor that `check` has passed.
        missing: how many of x's dims come before w's first.

    Returns:
        The part that goes with x's. Where x is split along a dim that w does not have, or along one of which it has
        but one, every rank gets the whole, and the gradient is a sum over ranks.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    if w is None:
        return None
    wanted: list[Any] = []
    gradient: list[Any] = []
    for placement in x.placements:
        dim = placement.dim - missing if isinstance(placement, Shard) else -1
        along = dim >= 0 and w.shape[dim] > 1
        wanted.append(Shard(dim) if along else Replicate())
        gradient.append(Shard(dim) if along else Partial() if isinstance(placement, Shard) else Replicate())
    if not isinstance(w, DTensor):
        w = DTensor.from_local(w, x.device_mesh, [Replicate()] * len(wanted), run_check=False)
    if tuple(w.placements) != tuple(wanted):
        if not all(p.is_replicate() for p in w.placements):
            raise ValueError(
                f"a factor of shape {tuple(w.shape)} is placed as {tuple(w.placements)} beside an input placed as "
                f"{tuple(x.placements)}; hold it whole (Replicate) or as {tuple(wanted)}"
            )
        w = w.redistribute(placements=wanted)  # of what is whole: each rank takes its part
    return w.to_local(grad_placements=gradient)


def whole(part: Tensor, like: Any) -> Tensor:
    """An op's result on this rank's part, as a DTensor of the input's shape, placed as the input."""
    from torch.distributed.tensor import DTensor

    stride = torch.empty(like.shape, device="meta").stride()
    return DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=stride)
