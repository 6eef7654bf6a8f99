"""The residual step of nGPT: h ← Norm(h + |α| (Norm(o) − h))."""

import torch
from torch import Tensor

from nsphere.ops import backend as backends
from nsphere.ops import sharded
from nsphere.ops.normalized_update import lean, reference
from nsphere.ops.normalized_update.reference import unit

__all__ = ["normalized_update", "unit"]


def normalized_update(h: Tensor, o: Tensor, eigen_lr: Tensor, *, backend: str | None = None) -> Tensor:
    """h′ = Norm(h + α (Norm(o) − h)): a step on the sphere from h towards the block's output.

    Args:
        h: [..., d], the hidden state; unit vectors.
        o: [..., d], what attention or the MLP returned; any length, any float dtype. A zero row is left out of
            the step (its Norm is zero).
        eigen_lr: [d] or [1] or [], fp32, the effective |α|: the caller takes the absolute value.
        backend: "reference" or "compiled", the formula, which a graph that is being compiled fuses; or "triton".
            By default the one that measured fastest.

    Returns:
        [..., d] in h's dtype; unit vectors. Statistics and the interpolation are computed in fp32. Under "triton"
        the second derivative is an error.

    h and o may be DTensors, placed alike and split along any dim but the last; eigen_lr is then whole on every rank,
    and if a DTensor, its gradient is a `Partial` where h is split. Nothing is sent.

    Raises:
        ValueError: for an unknown backend; for DTensors that are placed in another way.
        RuntimeError: for a backend that was asked for and cannot run.

    Source: arXiv 2410.01131, equations 10 and 11.
    """
    if sharded.any_dtensor((h, o)):
        sharded.check("h", h, range(h.dim() - 1), "a norm spans the last dim")
        sharded.check("o", o, range(o.dim() - 1), "a norm spans the last dim", like=h)
        lr = sharded.local_factor(eigen_lr, h, h.dim() - eigen_lr.dim())
        assert lr is not None
        y = normalized_update(sharded.local_part(h), sharded.local_part(o), lr, backend=backend)
        return sharded.whole(y, h)
    chosen = backends.choose_for(h.device.type, backend)
    if chosen == "triton":
        from nsphere.ops.normalized_update import triton

        reason = triton.why_not(h, o, eigen_lr)
        if reason is None:
            return triton.normalized_update(h, o, eigen_lr)
        backends.refuse_or_log(backend, "triton", f"normalized_update: {reason}")
    trained = torch.is_grad_enabled() and (h.requires_grad or o.requires_grad or eigen_lr.requires_grad)
    if torch.compiler.is_compiling() and trained and chosen == "compiled" and type(h) is type(o) is Tensor:
        return lean.normalized_update(h, o, eigen_lr)
    return reference.normalized_update(h, o, eigen_lr)
