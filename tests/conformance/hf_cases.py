"""The attentions of transformers that are compared with ours."""

from typing import Any

import torch
from hf_attentions import B, D, H, HIDDEN, HKV, T, Case, Run, heads


def gated_q(r: Run) -> tuple[torch.Tensor, ...]:
    """q_proj holds [q, gate] per head."""
    q = heads(r.outputs["q_proj"], 2 * D)[..., :D]
    return q, heads(r.outputs["k_proj"]), heads(r.outputs["v_proj"])


def no_v(r: Run) -> tuple[torch.Tensor, ...]:
    """v is k before its norm."""
    k = heads(r.outputs["k_proj"])
    return heads(r.outputs["q_proj"]), k, k


SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
HALF = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}

CASES = [
    Case("qwen3", "qwen3:Qwen3Attention"),
    Case("qwen3_moe", "qwen3_moe:Qwen3MoeAttention"),
    Case("dots1", "dots1:Dots1Attention"),
    Case("mellum", "mellum:MellumAttention"),
    Case("lfm3", "lfm3:Lfm3Attention"),
    Case("minimax_m3_vl", "minimax_m3_vl:MiniMaxM3VLAttention", options={"rotary_dim": 16, **HALF}),
    Case("qwen3_vl", "qwen3_vl:Qwen3VLTextAttention", mrope=True),
    Case("qwen3_vl_moe", "qwen3_vl_moe:Qwen3VLMoeTextAttention", mrope=True),
    Case("qwen3_omni_moe", "qwen3_omni_moe:Qwen3OmniMoeThinkerTextAttention", mrope=True),
    Case("apertus", "apertus:ApertusAttention"),
    Case("gemma3", "gemma3:Gemma3Attention", rotary_args=("full_attention",)),
    Case("hy_v3", "hy_v3:HYV3Attention"),
    Case("t5gemma2", "t5gemma2:T5Gemma2SelfAttention", rotary_args=("full_attention",)),
    Case("beam", "beam:BeamAttention"),
    Case("afmoe", "afmoe:AfmoeAttention", options=SLIDING),
    Case("cohere", "cohere:CohereAttention", options={"use_qk_norm": True}),
    Case("glm4_moe", "glm4_moe:Glm4MoeAttention", options={"use_qk_norm": True, **HALF}),
    Case("laguna", "laguna:LagunaAttention", args=(0, H)),
    Case("doge", "doge:DogeAttention"),
    Case("exaone4", "exaone4:Exaone4Attention", options=SLIDING),
    Case("exaone4_5", "exaone4_5:Exaone4_5_Attention"),
    Case("exaone_moe", "exaone_moe:ExaoneMoeAttention", options=SLIDING),
    Case("kolibri1", "kolibri1:Kolibri1Attention", options=SLIDING),
    Case("flex_olmo", "flex_olmo:FlexOlmoAttention"),
    Case("minimax_m2", "minimax_m2:MiniMaxM2Attention", options={"rotary_dim": 16}),
    Case("olmo2", "olmo2:Olmo2Attention"),
    Case("olmo3", "olmo3:Olmo3Attention"),
    Case("olmo_hybrid", "olmo_hybrid:OlmoHybridAttention"),
    Case("olmoe", "olmoe:OlmoeAttention"),
    Case("flint", "flint:FlintAttention", options=SLIDING),
    Case("gemma3n", "gemma3n:Gemma3nTextAttention", rotary_args=("full_attention",)),
    Case("gemma4", "gemma4:Gemma4TextAttention", rotary_args=("sliding_attention",)),
    Case("gemma4_unified", "gemma4_unified:Gemma4UnifiedTextAttention", rotary_args=("sliding_attention",)),
    Case("diffusion_gemma", "diffusion_gemma:DiffusionGemmaEncoderTextAttention", rotary_args=("sliding_attention",)),
    Case("embedding_gemma2", "embedding_gemma2:EmbeddingGemma2Attention", rotary_args=("sliding_attention",)),
    Case("esmc", "esmc:EsmcAttention"),
    Case("hunyuan_v1_dense", "hunyuan_v1_dense:HunYuanDenseV1Attention"),
    Case("hunyuan_v1_moe", "hunyuan_v1_moe:HunYuanMoEV1Attention"),
    Case("hunyuan_vl", "hunyuan_vl:HunYuanVLDenseV1Attention", mrope=True),
    Case("lfm2", "lfm2:Lfm2Attention"),
    Case("lfm2_moe", "lfm2_moe:Lfm2MoeAttention"),
    Case("muse_glimmer", "muse_glimmer:MuseGlimmerTextAttention"),
    Case("muse_spark", "muse_spark:MuseSparkTextAttention"),
    Case("muse_glimmer_assistant", "muse_glimmer_assistant:MuseGlimmerAssistantAttention"),
    Case("nanochat", "nanochat:NanoChatAttention"),
    Case("nemotron3_5_transcribe", "nemotron3_5_transcribe:Nemotron3_5TranscribeAttention"),
    Case("pe_audio", "pe_audio:PeAudioEncoderAttention"),
    Case("pe_video", "pe_video:PeVideoEncoderAttention"),
    Case("pe_audio_video", "pe_audio_video:PeAudioVideoEncoderAttention"),
    Case("phi", "phi:PhiAttention", options={"qk_layernorm": True}),
    Case("qwen3_5", "qwen3_5:Qwen3_5Attention", raw=gated_q, mrope=True),
    Case("qwen3_5_moe", "qwen3_5_moe:Qwen3_5MoeAttention", raw=gated_q, mrope=True),
    Case("qwen3_next", "qwen3_next:Qwen3NextAttention", raw=gated_q),
    Case("stablelm", "stablelm:StableLmAttention", options={"qk_layernorm": True}),
    Case("step3p7", "step3p7:Step3p7Attention"),
    Case("timesfm2_5", "timesfm2_5:TimesFm2_5Attention"),
    Case("neomme", "neomme:NeoMMEAttention"),
    Case("chameleon", "chameleon:ChameleonAttention"),
]
