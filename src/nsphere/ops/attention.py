"""Attention that also says how large its largest logit was, without a second pass over q and k.

Shape legend: B batch, H query heads, K key heads, T queries, S keys, D head_dim.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_with_max_logits(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Softmax(scale · q kᵀ) v, and the largest scale · q·k of every query head, over all pairs that may see each other.

    On CUDA, without a mask or dropout, it is FlexAttention, whose kernel keeps the maxima anyway; otherwise eager
    attention, which holds all logits.

    Args:
        q: [B, H, T, D].
        k: [B, K, S, D], K dividing H.
        v: [B, K, S, Dv].
        mask: bool, broadcastable to [B, H, T, S], true where q may see k; or floats that are added.
        is_causal: query i sees keys 0 … i.
        scale: of the logits; 1/√D by default.
        dropout_p: of the attention weights.

    Returns:
        [B, H, T, Dv] in q's dtype, and fp32 [H], without a gradient (-inf for a head that sees nothing).
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if q.is_cuda and mask is None and dropout_p == 0 and _flex_reports_maxima():
        return _flex(q, k, v, is_causal, scale)
    return _eager(q, k, v, mask, is_causal, scale, dropout_p)


def _eager(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float, dropout_p: float
) -> tuple[Tensor, Tensor]:
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logits = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * scale
    if is_causal:
        causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        mask = causal if mask is None else mask & causal
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
    of_heads = logits.detach().transpose(0, 1).reshape(heads, -1).float()
    largest = of_heads.amax(-1) if of_heads.numel() else of_heads.new_full((heads,), -math.inf)
    if mask is None:
        weights = logits.softmax(-1)
    else:  # a query that sees nothing gets 0; what is NaN stays NaN
        blind = (logits == -math.inf).all(-1, keepdim=True)
        weights = logits.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    weights = F.dropout(weights.to(v.dtype), dropout_p) if dropout_p else weights.to(v.dtype)
    return weights @ v, largest


@functools.cache
def _flex_reports_maxima() -> bool:
    from torch.nn.attention import flex_attention

    return hasattr(flex_attention, "AuxRequest")


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@functools.lru_cache(32)
def _causal_blocks(num_queries: int, num_keys: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, i, j: i >= j, None, None, num_queries, num_keys, device=device)


def _flex(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    from torch.nn.attention.flex_attention import AuxRequest

    y, aux = _compiled_flex()(
        q,
        k,
        v,
        block_mask=_causal_blocks(q.shape[2], k.shape[2], q.device) if is_causal else None,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(max_scores=True),
    )
    return y, aux.max_scores.detach().float().amax((0, 2))


def record_max_logits(module: Any, largest: Tensor) -> None:
    """Raise `module.max_logits` [H], in place, to what a forward pass in training saw; see nsphere.qk_clip."""
    if torch.is_grad_enabled():
        module.max_logits.copy_(torch.maximum(module.max_logits, largest))
