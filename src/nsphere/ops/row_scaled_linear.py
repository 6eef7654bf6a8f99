"""x (s ⊙ W)ᵀ, W's rows scaled by s, for a graph that is being compiled in one dtype: its backward keeps W and s alone.

The scaled weight serves the forward and goes. In the backward s multiplies the output's gradient, in the kernel that
makes it, and of that both products are taken; left to itself the compiler keeps the scaled weight. Under autocast there
is nothing to gain: the copy in bf16 that is kept for the backward is as large with a scale as without.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsphere.ops import backend as backends
from nsphere.ops.nonzero import nonzero


def suits(x: Tensor, weight: Tensor, scale: Tensor) -> bool:
    """Whether a graph is being compiled that trains this product, all of it in one dtype."""
    if not torch.compiler.is_compiling() or backends.choose_for(x.device.type) == "reference":
        return False
    tensors = (x, weight, scale)
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    plain = all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
    one_dtype = x.dtype == weight.dtype == scale.dtype and not torch.is_autocast_enabled(x.device.type)
    # in 16 bits s times the gradient would be another rounding
    return trained and plain and one_dtype and x.dtype in (torch.float32, torch.float64)


def row_scaled_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Y = x (s ⊙ W)ᵀ, first derivatives only.

    Args:
        x: [..., in], any one dtype of at least fp32.
        weight: [out, in], W.
        scale: [out], s; or [1].
    """
    return _RowScaledLinear.apply(x, weight, scale)


class _RowScaledLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, scale)
        return F.linear(x, weight * scale.unsqueeze(-1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, scale = ctx.saved_tensors
        factor = nonzero(scale)  # the scale's own gradient is had by a division
        scaled = grad * factor
        weight_grad = scaled.reshape(-1, weight.shape[0]).mT @ x.reshape(-1, weight.shape[1])
        # Σ W ⊙ (gradᵀ x), each row of which is at hand times s
        scale_grad = (weight_grad * weight).sum(-1) / factor
        return scaled @ weight, weight_grad, scale_grad.sum_to_size(scale.shape)
