"""Transformer Engine's DotProductAttention: layouts, masks and windows around torch's attention.

Shape legend: B batch, T queries, S keys, H query heads, K key heads, D head_dim, N tokens of packed sequences.
"""

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nsphere.ops.attention import attention_with_max_logits
from nsphere.te.base import TEModule
from nsphere.te.checks import HEAD_DIMS, check_arguments, check_groups, check_masks, check_q_k_v, mask_type

Masks = Tensor | tuple[Tensor, Tensor] | None
Window = tuple[int, int] | None


class DotProductAttention(TEModule):
    """Softmax(scale · q kᵀ + mask) v.

    Args:
        num_attention_heads: H.
        kv_channels: D, or (D of q and k, D of v).
        num_gqa_groups: K; H by default.
        attention_dropout: probability of dropping an attention weight.
        qkv_format: "sbhd", "bshd" or "thd" (packed sequences).
        attn_mask_type: "no_mask", "padding", "causal", "padding_causal", "causal_bottom_right",
            "padding_causal_bottom_right" or "arbitrary".
        window_size: (left, right), how many keys before and after its own place a query sees; −1 is all.
        bottom_right_diagonal: whether a window's diagonal ends in the lower right corner; the mask type decides where
            it is causal, and the default is True elsewhere.
        attention_type: "self" or "cross".
        softmax_scale: 1/√D by default.
        return_max_logit: return (output, fp32 [H]), the largest logit of every head.
        **others: Transformer Engine's, which raise ValueError unless at their defaults.

    Raises:
        ValueError: for what is not implemented, or does not fit.
    """

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: Window = None,
        bottom_right_diagonal: bool | None = None,
        softcap: float = 0.0,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: Any = None,
        cp_global_ranks: Any = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        return_max_logit: bool = False,
        name: str | None = None,
    ):
        check_arguments("DotProductAttention", locals(), other_rules={"kv_channels": HEAD_DIMS})
        check_groups("DotProductAttention", num_attention_heads, num_gqa_groups)
        super().__init__()
        self.num_attention_heads = num_attention_heads
        self.num_gqa_groups = num_attention_heads if num_gqa_groups is None else num_gqa_groups
        self.attn_mask_type = mask_type(attn_mask_type)
        self.qkv_format, self.attention_type = qkv_format, attention_type
        self.window_size, self.bottom_right_diagonal = window_size, bottom_right_diagonal
        self.attention_dropout, self.return_max_logit = attention_dropout, return_max_logit
        qk_width, v_width = (kv_channels, kv_channels) if isinstance(kv_channels, int) else kv_channels
        self.head_dims = (qk_width, v_width)
        self.softmax_scale = 1 / math.sqrt(qk_width) if softmax_scale is None else softmax_scale
        self.layer_number, self.name = 1 if layer_number is None else layer_number, name

    def forward(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        attention_mask: Masks = None,
        qkv_format: str | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Tensor | None = None,
        cu_seqlens_kv_padded: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        window_size: Window = None,
        bottom_right_diagonal: bool | None = None,
        softcap: float | None = None,
        checkpoint_core_attention: bool = False,
        core_attention_bias_type: str = "no_bias",
        core_attention_bias: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        fast_zero_fill: bool = True,
        inference_params: Any = None,
        pad_between_seqs: bool | None = None,
        fp8_output: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend.

        Args:
            query_layer: [T, B, H, D], [B, T, H, D] or [N, H, D], as qkv_format says.
            key_layer: as query_layer, with K heads and S keys.
            value_layer: as key_layer.
            attention_mask: bool, **true where masked**. For padding masks [B, 1, 1, T], or for cross-attention two of
                them, [B, 1, 1, T] and [B, 1, 1, S]; for "arbitrary" broadcastable to [B, H, T, S].
            qkv_format: instead of the module's.
            cu_seqlens_q: int [B + 1], the sequences' ends: of packed sequences, or in place of a padding mask.
            cu_seqlens_kv: as cu_seqlens_q; the same by default.
            cu_seqlens_q_padded: where packed sequences begin, if there is padding between them.
            cu_seqlens_kv_padded: as cu_seqlens_q_padded.
            attn_mask_type: instead of the module's; also window_size and bottom_right_diagonal.
            checkpoint_core_attention: recompute the attention in the backward pass.
            **others: Transformer Engine's; those that only save time are accepted, the rest raise ValueError.

        Returns:
            [T, B, H·D], [B, T, H·D] or [N, H·D]; 0 for queries that see no key. With return_max_logit, also fp32 [H].
        """
        layout = self.qkv_format if qkv_format is None else qkv_format
        kind = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        window_size = self.window_size if window_size is None else window_size
        check_arguments(
            "DotProductAttention",
            {
                "qkv_format": layout,
                "attn_mask_type": kind,
                "window_size": window_size,
                "bottom_right_diagonal": bottom_right_diagonal,
                "checkpoint_core_attention": checkpoint_core_attention,
                "softcap": softcap,
                "core_attention_bias_type": core_attention_bias_type,
                "core_attention_bias": core_attention_bias,
                "alibi_slopes": alibi_slopes,
                "inference_params": inference_params,
                "fp8_output": fp8_output,
            },
        )
        kind = mask_type(kind)
        check_q_k_v(
            "DotProductAttention", layout, query_layer, key_layer, value_layer,
            self.num_attention_heads, self.num_gqa_groups, self.head_dims,
        )  # fmt: skip
        ends = {
            "cu_seqlens_q": cu_seqlens_q,
            "cu_seqlens_kv": cu_seqlens_kv,
            "cu_seqlens_q_padded": cu_seqlens_q_padded,
            "cu_seqlens_kv_padded": cu_seqlens_kv_padded,
        }
        check_masks(
            "DotProductAttention", layout, kind, attention_mask, ends, query_layer, key_layer, self.num_attention_heads
        )  # fmt: skip
        window = settle_window(kind, window_size)
        bottom = self.bottom_right_diagonal if bottom_right_diagonal is None else bottom_right_diagonal
        bottom = "bottom_right" in kind or ("causal" not in kind and bottom is not False)
        cu_seqlens_kv = cu_seqlens_q if cu_seqlens_kv is None else cu_seqlens_kv
        attend: Callable[..., tuple[Tensor, Tensor]] = self._attend
        if checkpoint_core_attention and torch.is_grad_enabled():
            attend = functools.partial(checkpoint, self._attend, use_reentrant=False)
        if layout == "thd":
            assert cu_seqlens_q is not None and cu_seqlens_kv is not None
            spans = (
                _spans(cu_seqlens_q, cu_seqlens_q_padded, query_layer.shape[0]),
                _spans(cu_seqlens_kv, cu_seqlens_kv_padded, key_layer.shape[0]),
            )
            y, largest = self._packed(attend, query_layer, key_layer, value_layer, *spans, kind, window, bottom)
        else:
            heads, tokens = ((1, 2, 0, 3), (2, 0, 1, 3)) if layout == "sbhd" else ((0, 2, 1, 3), (0, 2, 1, 3))
            q, k, v = (x.permute(heads) for x in (query_layer, key_layer, value_layer))
            allowed = self._allowed(q, k, attention_mask, cu_seqlens_q, cu_seqlens_kv, kind, window, bottom)
            is_causal = allowed is None and "causal" in kind
            y, largest = attend(q, k, v, allowed, is_causal)
            y = y.permute(tokens)
        y = y.flatten(-2)
        return (y, largest) if self.return_max_logit else y

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, is_causal: bool
    ) -> tuple[Tensor, Tensor]:
        """[B, H, T, D] and [B, K, S, D] → [B, H, T, D], and the largest logits where they are asked for."""
        dropout = self.attention_dropout if self.training else 0.0
        blind = None
        if allowed is not None:  # softmax has no answer where nothing may be seen: look at all, then drop it
            blind = ~allowed.any(-1, keepdim=True)
            allowed = allowed if self.return_max_logit else allowed | blind
        if self.return_max_logit:
            y, largest = attention_with_max_logits(
                q, k, v, mask=allowed, is_causal=is_causal, scale=self.softmax_scale, dropout_p=dropout
            )
        else:
            y = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=allowed,
                is_causal=is_causal,
                scale=self.softmax_scale,
                dropout_p=dropout,
                enable_gqa=k.shape[1] != q.shape[1],
            )
            largest = q.new_empty(0)
        return (y if blind is None else y.masked_fill(blind, 0.0)), largest

    def _packed(
        self,
        attend: Callable[..., tuple[Tensor, Tensor]],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_spans: list[tuple[int, int]],
        k_spans: list[tuple[int, int]],
        kind: str,
        window: tuple[int, int],
        bottom: bool,
    ) -> tuple[Tensor, Tensor]:
        """Each sequence alone, [N, H, D] → [N, H, D]; what lies between them stays 0."""
        pieces, maxima, at = [], [], 0
        inner = kind.replace("padding_", "") if kind != "padding" else "no_mask"
        for (start, stop), (k_start, k_stop) in zip(q_spans, k_spans, strict=True):
            one_q = q[start:stop].transpose(0, 1)[None]
            one_k, one_v = (x[k_start:k_stop].transpose(0, 1)[None] for x in (k, v))
            allowed = self._allowed(one_q, one_k, None, None, None, inner, window, bottom)
            y, largest = attend(one_q, one_k, one_v, allowed, allowed is None and "causal" in inner)
            pieces += [v.new_zeros(start - at, q.shape[1], v.shape[2]), y[0].transpose(0, 1)]
            maxima.append(largest)
            at = stop
        y = torch.cat((*pieces, v.new_zeros(q.shape[0] - at, q.shape[1], v.shape[2])))
        return y, torch.stack(maxima).amax(0) if self.return_max_logit else maxima[0]

    def _allowed(
        self,
        q: Tensor,
        k: Tensor,
        attention_mask: Masks,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_kv: Tensor | None,
        kind: str,
        window: tuple[int, int],
        bottom: bool,
    ) -> Tensor | None:
        """Where q may see k, bool [B or 1, H or 1, T, S]; None where torch's own causal or no mask says it."""
        T, S = q.shape[2], k.shape[2]
        if kind == "no_mask" and window == (-1, -1):
            return None
        if kind == "causal" and window == (-1, 0):
            return None
        allowed: Tensor | None = None
        offset: int | Tensor = S - T if bottom else 0
        if "padding" in kind:
            q_real, k_real = self._real(attention_mask, cu_seqlens_q, cu_seqlens_kv, T, S, q.device)
            allowed = q_real[:, None, :, None] & k_real[:, None, None, :]
            if bottom:
                offset = (k_real.sum(-1) - q_real.sum(-1))[:, None, None, None]
        elif kind == "arbitrary":
            assert isinstance(attention_mask, Tensor)
            allowed = ~attention_mask
        left, right = window
        if left >= 0 or right >= 0:
            place = torch.arange(T, device=q.device)[:, None] + offset
            key = torch.arange(S, device=q.device)
            near = torch.ones((), dtype=torch.bool, device=q.device)
            if left >= 0:
                near = near & (key >= place - left)
            if right >= 0:
                near = near & (key <= place + right)
            near = near if near.dim() == 4 else near[None, None]
            allowed = near if allowed is None else allowed & near
        return allowed

    def _real(
        self,
        attention_mask: Masks,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_kv: Tensor | None,
        T: int,
        S: int,
        device: torch.device,
    ) -> tuple[Tensor, Tensor]:
        """Which queries [B, T] and keys [B, S] are no padding."""
        if attention_mask is not None:
            q_mask, k_mask = (attention_mask, attention_mask) if isinstance(attention_mask, Tensor) else attention_mask
            return ~q_mask[:, 0, 0], ~k_mask[:, 0, 0]
        assert cu_seqlens_q is not None and cu_seqlens_kv is not None
        return (
            torch.arange(T, device=device) < cu_seqlens_q.to(device).diff()[:, None],
            torch.arange(S, device=device) < cu_seqlens_kv.to(device).diff()[:, None],
        )


def settle_window(kind: str, window: Window) -> tuple[int, int]:
    """The window that goes with a mask type, as Transformer Engine settles it."""
    causal = "causal" in kind
    if window is None:
        return (-1, 0) if causal else (-1, -1)
    left, right = window
    if causal and right != 0:
        warnings.warn(f"window_size {window} looks ahead, which attn_mask_type={kind!r} forbids", stacklevel=3)
        return (left, 0)
    if not causal and (left, right) == (-1, 0):
        warnings.warn(f"window_size (-1, 0) is a causal mask and attn_mask_type is {kind!r}: ignored", stacklevel=3)
        return (-1, -1)
    return (left, right)


def _spans(ends: Tensor, starts: Tensor | None, num_tokens: int) -> list[tuple[int, int]]:
    """(start, stop) of every packed sequence."""
    lengths: list[int] = ends.diff().tolist()
    first: list[int] = (ends if starts is None else starts)[:-1].tolist()
    spans = [(start, start + length) for start, length in zip(first, lengths, strict=True)]
    previous = 0
    for start, stop in spans:
        if not previous <= start <= stop <= num_tokens or first[0] != 0:
            raise ValueError(
                f"DotProductAttention got packed sequences {spans}, which do not follow each other within {num_tokens} "
                "tokens; give cu_seqlens that begin with 0, grow, and end with at most the number of tokens"
            )
        previous = stop
    return spans


def packed_positions(starts: Tensor, num_tokens: int) -> Tensor:
    """The place of every packed token in its sequence, int64 [N]; `starts` [B + 1] are the sequences' beginnings.

    The last of them is where the last sequence ends; tokens behind it belong to none, and their place is 0.
    """
    token = torch.arange(num_tokens, device=starts.device)
    begun = torch.searchsorted(starts[:-1].contiguous(), token, right=True) - 1
    return torch.where(token < starts[-1], token - starts.long()[begun], 0)
