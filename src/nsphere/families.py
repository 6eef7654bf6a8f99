"""The published QK-norm variants as data, and `families.qk_norm("olmo2", ...)` to build any of them.

One `Family` says what an attention does between its projections and its kernel: the norm of q, k and v, of the
latents where it has them, what one statistic spans, the rotation, the softmax scale. The names are the directories
of transformers' models (with a suffix where one holds several kinds of attention), then those of other libraries.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nsphere.multiplier import LearnedMultiplier
from nsphere.norms import L2Clip, NormSpec, StatisticNorm
from nsphere.qk_norm import Over, QKNorm, statistic_width
from nsphere.rope import RopeSpec


@dataclasses.dataclass(frozen=True)
class Family:
    """What one family's attention does to q, k, v and its latents."""

    name: str
    """The name it is asked for by."""
    q: NormSpec | None
    """The norm of q, with the family's default eps and its own rounding; None for none."""
    k: NormSpec | None
    """The norm of k."""
    v: NormSpec | None = None
    """The norm of v, for `families.v_norm`."""
    latent: NormSpec | None = None
    """The norm of the low-rank latents (MLA), for `families.latent_norm`."""
    over: Literal["head", "full"] = "head"
    """What one statistic spans."""
    place: Literal["before", "after"] = "before"
    """The norm before or after RoPE."""
    rope: Mapping[str, Any] | None = dataclasses.field(default_factory=lambda: HF_ROPE)
    """The fields of RopeSpec beside dim; None where the family has no rotation."""
    partial: float | None = 1.0
    """The share of a head that turns, by default; None where only a config knows: then rope_dim must be given."""
    softmax_scale: str | float = "1/sqrt(D)"
    """"1/sqrt(D)", "1/D", "sqrt(D)", a number, or a name of the config: then it must be given."""
    multiplier: str = ""
    """What multiplies q besides, in words."""
    factor: float | Callable[[int, int], nn.Module] | Literal["config"] | None = None
    """The multiplier itself: a number, or (num_heads, head_dim) -> module; "config" where it must be given."""
    k_factor: float | None = None
    """The number that multiplies k."""
    multiplier_place: Literal["last", "before_rope"] = "last"
    """See QKNorm."""
    multiplier_dtype: Literal["float32", "input"] = "float32"
    """See QKNorm."""
    clip: float = 0.0
    """q and k are clipped to this L2 norm in place of a norm (norms.L2Clip), q after a weight per head."""
    times: Literal["", "sqrt(D)", "1/sqrt(D)"] = ""
    """A factor in the norm itself that depends on the width."""
    attributes: tuple[str, str] = ("q_norm", "k_norm")
    """What the family's module calls its norms."""
    note: str = ""
    """What else is particular."""
    source: str = "transformers"
    """Where it is published."""


# Hugging Face rotates in the dtype of q, and rounds the tables to it
HF_ROPE: dict[str, Any] = {"compute_dtype": "input", "table_dtype": "input"}
FP32_ROPE = {"compute_dtype": torch.float32}
FP32_ROPE_ROUNDED_TABLES = {"compute_dtype": torch.float32, "table_dtype": "input"}
PAIRS = {"layout": "interleaved"}
# the DeepSeek family takes interleaved pairs, and leaves them in half order
MLA_ROPE = {**HF_ROPE, **PAIRS, "where": "trailing", "output": "half", "twice": "halves"}

LLAMA = NormSpec("rms", 1e-6, weight="shared", weight_cast="after")
OLMO = NormSpec("rms", 1e-6, weight="shared", weight_cast="before")
GEMMA = NormSpec("rms", 1e-6, weight="shared", weight_cast="before", zero_centered=True)
GEMMA_POW = NormSpec("rms", 1e-6, weight="shared", weight_cast="before", root="pow")
BARE = NormSpec("rms", 1e-6, weight_cast="before")
BARE_POW = NormSpec("rms", 1e-6, weight_cast="before", root="pow")
TORCH_LAYER = NormSpec("layer", 1e-5, weight="shared", bias=True, weight_cast="torch")
L2 = NormSpec("l2", 1e-12, eps_place="clamp", weight_cast="torch")


