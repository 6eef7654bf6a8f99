"""The commonest sides in fp32 on CPU, in C++: norm over a head, then RoPE of halves, each row read once.

RMS or L2 with eps inside the root, a weight [D] or none, tables [T, R/2]: Qwen 3's norm and most others. What is of
another kind takes the compiler's code.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsphere.ops import cpp
from nsphere.ops.qk_norm_rope.reference import SideSpec

Flat = Sequence[Any]
MAX_HEAD_DIM = 512


class _Side(ctypes.Structure):
    """`Side` of rows.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "grad", "weight", "cos", "sin", "undo")),
        *((name, ctypes.c_void_p) for name in ("y", "inverse", "weight_grad")),
        *((name, ctypes.c_int64) for name in ("B", "T", "H", "D", "half")),
        *((name, ctypes.c_int64) for name in ("xb", "xt", "xh", "gb", "gt", "gh")),
        *((name, ctypes.c_float) for name in ("eps", "divisor", "offset")),
    )


@functools.cache
def _kernel() -> Any:
    function = cpp.load(Path(__file__).with_name("rows.cpp")).qk_norm_rope
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int]
    function.restype = None
    return function


def suit(specs: Sequence[SideSpec]) -> bool:
    """Whether the kernel knows these norms and rotations."""
    return all(_suits(spec) for spec in specs)


def _suits(spec: SideSpec) -> bool:
    norm, rope = spec.norm, spec.rope
    return (
        norm is not None
        and norm.statistic in ("l2", "rms")
        and (norm.eps or 0.0) > 0
        and (norm.eps_place, norm.root, norm.scale, norm.bias) == ("inside", "rsqrt", 1.0, False)
        and norm.weight in ("none", "shared")
        and (spec.norm_first, spec.over) == (True, "head")
        and rope is not None
        and (rope.layout, rope.where, rope.sign, rope.blocks) == ("half", "leading", 1, 1)
        and rope.table_dtype is None
        and rope.compute_dtype is torch.float32
    )


def forward(specs: Sequence[SideSpec], otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of `lean`, by the kernel where it takes the tensors."""
    n = len(specs)

    def run(*tensors: Any) -> Any:
        fields = [tensors[n + 5 * i : n + 5 * i + 5] for i in range(n)]
        sides = list(zip(tensors[:n], fields, tensors[-n:], specs, strict=True))
        if not all(_takes(x, *side) for x, *side in sides):
            return otherwise(*tensors)
        ys = [torch.empty(x.shape) for x in tensors[:n]]
        inverses = [torch.empty(*y.shape[:-1], 1) for y in ys]
        table = (_Side * n)()
        for entry, (x, (weight, _, cos, sin, _), _, spec), y, inverse in zip(table, sides, ys, inverses, strict=True):
            _fill(entry, spec, x, weight, cos, sin, y)
            entry.inverse = inverse.data_ptr()
        _kernel()(table, n, False, torch.get_num_threads())
        return *ys, *inverses

    return run


def backward(
    specs: Sequence[SideSpec], wanted: Sequence[tuple[bool, bool, bool]], otherwise: Callable[..., Any]
) -> Callable[..., Any]:
    """The backward of `lean`, by the kernel where it takes the tensors."""
    n = len(specs)

    def run(*tensors: Any) -> Any:
        grads, kept, inverses, undo = (tensors[i * n : (i + 1) * n] for i in range(4))
        fields = [tensors[4 * n + 5 * i : 4 * n + 5 * i + 5] for i in range(n)]
        sides = list(zip(kept, fields, tensors[-n:], specs, strict=True))
        whole = [t for t in (*inverses, *undo) if t is not None]
        if not all(_takes(*side, grad) for side, grad in zip(sides, grads, strict=True)) or not all(
            t.is_contiguous() for t in whole
        ):
            return otherwise(*tensors)
        table, results = (_Side * n)(), []
        for i, (entry, (x, (weight, _, cos, sin, _), _, spec)) in enumerate(zip(table, sides, strict=True)):
            grad, dx = grads[i], torch.empty(grads[i].shape)
            _fill(entry, spec, x, weight, cos, sin, dx)
            entry.grad, entry.inverse = grad.data_ptr(), inverses[i].data_ptr()
            entry.gb, entry.gt, entry.gh = grad.stride()[:3]
            entry.undo = None if undo[i] is None else undo[i].data_ptr()
            dw = torch.empty_like(weight) if weight is not None and wanted[i][0] else None
            entry.weight_grad = None if dw is None else dw.data_ptr()
            results.append((dx, dw, None, None))
        _kernel()(table, n, True, torch.get_num_threads())
        return results

    return run


def _takes(x: Tensor, fields: Flat, constant: Any, spec: SideSpec, grad: Tensor | None = None) -> bool:
    weight, bias, cos, sin, multiplier = fields
    tensors = [t for t in (x, grad, weight, cos, sin) if t is not None]
    return (
        x.device.type == "cpu"
        and all(t.dtype is torch.float32 and t.stride(-1) == 1 for t in tensors)
        and bias is multiplier is constant is None
        and cos is not None
        and cos.dim() == 2
        and cos.is_contiguous()
        and sin.is_contiguous()
        and x.shape[-1] <= MAX_HEAD_DIM
        and spec.rope is not None
        and 2 * cos.shape[-1] == spec.rope.dim <= x.shape[-1]
    )


def _fill(entry: Any, spec: SideSpec, x: Tensor, weight: Any, cos: Tensor, sin: Tensor, y: Tensor) -> None:
    entry.x, entry.cos, entry.sin, entry.y = x.data_ptr(), cos.data_ptr(), sin.data_ptr(), y.data_ptr()
    entry.weight = None if weight is None else weight.data_ptr()
    entry.B, entry.T, entry.H, entry.D = x.shape
    entry.half = cos.shape[-1]
    entry.xb, entry.xt, entry.xh = x.stride()[:3]
    norm = spec.norm
    assert norm is not None
    entry.eps, entry.divisor = norm.eps, 1.0 if norm.statistic == "l2" else x.shape[-1]
    entry.offset = float(norm.zero_centered)
