"""The attentions of transformers that are compared with ours."""

from types import SimpleNamespace
from typing import Any

import torch
from hf_attentions import HIDDEN, HKV, B, Case, D, H, Run, T, given_tables, heads
from transformers.models.esmfold2.modeling_esmfold2 import EsmFold2AtomAttention
from transformers.models.idefics.modeling_idefics import IdeficsAttention

from nsphere import hf


def gated_q(r: Run) -> tuple[torch.Tensor, ...]:
    """q_proj holds [q, gate] per head."""
    q = heads(r.outputs["q_proj"], 2 * D)[..., :D]
    return q, heads(r.outputs["k_proj"]), heads(r.outputs["v_proj"])


def no_v(r: Run) -> tuple[torch.Tensor, ...]:
    """v is k before its norm."""
    k = heads(r.outputs["k_proj"])
    return heads(r.outputs["q_proj"]), k, k


def fused_vision(r: Run) -> tuple[torch.Tensor, ...]:
    """One projection of packed tokens, [N, 3·H·D]."""
    return tuple(t.unsqueeze(0) for t in r.outputs["qkv"].reshape(-1, 3, H, D).unbind(1))


def unpacked(r: Run) -> tuple[torch.Tensor, ...]:
    """Packed tokens, three projections."""
    return tuple(heads(r.outputs[f"{n}_proj"]).unsqueeze(0) for n in "qkv")


def persimmon(r: Run) -> tuple[torch.Tensor, ...]:
    return r.outputs["query_key_value"].view(B, T, H, 3, D).unbind(-2)


def convolved(r: Run) -> tuple[torch.Tensor, ...]:
    """k and v pass a short convolution before the norm."""
    return heads(r.outputs["q_proj"]), heads(r.outputs["k_sconv"]), heads(r.outputs["v_sconv"])


def zaya(r: Run) -> tuple[torch.Tensor, ...]:
    return r.outputs["qkv_proj"]


def one_head_of_k(r: Run) -> tuple[torch.Tensor, ...]:
    kv = heads(r.outputs["kv_proj"])
    return heads(r.outputs["q_b_proj"]), kv, kv


def latents(r: Run) -> tuple[torch.Tensor, ...]:
    """MLA: our norms of the latents, the module's own projections from them."""
    m = r.module
    if "q_a_proj" in r.outputs:
        q = hf.latent_norm(m, "q_a_layernorm")(r.outputs["q_a_proj"])
        if hasattr(m, "q_gate_proj"):  # A.X K2 projects [normed, raw] to [q, gate]
            q = m.q_gate_proj(torch.cat((q, r.outputs["q_a_proj"]), -1))
            q = heads(q, m.qk_head_dim + m.v_head_dim)[..., : m.qk_head_dim]
        else:
            q = heads(m.q_b_proj(q), m.qk_head_dim)
    else:
        q = heads(r.outputs["q_proj"], m.qk_head_dim)
    latent, k_rot = r.outputs["kv_a_proj_with_mqa"].split((m.kv_lora_rank, m.qk_rope_head_dim), -1)
    latent = hf.latent_norm(m, "kv_a_layernorm")(latent)
    with torch.no_grad():
        k, v = m.expand_kv(latent.unsqueeze(1), k_rot.unsqueeze(1))
    return q, k.transpose(1, 2), v.transpose(1, 2)


def plain(hidden: Any, tables: Any, positions: Any, module: Any) -> dict[str, Any]:
    return {"hidden_states": hidden, "attention_mask": None}


def shared_kv(hidden: Any, tables: Any, positions: Any, module: Any) -> dict[str, Any]:
    return {**plain(hidden, tables, positions, module), "position_embeddings": tables, "shared_kv_states": {}}


def with_positions(hidden: Any, tables: Any, positions: Any, module: Any) -> dict[str, Any]:
    mask = torch.zeros(B, 1, T, T, dtype=hidden.dtype)
    return {"hidden_states": hidden, "position_embeddings": tables, "attention_mask": mask, "position_ids": positions}


def with_mask(hidden: Any, tables: Any, positions: Any, module: Any) -> dict[str, Any]:
    keywords = with_positions(hidden, tables, positions, module)
    return {k: v for k, v in keywords.items() if k != "position_ids"} | {"past_key_values": None}


