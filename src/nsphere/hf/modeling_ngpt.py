"""nGPT, the normalized transformer (arXiv 2410.01131), for Hugging Face transformers.

This file needs torch and transformers alone: it is shipped with exported models and runs without nsphere, which holds
it equal to its own model. All matrices have unit rows (or columns: o_proj, down_proj) along the embedding, and hidden
states are unit vectors. Inference and LoRA need nothing for that. To train the matrices themselves, project them after
every optimizer step: nsphere.hf.SphereCallback for the Trainer, nsphere.keep_on_hypersphere for any torch optimizer.

Shapes: B batch, T tokens, H query heads, K key and value heads, D head_dim.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.generic import can_return_tuple


class NGPTConfig(PreTrainedConfig):
    """The shape of an nGPT, and how its learned scales are stored.

    A scale starts at `*_init` and is stored as `*_scale`: effective = stored · init / scale, which sets its learning
    rate under Adam and leaves the forward pass unchanged. `vector` learns a number per dimension, `scalar` one, `fixed`
    none.

    Args:
        vocab_size: rows of the embedding.
        hidden_size: d.
        intermediate_size: hidden width of the MLP; 4 d if not given.
        num_hidden_layers: blocks.
        num_attention_heads: H.
        num_key_value_heads: K; H if not given.
        head_dim: D; d / H if not given.
        max_position_embeddings: tokens of a training sequence.
        rope_theta: base of the rotary embedding.
        eigen_lr: kind of α, the step towards what attention or the MLP suggest.
        eigen_lr_init: start of α.
        eigen_lr_scale: stored start of α; 1/√d if not given.
        s_qk: kind of the scale of normalised q and k.
        s_qk_init: start of s_qk.
        s_qk_scale: stored start of s_qk; 1/√d if not given.
        s_uv: kind of the scales of the MLP's branches.
        s_uv_init: start of s_u and s_v.
        s_uv_scale: stored start of s_u and s_v.
        s_z: kind of the scale of the logits.
        s_z_init: start of s_z.
        s_z_scale: stored start of s_z; 1/√d if not given.
        qk_norm: whether q and k are normalised.
        softmax_scale: factor on q·k; √D if not given.
        convention: "paper", or "nvidia" for the details of the authors' code: its rotary code is not a rotation, hidden
            states are normalised again before each step, √d is on both branches of the MLP, s_qk is on q and on k.
    """

    model_type = "ngpt"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = 256,
        hidden_size: int = 256,
        intermediate_size: int | None = None,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        max_position_embeddings: int = 256,
        rope_theta: float = 10000.0,
        eigen_lr: str = "vector",
        eigen_lr_init: float = 0.05,
        eigen_lr_scale: float | None = None,
        s_qk: str = "vector",
        s_qk_init: float = 1.0,
        s_qk_scale: float | None = None,
        s_uv: str = "vector",
        s_uv_init: float = 1.0,
        s_uv_scale: float = 1.0,
        s_z: str = "vector",
        s_z_init: float = 1.0,
        s_z_scale: float | None = None,
        qk_norm: bool = True,
        softmax_scale: float | None = None,
        convention: str = "paper",
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        for name, count in (
            ("vocab_size", vocab_size),
            ("hidden_size", hidden_size),
            ("intermediate_size", intermediate_size),
            ("num_hidden_layers", num_hidden_layers),
            ("num_attention_heads", num_attention_heads),
            ("num_key_value_heads", num_key_value_heads),
            ("max_position_embeddings", max_position_embeddings),
        ):
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        if head_dim is None and hidden_size % num_attention_heads:
            raise ValueError(
                f"hidden_size {hidden_size} is not divisible by num_attention_heads {num_attention_heads}; choose a "
                "divisor, or give head_dim"
            )
        scale = 1 / math.sqrt(hidden_size)
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.intermediate_size = 4 * hidden_size if intermediate_size is None else intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        self.max_position_embeddings, self.rope_theta = max_position_embeddings, rope_theta
        self.eigen_lr, self.eigen_lr_init = eigen_lr, eigen_lr_init
        self.eigen_lr_scale = scale if eigen_lr_scale is None else eigen_lr_scale
        self.s_qk, self.s_qk_init = s_qk, s_qk_init
        self.s_qk_scale = scale if s_qk_scale is None else s_qk_scale
        self.s_uv, self.s_uv_init, self.s_uv_scale = s_uv, s_uv_init, s_uv_scale
        self.s_z, self.s_z_init = s_z, s_z_init
        self.s_z_scale = scale if s_z_scale is None else s_z_scale
        self.qk_norm = qk_norm
        self.softmax_scale = math.sqrt(self.head_dim) if softmax_scale is None else softmax_scale
        self.convention, self.use_cache = convention, use_cache
        if convention not in ("paper", "nvidia"):
            raise ValueError(f"convention is {convention!r}; choose paper or nvidia")
        for name in ("eigen_lr", "s_qk", "s_uv", "s_z"):
            if getattr(self, name) not in ("vector", "scalar", "fixed"):
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose vector, scalar or fixed")
        scales = [f"{name}_{part}" for name in ("eigen_lr", "s_qk", "s_uv", "s_z") for part in ("init", "scale")]
        for name in ("rope_theta", "softmax_scale", *scales):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)}")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; the rotary embedding turns pairs, choose an even number")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {num_attention_heads} is not divisible by num_key_value_heads "
                f"{num_key_value_heads}; each key/value head serves the same number of query heads"
            )
        absent = ["sliding_window", "attention_chunk_size", "rope_scaling", "rope_parameters", "tie_word_embeddings"]
        if set(kwargs.get("layer_types") or ()) - {"full_attention"}:
            absent.append("layer_types")  # caches would go by it, and masks would not
        if asked := [name for name in absent if kwargs.get(name)]:
            raise ValueError(f"{asked[0]} is {kwargs[asked[0]]!r}, which nGPT does not have; leave it out")
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)


def unit(x: Tensor) -> Tensor:
    """X / ‖x‖₂ over the last dim, in fp32 or more; a zero vector stays zero, with a zero gradient."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    square = (x * x).sum(-1, keepdim=True)
    nonzero = square > 0
    return x * torch.where(nonzero, torch.where(nonzero, square, 1.0).rsqrt(), 0.0)


