"""The residual step as two Triton kernels: forward reads h and o and writes h′; backward recomputes it from h and o.

A row of h is held in registers, in fp32. The gradient of the eigen learning rate is summed over rows in two stages:
each backward program keeps the sum of the rows it walks over, and those sums are added in a fixed order.

The ops are opaque to the compiler (`custom_op`) and not traced into (`triton_op`): Triton's interpreter, which tests
them without a GPU, has no traceable kernels, and the compiler would pass their floats as fp64.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsphere.ops.launch import Launch, next_power_of_2, persistent_programs, refuses_dtype, warps_for

MAX_WIDTH = 16384


def why_not(h: Tensor, o: Tensor, eigen_lr: Tensor) -> str | None:
    """The reason the kernels do not take these tensors, None if they do."""
    if h.shape[-1] > MAX_WIDTH:
        return f"a row of {h.shape[-1]} elements is more than a program holds ({MAX_WIDTH})"
    if h.shape != o.shape:
        return f"h is {tuple(h.shape)} and o is {tuple(o.shape)}"
    if eigen_lr.dim() > 1:
        return f"the eigen learning rate is {tuple(eigen_lr.shape)}, not [d], [1] or []"
    return refuses_dtype(h, o, eigen_lr)


@triton.jit
def inverse_length(square):
    """1/√square; 0 of 0, so that a zero vector stays zero."""
    nonzero = square > 0
    return tl.where(nonzero, tl.rsqrt(tl.where(nonzero, square, 1.0)), 0.0)


@triton.jit
def _row(ptr, row, num_inner, outer_stride, inner_stride):
    """Where a row begins: rows are counted through two dims of any strides."""
    return ptr + (row // num_inner) * outer_stride + (row % num_inner) * inner_stride


@triton.jit
def _unit(x):
    """(x / ‖x‖, 1/‖x‖)."""
    inverse = inverse_length(tl.sum(x * x, 0))
    return x * inverse, inverse


@triton.jit
def forward_kernel(
    h_ptr,
    o_ptr,
    lr_ptr,
    out_ptr,
    num_inner,
    width,
    h_outer,
    h_inner,
    o_outer,
    o_inner,
    out_outer,
    out_inner,
    LR_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    h = tl.load(_row(h_ptr, row, num_inner, h_outer, h_inner) + column, mask=inside, other=0.0).to(tl.float32)
    o = tl.load(_row(o_ptr, row, num_inner, o_outer, o_inner) + column, mask=inside, other=0.0).to(tl.float32)
    lr = tl.load(lr_ptr + column * LR_STRIDE, mask=inside, other=0.0).to(tl.float32)
    u, _ = _unit(o)
    y, _ = _unit(h + lr * (u - h))
    out = _row(out_ptr, row, num_inner, out_outer, out_inner) + column
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    grad_ptr,
    h_ptr,
    o_ptr,
    lr_ptr,
    h_grad_ptr,
    o_grad_ptr,
    lr_partial_ptr,
    num_rows,
    num_inner,
    width,
    grad_outer,
    grad_inner,
    h_outer,
    h_inner,
    o_outer,
    o_inner,
    h_grad_outer,
    h_grad_inner,
    o_grad_outer,
    o_grad_inner,
    LR_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every num_programs-th row a program; row p of `lr_partial` is the sum that program p kept."""
    first, step = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    lr = tl.load(lr_ptr + column * LR_STRIDE, mask=inside, other=0.0).to(tl.float32)
    lr_grad = tl.zeros([BLOCK], tl.float32)
    for turn in range(tl.cdiv(num_rows - first, step)):
        row = first + turn * step
        grad = tl.load(_row(grad_ptr, row, num_inner, grad_outer, grad_inner) + column, mask=inside, other=0.0)
        h = tl.load(_row(h_ptr, row, num_inner, h_outer, h_inner) + column, mask=inside, other=0.0).to(tl.float32)
        o = tl.load(_row(o_ptr, row, num_inner, o_outer, o_inner) + column, mask=inside, other=0.0).to(tl.float32)
        u, o_inverse = _unit(o)
        y, z_inverse = _unit(h + lr * (u - h))
        grad = grad.to(tl.float32)
        z_grad = z_inverse * (grad - y * tl.sum(grad * y, 0))
        lr_grad += z_grad * (u - h)
        u_grad = lr * z_grad
        o_grad = o_inverse * (u_grad - u * tl.sum(u_grad * u, 0))
        h_out = _row(h_grad_ptr, row, num_inner, h_grad_outer, h_grad_inner) + column
        o_out = _row(o_grad_ptr, row, num_inner, o_grad_outer, o_grad_inner) + column
        tl.store(h_out, (z_grad - u_grad).to(h_grad_ptr.dtype.element_ty), mask=inside)
        tl.store(o_out, o_grad.to(o_grad_ptr.dtype.element_ty), mask=inside)
    tl.store(lr_partial_ptr + first * width + column, lr_grad, mask=inside)


