"""q and k together: norm, RoPE and multiplier in one op."""

import torch
from torch import Tensor

from nsphere.ops import backend as backends
from nsphere.ops.qk_norm_rope import lean, reference
from nsphere.ops.qk_norm_rope.reference import SideSpec, SideTensors

__all__ = ["SideSpec", "SideTensors", "qk_norm_rope"]

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

    Raises:
        ValueError: for an unknown backend.
        RuntimeError: for a backend that was asked for and cannot run.
    """
    if backend is not None:
        backends.check_name(backend)
    if backend == "triton":
        raise RuntimeError("the backend 'triton' was asked for and cannot run: this op has no Triton kernel")
    reason = _plain(q, k, q_tensors, k_tensors, q_spec, k_spec)
    if reason is not None:
        if backend == "compiled" and reason != _TRACED:
            raise RuntimeError(f"the backend 'compiled' was asked for and cannot run: {reason}")
        return reference.forward(q, q_tensors, q_spec)[0], reference.forward(k, k_tensors, k_spec)[0]
    asked = backend or backends.asked_by_environment()
    chosen = backends.choose(q.device, asked)
    if asked == "reference":
        return reference.forward(q, q_tensors, q_spec)[0], reference.forward(k, k_tensors, k_spec)[0]
    big = asked is not None or q.numel() >= MIN_COMPILED_ELEMENTS
    shapes = (q.shape[-2], q.shape[-1]), (k.shape[-2], k.shape[-1])
    plan = lean.Plan((q_spec, k_spec), shapes, compiled=chosen == "compiled" and big)
    return lean.run((q, k), (q_tensors, k_tensors), plan)


def _plain(q: Tensor, k: Tensor, q_t: SideTensors, k_t: SideTensors, q_spec: SideSpec, k_spec: SideSpec) -> str | None:
    """Why the reference must run as it is, None where nothing stands against the others."""
    if torch.compiler.is_compiling():
        return _TRACED
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms take the reference"
    if isinstance(q_spec.over, tuple) or isinstance(k_spec.over, tuple):
        return "over a slice of the head there is the reference alone"
    tables = (q_t.cos, q_t.sin, k_t.cos, k_t.sin)
    if any(t is not None and t.requires_grad for t in tables):
        return "RoPE tables that need a gradient take the reference"
    weights = (q_t.weight, q_t.bias, q_t.multiplier, k_t.weight, k_t.bias, k_t.multiplier)
    every = (q, k, *tables, *weights)
    if q.is_meta or any(type(t) not in (Tensor, torch.nn.Parameter) for t in every if t is not None):
        return "meta tensors and subclasses of Tensor take the reference"
    return None