class NGPTScale(nn.Module):
    """A learned scale: stored · init / scale, in fp32 or more, of [size], or [1] if it is no vector."""

    stored: nn.Parameter | None

    def __init__(self, size: int, kind: str, init: float, scale: float) -> None:
        super().__init__()
        self.init, self.scale = float(init), float(scale)
        stored = None if kind == "fixed" else nn.Parameter(torch.empty(size if kind == "vector" else 1))
        self.register_parameter("stored", stored)

    def forward(self) -> Tensor | float:
        if self.stored is None:
            return self.init
        return self.stored.to(torch.promote_types(self.stored.dtype, torch.float32)) * (self.init / self.scale)


def on_sphere(module: nn.Module, dim: int) -> Any:
    """Say along which dim the module's weight has unit norm; nsphere's functions read it."""
    module.sphere_dims = {"weight": dim}  # type: ignore[assignment]
    return module


def rotary_tables(config: NGPTConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, T, D/2] in fp32, from angles in fp64: in fp32 they drift with length."""
    wide = torch.float32 if positions.device.type == "mps" else torch.float64
    powers = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=wide) / config.head_dim
    angles = positions[..., None].to(wide) * config.rope_theta**-powers
    cos, sin = angles.cos().float(), angles.sin().float()
    if config.convention == "paper":
        return cos, sin
    # the authors' tables: the two halves of the rows [sin pθ₀, cos pθ₀, sin pθ₁, cos pθ₁, …]
    return torch.stack((sin, cos), -1).flatten(-2).chunk(2, -1)  # type: ignore[return-value]


def rotate(x: Tensor, tables: tuple[Tensor, Tensor], convention: str) -> Tensor:
    """X [B, T, H, D] turned by its position, in the tables' fp32 or more."""
    a, b = (table.unsqueeze(-2) for table in tables)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if convention == "nvidia":  # the authors' code, which is not a rotation
        return torch.stack((-x[..., 1::2] * b, x[..., 0::2] * a), -1).flatten(-2)
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * a - x2 * b, x2 * a + x1 * b), -1)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in plain PyTorch: [B, H, T, D] → [B, T, H, D] and the weights [B, H, T, S]."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask[..., : key.shape[-2]]
    weights = weights.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class NGPTAttention(nn.Module):
    """W_o softmax(softmax_scale · q kᵀ) v, with q = s_qk² ⊙ Norm(RoPE(W_q h)) and k = Norm(RoPE(W_k h)).

    The paper multiplies q and k by s_qk each; the square on q is the same and leaves the cached keys unit vectors.
    """

    def __init__(self, config: NGPTConfig, layer_idx: int) -> None:
        super().__init__()
        d, D, H, K = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
        self.config, self.layer_idx, self.head_dim = config, layer_idx, D
        self.num_key_value_groups = H // K
        self.scaling, self.is_causal, self.attention_dropout = config.softmax_scale, True, 0.0
        self.q_proj = on_sphere(nn.Linear(d, H * D, bias=False), 1)
        self.k_proj = on_sphere(nn.Linear(d, K * D, bias=False), 1)
        self.v_proj = on_sphere(nn.Linear(d, K * D, bias=False), 1)
        self.o_proj = on_sphere(nn.Linear(H * D, d, bias=False), 0)
        self.s_qk = NGPTScale(H * D, config.s_qk, config.s_qk_init, config.s_qk_scale)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = (
            project(hidden_states).unflatten(-1, (-1, self.head_dim))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        dtype = q.dtype
        q, k = (rotate(x, position_embeddings, self.config.convention) for x in (q, k))
        if self.config.qk_norm:
            q, k = unit(q), unit(k)
        s_qk = self.s_qk()
        if isinstance(s_qk, Tensor) and s_qk.numel() > 1:
            s_qk = s_qk.view(-1, self.head_dim)
        q = q * s_qk**2
        q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend: Callable[..., Any]
        if hasattr(ALL_ATTENTION_FUNCTIONS, "get_interface"):
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        else:  # transformers 5.0
            attend = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation, eager_attention_forward)
        y, weights = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(y.flatten(-2)), weights


