"""The op for eager code: keeps little for the backward, and runs each direction as one compiled function.

Of a weightless side the backward keeps the output, which attention keeps anyway; of the others the input, a view
if it came as one; and 1/root of each. Under torch.compile nothing here is used: the surrounding graph takes the
reference and fuses it.
"""

import contextlib
import dataclasses
import functools
import itertools
import logging
import operator
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from nsphere.norms import compute_dtype
from nsphere.ops.qk_norm_rope import reference, rows
from nsphere.ops.qk_norm_rope.reference import SideSpec, SideTensors
from nsphere.rope import RopeSpec

logger = logging.getLogger("nsphere")

Flat = tuple[Tensor | None, ...]
# The fields of SideTensors that are tensors, and how many of their leading dims are batch or length; a negative number
# counts the trailing dims that are not.
_FIELDS = ("weight", "bias", "cos", "sin", "multiplier")
_fields_of = operator.attrgetter(*_FIELDS)
_FREE = (0, 0, -1, -1, -2)
# Plans, and ways to lay out their tensors, whose code is kept; a program has a few of each.
_MAX_PLANS, _MAX_KINDS, _MAX_LOOKS = 256, 32, 256
_serial = itertools.count()
_undo_factors: Any = WeakIdKeyDictionary()


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What one compiled pair of functions is made for; all else, the lengths above all, may vary freely."""

    specs: tuple[SideSpec, ...]
    shapes: tuple[tuple[int, int], ...]
    """(H, D) of each side."""
    compiled: bool

    @functools.cached_property
    def forward(self) -> Callable[..., Any]:
        """(each x, all fields of the sides, their constants) -> (each y, each 1/root)."""
        return _forward(self)

    @functools.cached_property
    def backward(self) -> Callable[[tuple[bool, ...]], Callable[..., Any]]:
        """Which fields want a gradient -> the function for these.

        That is (each gradient, kept tensor, 1/root and undo factors; fields; constants) -> per side (dx, dw, db, dm),
        where what is not wanted is None.
        """
        return functools.cache(functools.partial(_backward, self))


@functools.lru_cache(_MAX_PLANS)
def plan(specs: tuple[SideSpec, ...], shapes: tuple[tuple[int, int], ...], compiled: bool) -> Plan:
    """The one Plan of this kind: its compiled code lives as long as it is remembered here."""
    return Plan(specs, shapes, compiled)


def run(sides: tuple[Tensor, ...], values: tuple[SideTensors, ...], plan: Plan) -> tuple[Tensor, ...]:
    """Apply the plan to q and k, or to one of them, with a backward that keeps little (first derivatives only)."""
    flat = tuple([w for t in values for w in _fields_of(t)])
    constants = tuple([t.constant for t in values])
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*sides, *flat)):
        return _Function.apply(plan, constants, *sides, *flat)
    with _no_autocast(sides[0]), torch.no_grad():
        return plan.forward(*sides, *flat, *_tensors(constants))[: len(sides)]


def _no_autocast(like: Tensor) -> contextlib.AbstractContextManager[Any]:
    device = like.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, constants: tuple[Any, ...], *tensors: Any) -> tuple[Tensor, ...]:
        n = len(plan.specs)
        ctx.plan, ctx.constants = plan, constants
        sides, flat = tensors[:n], tensors[n:]
        with _no_autocast(sides[0]):
            results = plan.forward(*sides, *flat, *_tensors(constants))
        outputs, inverses = results[:n], results[n:]
        values = _sides(flat, constants)
        kept = [_kept(*side) for side in zip(sides, outputs, values, plan.specs, strict=True)]
        ctx.save_for_backward(*kept, *inverses, *flat)
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan, n = ctx.plan, len(ctx.plan.specs)
        with _no_autocast(grads[0]):
            saved = ctx.saved_tensors  # asked for once: checkpointing hands them out once
            kept, flat = saved[: 2 * n], saved[2 * n :]
            undo = [
                _undo(t, spec, head_dim, compute_dtype(grads[0]), plan.compiled)
                for t, spec, (_, head_dim) in zip(_sides(flat, ctx.constants), plan.specs, plan.shapes, strict=True)
            ]
            needed = ctx.needs_input_grad[2 + n :]
            wanted = tuple([t is not None and need for t, need in zip(flat, needed, strict=True)])
            results = plan.backward(wanted)(*grads, *kept, *undo, *flat, *_tensors(ctx.constants))
        inputs = [dx for dx, *_ in results]
        rest = [g for _, dw, db, dm in results for g in (dw, db, None, None, dm)]
        rest = [None if g is None or t is None else g.to(t.dtype) for g, t in zip(rest, flat, strict=True)]
        return None, None, *inputs, *rest


def _tensors(constants: tuple[Any, ...]) -> Flat:
    """As tensors, so that code compiled for one number serves all; None for 1, which costs nothing."""
    return tuple(None if c == 1 else torch.tensor(c, dtype=torch.float64) for c in constants)


def _sides(flat: tuple[Any, ...], constants: tuple[Any, ...]) -> list[SideTensors]:
    n = len(_FIELDS)
    rows = [flat[i : i + n] for i in range(0, len(flat), n)]
    return [SideTensors(*row, 1.0 if c is None else c) for row, c in zip(rows, constants, strict=True)]  # type: ignore[call-arg]


def _undo(t: SideTensors, spec: SideSpec, head_dim: int, dtype: torch.dtype, compiled: bool) -> Tensor | None:
    """`undo_factors` where the backward uses them: made once for a pair of tables, and not for every element."""
    cos, sin = t.cos, t.sin
    if spec.norm is None or spec.rope is None or cos is None or sin is None:
        return None
    if not spec.norm_first or not reference.from_output(t):
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
    if reference.from_output(t):
        return None if spec.norm is None else y
    return x


def _forward(plan: Plan) -> Callable[..., Any]:
    n = len(plan.specs)

    def forward(*tensors: Any) -> tuple[Tensor | None, ...]:
        values = _sides(tensors[n:-n], tensors[-n:])
        results = [reference.forward(*side) for side in zip(tensors[:n], values, plan.specs, strict=True)]
        return *(y for y, _ in results), *(inverse for _, inverse in results)

    if not plan.compiled:
        return forward
    compiled = _compile(forward, (*[2] * n, *_FREE * n, *[0] * n))
    return rows.forward(plan.specs, compiled) if rows.suit(plan.specs) else compiled


def _backward(plan: Plan, wanted: tuple[bool, ...]) -> Callable[..., Any]:
    n, num_fields = len(plan.specs), len(_FIELDS)
    by_side = [wanted[i : i + num_fields] for i in range(0, len(wanted), num_fields)]
    wanted_of = [(weight, bias, multiplier) for weight, bias, _, _, multiplier in by_side]

    def backward(*tensors: Any) -> list[tuple[Tensor | None, ...]]:
        grads, kept, inverses, undo = (tensors[i * n : (i + 1) * n] for i in range(4))
        values = _sides(tensors[4 * n : -n], tensors[-n:])
        sides = zip(grads, kept, inverses, values, plan.specs, undo, wanted_of, strict=True)
        return [reference.backward(*side) for side in sides]

    if not plan.compiled:
        return backward
    compiled = _compile(backward, (*[2] * 3 * n, *[-2] * n, *_FREE * n, *[0] * n))
    return rows.backward(plan.specs, wanted_of, compiled) if rows.suit(plan.specs) else compiled


def _compile(function: Callable[..., Any], free: tuple[int, ...]) -> Callable[..., Any]:
    """The function of tensors, compiled for every kind of them: dtype, rank, stride order, dims of one.

    These are what the compiler specialises on, lengths aside; it counts variants per code object and fails at the
    ninth. Of a kind, the first that come have code of their own, and all others share code for any length: code for
    fixed lengths runs about 10% faster (CPU, D = 64), and most training has one length.
    """
    kinds: dict[tuple[Any, ...], Callable[..., Any]] = {}
    seen: dict[tuple[Any, ...], Callable[..., Any]] = {}  # by what is quick to ask for; most calls are like the last

    def for_looks(looks: tuple[Any, ...], tensors: tuple[Tensor | None, ...]) -> Callable[..., Any]:
        if len(seen) == _MAX_LOOKS:
            seen.clear()
        kind = tuple(None if t is None else _kind(t) for t in tensors)
        if kind in kinds:
            seen[looks] = kinds[kind]
            return seen[looks]
        if len(kinds) == _MAX_KINDS:
            kinds.pop(next(iter(kinds)))
            seen.clear()
        kinds[kind] = _for_all_lengths(function, free)
        # what the guards would ask is what `looks` says: they need not be asked again
        seen[looks] = _own_compile(function, options={"guard_filter_fn": lambda guards: [False] * len(guards)})
        return seen[looks]

    def call(*tensors: Tensor | None) -> Any:
        looks = (
            torch.get_num_threads(),
            *[None if t is None else (t.dtype, t.device, t.shape, t.stride(), t.is_inference()) for t in tensors],
        )
        compiled = seen.get(looks)
        if compiled is None:
            # detached: the compiler must not see that some are no leaves
            return for_looks(looks, tensors)(*[None if t is None else t.detach() for t in tensors])
        return compiled(*tensors)

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
    compiled = _own_compile(function)
    gave_up: list[bool] = []

    def call(*tensors: Tensor | None) -> Any:
        if gave_up:
            return function(*tensors)
        # detached: to the guards training and evaluation shall look the same
        detached = [None if t is None else t.detach() for t in tensors]
        for t, n in zip(detached, free, strict=True):
            if t is not None:
                for dim in range(n if n >= 0 else max(t.dim() + n, 0)):
                    torch._dynamo.maybe_mark_dynamic(t, dim)
        try:
            return compiled(*detached)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            gave_up.append(True)
            logger.warning("nsphere: too many variants of %s to compile; it runs op by op now", function.__qualname__)
            return function(*tensors)

    return call


def _own_compile(function: Callable[..., Any], options: dict[str, Any] | None = None) -> Callable[..., Any]:
    # a code object of its own: the compiler counts its recompilations per code object, and gives up at eight
    code = function.__code__.replace(co_name=f"qk_norm_rope_{function.__name__}_{next(_serial)}")
    own = types.FunctionType(code, function.__globals__, code.co_name, None, function.__closure__)
    return torch.compile(own, fullgraph=True, options=options)
