"""AdamW with the projection in plain PyTorch: torch's own step, then the norm; the truth for the fused kernels."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from nsphere.ops.normalize_matrices.reference import normalize_matrices_


class Step(NamedTuple):
    """What a step is made from and what it changes; see `nsphere.ops.sphere_adamw`."""

    weights: Sequence[Tensor]
    grads: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    steps: Sequence[Tensor]
    dims: Sequence[int | None]
    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    rounded: Sequence[Tensor | None]
    rounding_seed: int | None
    grad_scale: Tensor | None
    found_inf: Tensor | None


@torch.no_grad()
def sphere_adamw_(step: Step, fused: bool = False) -> None:
    """See `nsphere.ops.sphere_adamw`; `fused` takes torch's one kernel for all weights."""
    if step.found_inf is not None and step.found_inf.item():
        return
    adamw(
        list(step.weights),
        unscaled(step),
        list(step.exp_avgs),
        list(step.exp_avg_sqs),
        [],
        list(step.steps),
        foreach=False,
        fused=fused,
        amsgrad=False,
        beta1=step.betas[0],
        beta2=step.betas[1],
        lr=step.lr,
        weight_decay=step.weight_decay,
        eps=step.eps,
        maximize=False,
    )
    normalize_matrices_([(w, dim) for w, dim in zip(step.weights, step.dims, strict=True) if dim is not None])
    write_rounded(step)


def unscaled(step: Step) -> list[Tensor]:
    """The gradients in the weights' dtypes, GradScaler's factor taken out."""
    wide = [g.to(w.dtype) for g, w in zip(step.grads, step.weights, strict=True)]
    return wide if step.grad_scale is None else [g / step.grad_scale for g in wide]


def write_rounded(step: Step) -> None:
    """Write each weight, rounded, to its copy, if it has one."""
    for i, (w, copy) in enumerate(zip(step.weights, step.rounded, strict=True)):
        if copy is None:
            continue
        if step.rounding_seed is not None and copy.dtype == torch.bfloat16:
            generator = torch.Generator(w.device).manual_seed(step.rounding_seed * 1_000_003 + i)
            copy.copy_(round_stochastically(w, generator))
        else:
            copy.copy_(w)


def round_stochastically(w: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """fp32 → bf16, up with the probability that makes the mean exact.

    bf16 is the upper half of an fp32: a uniform number below 2^16 is added to the bits, and the lower half cut off.
    """
    noise = torch.randint(0, 1 << 16, w.shape, dtype=torch.int32, device=w.device, generator=generator)
    bits = (w.float().contiguous().view(torch.int32) + noise) & -(1 << 16)
    return torch.where(w.isfinite(), bits.view(torch.float32), w.float()).to(torch.bfloat16)
