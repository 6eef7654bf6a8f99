"""Keeping a model on the hypersphere while any torch optimizer trains it."""

from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from nsphere.hypersphere import project_what_is_off_, sphere_matrices
from nsphere.ops.normalize_matrices import normalize_matrices_ as project_


def keep_on_hypersphere(model: nn.Module, optimizer: Optimizer) -> RemovableHandle:
    """Put the model's matrices on the sphere now, if they are not, and project them after every `optimizer.step()`.

    Works with any torch optimizer, and with several: call it once for each. A step that is skipped (a gradient
    scaler that saw infinities) changes nothing and so projects nothing; between accumulated micro-batches nothing
    happens; a frozen matrix is not touched, not even in its last bits.

    Args:
        model: has SphereLinear, SphereEmbedding or modules marked with `on_sphere`.
        optimizer: holds at least one of those matrices.

    Returns:
        A handle; `handle.remove()` stops the projection.

    Raises:
        ValueError: the model has no such matrix, or the optimizer holds none of them.

    Source: arXiv 2410.01131, section 2.6, step 2.
    """
    matrices = list(sphere_matrices(model))
    if not matrices:
        raise ValueError("no module of this model says that a matrix belongs on the sphere; mark them with on_sphere")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(m.weight) in held for m in matrices):
        raise ValueError(
            f"this {type(optimizer).__name__} holds none of the model's {len(matrices)} sphere matrices "
            f"(the first is {matrices[0].name}); build it from this model's parameters, after any wrapping"
        )
    project_what_is_off_(model)

    def project_after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # a fused optimizer is stepped by the gradient scaler even where it saw infinities, and skips inside
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and found_inf.item():
            return
        # only what this optimizer just changed: normalising a unit row again would alter its last bits
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
        project_([(m.weight, m.dim) for m in sphere_matrices(model) if id(m.weight) in stepped])

    return optimizer.register_step_post_hook(project_after_step)
