"""Embedding look-up whose gradient is the same from run to run, compiled or not.

The compiler turns the embedding's gradient into atomic additions, whose order, and so whose last bits, change from
run to run with several threads. The eager kernel gives each thread its own rows of the table. It is kept opaque to
the compiler here; the forward pass stays an ordinary, fusible look-up.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("nsphere::embedding_grad", mutates_args=())
def embedding_grad(grad: Tensor, tokens: Tensor, num_embeddings: int) -> Tensor:
    """Sum the rows of `grad` [..., d] that share a token: [num_embeddings, d]."""
    return torch.ops.aten.embedding_dense_backward(grad.contiguous(), tokens, num_embeddings, -1, False)


@embedding_grad.register_fake
def _(grad: Tensor, tokens: Tensor, num_embeddings: int) -> Tensor:
    return grad.new_empty(num_embeddings, grad.shape[-1])


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.num_embeddings = weight.shape[0]
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (tokens,) = ctx.saved_tensors
        return torch.ops.nsphere.embedding_grad(grad, tokens, ctx.num_embeddings), None


def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """weight[tokens] with a deterministic gradient.

    Args:
        tokens: integer [...], each in [0, V).
        weight: [V, d], any float dtype.

    Returns:
        [..., d] in the weight's dtype.
    """
    if torch.is_grad_enabled() and weight.requires_grad:
        return _Embedding.apply(weight, tokens)
    return F.embedding(tokens, weight)
