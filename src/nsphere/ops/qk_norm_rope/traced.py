"""One weightless side in a graph that is being compiled, with a backward that starts from the output.

Attention keeps its q and k in any case, so that nothing more is kept of a side, be it multiplied or not: what a
multiplier such as nGPT's s_qk did is undone by a division. A multiplier of 0 would leave nothing to divide: 2⁻⁶⁰
stands in for it, which is too little to reach a sum of products with a key and keeps the digits. Left to itself the
compiler keeps the inputs of both sides, and the rotated fp32 values under the multiplier besides.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsphere.norms import compute_dtype, eps_of
from nsphere.ops.backend import cast
from nsphere.ops.nonzero import nonzero
from nsphere.ops.qk_norm_rope import reference
from nsphere.ops.qk_norm_rope.reference import SideSpec, SideTensors
from nsphere.ops.token_sums import sum_to


def suits(x: Tensor, spec: SideSpec, t: SideTensors) -> bool:
    """Whether this side is a weightless norm that needs gradients, and its tables need none."""
    if spec.norm is None or t.weight is not None or t.bias is not None or reference.loses_the_input(spec, t):
        return False
    if t.multiplier is not None and x.dtype == torch.float16:
        return False  # its range is too small to divide by a small multiplier
    needed = x.requires_grad or (t.multiplier is not None and t.multiplier.requires_grad)
    tables = any(table is not None and table.requires_grad for table in (t.cos, t.sin))
    plain = type(x) is Tensor and not isinstance(t.constant, Tensor)
    return needed and torch.is_grad_enabled() and not tables and plain


def norm_rope(x: Tensor, spec: SideSpec, t: SideTensors) -> Tensor:
    """`nsphere.ops.qk_norm_rope.norm_rope`, first derivatives only."""
    # an eps that the compiler takes for a variable, because it differs between calls, has to be met outside first
    assert spec.norm is not None and eps_of(spec.norm, x.dtype) >= 0
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
        y, inverse = reference.forward(x.to(compute_dtype(x)), t, spec)
        if multiplier is not None:
            y = y * nonzero(multiplier.to(y.dtype))
        y = cast(y, x.dtype)
        ctx.save_for_backward(y, inverse, multiplier, cos, sin)
        ctx.constant, ctx.spec = constant, spec
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        y, inverse, multiplier, cos, sin = ctx.saved_tensors
        dtype, dm = grad.dtype, None
        if multiplier is not None:
            factor = multiplier.to(inverse.dtype)
            # before the sum: what 2⁻⁶⁰ and a small gradient make together is below fp32
            grad, y = grad.to(inverse.dtype), y * (1 / nonzero(factor))
            if ctx.needs_input_grad[1]:
                dm = sum_to(grad * y, multiplier.shape, 1).to(multiplier.dtype)
            grad = grad * factor
        t = SideTensors(cos=cos, sin=sin, constant=ctx.constant)
        dx = reference.backward(grad, y, inverse, t, ctx.spec)[0]
        return dx.to(dtype), dm, None, None, None, None
