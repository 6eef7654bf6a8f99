"""The weight projection of nGPT: every matrix back onto the sphere, in place."""

from collections.abc import Sequence

from torch import Tensor

from nsphere.collectives import local, split_axes
from nsphere.ops import backend as backends
from nsphere.ops.normalize_matrices import reference, sharded

__all__ = ["normalize_matrices_"]


def normalize_matrices_(matrices: Sequence[tuple[Tensor, int]], *, backend: str | None = None) -> None:
    """W ← w / ‖w‖₂ in place for every (matrix, dim): dim is the embedding axis, the one that is reduced.

    Args:
        matrices: pairs of a float matrix and 0 or 1. fp32 rows come out with |‖w‖ − 1| ≤ 1e-6; bf16 rows as near
            as bf16 can say. Norms are computed in fp32. Zero rows stay zero.
            DTensors are projected where they are, without communication unless they are split along dim; one
            all-reduce completes all those that are, so every rank must call with the same matrices.
        backend: "triton", all matrices of a kind in one launch; "reference" or "compiled", one by one; by default the
            one that measured fastest.

    Not differentiated through, and optimizer state is not touched.

    Raises:
        ValueError: for an unknown backend.
        RuntimeError: for a backend that was asked for and cannot run.

    Source: arXiv 2410.01131, section 2.6.
    """
    whole = [(local(w), dim) for w, dim in matrices if not split_axes(w, dim)]
    if not whole or not _in_few_launches(whole, backend):
        reference.normalize_matrices_(whole)
    sharded.normalize_matrices_([(w, dim) for w, dim in matrices if split_axes(w, dim)])


def _in_few_launches(matrices: list[tuple[Tensor, int]], backend: str | None) -> bool:
    """Project them with the kernels, if those are chosen and take them."""
    if backends.choose_for(matrices[0][0].device.type, backend) != "triton":
        return False
    from nsphere.ops.sphere_adamw import triton

    weights, dims = [w for w, _ in matrices], [dim for _, dim in matrices]
    reason = triton.why_not(weights, dims)
    if reason is not None:
        backends.refuse_or_log(backend, "triton", f"normalize_matrices_: {reason}")
        return False
    triton.normalize_matrices_([w.detach() for w in weights], dims)
    return True