class _SquaredMultiplier(LearnedMultiplier):
    """s² on q alone is s on both, see nsphere.ngpt.QKScale."""

    def forward(self) -> Tensor:
        """The factor [H, D], fp32."""
        return super().forward().square()


def _s_qk(num_heads: int, head_dim: int) -> LearnedMultiplier:
    return _SquaredMultiplier((num_heads, head_dim), scale=(num_heads * head_dim) ** -0.5)  # stored as 1/√d_model


def _logit_scale(num_heads: int, head_dim: int) -> LearnedMultiplier:
    return LearnedMultiplier((num_heads, 1), 10.0, transform="exp", max=100.0)


def _eps(spec: NormSpec, eps: float) -> NormSpec:
    return dataclasses.replace(spec, eps=eps)


def _same(norm: NormSpec | None, *names: str, **fields: Any) -> list[Family]:
    return [Family(name, norm, norm, **fields) for name in names]


def _mla(*names: str, eps: float = 1e-6, **fields: Any) -> list[Family]:
    fields = {"rope": MLA_ROPE, "partial": None, "softmax_scale": "1/√D · yarn's mscale²", **fields}
    note = "q_lora and kv_lora latents are normalised; k's rotated part is shared by the heads and is not"
    return [Family(name, None, None, latent=_eps(LLAMA, eps), **{"note": note, **fields}) for name in names]


_LAYERNORM_ATTRIBUTES = ("q_layernorm", "k_layernorm")
_VISION_ROPE = "two-axis tables; fused qkv, packed sequences"

