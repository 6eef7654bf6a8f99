"""A QKNorm in a module of the real Transformer Engine."""

from typing import Any

from torch import Tensor, nn

from nsphere.norms import compute_dtype
from nsphere.qk_norm import QKNorm


class InstalledNorm(nn.Module):
    """One side of a QKNorm, q or k, called where Transformer Engine calls q_norm and k_norm.

    Args:
        qk_norm: whose norm and multiplier are used.
        side: "q" or "k".
        factor: a constant on the result.
    """

    def __init__(self, qk_norm: QKNorm, side: str, factor: float = 1.0):
        super().__init__()
        self.qk_norm, self.side, self.factor = qk_norm, side, factor

    def forward(self, x: Tensor) -> Tensor:
        """X [..., H, D] → the same, in its dtype."""
        norm = self.qk_norm.q_norm if self.side == "q" else self.qk_norm.k_norm
        own = self.qk_norm.multiplier if self.side == "q" else self.qk_norm.k_multiplier
        y = self.qk_norm._norm(x, norm)
        multiplier = own() if isinstance(own, nn.Module) else own
        if multiplier is not None or self.factor != 1:
            y = y.to(compute_dtype(y)) * self.factor
            y = y if multiplier is None else y * multiplier
        return y.to(x.dtype)


def install(te_module: nn.Module, qk_norm: QKNorm) -> list[str]:
    """Put a QKNorm into the attentions of a Transformer Engine module. **Untested on real Transformer Engine.**

    Every MultiheadAttention in it gets q_norm, k_norm and qk_norm_before_rope; Transformer Engine calls the norms and
    turns q and k itself, so the fused op is not used. A softmax scale other than Transformer Engine's 1/√D is folded
    into q. All attentions share the weights: call it once per attention, with a QKNorm each, where they should not.

    Args:
        te_module: a MultiheadAttention, a TransformerLayer, or a model that holds some.
        qk_norm: built without RoPE (the module has its own); its place says before or after it.

    Returns:
        The names of the attentions that were changed.

    Raises:
        ValueError: for a QKNorm that does not fit, or a module without such an attention.
    """
    if not isinstance(qk_norm, QKNorm):
        raise ValueError(f"install got {qk_norm!r}; give a nsphere.QKNorm, built without rope=")
    if not isinstance(te_module, nn.Module):
        raise ValueError(f"install got {te_module!r}; give a module of Transformer Engine")
    if qk_norm.rope is not None:
        raise ValueError("install takes a QKNorm without rope=: Transformer Engine turns q and k itself")
    for name, own in (("multiplier", qk_norm.multiplier), ("k_multiplier", qk_norm.k_multiplier)):
        if getattr(own, "takes_positions", callable(own) and not isinstance(own, nn.Module | Tensor)):
            raise ValueError(
                f"install can't tell the {name} the positions it depends on; give a constant or a Parameter"
            )
        factor = own() if isinstance(own, nn.Module) else own
        within_head = isinstance(factor, Tensor) and factor.dim() > 0 and factor.shape[-1] > 1
        if within_head and qk_norm.place == "before":
            raise ValueError(
                f"Transformer Engine turns q and k after a norm before RoPE, and the {name} would have to come after "
                "that, as it differs within a head; give a scalar or [H, 1], or place='after'"
            )
    wanted = ("q_norm", "k_norm", "qk_norm_before_rope", "hidden_size_per_attention_head")
    found = {name: m for name, m in te_module.named_modules() if all(hasattr(m, attribute) for attribute in wanted)}
    if not found:
        raise ValueError(f"{type(te_module).__name__} holds no MultiheadAttention of Transformer Engine 2.8 or later")
    for name, attention in found.items():
        head_dim = attention.hidden_size_per_attention_head
        if head_dim != qk_norm.head_dim:
            raise ValueError(
                f"the QKNorm has head_dim={qk_norm.head_dim} and {name or 'the attention'} {head_dim}; build it so"
            )
    for attention in found.values():
        _install(attention, qk_norm)
    return list(found)


def _install(attention: Any, qk_norm: QKNorm) -> None:
    scale = qk_norm.softmax_scale * qk_norm.head_dim**0.5
    scale = 1.0 if abs(scale - 1) < 1e-12 else scale
    attention.q_norm = InstalledNorm(qk_norm, "q", scale)
    attention.k_norm = InstalledNorm(qk_norm, "k")
    attention.qk_norm_before_rope = qk_norm.place == "before"
