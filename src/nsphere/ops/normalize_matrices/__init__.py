"""The weight projection of nGPT: every matrix back onto the sphere, in place."""

from collections.abc import Sequence

from torch import Tensor

from nsphere.collectives import local, split_axes
from nsphere.ops.normalize_matrices import reference, sharded

__all__ = ["normalize_matrices_"]


def normalize_matrices_(matrices: Sequence[tuple[Tensor, int]]) -> None:
    """W ← w / ‖w‖₂ in place for every (matrix, dim): dim is the embedding axis, the one that is reduced.

    Args:
        matrices: pairs of a float matrix and 0 or 1. fp32 rows come out with |‖w‖ − 1| ≤ 1e-6; bf16 rows as near
            as bf16 can say. Norms are computed in fp32. Zero rows stay zero.
            DTensors are projected where they are, without communication unless they are split along dim; one
            all-reduce completes all those that are, so every rank must call with the same matrices.

    Not differentiated through, and optimizer state is not touched.

    Source: arXiv 2410.01131, section 2.6.
    """
    whole = [(local(w), dim) for w, dim in matrices if not split_axes(w, dim)]
    reference.normalize_matrices_(whole)
    sharded.normalize_matrices_([(w, dim) for w, dim in matrices if split_axes(w, dim)])
