"""GPT of convention nanogpt as transformers' GPT-2 and back.

The names are nanoGPT's. GPT-2 keeps a block's four matrices transposed ([in, out], `Conv1D`) and always has biases.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from nsphere.gpt import GPTConfig
from nsphere.layers import Decoder
from nsphere.nanogpt import NanoGPT, config_of, from_nanogpt_state_dict, not_in_nanogpt, to_nanogpt_state_dict
from nsphere.presets import make_model

_GELUS = {"gelu": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
"""Their activations that GPT has; of two of one meaning the first is what an export says."""


def gpt2_config(config: GPTConfig) -> GPT2Config:
    """The transformers config of a config of convention nanogpt.

    Raises:
        ValueError: heads or a QK-norm that GPT-2 does not have.
    """
    if faults := not_in_nanogpt(config):
        raise ValueError(
            f"transformers' GPT-2 has no {' and no '.join(faults)}; export it as safetensors, torch-export or onnx"
        )
    return GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.context,
        n_embd=config.d_model,
        n_layer=config.num_layers,
        n_head=config.num_heads,
        n_inner=config.d_mlp,
        activation_function=next(theirs for theirs, gelu in _GELUS.items() if gelu == config.gelu),
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        layer_norm_epsilon=config.norm_eps,
        initializer_range=config.init_std,
        tie_word_embeddings=config.tied,
        bos_token_id=None,
        eos_token_id=None,
    )


def gpt2_state_dict(model: NanoGPT) -> dict[str, Tensor]:
    """A copy of the parameters as GPT2LMHeadModel has them, zeros for biases that the model does not have."""
    state = {}
    for name, tensor in to_nanogpt_state_dict(model).items():
        state[name] = (tensor.t() if _is_transposed(name) else tensor).clone(memory_format=torch.contiguous_format)
        if name.endswith(".weight") and (name.startswith("transformer.h.") or ".ln_f." in name):
            state.setdefault(name.replace(".weight", ".bias"), tensor.new_zeros(len(tensor)))
    if model.config.tied:
        state["lm_head.weight"] = state["transformer.wte.weight"]
    return state


def _is_transposed(name: str) -> bool:
    return name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))


@torch.no_grad()
def from_gpt2(model: GPT2LMHeadModel) -> Decoder:
    """GPT with a copy of the parameters, bit for bit, biases included; without its dropout.

    Raises:
        ValueError: what GPT does not have, by name.
    """
    theirs: Any = model.config
    against = {
        f"the activation {theirs.activation_function}": theirs.activation_function not in _GELUS,
        "attention scaled by layer (scale_attn_by_inverse_layer_idx)": theirs.scale_attn_by_inverse_layer_idx,
        "attention without 1/√D (scale_attn_weights=False)": not theirs.scale_attn_weights,
        "cross-attention (add_cross_attention)": theirs.add_cross_attention,
    }
    if faults := [what for what, there in against.items() if there]:
        raise ValueError(f"this {type(theirs).__name__} has {' and '.join(faults)}, which nsphere's GPT does not have")
    state = {name: t.t() if _is_transposed(name) else t for name, t in model.state_dict().items()}
    ours = from_nanogpt_state_dict(state)
    if not theirs.tie_word_embeddings:  # even if they are equal by now
        ours["head.weight"] = state["lm_head.weight"]
    config = config_of(
        ours,
        theirs.n_head,
        gelu=_GELUS[theirs.activation_function],
        norm_eps=theirs.layer_norm_epsilon,
        init_std=theirs.initializer_range,
    )
    made = make_model(config).to(model.dtype)
    made.load_state_dict(ours)
    return made.eval()
