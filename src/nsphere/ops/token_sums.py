"""Sums over tokens, which the gradient of whatever all tokens share is, in two stages.

On a CPU the compiler sums a column by walking down all rows of the tensor, eight or sixteen numbers wide: half of each
cache line is thrown away and fetched again, and a head_dim of 64 keeps four threads busy. Groups of tokens first, and
then their sums, are faster (docs/lab-notes.md) and round less. The order is fixed: a sum is the same from run to run.
"""

from collections.abc import Callable

import torch
from torch import Tensor

GROUP = 64
"""Tokens of a group: at d_model 512, 128 KiB of fp32, which a core's cache holds."""


def sum_to(x: Tensor, shape: torch.Size, dim: int) -> Tensor:
    """`x.sum_to_size(shape)`, by groups of the tokens along `dim` where they are summed over."""
    own = len(shape) >= -dim if dim < 0 else len(shape) >= x.dim() - dim
    if not (own and shape[dim if dim < 0 else dim - x.dim()] != 1) and _pays(x, dim):
        x = x.unflatten(dim, (-1, GROUP)).sum(dim + 1 if dim >= 0 else dim)
    return x.sum_to_size(shape)


def share(op: Callable[[Tensor, Tensor], Tensor], x: Tensor, w: Tensor, dim: int) -> Tensor:
    """op(x, w), elementwise; the gradient of a w that all tokens along `dim` >= 0 of x share goes by groups."""
    if dim < 0 or w.dim() >= x.dim() - dim or not w.requires_grad or not _plain(w) or not _pays(x, dim):
        return op(x, w)
    grouped = x.unflatten(dim, (-1, GROUP))
    own = w.reshape(*[1] * (x.dim() - dim - 1 - w.dim()), *w.shape)
    # a view per group of tokens: autograd sums over a group for each, and then over the views
    return op(grouped, own.expand(*grouped.shape[: dim + 1], 1, *own.shape)).flatten(dim, dim + 1)


def _plain(t: Tensor) -> bool:
    return type(t) in (Tensor, torch.nn.Parameter)  # of a DTensor the groups would be another's


def _pays(x: Tensor, dim: int) -> bool:
    if not torch.compiler.is_compiling() or x.device.type != "cpu" or not _plain(x) or dim < -x.dim():
        return False
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    num_tokens = x.shape[dim]
    return statically_known_true(num_tokens % GROUP == 0) and statically_known_true(num_tokens > GROUP)