_ALL: list[Family] = [
    # RMS over each head, the weight after the rounding, then RoPE
    *_same(LLAMA, "qwen3", "qwen3_moe", "qwen3_omni_moe_talker", "dots1", "mellum", "apertus", "hy_v3", "laguna"),
    *_same(LLAMA, "qwen3_vl", "qwen3_vl_moe", "qwen3_omni_moe", note="M-RoPE, in the tables"),
    *_same(LLAMA, "doge", "molmo2", "muse_glimmer_assistant"),
    *_same(LLAMA, "lfm3", rope=FP32_ROPE),
    *_same(_eps(LLAMA, 1e-5), "glm4_moe", partial=0.5, note="use_qk_norm is off by default"),
    *_same(_eps(LLAMA, 1e-5), "exaone4", "exaone4_5", "exaone_moe", "kolibri1", note="no RoPE on global layers"),
    *_same(_eps(LLAMA, 1e-5), "lfm2", "lfm2_moe", attributes=_LAYERNORM_ATTRIBUTES),
    *_same(LLAMA, "sapiens2", note="prefix tokens do not turn: give them angle 0"),
    *_same(
        _eps(LLAMA, 1e-5), "glm_ocr_vision", "glm5_next_vision", "dots3_note_vision", rope=FP32_ROPE, note=_VISION_ROPE
    ),
    *_same(_eps(LLAMA, 1e-5), "lfm3_vl_vision", rope=FP32_ROPE, note=_VISION_ROPE),
    *_same(_eps(LLAMA, 1e-5), "mllama", rope=None, note="cross-attention"),
    *_same(_eps(LLAMA, 1e-5), "pe_audio", "pe_video", "pe_audio_video", rope={**HF_ROPE, **PAIRS, "twice": "halves"}),
    *_same(
        LLAMA,
        "inkling",
        rope=None,
        softmax_scale="1/D",
        multiplier="tau(position) on global layers",
        factor="config",
        note="a short convolution precedes k's norm",
    ),
    Family(
        "inkling2",
        None,
        None,
        v=NormSpec("rms", 1e-6, weight_cast="before"),
        clip=22.627,
        rope=None,
        multiplier="tau(position) on full layers",
        factor="config",
        attributes=("q_l2_clip", "k_l2_clip"),
        note="short rows pass unchanged",
    ),
    # the weight in fp32 before the rounding
    *_same(OLMO, "afmoe", "flint", note="RoPE on local layers only"),
    *_same(OLMO, "beam", rope=FP32_ROPE, multiplier="attention_scaling(position) where given"),
    *_same(GEMMA, "gemma3", "t5gemma2", "step3p7", softmax_scale="query_pre_attn_scalar"),
    *_same(GEMMA, "t5gemma2_merged", softmax_scale="query_pre_attn_scalar", note="cross keys do not turn"),
    *_same(GEMMA, "qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen4_exp", partial=0.25, note="q_proj holds a gate too"),
    *_same(GEMMA, "minimax_m3_vl", partial=0.5),
    *_same(GEMMA_POW, "gemma3n", "gemma4", "gemma4_unified", v=BARE_POW, softmax_scale=1.0),
    *_same(GEMMA_POW, "diffusion_gemma", "embedding_gemma2", v=BARE_POW, softmax_scale=1.0),
    *_same(GEMMA_POW, "gemma4_vision", v=BARE_POW, softmax_scale=1.0, rope={**HF_ROPE, "blocks": 2}),
    # no weight
    *_same(
        BARE_POW,
        "muse_glimmer",
        "muse_spark",
        multiplier="qk_scale_factor",
        factor="config",
        multiplier_place="before_rope",
        attributes=("qk_norm", "qk_norm"),
    ),
    *_same(BARE_POW, "neomme"),
    *_same(BARE, "esmfold2", note="atom attention"),
    *_same(
        _eps(BARE, 1e-5),
        "llama4",
        place="after",
        rope={**FP32_ROPE, **PAIRS},
        attributes=("qk_norm", "qk_norm"),
        note='the class is called L2Norm and is RMS; layers without RoPE have no norm, see "llama4_nope"',
    ),
    Family(
        "llama4_nope",
        None,
        None,
        rope=None,
        multiplier="1 + attn_scale·log1p(⌊(position + 1)/floor_scale⌋)",
        factor="config",
    ),
    *_same(BARE, "nanochat", place="after", rope={**HF_ROPE, "sign": -1}),
    # after RoPE
    *_same(
        _eps(LLAMA, 1e-5),
        "hunyuan_v1_dense",
        "hunyuan_v1_moe",
        place="after",
        attributes=("query_layernorm", "key_layernorm"),
    ),
    *_same(
        _eps(LLAMA, 1e-5),
        "hunyuan_vl",
        place="after",
        rope=FP32_ROPE,
        attributes=("query_layernorm", "key_layernorm"),
    ),
    *_same(
        LLAMA,
        "idefics",
        place="after",
        attributes=("q_layer_norm", "k_layer_norm"),
        note="the cache holds k before its norm",
    ),
    *_same(
        LLAMA,
        "timesfm2_5",
        place="after",
        softmax_scale=1.0,
        multiplier="softplus(scaling)·log2(e)/√D per dim",
        factor="config",
    ),
    # over all heads together
    *_same(_eps(OLMO, 1e-5), "olmo2", "olmo3", over="full", rope=FP32_ROPE),
    *_same(OLMO, "flex_olmo", "olmo_hybrid", over="full", rope=FP32_ROPE),
    *_same(_eps(LLAMA, 1e-5), "olmoe", over="full", note="clip_qkv clamps after the norm"),
    *_same(LLAMA, "minimax_m2", over="full", partial=0.5),
    *_same(LLAMA, "molmo2_olmo", over="full"),
    *_same(LLAMA, "internvl", "qianfan_ocr", over="full", rope=None),
    *_same(
        NormSpec("layer", 1e-5, weight="shared", weight_cast="torch"),
        "esmc",
        over="full",
        note="LayerNorm without bias",
    ),
    # LayerNorm
    *_same(
        NormSpec("layer", 1e-5, weight="per_head", weight_cast="before"),
        "cohere",
        rope={**FP32_ROPE_ROUNDED_TABLES, **PAIRS},
    ),
    *_same(NormSpec("layer", 1e-5, weight="per_head", bias=True, weight_cast="after"), "chameleon"),
    *_same(
        NormSpec("layer", 1e-5, weight="per_head", weight_cast="torch"),
        "stablelm",
        partial=0.25,
        attributes=_LAYERNORM_ATTRIBUTES,
        note="one LayerNorm per head",
    ),
    *_same(TORCH_LAYER, "phi", "persimmon", partial=0.5, attributes=_LAYERNORM_ATTRIBUTES),
    *_same(TORCH_LAYER, "nemotron3_5_transcribe", partial=0.5),
    *_same(TORCH_LAYER, "idefics_perceiver", rope=None, attributes=("q_layer_norm", "k_layer_norm")),
    *_same(TORCH_LAYER, "janus", rope=None, note="declared over embed_dim and applied per head: one head only"),
    # L2
    *_same(
        L2,
        "swinv2",
        "swin2sr",
        rope=None,
        softmax_scale=1.0,
        multiplier="exp(min(s, log 100)) per head, s starts at log 10",
        factor=_logit_scale,
    ),
    *_same(L2, "yoso", rope=None, note="when training, or with use_expectation"),
    *_same(L2, "swiftformer", rope=None, over="full", note="additive attention: no softmax over q·k"),
    Family(
        "zaya",
        NormSpec("l2", None, eps_place="clamp", weight_cast="input"),
        NormSpec("l2", None, eps_place="clamp", weight="scalar_per_head", weight_cast="input"),
        partial=0.5,
        attributes=("qk_norm", "qk_norm"),
        times="sqrt(D)",
        note="k has one learned temperature per head",
    ),
    Family(
        "reformer",
        None,
        NormSpec("rms", 1e-6, weight_cast="input"),
        rope=None,
        times="1/sqrt(D)",
        note="k only; q and k share one projection",
    ),
    # multi-head latent attention
    *_mla("deepseek_v3", "glm4_moe_lite", "youtu", "axk1", "axk2", "deepseek_v32", "glm_moe_dsa"),
    *_mla("bailing_hybrid", note="the kv latent is normalised; q has none"),
    *_mla(
        "mistral4",
        multiplier="1 + beta·log(1 + ⌊position/original_length⌋)",
        factor="config",
        multiplier_dtype="input",
    ),
    *_mla("longcat_flash", multiplier="√(hidden/q_lora)", factor="config", multiplier_place="before_rope"),
    *_mla("deepseek_v2", rope={**FP32_ROPE, **PAIRS, "where": "trailing"}),
    *_mla("minicpm3", "hy_v4", rope={**HF_ROPE, "where": "trailing"}),
    *_mla("kimi_linear", rope=None),
    *_mla("glm5_next", eps=1e-5, rope=None),
    *_mla("mistral_large4", eps=1e-5, multiplier="scale·log(position + 1) + bias per head", factor="config"),
    Family(
        "dots3_note",
        None,
        _eps(LLAMA, 1e-5),
        latent=_eps(LLAMA, 1e-5),
        rope=MLA_ROPE,
        partial=None,
        attributes=("", "k_rope_only_layernorm"),
        note="k's norm spans its rotated part alone; latents times √(hidden/rank)",
    ),
    Family(
        "deepseek_v4",
        NormSpec("rms", 1e-6, weight_cast="input"),
        OLMO,
        latent=OLMO,
        rope={**FP32_ROPE, **PAIRS, "where": "trailing"},
        partial=None,
        attributes=("q_b_norm", "kv_norm"),
        note="one head of k, which is v too",
    ),
    # elsewhere
    *_same(
        NormSpec("l2", 0.0),
        "ngpt",
        place="after",
        rope={},
        softmax_scale="sqrt(D)",
        multiplier="s_qk² [H, D] on q (or s_qk on both)",
        factor=_s_qk,
        source="arXiv 2410.01131",
    ),
    *_same(
        _eps(L2, 1e-12),
        "henry2020",
        rope=None,
        softmax_scale=1.0,
        multiplier="one learned scalar, log2(L² - L) at first, L the length",
        factor="config",
        source="arXiv 2010.04245",
    ),
    *_same(
        NormSpec("layer", 1e-6, weight="shared", weight_cast="before"),
        "vit22b",
        "flax_normalize_qk",
        rope=None,
        attributes=("query_ln", "key_ln"),
        source="arXiv 2302.05442; flax",
    ),
    *_same(
        NormSpec("l2", 1e-6, weight_cast="before"),
        "te_l2normalization",
        place="after",
        note="x·rsqrt(Σx² + eps), yet TE's softmax scale stays 1/√D",
        source="Transformer Engine",
    ),
    *_same(
        NormSpec("rms", 1e-6, weight="shared", weight_cast="before"),
        "te_rmsnorm",
        place="after",
        source="Transformer Engine",
    ),
    *_same(
        NormSpec("layer", 1e-6, weight="shared", bias=True, weight_cast="before"),
        "te_layernorm",
        place="after",
        source="Transformer Engine",
    ),
    *_same(
        NormSpec("rms", 1e-5, weight="shared", weight_cast="before"),
        "megatron_qk_layernorm",
        source="Megatron-LM",
        note="over config.normalization; zero-centred with layernorm_zero_centered_gamma",
    ),
    *_same(_eps(BARE, 1e-6), "megatron_qk_l2_norm", place="after", source="Megatron-LM", note="RMS, for all its name"),
    *_same(TORCH_LAYER, "timm", rope=None, source="timm", note="norm_layer(head_dim), any; prefix tokens do not turn"),
    *_same(TORCH_LAYER, "timm_mvitv2", rope=None, v=TORCH_LAYER, source="timm", note="on pooled q, k and v"),
    *_same(TORCH_LAYER, "diffusers_layer_norm", source="diffusers", rope={**FP32_ROPE, **PAIRS}),
    *_same(
        NormSpec("layer", 1e-5, weight_cast="torch"),
        "diffusers_fp32_layer_norm",
        source="diffusers (AuraFlow)",
        rope=None,
    ),
    *_same(
        TORCH_LAYER,
        "diffusers_layer_norm_across_heads",
        over="full",
        source="diffusers (Lumina-Next)",
        rope={**FP32_ROPE, **PAIRS},
    ),
    *_same(
        LLAMA,
        "diffusers_rms_norm",
        source="diffusers (HunyuanVideo, Qwen-Image)",
        rope={**FP32_ROPE, **PAIRS},
        note="the text stream has its own pair, norm_added_q and norm_added_k",
    ),
    *_same(
        LLAMA,
        "diffusers_rms_norm_across_heads",
        over="full",
        source="diffusers",
        rope={**FP32_ROPE, **PAIRS},
    ),
    *_same(L2, "diffusers_l2", source="diffusers", rope=None),
    *_same(
        NormSpec("rms", 1e-6, weight="shared", weight_cast="torch"),
        "flux",
        "flux2",
        source="diffusers",
        rope={**FP32_ROPE, **PAIRS},
    ),
    *_same(
        _eps(OLMO, 1e-5),
        "mochi",
        source="diffusers",
        rope={**FP32_ROPE, **PAIRS},
        note="angles differ from head to head",
    ),
    *_same(
        NormSpec("layer", 1e-6, weight="shared", bias=True, weight_cast="torch"),
        "cogvideox",
        "hunyuan_dit",
        source="diffusers",
        rope={**FP32_ROPE, **PAIRS},
        note="text tokens do not turn; nor do cross keys",
    ),
    *_same(
        NormSpec("layer", 1e-5, weight_cast="torch"),
        "cogview4",
        source="diffusers",
        rope=FP32_ROPE,
        note="text tokens do not turn",
    ),
    *_same(_eps(LLAMA, 1e-5), "cosmos", source="diffusers", rope=FP32_ROPE, note="cross keys do not turn"),
    *_same(
        LLAMA,
        "sd3_5",
        source="diffusers",
        rope=None,
        note="the text stream has its own pair, norm_added_q and norm_added_k",
    ),
    *_same(_eps(LLAMA, 1e-5), "lumina2", "z_image", source="diffusers", rope={**FP32_ROPE, **PAIRS}),
    *_same(
        NormSpec("rms", 1e-6, weight="shared", weight_cast="torch"),
        "wan",
        over="full",
        source="diffusers",
        rope={**FP32_ROPE, **PAIRS},
        note="image to video normalises the image's keys too, norm_added_k",
    ),
    *_same(
        NormSpec("rms", 1e-5, weight="shared", weight_cast="torch"),
        "ltx",
        over="full",
        source="diffusers",
        rope={**FP32_ROPE, **PAIRS},
        note="angles differ from head to head: tables [B, T, H, R/2]",
    ),
    *_same(
        TORCH_LAYER,
        "mpt_qk_ln",
        "open_lm",
        over="full",
        source="llm-foundry; open_lm",
        rope=None,
        note="after clip_qkv; transformers' MptAttention ignores qk_ln",
    ),
    *_same(TORCH_LAYER, "mpt_qk_gn", source="llm-foundry", rope=None),
    *_same(OLMO, "olmo_core", over="full", source="OLMo-core", rope=FP32_ROPE, note="use_head_qk_norm: per head"),
    *_same(
        NormSpec("rms", None, weight_cast="torch"),
        "modded_nanogpt",
        softmax_scale=0.12,
        source="modded-nanogpt",
        note="eps of fp32, whatever the input's dtype",
    ),
    *_same(
        BARE,
        "nanochat_upstream",
        place="after",
        rope={**HF_ROPE, "sign": -1},
        multiplier="1.2 on q and k",
        factor=1.2,
        k_factor=1.2,
        source="nanochat",
    ),
    *_same(
        L2,
        "x_transformers",
        softmax_scale=10.0,
        rope={**FP32_ROPE, **PAIRS},
        source="x-transformers",
        note="qk_norm_groups: over=the width of one",
    ),
    *_same(
        dataclasses.replace(L2, weight="per_head"),
        "x_transformers_dim_scale",
        rope={**FP32_ROPE, **PAIRS},
        source="x-transformers",
        note="qk_norm_dim_scale: the weights start at D^¼",
    ),
    *_same(
        dataclasses.replace(L2, weight="per_head", zero_centered=True),
        "x_transformers_rmsnorm",
        rope={**FP32_ROPE, **PAIRS},
        times="sqrt(D)",
        source="x-transformers",
        note="qk_rmsnorm",
    ),
    *_same(
        NormSpec("l2", 1e-6, weight_cast="before"),
        "gated_deltanet",
        rope=None,
        source="flash-linear-attention; transformers",
        note="linear attention without a softmax, q times the scale: qwen3_next's, olmo_hybrid's, kimi_linear's",
    ),
]

FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}
assert len(FAMILIES) == len(_ALL), "a family's name is taken twice"

_BEFORE = "its norms precede the projections"
_OUTPUT = "its norm is of the attention's output"
_LOGITS = "it acts on the logits, not on q and k"
_HIDDEN = "a norm of hidden states before a projection"
_INDEXER = "the norms of an indexer, which picks the keys to attend to, are plain norms: `LayerNorm(dim)`"

_WITH_INDEXER = (
    *("axk2", "deepseek_v32", "deepseek_v4", "dots3_note", "glm5_next", "glm_moe_dsa", "hy_v4", "minimax_m3_vl"),
    *("mistral_large4", "qwen4_exp"),
)

NOT_COVERED: dict[str, str] = {
    "kimi_k2_qk_clip": "not in the forward pass: MuonClip rescales the projections' weights after a step",
    "megatron_qk_clip": "not in the forward pass: the projections' weights are rescaled after a step",
    "blt": "q_norm and k_norm precede the projections of a cross-attention: a norm of hidden states",
    **dict.fromkeys(("aria", "evolla", "perceiver", "efficientloftr", "pvt", "segformer", "glpn"), _BEFORE),
    **dict.fromkeys(("levit", "cvt"), "BatchNorm inside the projections"),
    **dict.fromkeys(("diffllama", "bitnet", "kosmos2", "minimax", "muse_spark_o_norm", "timm_scale_norm"), _OUTPUT),
    **dict.fromkeys((f"{name}_indexer" for name in _WITH_INDEXER), _INDEXER),
    **dict.fromkeys(
        ("mistral_large4_q_input_norm", "inkling2_q_input_layernorm", "inkling2_k_input_layernorm"), _HIDDEN
    ),
    **dict.fromkeys(("dac", "glm_image", "clap"), "it normalises codes or embeddings, not q and k"),
    "neomme_exclusive": "its attention's output loses its part along v",
    "qwen4_exp_ple": "norm_query and norm_key belong to the gate of its per-layer embeddings, not to its attention",
    **dict.fromkeys(("gemma2", "cohere_logit_scale", "clip", "gpt_oss"), _LOGITS),
}
assert not NOT_COVERED.keys() & FAMILIES.keys(), "a family is listed as not covered too"


