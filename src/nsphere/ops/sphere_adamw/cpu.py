"""AdamW with the projection on CPU, in C++: one pass over each weight.

It moves 28 bytes a parameter, as AdamW alone does; a projection of its own moves 8 to 12 more.
"""

import ctypes
import functools
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsphere.ops import cpp
from nsphere.ops.sphere_adamw.reference import Step, unscaled, write_rounded


class _Tensor(ctypes.Structure):
    """`Tensor` of cpu.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("w", "g", "m", "v")),
        *((name, ctypes.c_int64) for name in ("rows", "cols", "dim")),
        *((name, ctypes.c_float) for name in ("step_size", "bias_correction2_sqrt")),
    )


@functools.cache
def _kernel() -> Any:
    function = cpp.load(Path(__file__).with_name("cpu.cpp")).sphere_adamw
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_double] * 5, ctypes.c_int]
    function.restype = None
    return function


def why_not(step: Step) -> str | None:
    """The reason the C++ pass can't take this step, None where it can."""
    for t in (*step.weights, *step.exp_avgs, *step.exp_avg_sqs):
        if type(t) not in (Tensor, torch.nn.Parameter) or t.dtype != torch.float32 or not t.is_contiguous():
            return f"the C++ pass is for fp32 tensors, contiguous, and not for {type(t).__name__} of {t.dtype}"
    for w, dim in zip(step.weights, step.dims, strict=True):
        if dim not in (None, 0, w.dim() - 1):
            return f"the C++ pass knows norms along the first and the last dim, not along {dim} of {w.dim()}"
    return None


@torch.no_grad()
def sphere_adamw_(step: Step) -> None:
    """See `nsphere.ops.sphere_adamw`; for what `why_not` has nothing against."""
    if step.found_inf is not None and step.found_inf.item():
        return
    kernel = _kernel()
    lr, (beta1, beta2) = float(step.lr), step.betas
    grads = [g.contiguous() for g in unscaled(step)]
    torch._foreach_add_(list(step.steps), 1)
    table = (_Tensor * len(grads))()
    each = zip(table, step.weights, grads, step.exp_avgs, step.exp_avg_sqs, step.steps, step.dims, strict=True)
    for entry, w, g, m, v, count, dim in each:
        t = count.item()
        entry.w, entry.g, entry.m, entry.v = w.data_ptr(), g.data_ptr(), m.data_ptr(), v.data_ptr()
        columns = dim == 0 and w.dim() > 1
        entry.cols = math.prod(w.shape[1:] if columns else w.shape[-1:] if dim is not None else w.shape)
        entry.rows = w.numel() // max(1, entry.cols)
        entry.dim = -1 if dim is None else 0 if columns else 1
        entry.step_size = lr / (1 - beta1**t)
        entry.bias_correction2_sqrt = math.sqrt(1 - beta2**t)
    kernel(table, len(table), lr, beta1, beta2, step.eps, step.weight_decay, torch.get_num_threads())
    # written behind autograd's back: it must still notice that a tensor it saved has changed
    torch.autograd.graph.increment_version([*step.weights, *step.exp_avgs, *step.exp_avg_sqs])
    write_rounded(step)