class NGPTMLP(nn.Module):
    """W_down (u ⊙ SiLU(ν)), with u = s_u ⊙ W_u h and ν = √d s_v ⊙ W_ν h."""

    def __init__(self, config: NGPTConfig) -> None:
        super().__init__()
        d, width = config.hidden_size, config.intermediate_size
        self.up_proj = on_sphere(nn.Linear(d, width, bias=False), 1)
        self.gate_proj = on_sphere(nn.Linear(d, width, bias=False), 1)
        self.down_proj = on_sphere(nn.Linear(width, d, bias=False), 0)
        self.s_u = NGPTScale(width, config.s_uv, config.s_uv_init, config.s_uv_scale)
        self.s_v = NGPTScale(width, config.s_uv, config.s_uv_init, config.s_uv_scale)
        self.gate_gain = math.sqrt(d)
        self.up_gain = math.sqrt(d) if config.convention == "nvidia" else 1.0

    def forward(self, hidden_states: Tensor) -> Tensor:
        u, v = self.up_proj(hidden_states), self.gate_proj(hidden_states)
        u_scaled = (u * (self.s_u() * self.up_gain)).to(u.dtype)
        v_scaled = (v * (self.s_v() * self.gate_gain)).to(v.dtype)
        return self.down_proj(u_scaled * nn.functional.silu(v_scaled))


