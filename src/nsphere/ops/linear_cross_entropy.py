"""The loss at the end of a language model: output projection and cross-entropy in one, in chunks of tokens.

The logits of a chunk are made, used for the loss and for both gradients, and dropped: three products, as in the plain
formula, and never more than `MAX_LOGITS` logits alive at a time.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsphere.collectives import Group, largest_logit, sum_over_words

MAX_LOGITS = 1 << 26
"""Most logits stored at a time: 256 MiB of fp32. The compiler unrolls the chunks, so there should not be hundreds."""

IGNORE = -100
"""A target that does not count, as in torch.nn.functional.cross_entropy."""


class VocabShard(NamedTuple):
    """The rows of the output embedding that this rank of a tensor-parallel group holds."""

    first: int
    group: Group


def linear_cross_entropy(
    h: Tensor, weight: Tensor, targets: Tensor, max_logits: int = MAX_LOGITS, vocab: VocabShard | None = None
) -> Tensor:
    """Mean over tokens of −log softmax(h Wᵀ)[target].

    Products run in h's dtype, or in autocast's where that is on; softmax, loss and the sum of the weight's gradient
    over chunks are fp32.

    Args:
        h: [N, d], final hidden states.
        weight: [V, d], output embedding, with any scale of the logits already folded into its rows.
        targets: [N] int64 in [0, V), or -100 where a token does not count.
        max_logits: most logits stored at a time.
        vocab: where `weight` is but this rank's rows. The ranks exchange three numbers a token, and each gets the
            whole loss, the gradient of its rows, and its share of the gradient of h, which is the caller's to sum.

    Returns:
        [], fp32. The mean over no token at all is 0.
    """
    if torch.is_autocast_enabled(h.device.type):
        compute_dtype = torch.get_autocast_dtype(h.device.type)
    else:
        compute_dtype = h.dtype
    rows = max(1, min(h.shape[0], max_logits // weight.shape[0]))
    needs_grad = torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad)
    if needs_grad:  # the gradients are made while the logits are at hand
        return _LinearCrossEntropy.apply(h, weight, targets, rows, compute_dtype, vocab)
    return _forward(h, weight, targets, rows, compute_dtype, vocab)[0]


def _count(targets: Tensor) -> Tensor:
    return (targets != IGNORE).sum().clamp_min(1)


def _forward(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: int,
    compute_dtype: torch.dtype,
    vocab: VocabShard | None,
    with_grads: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, and where asked for d loss/d h and d loss/d weight."""
    wide = torch.promote_types(compute_dtype, torch.float32)
    with torch.autocast(h.device.type, enabled=False):
        h_c, weight_c, count = h.to(compute_dtype), weight.to(compute_dtype), _count(targets)
        total = torch.zeros((), dtype=wide, device=h.device)
        h_grads, weight_grad = [], None
        for h_rows, targets_rows in zip(h_c.split(rows), targets.split(rows), strict=True):
            logits = (h_rows @ weight_c.t()).to(wide)
            counted = targets_rows != IGNORE
            index = torch.where(counted, targets_rows, 0).unsqueeze(-1)
            if vocab is None:
                logsumexp, target_logit = logits.logsumexp(-1, keepdim=True), logits.gather(-1, index)
            else:
                index = index - vocab.first
                logsumexp, target_logit = _over_all_words(logits, index, vocab.group)
            total = total + ((logsumexp - target_logit).squeeze(-1) * counted).sum()
            if with_grads:
                # softmax − onehot, as a comparison rather than a scatter: fuses, and has one order of execution
                onehot = torch.arange(weight.shape[0], device=h.device) == index
                logits_grad = ((logits - logsumexp).exp() - onehot.to(wide)) * (counted.to(wide) / count).unsqueeze(-1)
                logits_grad = logits_grad.to(compute_dtype)
                h_grads.append(logits_grad @ weight_c)
                partial = (logits_grad.t() @ h_rows).to(wide)
                weight_grad = partial if weight_grad is None else weight_grad + partial
        loss = total / count
    return loss, torch.cat(h_grads).to(h.dtype) if with_grads else None, weight_grad


def _over_all_words(logits: Tensor, index: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Logsumexp and the target's logit, each [rows, 1], where every rank has the logits of its own words."""
    last = logits.shape[-1] - 1
    here = (index >= 0) & (index <= last)
    largest = largest_logit(logits.amax(-1, keepdim=True), group)
    exponentials = (logits - largest).exp().sum(-1, keepdim=True)
    target_logit = torch.where(here, logits.gather(-1, index.clamp(0, last)), 0.0)
    exponentials, target_logit = sum_over_words(torch.cat((exponentials, target_logit), -1), group).split(1, -1)
    return largest + exponentials.log(), target_logit


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        targets: Tensor,
        rows: int,
        compute_dtype: torch.dtype,
        vocab: VocabShard | None,
    ) -> Tensor:
        loss, h_grad, weight_grad = _forward(h, weight, targets, rows, compute_dtype, vocab, with_grads=True)
        assert h_grad is not None and weight_grad is not None
        ctx.save_for_backward(h_grad, weight_grad.to(weight.dtype))
        return loss

    @staticmethod
    @once_differentiable  # a second derivative would take the stored gradients for constants: an error is better
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        h_grad, weight_grad = ctx.saved_tensors
        return h_grad * grad, weight_grad * grad, None, None, None, None
