"""Models of this library as transformers' and back: the same parameters under the names that each knows."""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from nsphere.fold import Constant
from nsphere.gpt import GPTConfig
from nsphere.hf.gpt2 import from_gpt2, gpt2_config, gpt2_state_dict
from nsphere.hf.modeling_ngpt import NGPTConfig as HFConfig
from nsphere.hf.modeling_ngpt import NGPTForCausalLM
from nsphere.layers import Decoder, DecoderConfig
from nsphere.nanogpt import NanoGPT
from nsphere.ngpt import NGPT, NGPTConfig
from nsphere.norms import RMSNorm
from nsphere.ops.normalized_update import unit
from nsphere.presets import make_model

# ours → theirs, of a block
_SHARED = {
    "attn.W_q.weight": "self_attn.q_proj.weight",
    "attn.W_k.weight": "self_attn.k_proj.weight",
    "attn.W_v.weight": "self_attn.v_proj.weight",
    "attn.W_o.weight": "self_attn.o_proj.weight",
    "mlp.W_u.weight": "mlp.up_proj.weight",
    "mlp.W_nu.weight": "mlp.gate_proj.weight",
    "mlp.W_down.weight": "mlp.down_proj.weight",
}
_NGPT_BLOCK = _SHARED | {
    "attn.qk_norm.multiplier.s_qk.stored": "self_attn.s_qk.stored",
    "mlp.W_u.scale.stored": "mlp.s_u.stored",
    "mlp.W_nu.scale.stored": "mlp.s_v.stored",
    "eigen_lr_attn.stored": "eigen_lr_attn.stored",
    "eigen_lr_mlp.stored": "eigen_lr_mlp.stored",
}
_GPT_BLOCK = _SHARED | {
    "attn_norm.weight": "input_layernorm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "attn.qk_norm.q_norm.weight": "self_attn.q_norm.weight",
    "attn.qk_norm.k_norm.weight": "self_attn.k_norm.weight",
}
_TOP = {
    "embed.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "head.scale.stored": "s_z.stored",
}
_SHAPE = {
    "vocab_size": "vocab_size",
    "context": "max_position_embeddings",
    "d_model": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "d_mlp": "intermediate_size",
}
_SCALES = [f"{s}{part}" for s in ("eigen_lr", "s_qk", "s_uv", "s_z") for part in ("", "_init", "_scale")]
_QK_EPS = RMSNorm(2).spec.eps
_NGPT_ONLY = [*_SCALES, "qk_norm", "softmax_scale", "convention"]


def _theirs(name: str, is_ngpt: bool) -> str:
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if block is None:
        return _TOP[name]
    return f"model.layers.{block[1]}.{(_NGPT_BLOCK if is_ngpt else _GPT_BLOCK)[block[2]]}"


def _ours(name: str, is_ngpt: bool) -> str | None:
    block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    names = _TOP if block is None else _NGPT_BLOCK if is_ngpt else _GPT_BLOCK
    back = {theirs: ours for ours, theirs in names.items()}
    if block is None:
        return back.get(name)
    return None if (ours := back.get(block[2])) is None else f"blocks.{block[1]}.{ours}"


