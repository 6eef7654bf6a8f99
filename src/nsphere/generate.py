"""Text from a model: sampling with a key/value cache, a token at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nsphere.layers import Decoder


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits."""

    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Draw among the k likeliest tokens only."""
    top_p: float | None = None
    """Draw among the likeliest tokens that together have at least this probability."""
    seed: int = 0
    """Of the draw."""

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and self.temperature != float("inf")):
            raise ValueError(f"temperature must be a number from 0 up, got {self.temperature}; 0 is greedy")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}; leave it out to draw among all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}; leave it out to draw among all tokens")


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that is drawn from: logits [..., V] → probabilities [..., V] in fp32.

    Temperature first, then top-k, then top-p on what is left. Tokens as likely as the last one kept stay in.
    """
    logits = logits.float()
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    p = logits.softmax(-1)
    if sampling.top_p is not None:
        ordered = p.sort(-1, descending=True).values
        # a token stays if those likelier than it do not yet reach top_p
        num_kept = ((ordered.cumsum(-1) - ordered) < sampling.top_p).sum(-1, keepdim=True)
        p = p.masked_fill(p < ordered.gather(-1, num_kept - 1), 0.0)
        p = p / p.sum(-1, keepdim=True)
    return p


@torch.no_grad()
def generate(
    model: Decoder,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    cache_dtype: torch.dtype = torch.float32,
) -> Iterator[int]:
    """Continue a prompt, yielding each token as it is drawn.

    The cache holds as many tokens as the model's context. When it is full, the last half of them is read in again
    and generation goes on from there: the model never sees positions that it was not trained on.

    Args:
        model: in the autocast that is on, if any.
        prompt: at least one token, fewer than the context.
        max_new_tokens: how many to draw.
        sampling: how; `Sampling()` if not given.
        cache_dtype: of keys and values; autocast's where that is on.

    Raises:
        ValueError: an empty prompt, one that fills the context, or tokens outside the vocabulary.
    """
    sampling = sampling or Sampling()
    context, vocab_size = model.config.context, model.config.vocab_size
    if not prompt:
        raise ValueError("the prompt is empty; give at least one token, such as the document separator")
    if len(prompt) >= context:
        raise ValueError(f"the prompt has {len(prompt)} tokens, the model's context is {context}; shorten the prompt")
    if not all(0 <= token < vocab_size for token in prompt):
        raise ValueError(f"the prompt has tokens outside the vocabulary of {vocab_size}; is it another tokenizer's?")
    device = model.rope_cos.device
    random = torch.Generator(device="cpu").manual_seed(sampling.seed)
    if torch.is_autocast_enabled(device.type):
        cache_dtype = torch.get_autocast_dtype(device.type)
    seen, unread = list(prompt), list(prompt)
    caches = model.make_caches(1, context, cache_dtype)
    for _ in range(max_new_tokens):
        if caches[0].num_tokens + len(unread) > context:
            unread = seen[-max(1, context // 2) :]
            caches = model.make_caches(1, context, cache_dtype)
        logits = model(torch.tensor([unread], device=device), caches=caches)[0, -1]
        # drawn on the CPU, so that a seed gives the same text on every device with the same logits
        token = int(torch.multinomial(probabilities(logits.cpu(), sampling), 1, generator=random))
        seen.append(token)
        unread = [token]
        yield token
