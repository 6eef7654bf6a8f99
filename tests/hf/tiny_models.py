"""Tiny models of transformers with random weights, norms' included."""

from typing import Any

import torch
import transformers
from torch import nn

transformers.logging.set_verbosity_error()
COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "experts_implementation": "eager"}
# name: (config, model, options)
WITH_QK_NORM = {
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {"num_experts": 4, **EXPERTS}),
    "llama4": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {"no_rope_layers": [1, 0], "num_local_experts": 2, "intermediate_size_mlp": 64},
    ),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {}),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "cohere": ("CohereConfig", "CohereForCausalLM", {"use_qk_norm": True}),
    "glm4_moe": (
        "Glm4MoeConfig",
        "Glm4MoeForCausalLM",
        {"use_qk_norm": True, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, **EXPERTS},
    ),
    "hunyuan": ("HunYuanDenseV1Config", "HunYuanDenseV1ForCausalLM", {}),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM", {"qk_layernorm": True}),
    "exaone4": (
        "Exaone4Config",
        "Exaone4ForCausalLM",
        {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}


def make(config: str, model: str, options: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**{**COMMON, **options})).eval()
    for p in made.parameters():
        if p.dim() == 1 or p.shape[-1] == 16:  # norms, per head too
            nn.init.normal_(p, 1.0, 0.3)
        else:
            nn.init.normal_(p, 0.0, 1.5 * p.shape[-1] ** -0.5)
    return made.to(dtype)


def with_qk_norm(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    config, model, own = WITH_QK_NORM[family]
    return make(config, model, {**own, **options}, dtype)


def llama(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return make("LlamaConfig", "LlamaForCausalLM", options, dtype)


def token_ids(batch: int = 2, length: int = 12, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids() if ids is None else ids).logits


def gradients(model: Any, ids: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    ids = token_ids() if ids is None else ids
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