class NGPTDecoderLayer(GradientCheckpointingLayer):
    """h ← Norm(h + |α_A| (Norm(ATTN(h)) − h)); h ← Norm(h + |α_M| (Norm(MLP(h)) − h))."""

    def __init__(self, config: NGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn, self.mlp = NGPTAttention(config, layer_idx), NGPTMLP(config)
        alpha = config.hidden_size, config.eigen_lr, config.eigen_lr_init, config.eigen_lr_scale
        self.eigen_lr_attn, self.eigen_lr_mlp = NGPTScale(*alpha), NGPTScale(*alpha)
        self.renormalise = config.convention == "nvidia"

    def step(self, h: Tensor, towards: Tensor, eigen_lr: NGPTScale) -> Tensor:
        """One step on the sphere from h, in fp32 or more, rounded once."""
        start = unit(h) if self.renormalise else h.to(torch.promote_types(h.dtype, torch.float32))
        return unit(start + abs(eigen_lr()) * (unit(towards) - start)).to(h.dtype)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        attended, weights = self.self_attn(hidden_states, **kwargs)
        hidden_states = self.step(hidden_states, attended, self.eigen_lr_attn)
        return self.step(hidden_states, self.mlp(hidden_states), self.eigen_lr_mlp), weights


class NGPTPreTrainedModel(PreTrainedModel):
    """What every nGPT shares."""

    config: NGPTConfig
    config_class = NGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NGPTDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        """Uniformly random unit rows or columns; every scale at its start. Leaves alone what was loaded."""
        dims = getattr(module, "sphere_dims", None)
        if isinstance(module, NGPTScale):
            if module.stored is not None:
                init.constant_(module.stored, module.scale)
        elif dims is not None:
            weight = torch.randn_like(module.weight, dtype=torch.float32)
            init.copy_(module.weight, nn.functional.normalize(weight, dim=dims["weight"]).to(module.weight.dtype))


def _note_convention(model: "NGPTModel", state: Any, prefix: str, metadata: dict[str, Any]) -> None:
    metadata["convention"] = model.config.convention


def _check_convention(model: "NGPTModel", state: Any, prefix: str, metadata: dict[str, Any], *_: Any) -> None:
    """The names and shapes of both conventions are the same."""
    if (theirs := metadata.get("convention", model.config.convention)) != model.config.convention:
        raise ValueError(
            f"these weights are of convention {theirs!r} and the model is of {model.config.convention!r}, which would "
            f"compute something else with them; make it with convention={theirs!r}"
        )


_MASK_ARGUMENTS = inspect.signature(create_causal_mask).parameters


class NGPTModel(NGPTPreTrainedModel):
    """Tokens to hidden states: embedding and blocks. There is no final norm: every hidden state is a unit vector."""

    def __init__(self, config: NGPTConfig) -> None:
        super().__init__(config)
        self.embed_tokens = on_sphere(nn.Embedding(config.vocab_size, config.hidden_size), 1)
        self.layers = nn.ModuleList(NGPTDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.gradient_checkpointing = False
        self.register_state_dict_post_hook(_note_convention)
        self.register_load_state_dict_pre_hook(_check_convention)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As every transformers decoder.

        Positions matter beyond their differences, because s_qk scales the two dims of a rotated pair apart: every
        sequence must count from 0. Without `position_ids` they follow from a 2D `attention_mask`, padding apart.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        h = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        slots = torch.arange(h.shape[1], device=h.device) + seen if cache_position is None else cache_position
        if position_ids is None:
            if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -h.shape[1] :]
            else:
                position_ids = slots.unsqueeze(0)
        # the names of these arguments changed within transformers 5
        given: dict[str, Any] = {"inputs_embeds": h, "input_embeds": h, "cache_position": slots}
        mask = create_causal_mask(
            config=self.config,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            **{name: value for name, value in given.items() if name in _MASK_ARGUMENTS},
        )
        tables = rotary_tables(self.config, position_ids)
        keep_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        keep_weights = self.config.output_attentions if output_attentions is None else output_attentions
        states, every_weight = [h], []
        for layer in self.layers[: self.config.num_hidden_layers]:  # which assisted generation lowers, to exit early
            h, weights = layer(
                h, attention_mask=mask, position_embeddings=tables, past_key_values=past_key_values, **kwargs
            )
            states.append(h)
            every_weight.append(weights)
        return BaseModelOutputWithPast(
            last_hidden_state=h,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(states) if keep_states else None,
            attentions=tuple(every_weight) if keep_weights else None,
        )


class NGPTForCausalLM(NGPTPreTrainedModel, GenerationMixin):
    """nGPT with its output head: logits = s_z ⊙ E_out h."""

    def __init__(self, config: NGPTConfig) -> None:
        super().__init__(config)
        self.model = NGPTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = on_sphere(nn.Linear(config.hidden_size, config.vocab_size, bias=False), 1)
        self.s_z = NGPTScale(config.vocab_size, config.s_z, config.s_z_init, config.s_z_scale)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V] in fp32 or more, and with `labels` [B, T] the mean cross-entropy of the next tokens."""
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{k: v for k, v in kwargs.items() if k != "num_items_in_batch"},
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * self.s_z()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


# save_pretrained then writes this file beside the weights, and the config says where the classes are
NGPTConfig.register_for_auto_class()
NGPTModel.register_for_auto_class("AutoModel")
NGPTForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["NGPTConfig", "NGPTForCausalLM", "NGPTModel", "NGPTPreTrainedModel"]