def no_tables(hidden: Any, tables: Any, positions: Any, module: Any) -> dict[str, Any]:
    return {**plain(hidden, tables, positions, module), "position_embeddings": None}


def packed(hidden: Any, tables: Any, positions: Any, module: Any) -> dict[str, Any]:
    lengths = torch.tensor([0, T], dtype=torch.int32)
    return {"hidden_states": hidden[0], "cu_seqlens": lengths, "position_embeddings": tables, "max_seqlen": T}


def first_tables(hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(t[0] for t in given_tables(hidden, positions))


SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
FULL_FIRST = {**SLIDING, "layer_types": ["full_attention", "sliding_attention"] * 2}
HALF = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
ALL_KV = {"num_key_value_heads": H}
MLA = {
    **ALL_KV,
    "q_lora_rank": 48,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    "head_dim": 16,
    "original_max_position_embeddings": 32,
}

CASES = [
    Case("qwen3", "qwen3:Qwen3Attention"),
    Case("qwen3_moe", "qwen3_moe:Qwen3MoeAttention"),
    Case(
        "qwen3_omni_moe_talker",
        "qwen3_omni_moe:Qwen3OmniMoeTalkerCodePredictorAttention",
        config="Qwen3OmniMoeTalkerCodePredictorConfig",
        rotary="Qwen3OmniMoeRotaryEmbedding",
    ),
    Case("dots1", "dots1:Dots1Attention"),
    Case("mellum", "mellum:MellumAttention"),
    Case("lfm3", "lfm3:Lfm3Attention", options={"layer_types": ["full_attention"] * 4}),
    Case("minimax_m3_vl", "minimax_m3_vl:MiniMaxM3VLAttention", options={"rotary_dim": 16, **HALF}),
    Case("qwen3_vl", "qwen3_vl:Qwen3VLTextAttention", mrope=True),
    Case("qwen3_vl_moe", "qwen3_vl_moe:Qwen3VLMoeTextAttention", mrope=True),
    Case(
        "qwen3_omni_moe",
        "qwen3_omni_moe:Qwen3OmniMoeThinkerTextAttention",
        config="Qwen3OmniMoeTextConfig",
        rotary="Qwen3OmniMoeThinkerTextRotaryEmbedding",
        mrope=True,
    ),
    Case("apertus", "apertus:ApertusAttention"),
    Case("hy_v3", "hy_v3:HYV3Attention"),
    Case("laguna", "laguna:LagunaAttention", args=(0, H)),
    Case("doge", "doge:DogeAttention"),
    Case("molmo2", "molmo2:Molmo2Attention"),
    Case("molmo2_olmo", "molmo2:Molmo2Attention", options={"qk_norm_type": "olmo"}, note="full width"),
    Case(
        "muse_glimmer_assistant",
        "muse_glimmer_assistant:MuseGlimmerAssistantAttention",
        forward=lambda h, t, p, m: {
            "hidden_states": h,
            "context_hidden_states": h[:, :0],
            "position_embeddings": t,
            "attention_mask": None,
        },
    ),
    Case("glm4_moe", "glm4_moe:Glm4MoeAttention", options={"use_qk_norm": True, **HALF}),
    Case("exaone4", "exaone4:Exaone4Attention", options=SLIDING),
    Case("exaone4", "exaone4:Exaone4Attention", options=FULL_FIRST, note="NoPE layer"),
    Case(
        "exaone4_5",
        "exaone4_5:Exaone4_5_Attention",
        config="exaone4:Exaone4Config",
        options=SLIDING,
        rotary="exaone4:Exaone4RotaryEmbedding",
    ),
    Case("exaone_moe", "exaone_moe:ExaoneMoeAttention", options=SLIDING),
    Case("kolibri1", "kolibri1:Kolibri1Attention", options=SLIDING),
    Case("lfm2", "lfm2:Lfm2Attention"),
    Case("lfm2_moe", "lfm2_moe:Lfm2MoeAttention"),
    Case(
        "sapiens2",
        "sapiens2:Sapiens2Attention",
        config="Sapiens2Config",
        options={"num_key_value_heads_per_layer": [HKV] * 4},
        tables=lambda h, p: given_tables(h, p[0]),
    ),
    Case(
        "glm_ocr_vision",
        "glm_ocr:GlmOcrVisionAttention",
        config="GlmOcrVisionConfig",
        options={"num_heads": H},
        args=(),
        tables=first_tables,
        forward=packed,
        raw=fused_vision,
    ),
    Case(
        "glm5_next_vision",
        "glm5_next:Glm5NextVisionAttention",
        config="Glm5NextVisionConfig",
        options={"num_heads": H},
        args=(),
        tables=first_tables,
        forward=packed,
        raw=fused_vision,
    ),
    Case(
        "dots3_note_vision",
        "dots3_note:Dots3NoteVisionAttention",
        config="Dots3NoteVisionConfig",
        options={"num_heads": H, "num_hidden_layers": 42, "adapter_in_dim": HIDDEN},
        args=(),
        tables=first_tables,
        forward=packed,
        raw=fused_vision,
    ),
    Case(
        "lfm3_vl_vision",
        "lfm3_vl:Lfm3VlVisionAttention",
        config="Lfm3VlVisionConfig",
        tables=first_tables,
        forward=packed,
        raw=unpacked,
    ),
    Case(
        "mllama",
        "mllama:MllamaTextCrossAttention",
        config="MllamaTextConfig",
        rotary=None,
        forward=lambda h, t, p, m: {"hidden_states": h, "cross_attention_states": h.flip(1)},
    ),
    Case("pe_audio", "pe_audio:PeAudioEncoderAttention", rotary="PeAudioEncoderRotaryEmbedding"),
    Case("pe_video", "pe_video:PeVideoEncoderAttention"),
    Case("pe_audio_video", "pe_audio_video:PeAudioVideoEncoderAttention", rotary="PeAudioVideoEncoderRotaryEmbedding"),
    Case(
        "inkling",
        "inkling:InklingAttention",
        rotary=None,
        raw=convolved,
        forward=plain,
        from_zero=True,
        options={"layer_types": ["hybrid"] * 4, "log_scaling_n_floor": 3, "log_scaling_alpha": 0.1},
    ),
    Case(
        "inkling2",
        "inkling2:Inkling2SlidingAttention",
        config="Inkling2TextConfig",
        rotary=None,
        raw=convolved,
        forward=plain,
        from_zero=True,
        options={
            "layer_types": ["hybrid_sliding"] * 4,
            "swa_head_dim": D,
            "swa_num_attention_heads": H,
            "swa_num_key_value_heads": HKV,
            "qk_l2_clip_threshold": 3.0,
        },
    ),
    Case("afmoe", "afmoe:AfmoeAttention", options=SLIDING),
    Case("afmoe", "afmoe:AfmoeAttention", options=FULL_FIRST, note="NoPE layer"),
    Case("flint", "flint:FlintAttention", options=SLIDING),
    Case("beam", "beam:BeamAttention"),
    Case("gemma3", "gemma3:Gemma3Attention"),
    Case("t5gemma2", "t5gemma2:T5Gemma2SelfAttention", config="T5Gemma2TextConfig"),
    Case("step3p7", "step3p7:Step3p7Attention"),
    Case("qwen3_next", "qwen3_next:Qwen3NextAttention", raw=gated_q),
    Case("qwen3_5", "qwen3_5:Qwen3_5Attention", raw=gated_q, mrope=True),
    Case("qwen3_5_moe", "qwen3_5_moe:Qwen3_5MoeAttention", raw=gated_q, mrope=True),
    Case("gemma3n", "gemma3n:Gemma3nTextAttention", options={"num_kv_shared_layers": 0}, forward=shared_kv),
    Case("gemma4", "gemma4:Gemma4TextAttention", forward=shared_kv),
    Case("gemma4_unified", "gemma4_unified:Gemma4UnifiedTextAttention", forward=shared_kv),
    Case(
        "gemma4_vision",
        "gemma4:Gemma4VisionAttention",
        config="Gemma4VisionConfig",
        tables=lambda h, p: tuple(
            torch.cat((a, b), -1)
            for a, b in zip(given_tables(h, p, D // 2), given_tables(h, p % 3, D // 2), strict=True)
        ),
        forward=lambda h, t, p, m: {
            "hidden_states": h,
            "position_embeddings": t,
            "attention_mask": None,
            "position_ids": p.unsqueeze(-1).expand(B, T, 2),
        },
        raw=lambda r: tuple(heads(r.outputs[f"{n}_proj"]) for n in "qkv"),
    ),
    Case("diffusion_gemma", "diffusion_gemma:DiffusionGemmaEncoderTextAttention"),
    Case(
        "diffusion_gemma",
        "diffusion_gemma:DiffusionGemmaEncoderTextAttention",
        note="v from k",
        raw=no_v,
        options={"layer_types": ["full_attention"] * 4, "global_head_dim": D, "num_global_key_value_heads": HKV},
    ),
    Case("embedding_gemma2", "embedding_gemma2:EmbeddingGemma2Attention"),
    Case("muse_glimmer", "muse_glimmer:MuseGlimmerTextAttention"),
    Case("muse_spark", "muse_spark:MuseSparkTextAttention"),
    Case("neomme", "neomme:NeoMMEAttention", tables=given_tables),
    Case(
        "esmfold2",
        "esmfold2:EsmFold2AtomAttention",
        config="EsmFold2Config",
        built=lambda c: EsmFold2AtomAttention(c, SimpleNamespace(head_dim=D, hidden_size=HIDDEN)),
        tables=given_tables,
    ),
    Case("llama4", "llama4:Llama4TextAttention", options={"no_rope_layers": [1, 1, 0, 1]}),
    Case(
        "llama4_nope",
        "llama4:Llama4TextAttention",
        options={"no_rope_layers": [0, 1, 0, 1], "floor_scale": 3},
        rotary=None,
        forward=no_tables,
        from_zero=True,
        note="NoPE layer with temperature",
    ),
    Case("nanochat", "nanochat:NanoChatAttention"),
    Case("hunyuan_v1_dense", "hunyuan_v1_dense:HunYuanDenseV1Attention"),
    Case("hunyuan_v1_moe", "hunyuan_v1_moe:HunYuanMoEV1Attention"),
    Case("hunyuan_vl", "hunyuan_vl:HunYuanVLDenseV1Attention", tables=given_tables),
    Case(
        "idefics",
        "idefics:IdeficsAttention",
        config="IdeficsConfig",
        built=lambda c: IdeficsAttention(HIDDEN, H, config=c, qk_layer_norms=True),
        forward=lambda h, t, p, m: {"hidden_states": h, "attention_mask": None, "position_ids": p},
    ),
    Case("timesfm2_5", "timesfm2_5:TimesFm2_5Attention"),
    Case("olmo2", "olmo2:Olmo2Attention"),
    Case("olmo3", "olmo3:Olmo3Attention"),
    Case("flex_olmo", "flex_olmo:FlexOlmoAttention"),
    Case("olmo_hybrid", "olmo_hybrid:OlmoHybridAttention"),
    Case("olmoe", "olmoe:OlmoeAttention"),
    Case("minimax_m2", "minimax_m2:MiniMaxM2Attention", options={"rotary_dim": 16}),
    Case(
        "internvl",
        "internvl:InternVLVisionAttention",
        config="InternVLVisionConfig",
        rotary=None,
        forward=plain,
        args=(),
        options={"use_qk_norm": True},
    ),
    Case(
        "qianfan_ocr",
        "qianfan_ocr:QianfanOCRVisionAttention",
        config="QianfanOCRVisionConfig",
        rotary=None,
        forward=plain,
        args=(),
        options={"use_qk_norm": True},
    ),
    Case("esmc", "esmc:EsmcAttention", options=ALL_KV),
    Case("cohere", "cohere:CohereAttention", options={"use_qk_norm": True}),
    Case("chameleon", "chameleon:ChameleonAttention", config="ChameleonConfig"),
    Case("stablelm", "stablelm:StableLmAttention", options={"qk_layernorm": True}),
    Case("phi", "phi:PhiAttention", options={"qk_layernorm": True}),
    Case("persimmon", "persimmon:PersimmonAttention", options={"qk_layernorm": True}, raw=persimmon),
    Case("nemotron3_5_transcribe", "nemotron3_5_transcribe:Nemotron3_5TranscribeAttention"),
    Case("zaya", "zaya:ZayaAttention", raw=zaya, options={"rope_parameters": {"hybrid": HALF["rope_parameters"]}}),
    Case("deepseek_v2", "deepseek_v2:DeepseekV2Attention", options=MLA, raw=latents),
    Case("deepseek_v3", "deepseek_v3:DeepseekV3Attention", options=MLA, raw=latents),
    Case("glm4_moe_lite", "glm4_moe_lite:Glm4MoeLiteAttention", options=MLA, raw=latents),
    Case("youtu", "youtu:YoutuAttention", options=MLA, raw=latents),
    Case("axk1", "axk1:AXK1Attention", options=MLA, raw=latents),
    Case("minicpm3", "minicpm3:MiniCPM3Attention", options=MLA, raw=latents),
    Case(
        "mistral4",
        "mistral4:Mistral4Attention",
        options={**MLA, "qk_nope_head_dim": 16, "head_dim": D},
        raw=latents,
        forward=with_positions,
    ),
    Case("longcat_flash", "longcat_flash:LongcatFlashMLA", options=MLA, raw=latents),
    Case("kimi_linear", "kimi_linear:KimiLinearAttention", options=MLA, raw=latents, rotary=None, forward=no_tables),
    Case("bailing_hybrid", "bailing_hybrid:BailingHybridAttention", options=MLA, raw=latents),
    Case(
        "mistral_large4",
        "mistral_large4:MistralLarge4TextAttention",
        options=MLA,
        raw=latents,
        forward=lambda h, t, p, m: {**with_positions(h, t, p, m), "shared_kv_states": {}},
    ),
    Case(
        "dots3_note",
        "dots3_note:Dots3NoteTextAttention",
        config="Dots3NoteTextConfig",
        raw=latents,
        options={**MLA, "num_hidden_layers": 48},
        forward=with_positions,
    ),
    Case("axk2", "axk2:AXK2Attention", options=MLA, raw=latents, forward=with_positions),
    Case("deepseek_v32", "deepseek_v32:DeepseekV32Attention", options=MLA, raw=latents, forward=with_positions),
    Case("glm_moe_dsa", "glm_moe_dsa:GlmMoeDsaAttention", options=MLA, raw=latents, forward=with_positions),
    Case("hy_v4", "hy_v4:HYV4Attention", options=MLA, raw=latents, forward=with_positions),
    Case(
        "glm5_next",
        "glm5_next:Glm5NextTextAttention",
        config="Glm5NextTextConfig",
        raw=latents,
        options={**MLA, "qk_rope_head_dim": 0},
        rotary=None,
        forward=lambda h, t, p, m: {"hidden_states": h, "attention_mask": torch.ones(B, T, dtype=torch.bool)},
    ),
    Case(
        "deepseek_v4",
        "deepseek_v4:DeepseekV4Attention",
        raw=one_head_of_k,
        options={"layer_types": ["sliding_attention"] * 4, "qk_rope_head_dim": 16, "q_lora_rank": 48, **HALF},
        tables=lambda h, p: {"main": tuple(t[..., :8] for t in given_tables(h, p, 16))},
        forward=with_positions,
    ),
    Case(
        "janus",
        "janus:JanusVisionAttention",
        config="JanusVisionConfig",
        rotary=None,
        forward=plain,
        args=(),
        options={"use_qk_norm": True, "num_attention_heads": 1, "head_dim": HIDDEN},
        raw=lambda r: tuple(heads(r.outputs[f"{n}_proj"], HIDDEN) for n in "qkv"),
    ),
    Case(
        "t5gemma2_merged",
        "t5gemma2:T5Gemma2MergedAttention",
        config="T5Gemma2TextConfig",
        raw=lambda r: tuple(heads(getattr(r.module, f"{n}_proj")(r.extra["hidden_states"])) for n in "qkv"),
        forward=lambda h, t, p, m: {
            "hidden_states": h,
            "position_embeddings": t,
            "merged_attention_mask": None,
            "encoder_hidden_states": h[:, :2],
        },
    ),
    Case(
        "qwen4_exp",
        "qwen4_exp:Qwen4ExpTextAttention",
        raw=gated_q,
        mrope=True,
        forward=with_mask,
        options={
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 32,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
        },
    ),
    Case("diffusion_gemma", "diffusion_gemma:DiffusionGemmaDecoderTextAttention"),
]