def _tensors(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Parameters under our names; what is normalised in every forward pass comes normalised."""
    sphere_dims = {
        f"{prefix}.weight": module.sphere_dims["weight"]
        for prefix, module in model.named_modules()
        if getattr(module, "projection", "step") == "forward"
    }
    for name, p in model.named_parameters():
        yield name, unit(p.detach(), sphere_dims[name]).to(p.dtype) if name in sphere_dims else p.detach()


def hf_config(config: DecoderConfig) -> Any:
    """The transformers config of a model's config: NGPTConfig, or for GPT LlamaConfig, Qwen3Config or GPT2Config.

    Raises:
        ValueError: a GPT with a QK-norm, heads, or a rotary embedding, that no transformers class of this shape has.
    """
    if isinstance(config, GPTConfig) and config.convention == "nanogpt":
        return gpt2_config(config)
    fields = {theirs: getattr(config, ours) for ours, theirs in _SHAPE.items()}
    if isinstance(config, NGPTConfig):
        own = {name: getattr(config, name) for name in _NGPT_ONLY}
        return HFConfig(**fields, rope_theta=config.rope_base, **own)
    assert isinstance(config, GPTConfig)
    if config.convention == "nvidia":
        raise ValueError(
            "transformers has no model with the rotary code of the authors' GPT (convention nvidia), which is no "
            "rotation; export it as safetensors, torch-export or onnx"
        )
    if config.qk_norm != "none" and config.qk_norm_over != "head":
        raise ValueError(
            f"transformers has no model of this shape with a QK-norm over {config.qk_norm_over!r}: Qwen3's is over "
            "each head; export it as safetensors, torch-export or onnx"
        )
    fields |= {
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "tie_word_embeddings": config.tied,
        "attention_bias": False,
        "initializer_range": config.init_std,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if config.qk_norm == "none":
        return LlamaConfig(**fields, mlp_bias=False)
    if config.qk_norm == "rms":
        if config.norm_eps != _QK_EPS:
            raise ValueError(
                f"a GPT whose norms have eps {config.norm_eps:g} and whose QK-norm has {_QK_EPS:g} is no Qwen3, which "
                "has one eps for both; export it as safetensors, torch-export or onnx"
            )
        return Qwen3Config(**fields)
    raise ValueError(
        f"transformers has no model of this shape with qk_norm {config.qk_norm!r}: GPT without QK-norm is a Llama, "
        "with rms a Qwen3; export it as safetensors, torch-export or onnx"
    )


_CLASSES = {
    HFConfig: NGPTForCausalLM,
    LlamaConfig: LlamaForCausalLM,
    Qwen3Config: Qwen3ForCausalLM,
    GPT2Config: GPT2LMHeadModel,
}


@torch.no_grad()
def to_hf(model: Decoder) -> PreTrainedModel:
    """A transformers model with a copy of this model's parameters, and the same function up to rounding.

    nGPT becomes `NGPTForCausalLM`, GPT a `LlamaForCausalLM`, GPT with RMS QK-norm a `Qwen3ForCausalLM`, GPT of
    convention nanogpt a `GPT2LMHeadModel`, which has biases in any case: zeros, where it has none.

    Raises:
        ValueError: see `hf_config`; a model of another kind, or a folded one.
    """
    if not isinstance(getattr(model, "config", None), DecoderConfig):
        raise ValueError(f"to_hf takes a GPT or NGPT of this library, got a {type(model).__name__}")
    if any(isinstance(module, Constant) for module in model.modules()):
        raise ValueError("this model was folded, which its scales do not survive; give the one that it was made of")
    config = hf_config(model.config)
    theirs: PreTrainedModel = _CLASSES[type(config)](config).to(next(model.parameters()).dtype)
    if isinstance(model, NanoGPT):
        theirs.load_state_dict(gpt2_state_dict(model))
        return theirs.eval()
    is_ngpt = isinstance(model, NGPT)
    state = {_theirs(name, is_ngpt): tensor.clone() for name, tensor in _tensors(model)}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    theirs.load_state_dict(state)
    return theirs.eval()


@torch.no_grad()
def from_hf(model: PreTrainedModel) -> Decoder:
    """The reverse of `to_hf`: this library's model with a copy of the parameters, bit for bit.

    Also of a GPT-2, Llama or Qwen3 from elsewhere, if it is of a shape that GPT has.

    Raises:
        ValueError: another class, or a shape that GPT does not have, with what stands against it.
    """
    if isinstance(model, GPT2LMHeadModel):
        return from_gpt2(model)
    if type(model).__name__ not in ("NGPTForCausalLM", "LlamaForCausalLM", "Qwen3ForCausalLM"):
        raise ValueError(
            f"{type(model).__name__} is no model that nsphere has; it reads NGPTForCausalLM, GPT2LMHeadModel, "
            "LlamaForCausalLM and Qwen3ForCausalLM"
        )
    theirs: Any = model.config
    fields = {ours: getattr(theirs, name) for ours, name in _SHAPE.items()}
    # shipped with an export and loaded with trust_remote_code, the class is another one of the same name
    is_ngpt = type(model).__name__ == "NGPTForCausalLM"
    config: DecoderConfig
    if is_ngpt:
        own = {name: getattr(theirs, name) for name in _NGPT_ONLY}
        config = NGPTConfig(**fields, rope_base=theirs.rope_theta, **own)
    else:
        config = _gpt_config(theirs, fields, qk_norm="rms" if isinstance(model, Qwen3ForCausalLM) else "none")
    ours = make_model(config).to(model.dtype)
    state = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and getattr(config, "tied", False):
            continue
        if (our_name := _ours(name, is_ngpt)) is None:
            raise ValueError(f"{name} of {type(model).__name__} has no place in nsphere's model")
        state[our_name] = tensor
    ours.load_state_dict(state)
    return ours.eval()


def _gpt_config(theirs: Any, fields: dict[str, Any], qk_norm: str) -> GPTConfig:
    rope = theirs.rope_parameters
    against = {
        "rope scaling": rope.get("rope_type", "default") != "default",
        "biases": theirs.attention_bias or getattr(theirs, "mlp_bias", False),
        f"the activation {theirs.hidden_act}": theirs.hidden_act != "silu",
        "sliding windows": bool(getattr(theirs, "use_sliding_window", False)),
        f"an eps of {theirs.rms_norm_eps:g} in its QK-norm": qk_norm == "rms" and theirs.rms_norm_eps != _QK_EPS,
    }
    if faults := [what for what, there in against.items() if there]:
        raise ValueError(f"this {type(theirs).__name__} has {' and '.join(faults)}, which nsphere's GPT does not have")
    return GPTConfig(
        **fields,
        rope_base=rope["rope_theta"],
        qk_norm=qk_norm,
        tied=theirs.tie_word_embeddings,
        norm_eps=theirs.rms_norm_eps,
        init_std=theirs.initializer_range,
    )
