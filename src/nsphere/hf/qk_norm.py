"""QK-norm from a transformers attention or config: `hf.qk_norm(model.model.layers[0].self_attn)`."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nsphere import families
from nsphere.norms import L2Clip, StatisticNorm
from nsphere.qk_norm import LearnedMultiplier, QKNorm

# attentions whose family is not the directory they live in
_FAMILY_OF_CLASS = {
    "Gemma4VisionAttention": "gemma4_vision",
    "GlmOcrVisionAttention": "glm_ocr_vision",
    "Glm5NextVisionAttention": "glm5_next_vision",
    "Dots3NoteVisionAttention": "dots3_note_vision",
    "Lfm3VlVisionAttention": "lfm3_vl_vision",
    "IdeficsPerceiverAttention": "idefics_perceiver",
    "T5Gemma2MergedAttention": "t5gemma2_merged",
    "Qwen3OmniMoeTalkerCodePredictorAttention": "qwen3_omni_moe_talker",
}


def family_of(source: Any) -> str:
    """The family's name for an attention module or a config; see nsphere.families.

    Raises:
        ValueError: for what is no known attention or config, with the way to build a QKNorm for it by hand.
    """
    if isinstance(source, nn.Module):
        kind = type(source).__name__
        parts = type(source).__module__.split(".")
        name = _FAMILY_OF_CLASS.get(kind, parts[-2] if len(parts) > 1 else "")
        if kind == "Llama4TextAttention" and not hasattr(source, "qk_norm"):
            name = "llama4_nope"
        if getattr(source, "qk_norm_type", None) == "olmo":
            name = "molmo2_olmo"
    else:
        name = getattr(source, "model_type", "")
        name = name if name in families.FAMILIES else name.removesuffix("_text")
    if name not in families.FAMILIES:
        reason = families.NOT_COVERED.get(name, "it is no family this version knows")
        raise ValueError(
            f"no QK-norm can be read from {type(source).__name__}: {reason}; build one with QKNorm(...), "
            "giving its norms as instances"
        )
    return name


def qk_norm(
    source: Any, *, rounding: Literal["family", "fused"] = "family", rope: bool | None = None, **options: Any
) -> QKNorm:
    """The QKNorm that does what a transformers attention does between its projections and its kernel.

    Args:
        source: an attention module, whose norm weights the result then shares (the same Parameters; stacked copies
            where the module keeps one per head); or a config, for a QKNorm with fresh weights.
        rounding: "family", bit for bit, or "fused", see families.qk_norm.
        rope: False for a layer without RoPE, where the module cannot tell by itself.
        **options: further arguments of QKNorm, layout first of all: before their norms transformers' q and k are
            [B, T, H, D], the default.

    Raises:
        ValueError: for what is no known attention or config.
    """
    name = family_of(source)
    family = families.get(name)
    config = source
    if isinstance(source, nn.Module):
        config = getattr(source, "config", None)
    read = _Reader(source, config)
    head_dim = read.head_dim()
    turns = read.turns() if rope is None else rope
    options.setdefault("softmax_scale", read.softmax_scale(family))
    options.setdefault("multiplier", read.multiplier(name))
    if name == "dots3_note":
        options.setdefault("over", (read.part("qk_nope_head_dim"), head_dim))
    made = families.qk_norm(
        name,
        head_dim=head_dim,
        num_heads=read.num_heads(),
        num_kv_heads=read.num_kv_heads(),
        rounding=rounding,
        eps=read.eps(family),
        rope=turns,
        rope_dim=read.rope_dim(head_dim, family),
        **options,
    )
    if isinstance(source, nn.Module):
        for ours, attribute in ((made.q_norm, family.attributes[0]), (made.k_norm, family.attributes[1])):
            if isinstance(ours, StatisticNorm) and ours.weight is not None:
                _share(ours, getattr(source, attribute))
            elif isinstance(ours, L2Clip):
                theirs = getattr(source, attribute)
                ours.max_norm = theirs.threshold
                ours.weight = getattr(theirs, "scale", None)
    return made


def v_norm(source: Any, *, rounding: Literal["family", "fused"] = "family") -> nn.Module | None:
    """The norm an attention applies to v, None if it has none."""
    made = families.v_norm(
        family_of(source), _Reader(source, getattr(source, "config", None)).head_dim(), rounding=rounding
    )
    if isinstance(made, StatisticNorm):
        made.spec = dataclasses.replace(made.spec, eps=_eps_of(source.v_norm))
        _share(made, source.v_norm)
    return made


def latent_norm(source: Any, attribute: str, *, rounding: Literal["family", "fused"] = "family") -> StatisticNorm:
    """The plain norm that does what an attention does to one of its low-rank latents, sharing its weight.

    Args:
        source: the attention.
        attribute: the name of its own norm: "q_a_layernorm", "kv_a_layernorm".
        rounding: see families.qk_norm.

    Raises:
        ValueError: for an attention without latents.
    """
    theirs = getattr(source, attribute)
    name = family_of(source)
    made = families.latent_norm(name, theirs.weight.shape[-1], eps=_eps_of(theirs), rounding=rounding)
    if not isinstance(made, StatisticNorm):
        raise ValueError(f"{type(source).__name__} has no latent norms")
    factor = "q_lora_scale" if attribute.startswith("q_") else "kv_lora_scale"
    scale = getattr(source, factor, getattr(source, f"mla_scale_{factor[:-6]}", 1.0))
    if name != "longcat_flash" or not attribute.startswith("q_"):  # there q is multiplied after its projection
        made.spec = dataclasses.replace(made.spec, scale=float(scale))
    _share(made, theirs)
    return made


class _Reader:
    """What a module or a config says of itself, under the several names transformers has for it."""

    def __init__(self, source: Any, config: Any):
        self.module: Any = source if isinstance(source, nn.Module) else None
        layers = getattr(config, "per_layer_config", None)
        layer = getattr(self.module, "layer_idx", None)
        self.config = config if not layers or layer is None else layers[layer]

    def part(self, *names: str) -> Any:
        """The first of these that the module, or else the config, has."""
        for owner in (self.module, self.config):
            for name in names:
                value = getattr(owner, name, None)
                if value is not None:
                    return value
        return None

    def head_dim(self) -> int:
        dim = self.part("qk_head_dim", "head_dim", "attention_head_size")
        return dim if dim is not None else self.part("hidden_size") // self.part("num_attention_heads")

    def num_heads(self) -> int | None:
        return self._full_width("q_norm") or self.part("num_heads", "num_attention_heads")

    def num_kv_heads(self) -> int | None:
        projection = getattr(self.module, "k_proj", None)
        projection = getattr(projection, "linear", projection)
        if isinstance(projection, nn.Linear):
            return projection.out_features // self.head_dim()
        return self._full_width("k_norm") or self.part("num_key_value_heads") or self.num_heads()

    def _full_width(self, attribute: str) -> int | None:
        """The number of heads that a norm over all of them spans, None for any other."""
        weight = getattr(getattr(self.module, attribute, None), "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 1 or weight.numel() <= self.head_dim():
            return None
        return weight.numel() // self.head_dim()

    def turns(self) -> bool:
        m = self.module
        if m is None:
            return True
        if hasattr(m, "use_rope"):
            return bool(m.use_rope)
        kind = type(m).__name__
        if kind == "AfmoeAttention":
            return bool(m.is_local_attention)
        if kind == "FlintAttention":
            return m.sliding_window is not None
        if kind.startswith(("Exaone", "Kolibri1")):
            return m.sliding_window is None or bool(m.is_sliding)
        return True

    def rope_dim(self, head_dim: int, family: families.Family) -> int | None:
        part = self.part("qk_rope_head_dim", "rotary_ndims", "rotary_dim")
        if part is not None:
            return part
        parameters = getattr(self.config, "rope_parameters", None) or {}
        kinds = getattr(self.config, "layer_types", None)
        if self.module is not None and kinds and isinstance(parameters.get(kinds[0]), dict):  # per kind of layer
            parameters = parameters.get(kinds[getattr(self.module, "layer_idx", 0)]) or {}
        share = parameters.get("partial_rotary_factor") if isinstance(parameters, dict) else None
        share = share if share is not None else getattr(self.config, "partial_rotary_factor", None)
        # "proportional" RoPE turns all pairs, some by angle 0
        proportional = isinstance(parameters, dict) and parameters.get("rope_type") == "proportional"
        return head_dim if share is None or proportional else int(head_dim * share)

    def softmax_scale(self, family: families.Family) -> Any:
        scaling = getattr(self.module, "scaling", None)
        if isinstance(scaling, float | int):
            return "rsqrt" if math.isclose(scaling, self.head_dim() ** -0.5) else scaling
        scalar = getattr(self.config, "query_pre_attn_scalar", None)
        if family.softmax_scale == "query_pre_attn_scalar" and scalar is not None:
            return scalar**-0.5
        return families.softmax_scale(family, self.head_dim())

    def eps(self, family: families.Family) -> float | None:
        if self.module is not None:
            norm = getattr(self.module, family.attributes[1], None)
            return None if norm is None or family.k is None or family.k.eps is None else _eps_of(norm)
        if family.k is None or family.k.eps is None:
            return None
        return self.part("layer_norm_eps" if family.k.statistic == "layer" else "rms_norm_eps", "norm_eps")

    def multiplier(self, name: str) -> Any:
        m, config = self.module, self.config
        if m is None:
            return None
        if name.startswith("inkling") and not m.is_sliding and config.log_scaling_n_floor is not None:
            return _log_scaling(config.log_scaling_alpha, config.log_scaling_n_floor)
        if name == "llama4_nope" and m.attn_temperature_tuning:
            return _llama4_temperature(m.attn_scale, m.floor_scale)
        if name == "mistral4":
            rope = config.rope_parameters
            return _mistral4_scale(rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"])
        if name == "mistral_large4":
            return _MistralLarge4Scale(m.softmax_scaling)
        if name in ("muse_glimmer", "muse_spark"):
            return float(m.qk_scale_factor)
        if name == "longcat_flash":
            return float(m.mla_scale_q_lora)
        if name == "timesfm2_5":
            return _TimesFmScale(m.scaling)
        if name in ("swinv2", "swin2sr"):
            made = LearnedMultiplier((m.num_attention_heads, 1), 10.0, transform="exp", max=100.0)
            made.weight = nn.Parameter(m.logit_scale.detach().reshape(-1, 1))
            return made
        return None


def _eps_of(norm: Any) -> float | None:
    if isinstance(getattr(norm, "norms", None), nn.ModuleList):  # one norm per head
        norm = norm.norms[0]
    eps = getattr(norm, "variance_epsilon", None)
    return eps if eps is not None else getattr(norm, "eps", None)


def _share(ours: StatisticNorm, theirs: Any) -> None:
    """Let `ours` use the parameters of `theirs`."""
    if isinstance(getattr(theirs, "norms", None), nn.ModuleList):
        weights = [norm.weight for norm in theirs.norms]
        ours.weight = nn.Parameter(torch.stack([w.detach() for w in weights]))
        return
    for name in ("weight", "bias"):
        if getattr(ours, name) is not None:
            value = getattr(theirs, "temp" if hasattr(theirs, "temp") else name)
            if value.shape != getattr(ours, name).shape:
                raise ValueError(
                    f"{type(theirs).__name__}.{name} has shape {tuple(value.shape)} where {ours} expects "
                    f"{tuple(getattr(ours, name).shape)}"
                )
            setattr(ours, name, value)


def _log_scaling(alpha: float, n_floor: float) -> Callable[[Tensor], Tensor]:
    return lambda positions: 1.0 + alpha * torch.log(((positions + 1) / n_floor).clamp(min=1.0))


def _llama4_temperature(scale: float, floor_scale: float) -> Callable[[Tensor], Tensor]:
    return lambda positions: torch.log1p(torch.floor((positions + 1.0) / floor_scale)) * scale + 1.0


def _mistral4_scale(beta: float, original_length: int) -> Callable[[Tensor], Tensor]:
    return lambda positions: 1 + beta * torch.log(1 + torch.floor(positions / original_length))


class _MistralLarge4Scale(nn.Module):
    """scale · log(position + 1) + bias per head, in the parameters' dtype."""

    takes_positions = True

    def __init__(self, theirs: Any):
        super().__init__()
        self.scale: nn.Parameter
        self.bias: nn.Parameter
        self.scale, self.bias = theirs.scale, theirs.bias

    def forward(self, positions: Tensor) -> Tensor:
        """Map positions [T] or [B, T] to [..., T, H, 1]."""
        log_position = (positions + 1).float().log().to(self.scale.dtype)
        return (self.scale * log_position.unsqueeze(-1) + self.bias).unsqueeze(-1)


class _TimesFmScale(nn.Module):
    """softplus(scaling) · log2(e)/√D per dim, in the parameter's dtype."""

    def __init__(self, scaling: nn.Parameter):
        super().__init__()
        self.scaling = scaling

    def forward(self) -> Tensor:
        """The factor [D]."""
        return F.softplus(self.scaling).mul(1.442695041 / math.sqrt(self.scaling.shape[-1]))
