"""The residual step of nGPT."""

from torch import Tensor

from nsphere.ops.normalized_update import reference
from nsphere.ops.normalized_update.reference import unit

__all__ = ["normalized_update", "unit"]


def normalized_update(h: Tensor, o: Tensor, eigen_lr: Tensor) -> Tensor:
    """h′ = Norm(h + α (Norm(o) − h)): a step on the sphere from h towards the block's output.

    Args:
        h: [..., d], the hidden state; unit vectors.
        o: [..., d], what attention or the MLP returned; any length, any float dtype. A zero row is left out of
            the step (its Norm is zero).
        eigen_lr: [d] or [1] or [], fp32, the effective |α|: the caller takes the absolute value.

    Returns:
        [..., d] in h's dtype; unit vectors. Statistics and the interpolation are computed in fp32.

    Source: arXiv 2410.01131, equations 10 and 11.
    """
    return reference.normalized_update(h, o, eigen_lr)
