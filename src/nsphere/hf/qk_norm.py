"""QK-norm from a transformers attention or config: `hf.qk_norm(model.model.layers[0].self_attn)`."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nsphere import families
from nsphere.multiplier import LearnedMultiplier
from nsphere.norms import L2Clip, StatisticNorm
from nsphere.qk_norm import QKNorm

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
# and configs whose model_type is not their family's name, nor that with "_text" behind it
_FAMILY_OF_MODEL_TYPE = {
    "qwen3_omni_moe_talker_code_predictor": "qwen3_omni_moe_talker",
    "dots3_note_vision_encoder": "dots3_note_vision",
    "mllama_text_model": "mllama",
    "pe_audio_encoder": "pe_audio",
    "pe_video_encoder": "pe_video",
    "pe_audio_video_encoder": "pe_audio_video",
    "step3p5": "step3p7",
    "internvl_vision": "internvl",
    "qianfan_ocr_vision": "qianfan_ocr",
    "nemotron3_5_transcribe_asr_audio": "nemotron3_5_transcribe",
    "janus_vision_model": "janus",
}
_SWITCHES = ("use_qk_norm", "qk_layernorm", "qk_layer_norms")
# their modules leave eps at the norm's own default, whatever the config says
_EPS_OF_THE_CLASS = {"esmc", "chameleon", "nemotron3_5_transcribe", "janus", "internvl", "qianfan_ocr"}
# RoPE on some layers only
_SLIDING_LAYERS_TURN = {"exaone4", "exaone4_5", "exaone_moe", "kolibri1", "afmoe", "flint"}
_GIVE_THE_MODULE = "give the attention module in place of the config"


def family_of(source: Any) -> str:
    """The family's name for an attention module or a config; see nsphere.families.

    Raises:
        ValueError: for what is no known attention or config, with the way to build a QKNorm for it by hand.
    """
    if isinstance(source, nn.Module):
        kind = type(source).__name__
        parts = type(source).__module__.split(".")
        name = _FAMILY_OF_CLASS.get(kind, parts[-2] if len(parts) > 1 else "")
        if kind == "Llama4TextAttention" and not source.use_rope:
            name = "llama4_nope"
    else:
        source = _text_config(source)
        name = getattr(source, "model_type", "")
        name = name if name in families.FAMILIES else name.removesuffix("_text")
        name = _FAMILY_OF_MODEL_TYPE.get(name, name)
    if getattr(source, "qk_norm_type", None) == "olmo":
        name = "molmo2_olmo"
    if name not in families.FAMILIES:
        reason = families.NOT_COVERED.get(name, "it is no family this version knows")
        raise ValueError(
            f"no QK-norm can be read from {type(source).__name__}: {reason}; build one with QKNorm(...), "
            "giving its norms as instances"
        )
    return name


def qk_norm(
    source: Any,
    *,
    layer_idx: int | None = None,
    rounding: Literal["family", "fused"] = "family",
    rope: bool | None = None,
    **options: Any,
) -> QKNorm:
    """The QKNorm that does what a transformers attention does between its projections and its kernel.

    Args:
        source: an attention module, whose norm weights the result then shares (the same Parameters; stacked copies
            where the module keeps one per head); or a config, for a QKNorm with fresh weights. What a config does
            not say is refused, never guessed; a composite config stands for its text_config.
        layer_idx: which layer's, for a config whose layers differ. A module knows its own.
        rounding: "family", bit for bit, or "fused", see families.qk_norm.
        rope: False for a layer without RoPE, where the module cannot tell by itself.
        **options: further arguments of families.qk_norm and QKNorm, in place of what is read; layout first of all:
            before their norms transformers' q and k are [B, T, H, D], the default.

    A module without a norm of k (layers that share an earlier layer's keys) gets k_norm None: use its q alone. The
    tables of a scaled RoPE ("yarn", "llama3") are the model's own rotary module's, not RopeSpec.tables'.

    Raises:
        ValueError: for what is no known attention or config, for one whose QK-norm is switched off, and for a config
            that leaves a norm, multiplier, scale, θ or number of rotated dims open.
    """
    name = family_of(source)
    family = families.get(name)
    read = _Reader(source, family, layer_idx)
    read.check(options)
    head_dim = read.head_dim()
    turns = (read.turns() if rope is None else rope) and family.rope is not None
    if "softmax_scale" not in options:
        options["softmax_scale"] = read.softmax_scale()
    if "multiplier" not in options:
        options["multiplier"] = read.multiplier()
    if turns and "rope_base" not in options:
        options["rope_base"] = read.rope_base()
    if turns and "rope_dim" not in options:
        options["rope_dim"] = read.rope_dim(head_dim)
    if name == "dots3_note":
        options.setdefault("over", (read.part("qk_nope_head_dim"), head_dim))
    made = families.qk_norm(
        name,
        head_dim=head_dim,
        num_heads=read.num_heads(),
        num_kv_heads=read.num_kv_heads(),
        rounding=rounding,
        eps=read.eps(),
        rope=turns,
        **options,
    )
    if isinstance(source, nn.Module):
        for side, attribute in zip(("q_norm", "k_norm"), family.attributes, strict=True):
            ours, theirs = getattr(made, side), _norm_of(source, attribute)
            if isinstance(ours, StatisticNorm) and ours.weight is not None:
                if theirs is None:
                    setattr(made, side, None)
                else:
                    _share(ours, theirs)
            elif isinstance(ours, L2Clip):
                ours.max_norm = theirs.threshold
                ours.weight = getattr(theirs, "scale", None)
    return made


def v_norm(
    source: Any, *, layer_idx: int | None = None, rounding: Literal["family", "fused"] = "family"
) -> nn.Module | None:
    """The norm an attention applies to v, None if it has none; of a config, with its eps. See qk_norm."""
    family = families.get(family_of(source))
    read = _Reader(source, family, layer_idx)
    theirs = _norm_of(source, "v_norm")
    if family.v is None or (read.module is not None and theirs is None):
        return None
    made = families.v_norm(family.name, read.head_dim(), rounding=rounding)
    if isinstance(made, StatisticNorm):
        eps = read.eps_in_config() if theirs is None else _eps_of(theirs)
        made.spec = made.spec if eps is None else dataclasses.replace(made.spec, eps=eps)
        if theirs is not None:
            _share(made, theirs)
    return made


def latent_norm(source: Any, attribute: str, *, rounding: Literal["family", "fused"] = "family") -> StatisticNorm:
    """The plain norm that does what an attention does to one of its low-rank latents, sharing its weight.

    Args:
        source: the attention module.
        attribute: the name of its own norm: "q_a_layernorm", "kv_a_layernorm".
        rounding: see families.qk_norm.

    Raises:
        ValueError: for a config, and for an attention without this latent.
    """
    name = family_of(source)
    theirs = _norm_of(source, attribute)
    if theirs is None:
        raise ValueError(f"{type(source).__name__} has no norm {attribute!r}; give an attention module that has")
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

    def __init__(self, source: Any, family: families.Family, layer_idx: int | None = None):
        self.family = family
        self.module: Any = source if isinstance(source, nn.Module) else None
        config: Any = getattr(source, "config", None) if self.module is not None else _text_config(source)
        self.name = type(config if self.module is None else source).__name__
        self.layer = getattr(self.module, "layer_idx", None) if layer_idx is None else layer_idx
        differ = getattr(config, "is_heterogeneous", False)
        if self.module is None:
            if differ and self.layer is None:
                raise self.refusal("its layers differ", "give layer_idx, or the attention module")
            count = getattr(config, "num_hidden_layers", None)
            if self.layer is not None and count is not None and not 0 <= self.layer < count:
                raise self.refusal(f"layer_idx is {self.layer}", f"give one from 0 to {count - 1}")
        self.config: Any = config.per_layer_config[self.layer] if differ and self.layer is not None else config
        kinds = getattr(self.config, "layer_types", None)
        self.kind = kinds[self.layer] if kinds and self.layer is not None else None

    def refusal(self, why: str, advice: str = _GIVE_THE_MODULE) -> ValueError:
        """The error for what cannot be read."""
        return ValueError(f"no QK-norm can be read from {self.name}: {why}; {advice}")

    def check(self, options: dict[str, Any]) -> None:
        """Refuse what has no norm, and a config that does not say which."""
        family, module, config = self.family, self.module, self.config
        if module is not None:
            carries = any(norm is not None and norm.weight != "none" for norm in (family.q, family.k))
            if (carries or hasattr(module, "qk_norm")) and not any(_norm_of(module, a) for a in family.attributes):
                raise self.refusal(f"it has no {' and no '.join(family.attributes)}", "its QK-norm is switched off")
            if type(module).__name__ == "Llama4TextAttention" and module.use_rope and not hasattr(module, "qk_norm"):
                raise self.refusal("it has no qk_norm", "its QK-norm is switched off")
            return
        for switch in _SWITCHES:
            if getattr(config, switch, True) is False:
                raise self.refusal(f"{switch} is False", f"its QK-norm is switched off; {switch}=True has one")
        if family.factor is not None and "multiplier" not in options:
            raise self.refusal(f"its attention multiplies q by {family.multiplier}")
        if self.kind in ("linear_attention", "conv", "recurrent"):
            raise self.refusal(f"layer {self.layer} is {self.kind}", "give a layer_idx of an attention")
        crossing = getattr(config, "cross_attention_layers", None)
        if family.name == "mllama" and self.layer is not None and self.layer not in (crossing or ()):
            raise self.refusal(f"layer {self.layer} is no cross-attention", f"those are {crossing}")
        if family.name == "janus" and config.num_attention_heads != 1:
            raise self.refusal("its attention fails with more than one head", "its norm spans all heads and gets one")
        self._check_layer()

    def _check_layer(self) -> None:
        shared = getattr(self.config, "num_kv_shared_layers", 0) or 0
        if shared and (self.layer is None or self.layer >= self.config.num_hidden_layers - shared):
            raise self.refusal("some of its layers take the keys of others")
        if self.family.name == "llama4":
            turning = self.config.no_rope_layers
            if not (all(turning) if self.layer is None else turning[self.layer]):
                raise self.refusal("layers without RoPE have no norm and a multiplier")
        for name in ("num_attention_heads_per_layer", "num_key_value_heads_per_layer"):
            counts = getattr(self.config, name, None)
            if counts and len(set(counts)) > 1:
                raise self.refusal(f"{name} differ")

    def part(self, *names: str) -> Any:
        """The first of these that the module, or else the config, has."""
        for owner in (self.module, self.config):
            for name in names:
                value = getattr(owner, name, None)
                if value is not None:
                    return value
        return None

    def declared(self, name: str) -> Any:
        """A config's own value; None for what was merely passed to it, which it keeps and its module never reads."""
        kind = type(self.config)
        fields = getattr(kind, "__dataclass_fields__", {})
        known = name in fields or name in getattr(kind, "attribute_map", {}) or hasattr(kind, name)
        return getattr(self.config, name, None) if known else None

    def head_dim(self) -> int:
        dim = self.part("qk_head_dim")
        if dim is None and self.module is None and self.family.latent is not None:  # there head_dim may be one part
            parts = [getattr(self.config, f"qk_{name}_head_dim", None) for name in ("nope", "rope")]
            dim = None if None in parts else sum(parts)
        dim = self.part("head_dim", "attention_head_size") if dim is None else dim
        if dim is None:
            width, heads = self.part("hidden_size"), self.part("num_attention_heads")
            if width is None or heads is None:
                raise self.refusal("it has no head_dim", "give the config of its text model, or the attention module")
            dim = width // heads
        return dim

    def num_heads(self) -> int | None:
        return self._full_width("q_norm") or self.part("num_heads", "num_attention_heads")

    def num_kv_heads(self) -> int | None:
        projection = getattr(self.module, "k_proj", None)
        projection = getattr(projection, "linear", projection)
        if isinstance(projection, nn.Linear):
            return projection.out_features // self.head_dim()
        own = self._full_width("k_norm") or getattr(self.module, "num_key_value_heads", None)
        return own or self.declared("num_key_value_heads") or self.num_heads()

    def _full_width(self, attribute: str) -> int | None:
        """The number of heads that a norm over all of them spans, None for any other."""
        weight = getattr(getattr(self.module, attribute, None), "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 1 or weight.numel() <= self.head_dim():
            return None
        return weight.numel() // self.head_dim()

    def turns(self) -> bool:
        m = self.module
        if m is None:
            if self.family.name not in _SLIDING_LAYERS_TURN:
                return True
            if getattr(self.config, "sliding_window", None) is None and self.family.name != "afmoe":
                return True
            if set(getattr(self.config, "layer_types", None) or ()) == {"sliding_attention"}:
                return True
            if self.kind is None:
                raise self.refusal("some of its layers have no RoPE", "give layer_idx, rope=True or rope=False")
            return self.kind == "sliding_attention"
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

    def rope_parameters(self) -> dict[str, Any]:
        """Those of this layer; empty where there are none or the layers' differ and it is not known which this is."""
        parameters = getattr(self.config, "rope_parameters", None) or {}
        if any(isinstance(value, dict) for value in parameters.values()):  # per kind of layer
            kinds = {self.kind} if self.kind else set(getattr(self.config, "layer_types", None) or ())
            found = [parameters.get(kind) or {} for kind in kinds]
            return found[0] if found and all(each == found[0] for each in found) else {}
        return parameters

    def rope_base(self) -> float:
        parameters = self.rope_parameters()
        theta = parameters.get("rope_theta")
        if self.module is not None:
            return float(theta) if theta is not None else 10000.0
        if theta is None:
            raise self.refusal(
                "one rope_theta for all its layers is not in it", "give layer_idx, rope_base=, or the attention module"
            )
        if parameters.get("rope_type", "default") != "default":
            raise self.refusal(f"its RoPE is {parameters['rope_type']!r}, which one base does not describe")
        return float(theta)

    def rope_dim(self, head_dim: int) -> int:
        part = self.part("qk_rope_head_dim", "rotary_ndims", "rotary_dim")
        if part is not None:
            return part
        parameters = self.rope_parameters()
        share = parameters.get("partial_rotary_factor", getattr(self.config, "partial_rotary_factor", None))
        # "proportional" RoPE turns all pairs, some by angle 0
        proportional = parameters.get("rope_type") == "proportional"
        return head_dim if share is None or proportional else int(head_dim * share)

    def softmax_scale(self) -> Any:
        scaling = getattr(self.module, "scaling", None)
        if isinstance(scaling, float | int):
            return "rsqrt" if math.isclose(scaling, self.head_dim() ** -0.5) else scaling
        scale = self.family.softmax_scale
        scalar = getattr(self.config, "query_pre_attn_scalar", None)
        if scale == "query_pre_attn_scalar" and scalar is not None:
            return scalar**-0.5
        latent = self.family.latent is not None and isinstance(scale, str)
        if latent and (self.rope_parameters().get("rope_type") or "default") == "default":
            return "rsqrt"  # without yarn there is no mscale
        try:
            return families.softmax_scale(self.family, self.head_dim())
        except ValueError as error:
            raise self.refusal(str(error)) from None

    def eps(self) -> float | None:
        family = self.family
        if family.k is None or family.k.eps is None:
            return None
        if self.module is None:
            return self.eps_in_config()
        norm = _norm_of(self.module, family.attributes[1]) or _norm_of(self.module, family.attributes[0])
        return None if norm is None else _eps_of(norm)

    def eps_in_config(self) -> float | None:
        """None for the family's default."""
        if self.family.name in _EPS_OF_THE_CLASS:
            return None
        layer = self.family.k is not None and self.family.k.statistic == "layer"
        for name in ("layer_norm_eps" if layer else "rms_norm_eps", "norm_eps"):
            eps = self.declared(name)
            if eps is not None:
                return eps
        return None

    def multiplier(self) -> Any:
        name, m, config = self.family.name, self.module, self.config
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


def _text_config(config: Any) -> Any:
    """The text model's config of a composite one."""
    text = getattr(config, "text_config", None)
    return config if text is None else text


def _norm_of(source: Any, attribute: str) -> Any:
    """That norm of a module, None where it has none or an identity in its place."""
    norm = getattr(source, attribute, None) if attribute else None
    return norm if isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity) else None


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
