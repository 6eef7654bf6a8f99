"""The largest attention logits of a transformers model, for nsphere.qk_clip."""

from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from nsphere.ops.attention import attention_with_max_logits, record_max_logits

IMPLEMENTATION = "nsphere_max_logits"
_UNKNOWN = ("softcap", "s_aux", "sinks", "position_bias")


def report_max_logits(model: Any) -> None:
    """Let a model's attentions note the largest logit of every head, as `QKClip` needs.

    Sets its attention implementation to one that gives the same result as eager attention, and reads the maxima off the
    logits on its way; `model.set_attn_implementation("sdpa")` goes back.

    Args:
        model: a transformers model whose attention goes through transformers' attention functions.

    Raises:
        ValueError: for anything else.
    """
    if not hasattr(model, "set_attn_implementation"):
        raise ValueError(f"report_max_logits takes a transformers model, got {type(model).__name__}")
    AttentionInterface.register(IMPLEMENTATION, _attend)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    model.set_attn_implementation(IMPLEMENTATION)
    for module in model.modules():
        if hasattr(module, "is_causal") and "max_logits" not in module._buffers:
            module.register_buffer("max_logits", None, persistent=False)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One of transformers' attention functions: [B, H, T, D] → [B, T, H, D]."""
    unknown = [name for name in _UNKNOWN if kwargs.get(name) is not None]
    if unknown:
        raise ValueError(
            f"{type(module).__name__} uses {', '.join(unknown)} in its attention, which {IMPLEMENTATION} does not do; "
            "choose another attention implementation"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    y, largest = attention_with_max_logits(
        query,
        key,
        value,
        mask=attention_mask,
        is_causal=causal and attention_mask is None and query.shape[2] > 1,
        scale=scaling,
        dropout_p=dropout,
    )
    if getattr(module, "max_logits", None) is not None:
        record_max_logits(module, largest)
    return y.transpose(1, 2).contiguous(), None
