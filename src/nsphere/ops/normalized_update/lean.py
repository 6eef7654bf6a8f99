"""The residual step of nGPT for a graph that is being compiled: its backward keeps what others keep anyway.

The product that follows the step takes h′ in the dtype of o, and the one before it took h so: under autocast both keep
bf16 copies for their weights' gradients. The backward of the step starts from that copy of h, from o, and from two
numbers a token. Left to itself the compiler keeps h in fp32 besides, and the step's sum before its norm.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsphere.ops.backend import cast
from nsphere.ops.token_sums import sum_to


def normalized_update(h: Tensor, o: Tensor, eigen_lr: Tensor) -> Tensor:
    """See `nsphere.ops.normalized_update`; first derivatives only."""
    return _NormalizedUpdate.apply(h, o, eigen_lr)


def _inverse_norm(x: Tensor) -> Tensor:
    square = (x * x).sum(-1, keepdim=True)
    nonzero = square > 0
    return torch.where(nonzero, torch.where(nonzero, square, 1.0).rsqrt(), 0.0)


class _NormalizedUpdate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, o: Tensor, eigen_lr: Tensor) -> Tensor:
        wide = torch.promote_types(torch.promote_types(h.dtype, o.dtype), torch.float32)
        h_wide, o_wide = h.to(wide), o.to(wide)
        o_inverse = _inverse_norm(o_wide)
        y = h_wide + eigen_lr * (o_wide * o_inverse - h_wide)
        y_inverse = _inverse_norm(y)
        narrower = o.dtype if o.dtype.itemsize < h.dtype.itemsize else h.dtype
        ctx.h_dtype = h.dtype
        ctx.save_for_backward(h.to(narrower), o, o_inverse, y_inverse, eigen_lr)
        return cast(y * y_inverse, h.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, o, o_inverse, y_inverse, eigen_lr = ctx.saved_tensors
        wide = o_inverse.dtype
        h_wide, unit_o, g = h.to(wide), o.to(wide) * o_inverse, grad.to(wide)
        # the other way round than in the forward: of the same operations, in fp32, the compiler keeps the results
        away = h_wide - unit_o
        y = h_wide - eigen_lr * away
        # all sums over a row in one pass: with a second that needs the first's results, the compiler stores in between
        y_g, o_g, o_y = _row_sum(y * g), _row_sum(eigen_lr * unit_o * g), _row_sum(eigen_lr * unit_o * y)
        radial = y_g * y_inverse * y_inverse
        y_grad = (g - y * radial) * y_inverse
        step_grad = eigen_lr * y_grad
        o_grad = (step_grad - unit_o * ((o_g - o_y * radial) * y_inverse)) * o_inverse
        eigen_lr_grad = -sum_to(y_grad * away, eigen_lr.shape, -2)
        return (y_grad - step_grad).to(ctx.h_dtype), o_grad.to(o.dtype), eigen_lr_grad.to(eigen_lr.dtype)


def _row_sum(x: Tensor) -> Tensor:
    return x.sum(-1, keepdim=True)
