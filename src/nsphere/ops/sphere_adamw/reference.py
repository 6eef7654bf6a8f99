"""AdamW with the projection in plain PyTorch: torch's own step, then the norm; the truth for the fused kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from nsphere.ops.normalize_matrices.reference import normalize_matrices_


@torch.no_grad()
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
    rounded: Sequence[Tensor | None] | None,
    rounding_seed: int | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    fused: bool = False,
) -> None:
    """See `nsphere.ops.sphere_adamw`; `fused` takes torch's one kernel for all weights."""
    if found_inf is not None and found_inf.item():
        return
    grads = unscaled(weights, grads, grad_scale)
    adamw(
        list(weights),
        list(grads),
        list(exp_avgs),
        list(exp_avg_sqs),
        [],
        list(steps),
        foreach=False,
        fused=fused,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
    normalize_matrices_([(w, dim) for w, dim in zip(weights, dims, strict=True) if dim is not None])
    write_rounded(weights, rounded, rounding_seed)


def unscaled(weights: Sequence[Tensor], grads: Sequence[Tensor], grad_scale: Tensor | None) -> list[Tensor]:
    """The gradients in the weights' dtypes, GradScaler's factor taken out."""
    wide = [g.to(w.dtype) for g, w in zip(grads, weights, strict=True)]
    return wide if grad_scale is None else [g / grad_scale for g in wide]


def write_rounded(weights: Sequence[Tensor], rounded: Sequence[Tensor | None] | None, seed: int | None) -> None:
    """Write each weight, rounded, to its copy, if it has one."""
    for i, (w, copy) in enumerate(zip(weights, rounded or [None] * len(weights), strict=True)):
        if copy is None:
            continue
        if seed is not None and copy.dtype == torch.bfloat16:
            generator = torch.Generator(w.device).manual_seed(seed * 1_000_003 + i)
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