def _rows(x: Tensor) -> Tensor:
    """X as [outer, inner, d] with d contiguous: a view, or where no view will do a copy."""
    x = x if x.dim() == 3 else x.reshape(1, -1, x.shape[-1])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(**tensors: Tensor) -> dict[str, int]:
    return {f"{name}_{dim}": t.stride(i) for name, t in tensors.items() for i, dim in enumerate(("outer", "inner"))}


def forward_launch(h: Tensor, o: Tensor, eigen_lr: Tensor, out: Tensor) -> Launch:
    """Of tensors [outer, inner, d] whose last dim is contiguous, and a contiguous eigen_lr."""
    width = h.shape[-1]
    block = next_power_of_2(width)
    arguments = {
        "h_ptr": h,
        "o_ptr": o,
        "lr_ptr": eigen_lr,
        "out_ptr": out,
        "num_inner": h.shape[1],
        "width": width,
        **_strides(h=h, o=o, out=out),
        "LR_STRIDE": int(eigen_lr.numel() > 1),
        "BLOCK": block,
    }
    return Launch(forward_kernel, (h.shape[0] * h.shape[1],), arguments, warps_for(block))


def backward_launch(
    grad: Tensor, h: Tensor, o: Tensor, eigen_lr: Tensor, h_grad: Tensor, o_grad: Tensor, lr_partial: Tensor
) -> Launch:
    """As `forward_launch`; lr_partial is fp32 [programs, d]."""
    width = h.shape[-1]
    block = next_power_of_2(width)
    tensors = {"grad": grad, "h": h, "o": o, "lr": eigen_lr, "h_grad": h_grad, "o_grad": o_grad}
    arguments = {
        **{f"{name}_ptr": t for name, t in (tensors | {"lr_partial": lr_partial}).items()},
        "num_rows": h.shape[0] * h.shape[1],
        "num_inner": h.shape[1],
        "width": width,
        **_strides(grad=grad, h=h, o=o, h_grad=h_grad, o_grad=o_grad),
        "LR_STRIDE": int(eigen_lr.numel() > 1),
        "BLOCK": block,
    }
    return Launch(backward_kernel, (len(lr_partial),), arguments, warps_for(block))


@torch.library.custom_op("nsphere::normalized_update", mutates_args=())
def normalized_update(h: Tensor, o: Tensor, eigen_lr: Tensor) -> Tensor:
    """See `nsphere.ops.normalized_update`; h′ is contiguous."""
    out = h.new_empty(h.shape)
    if out.numel():
        forward_launch(_rows(h), _rows(o), eigen_lr.contiguous(), _rows(out)).run()
    return out


@normalized_update.register_fake
def _(h: Tensor, o: Tensor, eigen_lr: Tensor) -> Tensor:
    return h.new_empty(h.shape)


@torch.library.custom_op("nsphere::normalized_update_backward", mutates_args=())
def normalized_update_backward(grad: Tensor, h: Tensor, o: Tensor, eigen_lr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of h, o and eigen_lr, contiguous, each in its tensor's dtype and shape."""
    h_grad, o_grad = h.new_empty(h.shape), o.new_empty(o.shape)
    if not h.numel():
        return h_grad, o_grad, torch.zeros_like(eigen_lr, memory_format=torch.contiguous_format)
    programs = persistent_programs(h.numel() // h.shape[-1], h.device)
    partial = h.new_empty((programs, h.shape[-1]), dtype=torch.float32)
    tensors = (_rows(grad), _rows(h), _rows(o), eigen_lr.contiguous(), _rows(h_grad), _rows(o_grad))
    backward_launch(*tensors, partial).run()
    lr_grad = partial.sum(0) if eigen_lr.numel() > 1 else partial.sum()
    return h_grad, o_grad, lr_grad.to(eigen_lr.dtype).view(eigen_lr.shape)


@normalized_update_backward.register_fake
def _(grad: Tensor, h: Tensor, o: Tensor, eigen_lr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return h.new_empty(h.shape), o.new_empty(o.shape), eigen_lr.new_empty(eigen_lr.shape)


def _keep_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return normalized_update_backward(grad, *ctx.saved_tensors)


normalized_update.register_autograd(_backward, setup_context=_keep_inputs)
