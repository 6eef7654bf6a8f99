"""One weightless side in a graph that is being compiled, with a backward that starts from the output.

Attention keeps its q and k in any case, so that nothing more is kept of a side without a multiplier. A multiplier,
such as nGPT's s_qk, may be zero: it rides outside, and the rounded output without it is kept. Left to itself the
compiler keeps the inputs of both sides, and the rotated fp32 values under the multiplier besides.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsphere.norms import compute_dtype
from nsphere.ops.backend import TRACES_BACKWARDS
from nsphere.ops.qk_norm_rope import reference
from nsphere.ops.qk_norm_rope.reference import SideSpec, SideTensors


def suits(x: Tensor, spec: SideSpec, t: SideTensors) -> bool:
    """Whether this side is a weightless norm that needs gradients, and its tables need none."""
    if not TRACES_BACKWARDS:
        return False
    if spec.norm is None or t.weight is not None or t.bias is not None or reference.loses_the_input(spec, t):
        return False
    needed = x.requires_grad or (t.multiplier is not None and t.multiplier.requires_grad)
    tables = any(table is not None and table.requires_grad for table in (t.cos, t.sin))
    plain = type(x) is Tensor and not isinstance(t.constant, Tensor)
    return needed and torch.is_grad_enabled() and not tables and plain


def norm_rope(x: Tensor, spec: SideSpec, t: SideTensors) -> Tensor:
    """`nsphere.ops.qk_norm_rope.norm_rope`, first derivatives only."""
    return _NormRope.apply(x, t.multiplier, t.cos, t.sin, t.constant, spec)


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        multiplier: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        constant: float,
        spec: SideSpec,
    ) -> Tensor:
        t = SideTensors(cos=cos, sin=sin, constant=constant)
        wide, inverse = reference.forward(x.to(compute_dtype(x)), t, spec)
        y = wide.to(x.dtype)
        ctx.save_for_backward(y, inverse, multiplier, cos, sin)
        ctx.constant, ctx.spec = constant, spec
        return y if multiplier is None else (wide * multiplier).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        y, inverse, multiplier, cos, sin = ctx.saved_tensors
        dtype, dm = grad.dtype, None
        if multiplier is not None:
            grad = grad.to(inverse.dtype)
            if ctx.needs_input_grad[1]:
                dm = (grad * y).sum_to_size(multiplier.shape).to(multiplier.dtype)
            grad = grad * multiplier
        t = SideTensors(cos=cos, sin=sin, constant=ctx.constant)
        dx = reference.backward(grad, y, inverse, t, ctx.spec)[0]
        return dx.to(dtype), dm, None, None, None, None
