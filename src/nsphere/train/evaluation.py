"""How good a trained model is: loss, perplexity and bits per byte, by context length."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nsphere.layers import Decoder
from nsphere.train.batches import TokenSplit, val_batches


@dataclass(frozen=True)
class ContextLoss:
    """The loss in windows of one length."""

    context: int
    """Tokens of a window; each token sees those before it in its window."""
    num_tokens: int
    """How many were predicted."""
    loss: float
    """Nats per token."""
    perplexity: float
    """exp(loss)."""
    bits_per_byte: float | None
    """None where the data does not say how many bytes a token stands for."""


def usual_contexts(model: Decoder, num_tokens: int) -> list[int]:
    """A quarter, a half, once, twice and four times the trained context, as far as data and model have such windows."""
    context, longest = model.config.context, model.max_length or num_tokens
    asked = [context // 4, context // 2, context, 2 * context, 4 * context]
    return sorted({c for c in asked if 1 <= c < num_tokens and c <= longest})


@torch.no_grad()
def loss_by_context(
    model: Decoder,
    split: TokenSplit,
    contexts: Sequence[int],
    *,
    num_tokens: int | None = None,
    batch_tokens: int = 4096,
    bytes_per_token: float | None = None,
) -> list[ContextLoss]:
    """The mean loss over windows of each length, laid side by side and spread evenly over the split.

    Beyond the context that the model was trained at this is length extrapolation (nGPT's paper measures it too).

    Args:
        model: in the autocast that is on, if any.
        split: what is predicted.
        contexts: window lengths.
        num_tokens: how many tokens to predict at each length, about; the whole split if not given.
        batch_tokens: tokens of a forward pass, at least one window.
        bytes_per_token: of the split, for bits per byte.

    Raises:
        ValueError: no length, or one that is below 1, that the split has no window of, or that the model has no
            positions for.
    """
    if not contexts:
        raise ValueError("there is no context length to evaluate at; give at least one")
    for context in contexts:
        split.num_windows(context)
        model.check_length(context)
    found = []
    for context in contexts:
        batches = val_batches(
            split,
            context=context,
            batch_size=max(1, batch_tokens // context),
            num_sequences=None if num_tokens is None else max(1, num_tokens // context),
        )
        total, count = 0.0, 0
        for batch in batches:
            inputs, targets, document_ids = batch.to(model.device)
            total += model.loss(inputs, targets, document_ids).item() * targets.numel()
            count += targets.numel()
        loss = total / count
        bits = None if bytes_per_token is None else loss / math.log(2) / bytes_per_token
        found.append(ContextLoss(context, count, loss, math.exp(min(loss, 700.0)), bits))
    return found
