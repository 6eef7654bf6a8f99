"""The weight projection in plain PyTorch: w ← w / ‖w‖₂ along one dim of each matrix, in place."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def normalize_matrices_(matrices: Sequence[tuple[Tensor, int]]) -> None:
    """See `nsphere.ops.normalize_matrices`."""
    for w, dim in matrices:
        wide = w.to(torch.promote_types(w.dtype, torch.float32))
        # on CPU over twice as fast as linalg.vector_norm, which crawls along dim 0 (docs/lab-notes.md)
        norm = (wide * wide).sum(dim, keepdim=True).sqrt()
        # a zero vector has no direction: it stays zero rather than turning into NaN
        w.div_(torch.where(norm > 0, norm, 1.0))
