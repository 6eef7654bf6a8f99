"""One optimizer step of AdamW, with the projection onto the sphere in the same pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nsphere.ops import backend as backends
from nsphere.ops.sphere_adamw import cpu, reference
from nsphere.ops.sphere_adamw.reference import Step

__all__ = ["sphere_adamw_"]


def sphere_adamw_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    dims: Sequence[int | None],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    rounded: Sequence[Tensor | None] | None = None,
    rounding_seed: int | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """AdamW as torch has it for every weight, then w ← w / ‖w‖₂ along its dim, in place.

        m ← β₁ m + (1 − β₁) g;  v ← β₂ v + (1 − β₂) g²
        w ← (1 − lr · weight_decay) w − lr · m̂ / (√v̂ + eps),  m̂ = m / (1 − β₁ᵗ), v̂ = v / (1 − β₂ᵗ)
        w ← w / ‖w‖₂ along `dim`

    Args:
        weights: fp32 tensors, stepped in place; the masters where `rounded` holds what the model computes with.
        grads: in the shapes of the weights, any float dtype; read only.
        exp_avgs: m, in the shapes and dtype of the weights, in place.
        exp_avg_sqs: v, likewise.
        steps: t of each weight, 0-dim fp32 on its device, as torch's fused AdamW keeps it; counted up here.
        dims: the embedding axis of each matrix, along which it leaves with norm 1 (a zero vector stays
            zero); None for a weight that is not on the sphere (the learned scales).
        lr: the learning rate; a 0-dim tensor may be given.
        betas: (β₁, β₂).
        eps: added to √v̂.
        weight_decay: decoupled, as in AdamW.
        rounded: for each weight a tensor of its shape to which the new weight is also written, rounded to that
            tensor's dtype; None for none.
        rounding_seed: rounds bf16 copies stochastically, up or down with the probability that makes the mean
            exact; give another seed every step. None rounds to the nearest.
        grad_scale: 0-dim; gradients are divided by it (GradScaler).
        found_inf: 0-dim; where it is not 0 nothing changes, not even the step counts.
        backend: "reference", torch's AdamW weight by weight and then the projection; "compiled", on CPU one pass in
            C++, elsewhere torch's fused AdamW and then the projection; "triton", all weights of a kind in one launch;
            by default the one that measured fastest.

    Raises:
        ValueError: for lists of unequal length, a weight that is not fp32, moments of another dtype, or a dim it does
            not have; for an unknown backend.
        RuntimeError: for a backend that was asked for and cannot run.

    Source: arXiv 2410.01131, section 2.6; AdamW: arXiv 1711.05101.
    """
    if rounded is None:
        rounded = [None] * len(weights)
    step = Step(
        weights,
        grads,
        exp_avgs,
        exp_avg_sqs,
        steps,
        dims,
        lr,
        betas,
        eps,
        weight_decay,
        rounded,
        rounding_seed,
        grad_scale,
        found_inf,
    )
    check(step)
    if not weights:
        return
    device = weights[0].device
    chosen = backends.choose_for(device.type, backend)
    if chosen == "triton":
        from nsphere.ops.sphere_adamw import triton

        copies = [r for r in rounded if r is not None]
        reason = triton.why_not(weights, dims, [*exp_avgs, *exp_avg_sqs], [*grads, *copies])
        if reason is None:
            return triton.step_(step)
        backends.refuse_or_log(backend, "triton", f"sphere_adamw_: {reason}")
    if chosen == "compiled" and device.type == "cpu":
        reason = cpu.why_not(step)
        if reason is None:
            return cpu.sphere_adamw_(step)
        backends.refuse_or_log(backend, "compiled", f"sphere_adamw_: {reason}")
    # where there is no pass of our own the compiled backend is torch's kernel for all weights, and then the projection
    reference.sphere_adamw_(step, fused=chosen == "compiled" and device.type != "cpu")


def check(step: Step) -> None:
    """Raises ValueError before anything is written."""
    weights, grads, exp_avgs, exp_avg_sqs, steps, dims = step[:6]
    lengths = [len(each) for each in (grads, exp_avgs, exp_avg_sqs, steps, dims, step.rounded)]
    if any(n != len(weights) for n in lengths):
        raise ValueError(f"sphere_adamw_ got {len(weights)} weights and lists of {lengths}; give one entry per weight")
    for i, (w, dim) in enumerate(zip(weights, dims, strict=True)):
        if w.dtype != weights[0].dtype or w.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"weight {i} is {w.dtype}; AdamW needs fp32 masters: give those as weights, and the low-precision "
                "copies as rounded"
            )
        if dim is not None and not 0 <= dim < w.dim():
            raise ValueError(
                f"weight {i} of shape {tuple(w.shape)} has dim={dim}; give one of its dims, or None "
                "for a weight that is not on the sphere"
            )
        copy = step.rounded[i]
        like = [grads[i], exp_avgs[i], exp_avg_sqs[i], *([] if copy is None else [copy])]
        if any(t.shape != w.shape for t in like):
            raise ValueError(
                f"weight {i} is {tuple(w.shape)} and what goes with it {[tuple(t.shape) for t in like]}; "
                "give equal shapes"
            )
        if any(m.dtype != w.dtype for m in (exp_avgs[i], exp_avg_sqs[i])):
            raise ValueError(
                f"weight {i} is {w.dtype}, and its moments are {exp_avgs[i].dtype} and {exp_avg_sqs[i].dtype}; "
                "give moments in the weight's dtype"
            )