def get(name: str) -> Family:
    """The family of that name; ValueError, listing near names, for an unknown one."""
    if name in FAMILIES:
        return FAMILIES[name]
    if name in NOT_COVERED:
        raise ValueError(f"{name!r} is no QK-norm of this kind: {NOT_COVERED[name]}")
    near = [n for n in FAMILIES if n.startswith(name[:4])]
    known = ", ".join(near or sorted(FAMILIES))
    raise ValueError(f"unknown family {name!r}; known: {known} (all: nsphere families)")


def qk_norm(
    name: str,
    *,
    head_dim: int,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    rounding: Literal["family", "fused"] = "family",
    eps: float | None = None,
    rope: bool = True,
    rope_dim: int | None = None,
    rope_base: float = 10000.0,
    over: Over | None = None,
    **options: Any,
) -> QKNorm:
    """The QKNorm of a published family.

    Args:
        name: see FAMILIES, or `nsphere families`.
        head_dim: D.
        num_heads: H.
        num_kv_heads: Hkv; H by default.
        rounding: "family" rounds where the family's own module does, bit for bit; "fused" is fp32 throughout with
            one rounding, faster and nearer to the exact value.
        eps: in place of the family's default.
        rope: False for a layer without it.
        rope_dim: R, in place of the family's default share of head_dim.
        rope_base: θ of RopeSpec.tables.
        over: in place of what the family's statistics span, see QKNorm.
        **options: further arguments of QKNorm: multiplier, softmax_scale, layout.

    Raises:
        ValueError: for an unknown family; for a multiplier, rope_dim or softmax_scale that only a config can give
            and that was not given.
    """
    family = get(name)
    if rounding not in ("family", "fused"):
        raise ValueError(f'rounding is "family" or "fused"; got {rounding!r}')
    spec = _rope_spec(family, head_dim, rope_dim, rope_base, rounding) if rope else None
    heads = num_heads, num_kv_heads if num_kv_heads is not None else num_heads
    over = family.over if over is None else over
    norms: list[nn.Module | None] = []
    for norm, count in zip((family.q, family.k), heads, strict=True):
        if over == "full" and count is None:
            raise ValueError(f"{name} normalises all heads together; give num_heads")
        width, rows = statistic_width(over, head_dim, count)
        norms.append(_norm(family, norm, width, rows, eps, rounding))
    if family.clip:
        norms = [L2Clip(head_dim, max_norm=family.clip, num_heads=n) for n in (num_heads, None)]
    options.setdefault("multiplier_place", family.multiplier_place)
    options.setdefault("multiplier_dtype", family.multiplier_dtype)
    if "softmax_scale" not in options:
        options["softmax_scale"] = softmax_scale(family, head_dim)
    if "multiplier" not in options:
        options = {**_factors(family, num_heads, head_dim), **options}
    return QKNorm(
        norms[0],
        # None is "as q" to QKNorm, so a family that normalises one side alone says so with an identity
        norms[1] if norms[1] is not None or norms[0] is None else nn.Identity(),
        head_dim=head_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        rope=spec,
        place=family.place,
        over=over,
        **options,
    )


