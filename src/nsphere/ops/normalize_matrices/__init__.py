"""The weight projection of nGPT: every matrix back onto the sphere, in place."""

from collections.abc import Sequence

from torch import Tensor

from nsphere.ops.normalize_matrices import reference

__all__ = ["normalize_matrices_"]


def normalize_matrices_(matrices: Sequence[tuple[Tensor, int]]) -> None:
    """W ← w / ‖w‖₂ in place for every (matrix, dim): dim is the embedding axis, the one that is reduced.

    Args:
        matrices: pairs of a float matrix and 0 or 1. fp32 rows come out with |‖w‖ − 1| ≤ 1e-6; bf16 rows as near
            as bf16 can say. Norms are computed in fp32. Zero rows stay zero.

    Not differentiated through, and optimizer state is not touched.

    Source: arXiv 2410.01131, section 2.6.
    """
    reference.normalize_matrices_(matrices)
