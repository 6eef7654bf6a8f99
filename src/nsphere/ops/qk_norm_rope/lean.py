"""The op for eager code: keeps little for the backward, and runs each direction as one compiled function.

Of a weightless side the backward keeps the output, which attention keeps anyway; of the others the input, a view
if it came as one; and 1/root of each. Under torch.compile nothing here is used: the surrounding graph takes the
reference and fuses it.
"""

import dataclasses
import functools
import itertools
import logging
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

logger = logging.getLogger("nsphere")

Flat = tuple[Tensor | None, ...]
# How many leading dims of each argument are batch or length; a negative number counts the trailing dims that are not.
_FREE_OF_SIDE = (0, 0, -1, -1, -2)
_FREE_FORWARD = (2, 2, *_FREE_OF_SIDE, *_FREE_OF_SIDE)
_FREE_BACKWARD = (2, 2, -2, -2, 2, 2, 2, 2, *_FREE_OF_SIDE, *_FREE_OF_SIDE)
# Plans, and ways to lay out their tensors, whose code is kept; a program has a few of each.
_MAX_PLANS, _MAX_KINDS = 256, 32
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
        q, k, _, _ = _forward(plan)(*sides, *flat)
    return q, k


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, plan: Plan, *flat: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.plan = plan
        with torch.autocast(q.device.type, enabled=False):
            q_out, k_out, q_inverse, k_inverse = _forward(plan)(q, k, *flat)
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
            wanted = tuple(t is not None and n for t, n in zip(flat, ctx.needs_input_grad[3:], strict=True))
            (dq, *q_rest), (dk, *k_rest) = _backward(plan, wanted)(q_grad, k_grad, *undo, *saved)
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

    return _compile(undo, (-1, -1)) if compiled else undo


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


@functools.lru_cache(_MAX_PLANS)
def _forward(plan: Plan) -> Callable[..., Any]:
    def forward(q: Tensor, k: Tensor, *flat: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        q_side, k_side = _sides(flat)
        q, q_inverse = reference.forward(q, q_side, plan.specs[0])
        k, k_inverse = reference.forward(k, k_side, plan.specs[1])
        return q, k, q_inverse, k_inverse

    return _compile(forward, _FREE_FORWARD) if plan.compiled else forward


@functools.lru_cache(_MAX_PLANS)
def _backward(plan: Plan, wanted: tuple[bool, ...]) -> Callable[..., Any]:
    """The backward that computes the gradients that are wanted, besides those of q and k."""
    q_wanted, k_wanted = ((w, b, m) for w, b, _, _, m in (wanted[:_NUM_FIELDS], wanted[_NUM_FIELDS:]))

    def backward(q_grad: Tensor, k_grad: Tensor, *rest: Tensor | None) -> tuple[Flat, Flat]:
        q_undo, k_undo, q_kept, k_kept, q_inverse, k_inverse, *flat = rest
        q_side, k_side = _sides(tuple(flat))
        return (
            reference.backward(q_grad, q_kept, q_inverse, q_side, plan.specs[0], q_undo, q_wanted),
            reference.backward(k_grad, k_kept, k_inverse, k_side, plan.specs[1], k_undo, k_wanted),
        )

    return _compile(backward, _FREE_BACKWARD) if plan.compiled else backward


def _compile(function: Callable[..., Any], free: tuple[int, ...]) -> Callable[..., Any]:
    """The function, compiled anew for every kind of arguments: dtype, rank, stride order, dims of one.

    These are what the compiler specialises on, lengths aside; it counts variants per code object and fails at the
    ninth. Tensors go in detached, so that it makes no difference between training and evaluation.
    """
    variants: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def call(*tensors: Tensor | None) -> Any:
        detached = tuple(None if t is None else t.detach() for t in tensors)
        kind = tuple(None if t is None else _kind(t) for t in detached)
        if kind not in variants:
            if len(variants) == _MAX_KINDS:
                variants.pop(next(iter(variants)))
            variants[kind] = _for_all_lengths(function, free)
        with torch.no_grad():
            return variants[kind](*detached)

    return call


def _kind(t: Tensor) -> tuple[Any, ...]:
    sizes, strides = t.shape, t.stride()
    longer = [i for i, n in enumerate(sizes) if n > 1]
    order = sorted(longer, key=strides.__getitem__, reverse=True)
    packed = all(strides[a] == sizes[b] * strides[b] for a, b in itertools.pairwise(order))
    short = tuple(n if n < 2 else 2 for n in sizes)
    spread = tuple(strides[i] == 0 for i in longer)
    return t.dtype, t.device, t.is_inference(), short, tuple(order), packed, spread


def _for_all_lengths(function: Callable[..., Any], free: tuple[int, ...]) -> Callable[..., Any]:
    """The function compiled twice at most: for the first lengths that come, and for all others together.

    Code for fixed lengths runs about 10% faster than code for any (CPU, D = 64), and most training has one length.
    """
    fixed, any_length = _own_compile(function), _own_compile(function)
    first: list[tuple[int, ...]] = []
    gave_up: list[bool] = []

    def call(*tensors: Tensor | None) -> Any:
        if gave_up:
            return function(*tensors)
        free_dims = [
            0 if t is None else n if n >= 0 else max(t.dim() + n, 0) for t, n in zip(tensors, free, strict=True)
        ]
        lengths = tuple(n for t, m in zip(tensors, free_dims, strict=True) if t is not None for n in t.shape[:m])
        if not first:
            first.append(lengths)
        if lengths != first[0]:
            for t, m in zip(tensors, free_dims, strict=True):
                for dim in range(m):
                    torch._dynamo.maybe_mark_dynamic(t, dim)
        try:
            return (fixed if lengths == first[0] else any_length)(*tensors)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            gave_up.append(True)
            logger.warning("nsphere: too many variants of %s to compile; it runs op by op now", function.__qualname__)
            return function(*tensors)

    return call


def _own_compile(function: Callable[..., Any]) -> Callable[..., Any]:
    # a code object of its own: the compiler counts its recompilations per code object, and gives up at eight
    code = function.__code__.replace(co_name=f"qk_norm_rope_{function.__name__}_{next(_serial)}")
    own = types.FunctionType(code, function.__globals__, code.co_name, None, function.__closure__)
    return torch.compile(own, fullgraph=True)
