"""The residual step of nGPT in plain PyTorch: h ← Norm(h + |α| (Norm(o) − h))."""

import torch
from torch import Tensor


def unit(x: Tensor, dim: int = -1) -> Tensor:
    """X / ‖x‖₂ along `dim`, computed in at least fp32 and returned in that precision.

    No eps: a vector of norm 1e-4 comes out with norm 1. A zero vector stays zero and gets a zero gradient,
    where the plain quotient gives NaN and `F.normalize` a gradient of 1e12.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    square = (x * x).sum(dim, keepdim=True)
    nonzero = square > 0
    # the inner `where` keeps rsqrt's infinite derivative at zero out of the graph
    return x * torch.where(nonzero, torch.where(nonzero, square, 1.0).rsqrt(), 0.0)


def normalized_update(h: Tensor, o: Tensor, eigen_lr: Tensor) -> Tensor:
    """See `nsphere.ops.normalized_update`."""
    h_32 = h.to(torch.promote_types(h.dtype, torch.float32))
    return unit(h_32 + eigen_lr * (unit(o) - h_32)).to(h.dtype)
