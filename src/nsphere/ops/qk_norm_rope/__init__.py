"""q and k together: norm, RoPE and multiplier in one op."""

from typing import Any

import torch
from torch import Tensor

from nsphere.ops import backend as backends
from nsphere.ops import sharded
from nsphere.ops.qk_norm_rope import lean, reference, traced
from nsphere.ops.qk_norm_rope.reference import SideSpec, SideTensors

__all__ = ["SideSpec", "SideTensors", "norm_rope", "qk_norm_rope"]

# Below this many elements of q a call costs less than the compiler's own: eager code then runs op by op.
MIN_COMPILED_ELEMENTS = 1 << 18

_TRACED = "a larger graph traces and compiles the reference"


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_spec: SideSpec,
    k_spec: SideSpec,
    q_tensors: SideTensors,
    k_tensors: SideTensors,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Y = multiplier · RoPE(weight · x / root + bias), or the norm after RoPE, for q and for k.

    Args:
        q: [B, T, H, D], floating point, any strides.
        k: [B, T, Hkv, D].
        q_spec: what happens to q: norm, rotation, their order, what a statistic spans.
        k_spec: the same for k.
        q_tensors: weight, bias, tables and multiplier of q.
        k_tensors: the same for k.
        backend: "reference", "compiled" or "triton"; by default the best that can run.

    Returns:
        (q, k) in the shapes and dtypes they came in; fp32 inside, rounded once. Gradients reach q, k, weights,
        biases and multipliers; the second derivative needs backend="reference".

    q and k may be DTensors, split along batch, tokens and, unless a statistic spans several of them, heads. What
    goes with them is whole on every rank or split alike; where the gradient of a learned DTensor is a sum over ranks
    it is a `Partial`. Nothing is sent.

    Raises:
        ValueError: for an unknown backend; for DTensors that are placed in another way.
        RuntimeError: for a backend that was asked for and cannot run.
    """
    return _run((q, k), (q_spec, k_spec), (q_tensors, k_tensors), backend)


def norm_rope(x: Tensor, spec: SideSpec, tensors: SideTensors, *, backend: str | None = None) -> Tensor:
    """One side of `qk_norm_rope` alone, for where the other is not of this kind."""
    return _run((x,), (spec,), (tensors,), backend)[0]


def _run(
    sides: tuple[Tensor, ...], specs: tuple[SideSpec, ...], values: tuple[SideTensors, ...], backend: str | None
) -> Any:
    if sharded.any_dtensor(sides):
        return _run_sharded(sides, specs, values, backend)
    if backends.choose_for(sides[0].device.type, backend) == "triton":
        from nsphere.ops.qk_norm_rope import triton

        reason = triton.why_not(sides, specs, values)
        if reason is None:
            return triton.run(sides, specs, values)
        backends.refuse_or_log(backend, "triton", f"qk_norm_rope: {reason}")
        backend = "compiled" if backends.why_not("compiled", sides[0].device.type) is None else "reference"
    reason = _plain(sides, specs, values)
    if reason is not None and backend == "compiled" and reason != _TRACED:
        raise RuntimeError(f"the backend 'compiled' was asked for and cannot run: {reason}")
    asked = backend or backends.asked_by_environment()
    chosen = "reference" if reason is not None else backends.choose(sides[0].device, asked)
    if reason is not None or asked == "reference":
        return tuple(
            traced.norm_rope(x, spec, t)
            if reason == _TRACED and asked != "reference" and traced.suits(x, spec, t)
            else reference.forward(x, t, spec)[0]
            for x, t, spec in zip(sides, values, specs, strict=True)
        )
    big = asked is not None or sides[0].numel() >= MIN_COMPILED_ELEMENTS
    shapes = tuple((x.shape[-2], x.shape[-1]) for x in sides)
    return lean.run(sides, values, lean.plan(specs, shapes, chosen == "compiled" and big))


def _run_sharded(
    sides: tuple[Tensor, ...], specs: tuple[SideSpec, ...], values: tuple[SideTensors, ...], backend: str | None
) -> tuple[Tensor, ...]:
    """Of DTensors: the op on this rank's parts, by the rules of `nsphere.ops.sharded`."""
    local_sides, parts = [], []
    for name, x, spec, t in zip("qk", sides, specs, values, strict=False):
        split_heads = spec.norm is None or spec.over == "head"
        allowed, what = ((0, 1, 2), "a norm spans a head") if split_heads else ((0, 1), "a norm spans several heads")
        sharded.check(name, x, allowed, what)
        local_sides.append(sharded.local_part(x))
        if spec.norm is not None and spec.norm.weight == "full" and sharded.split_along(x, 2):
            raise ValueError(
                f"{name} has its heads split and one weight for all of them; split neither, or give [H, D]"
            )
        # [D] and [H, D] end with a head's dims, [H] with the heads
        before = {1: 2} if spec.norm is not None and spec.norm.weight == "scalar_per_head" else {1: 3, 2: 2}
        weight, bias = (None if w is None else sharded.local_factor(w, x, before[w.dim()]) for w in (t.weight, t.bias))
        cos, sin = (_local_table(table, x) for table in (t.cos, t.sin))
        multiplier = None if t.multiplier is None else sharded.local_factor(t.multiplier, x, 4 - t.multiplier.dim())
        parts.append(SideTensors(weight, bias, cos, sin, multiplier, t.constant))
    ys = _run(tuple(local_sides), specs, tuple(parts), backend)
    return tuple(sharded.whole(y, x) for y, x in zip(ys, sides, strict=True))


def _local_table(table: Tensor | None, x: Tensor) -> Tensor | None:
    """This rank's part of [T, R/2], [B, T, R/2] or [B, T, H, R/2]."""
    if table is None or table.dim() == 4:
        return sharded.local_factor(table, x, 0)
    part = sharded.local_factor(table.unsqueeze(-2), x, 3 - table.dim())
    return None if part is None else part.squeeze(-2)


def _plain(sides: tuple[Tensor, ...], specs: tuple[SideSpec, ...], values: tuple[SideTensors, ...]) -> str | None:
    """Why the reference must run as it is, None where nothing stands against the others."""
    if torch.compiler.is_compiling():
        return _TRACED
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms take the reference"
    if any(reference.loses_the_input(spec, t) for spec, t in zip(specs, values, strict=True)):
        return "a factor of 0 takes the reference"
    tables = [table for t in values for table in (t.cos, t.sin)]
    if any(t is not None and t.requires_grad for t in tables):
        return "RoPE tables that need a gradient take the reference"
    every = [*sides, *tables, *(w for t in values for w in (t.weight, t.bias, t.multiplier))]
    if sides[0].is_meta or any(type(t) not in (Tensor, torch.nn.Parameter) for t in every if t is not None):
        return "meta tensors and subclasses of Tensor take the reference"
    return None