def v_norm(name: str, head_dim: int, *, rounding: Literal["family", "fused"] = "family") -> nn.Module | None:
    """The family's norm of v, None if it has none."""
    family = get(name)
    return _norm(family, family.v, head_dim, None, None, rounding)


def latent_norm(
    name: str, dim: int, *, eps: float | None = None, rounding: Literal["family", "fused"] = "family"
) -> nn.Module | None:
    """The family's norm of a low-rank latent of width dim (MLA), None if it has none."""
    family = get(name)
    return _norm(family, family.latent, dim, None, eps, rounding)


def table() -> str:
    """All families as a table in Markdown, then what is not covered and why."""
    lines = [
        "| family | q | k | v | latent | over | RoPE | softmax scale | besides | source |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for f in FAMILIES.values():
        turned = "none" if f.rope is None else f"{f.rope.get('layout', 'half')}, norm {f.place}"
        if f.rope is not None and f.partial != 1:
            turned += ", part of the head" if f.partial is None else f", {f.partial:g} of the head"
        besides = "; ".join(filter(None, (f.multiplier, f.note)))
        norms = (_in_words(f.q), _in_words(f.k) if f.k != f.q else "as q", _in_words(f.v), _in_words(f.latent))
        if f.clip:
            norms = (f"L2 clip at {f.clip:g}, w per_head first", f"L2 clip at {f.clip:g}", *norms[2:])
        scale = str(f.softmax_scale)
        lines.append(f"| {f.name} | {' | '.join(norms)} | {f.over} | {turned} | {scale} | {besides} | {f.source} |")
    lines += ["", "Not covered:", ""]
    lines += [f"- {name}: {reason}" for name, reason in NOT_COVERED.items()]
    return "\n".join(lines)


def _in_words(spec: NormSpec | None) -> str:
    if spec is None:
        return "–"
    eps = "finfo" if spec.eps is None else f"{spec.eps:g}"
    parts = [spec.statistic, f"eps {eps}" + ("" if spec.eps_place == "inside" else f" {spec.eps_place}")]
    if spec.weight != "none":
        parts.append(("1+w " if spec.zero_centered else "w ") + spec.weight + (" +b" if spec.bias else ""))
    return ", ".join([*parts, spec.weight_cast])


def _norm(
    family: Family, spec: NormSpec | None, dim: int, heads: int | None, eps: float | None, rounding: str
) -> nn.Module | None:
    if spec is None:
        return None
    if eps is not None:
        spec = dataclasses.replace(spec, eps=eps)
    if rounding == "fused":
        spec = dataclasses.replace(spec, weight_cast="fused", root="rsqrt")
    if family.times:
        spec = dataclasses.replace(spec, scale=dim**0.5 if family.times == "sqrt(D)" else dim**-0.5)
    return StatisticNorm(dim, spec, num_heads=heads)


def _rope_spec(family: Family, head_dim: int, rope_dim: int | None, base: float, rounding: str) -> RopeSpec | None:
    if family.rope is None:
        return None
    fields = dict(family.rope)
    if rounding == "fused":
        fields = {k: v for k, v in fields.items() if k not in ("compute_dtype", "table_dtype")}
    if rope_dim is None:
        if family.partial is None:
            raise ValueError(f"how many dims of a head {family.name} turns is its config's; give rope_dim=")
        rope_dim = int(head_dim * family.partial)
    return RopeSpec(rope_dim, base, **fields)


def softmax_scale(family: Family, head_dim: int) -> Any:
    """The family's softmax scale for heads of this width, as QKNorm takes it.

    Raises:
        ValueError: where only a config knows it.
    """
    scale = family.softmax_scale
    if not isinstance(scale, str):
        return scale
    known = {"1/sqrt(D)": "rsqrt", "1/D": 1 / head_dim, "sqrt(D)": head_dim**0.5}
    if scale not in known:
        raise ValueError(
            f"{family.name}'s softmax scale comes from its config ({scale}); give softmax_scale=, a number or "
            '"rsqrt" for 1/√D'
        )
    return known[scale]


def _factors(family: Family, num_heads: int | None, head_dim: int) -> dict[str, Any]:
    """The family's own multipliers, as arguments of QKNorm."""
    if family.factor == "config":
        raise ValueError(
            f"{family.name} multiplies q by {family.multiplier}, which its config or module tells; give multiplier=, "
            "None for none"
        )
    if callable(family.factor):
        if num_heads is None:
            raise ValueError(f"{family.name} learns a multiplier for each head; give num_heads")
        return {"multiplier": family.factor(num_heads, head_dim)}
    return {"multiplier": family.factor, "k_multiplier": family.k_factor}
