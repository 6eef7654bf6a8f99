"""The op for eager code: keeps little for the backward, and runs each direction as one compiled function.

Of a weightless side the backward keeps the output, which attention keeps anyway; of the others the input, a view
if it came as one; and 1/root of each. Under torch.compile nothing here is used: the surrounding graph takes the
reference and fuses it.
"""

import dataclasses
import functools
import itertools
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from nsphere.norms import compute_dtype
from nsphere.ops.qk_norm_rope import reference
from nsphere.ops.qk_norm_rope.reference import SideSpec, SideTensors
from nsphere.rope import RopeSpec

Flat = tuple[Tensor | None, ...]
_NUM_FIELDS = len(dataclasses.fields(SideTensors))
_serial = itertools.count()
_undo_factors: Any = WeakIdKeyDictionary()


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one compiled pair of functions is made for; all else, the lengths above all, may vary freely."""

    specs: tuple[SideSpec, SideSpec]
    shapes: tuple[tuple[int, int], tuple[int, int]]
    """(H, D) of q and of k."""
    compiled: bool


def run(sides: tuple[Tensor, Tensor], tensors: tuple[SideTensors, SideTensors], plan: Plan) -> tuple[Tensor, Tensor]:
    """Apply the plan to q and k, with a backward that keeps little (first derivatives only)."""
    flat = (*_flat(tensors[0]), *_flat(tensors[1]))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*sides, *flat)):
        return _Function.apply(*sides, plan, *flat)
    with torch.autocast(sides[0].device.type, enabled=False), torch.no_grad():
        q, k, _, _ = _functions(plan)[0](*sides, *flat)
    return q, k


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, plan: Plan, *flat: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.plan = plan
        with torch.autocast(q.device.type, enabled=False):
            q_out, k_out, q_inverse, k_inverse = _functions(plan)[0](q, k, *flat)
        kept = [
            _kept(x, y, t, spec) for x, y, t, spec in zip((q, k), (q_out, k_out), _sides(flat), plan.specs, strict=True)
        ]
        ctx.save_for_backward(*kept, q_inverse, k_inverse, *flat)
        return q_out, k_out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, q_grad: Tensor, k_grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(q_grad.device.type, enabled=False):
            plan, saved = ctx.plan, ctx.saved_tensors  # asked for once: checkpointing hands them out once
            flat = saved[4:]
            undo = [
                _undo(t, spec, head_dim, compute_dtype(q_grad), plan.compiled)
                for t, spec, (_, head_dim) in zip(_sides(flat), plan.specs, plan.shapes, strict=True)
            ]
            (dq, *q_rest), (dk, *k_rest) = _functions(plan)[1](q_grad, k_grad, *undo, *saved)
        grads = (*_spread(q_rest), *_spread(k_rest))
        grads = tuple(None if g is None or t is None else g.to(t.dtype) for g, t in zip(grads, flat, strict=True))
        return dq, dk, None, *grads


def _undo(t: SideTensors, spec: SideSpec, head_dim: int, dtype: torch.dtype, compiled: bool) -> Tensor | None:
    """`undo_factors` where the backward uses them: made once for a pair of tables, and not for every element."""
    cos, sin = t.cos, t.sin
    if spec.norm is None or spec.rope is None or cos is None or sin is None:
        return None
    if not spec.norm_first or not reference.from_output(spec, t):
        return None
    # q and k, layers and steps share their tables: the factors live as long as the cosines they were made of
    key = (spec.rope, head_dim, dtype, compiled, cos._version, sin._version)
    known = _undo_factors.get(cos)
    if known is None or known[0] != key or known[1]() is not sin:
        made = _undo_function(spec.rope, head_dim, dtype, compiled)(cos, sin)
        known = _undo_factors[cos] = key, weakref.ref(sin), made
    return known[2]


@functools.cache
def _undo_function(rope: RopeSpec, head_dim: int, dtype: torch.dtype, compiled: bool) -> Callable[..., Any]:
    def undo(cos: Tensor, sin: Tensor) -> Tensor:
        return reference.undo_factors(cos, sin, rope, head_dim, dtype)

    return _compile(undo) if compiled else undo


def _kept(x: Tensor, y: Tensor, t: SideTensors, spec: SideSpec) -> Tensor | None:
    if reference.from_output(spec, t):
        return None if spec.norm is None else y
    return x


def _flat(t: SideTensors) -> Flat:
    return t.weight, t.bias, t.cos, t.sin, t.multiplier


def _spread(grads: list[Tensor | None]) -> Flat:
    dw, db, dm = grads
    return dw, db, None, None, dm


def _sides(flat: Flat) -> tuple[SideTensors, SideTensors]:
    return SideTensors(*flat[:_NUM_FIELDS]), SideTensors(*flat[_NUM_FIELDS:])


@functools.cache
def _functions(plan: Plan) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def forward(q: Tensor, k: Tensor, *flat: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        q_side, k_side = _sides(flat)
        q, q_inverse = reference.forward(q, q_side, plan.specs[0])
        k, k_inverse = reference.forward(k, k_side, plan.specs[1])
        return q, k, q_inverse, k_inverse

    def backward(q_grad: Tensor, k_grad: Tensor, *rest: Tensor | None) -> tuple[Flat, Flat]:
        q_undo, k_undo, q_kept, k_kept, q_inverse, k_inverse, *flat = rest
        q_side, k_side = _sides(tuple(flat))
        return (
            reference.backward(q_grad, q_kept, q_inverse, q_side, plan.specs[0], q_undo),
            reference.backward(k_grad, k_kept, k_inverse, k_side, plan.specs[1], k_undo),
        )

    if not plan.compiled:
        return forward, backward
    return _compile(forward), _compile(backward)


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled twice at most: for the first lengths that come, and for all others together.

    Code for fixed lengths runs about 10% faster than code for any (CPU, D = 64), and most training has one length.
    """
    fixed, any_length = _own_compile(function), _own_compile(function)
    first: list[tuple[int, ...]] = []

    def call(*tensors: Tensor | None) -> Any:
        lengths = tuple(n for t in tensors if t is not None for n in t.shape[: _num_free(t)])
        if not first:
            first.append(lengths)
        if lengths == first[0]:
            return fixed(*tensors)
        for t in tensors:
            if t is not None:
                for dim in range(_num_free(t)):
                    torch._dynamo.maybe_mark_dynamic(t, dim)
        return any_length(*tensors)

    return call


def _num_free(t: Tensor) -> int:
    """How many leading dims are batch or length: two of [B, T, H, D], one of [T, R/2], none of a weight."""
    return 0 if t.dim() < 2 or isinstance(t, torch.nn.Parameter) else max(t.dim() - 2, 1)


def _own_compile(function: Callable[..., Any]) -> Callable[..., Any]:
    # a code object of its own: the compiler counts its recompilations per code object, and gives up at eight
    code = function.__code__.replace(co_name=f"qk_norm_rope_{function.__name__}_{next(_serial)}")
    own = types.FunctionType(code, function.__globals__, code.co_name, None, function.__closure__)
    return torch.compile(own, fullgraph=True)
