"""Transformer Engine's TransformerLayer."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsphere.te.checks import check_arguments, check_groups, check_hidden_states
from nsphere.te.dot_product import Masks, Window
from nsphere.te.linear import Init, LayerNormMLP
from nsphere.te.multihead import MultiheadAttention
from nsphere.te.norms import NORMS


class DropPath(nn.Module):
    """Drops whole rows of the first dimension with probability drop_prob while training, and scales the rest up."""

    def __init__(self, drop_prob: float = 0.0):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, hidden_state: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return hidden_state
        keep = 1 - self.drop_prob
        kept = torch.rand(len(hidden_state), *[1] * (hidden_state.dim() - 1), device=hidden_state.device) < keep
        return hidden_state * kept / keep


class TransformerLayer(nn.Module):
    """Attention and MLP with their norms and residuals: Transformer Engine's names, order and defaults.

    Args:
        hidden_size: width of the residual stream.
        ffn_hidden_size: width inside the MLP.
        num_attention_heads: H.
        hidden_dropout: probability of dropping an element of what is added to the residual stream (0.1 by default).
        apply_residual_connection_post_layernorm: the residual is the normed input.
        output_layernorm: norms come after the blocks, not before.
        parallel_attention_mlp: attention and MLP read the same input, and their outputs are added.
        layer_type: "encoder", or "decoder": cross-attention to encoder_output in between.
        drop_path_rate: probability of dropping a block's whole contribution to a sample.
        self_attn_mask_type: of the self-attention; enc_dec_attn_mask_type of the cross-attention; each has its
            window_size and bottom_right_diagonal.
        activation: of the MLP, see `LayerNormMLP`.
        attn_input_format: "sbhd", "bshd" or "thd".
        **others: as in `MultiheadAttention`; what is not implemented raises ValueError unless at its default.

    Raises:
        ValueError: for what is not implemented, or does not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        num_attention_heads: int,
        num_gqa_groups: int | None = None,
        layernorm_epsilon: float = 1e-5,
        hidden_dropout: float = 0.1,
        attention_dropout: float = 0.1,
        init_method: Init = None,
        output_layer_init_method: Init = None,
        layer_number: int | None = None,
        kv_channels: int | None = None,
        self_attn_mask_type: str = "causal",
        window_size: Window = None,
        bottom_right_diagonal: bool | None = None,
        softcap: float = 0.0,
        enc_dec_attn_mask_type: str = "no_mask",
        enc_dec_bottom_right_diagonal: bool | None = None,
        enc_dec_window_size: Window = None,
        tp_group: Any = None,
        tp_size: int = 1,
        params_dtype: torch.dtype | None = None,
        get_rng_state_tracker: Any = None,
        fuse_wgrad_accumulation: bool = False,
        seq_length: int | None = None,
        micro_batch_size: int | None = None,
        sequence_parallel: bool = False,
        apply_residual_connection_post_layernorm: bool = False,
        output_layernorm: bool = False,
        parallel_attention_mlp: bool = False,
        layer_type: str = "encoder",
        drop_path_rate: float = 0.0,
        set_parallel_mode: bool = False,
        fuse_qkv_params: bool = False,
        rotary_pos_interleaved: bool = False,
        zero_centered_gamma: bool = False,
        qkv_weight_interleaved: bool = True,
        ub_tp_comm_overlap: bool = False,
        ub_overlap_ag: bool = True,
        ub_overlap_rs: bool = True,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = True,
        ub_bulk_wgrad: bool = True,
        bias: bool = True,
        activation: str = "gelu",
        activation_params: dict[str, Any] | None = None,
        normalization: str = "LayerNorm",
        device: torch.device | str | None = None,
        attn_input_format: str = "sbhd",
        name: str | None = None,
        qk_norm_type: Any = None,
        qk_norm_eps: float = 1e-6,
        qk_norm_before_rope: bool = False,
        softmax_type: str = "vanilla",
        *,
        softmax_scale: float | None = None,
    ):
        # the overlaps beside ub_tp_comm_overlap do nothing without it
        overlaps = ("ub_overlap_ag", "ub_overlap_rs", "ub_overlap_rs_dgrad", "ub_bulk_dgrad", "ub_bulk_wgrad")
        check_arguments("TransformerLayer", locals(), ignored=overlaps)
        check_groups("TransformerLayer", num_attention_heads, num_gqa_groups)
        if parallel_attention_mlp and (
            layer_type == "decoder" or apply_residual_connection_post_layernorm or output_layernorm
        ):
            raise ValueError(
                "parallel_attention_mlp=True excludes layer_type='decoder', output_layernorm and "
                "apply_residual_connection_post_layernorm; drop one"
            )
        super().__init__()
        self.self_attn_mask_type, self.window_size = self_attn_mask_type, window_size
        self.bottom_right_diagonal = bottom_right_diagonal
        self.enc_dec_attn_mask_type, self.enc_dec_window_size = enc_dec_attn_mask_type, enc_dec_window_size
        self.enc_dec_bottom_right_diagonal = enc_dec_bottom_right_diagonal
        self.layer_type, self.output_layernorm, self.layer_number = layer_type, output_layernorm, layer_number
        self.parallel_attention_mlp = parallel_attention_mlp
        self.apply_residual_connection_post_layernorm = apply_residual_connection_post_layernorm
        self.hidden_dropout, self.attn_input_format, self.name = hidden_dropout, attn_input_format, name
        common: dict[str, Any] = {
            "init_method": init_method,
            "output_layer_init_method": output_layer_init_method,
            "return_layernorm_output": apply_residual_connection_post_layernorm,
            "zero_centered_gamma": zero_centered_gamma,
            "bias": bias,
            "normalization": normalization,
            "params_dtype": params_dtype,
            "device": device,
        }
        attention: dict[str, Any] = {
            **common,
            "kv_channels": kv_channels,
            "attention_dropout": attention_dropout,
            "layernorm_epsilon": layernorm_epsilon,
            "layer_number": layer_number,
            "num_gqa_groups": num_gqa_groups,
            "fuse_qkv_params": fuse_qkv_params,
            "qkv_weight_interleaved": qkv_weight_interleaved,
            "rotary_pos_interleaved": rotary_pos_interleaved,
            "qkv_format": attn_input_format,
            "qk_norm_type": qk_norm_type,
            "qk_norm_eps": qk_norm_eps,
            "qk_norm_before_rope": qk_norm_before_rope,
            "softmax_scale": softmax_scale,
        }
        self.self_attention = MultiheadAttention(
            hidden_size,
            num_attention_heads,
            input_layernorm=not output_layernorm,
            return_bias=not parallel_attention_mlp,
            **attention,
        )
        if layer_type == "decoder":
            if isinstance(qk_norm_type, nn.Module):
                raise ValueError(
                    "a decoder has two attentions and qk_norm_type is one module; give a name, a class or a partial"
                )
            self.inter_attention = MultiheadAttention(
                hidden_size,
                num_attention_heads,
                attn_mask_type=enc_dec_attn_mask_type,
                input_layernorm=True,
                attention_type="cross",
                return_bias=True,
                **attention,
            )
        self.layernorm_mlp = LayerNormMLP(
            hidden_size,
            ffn_hidden_size,
            eps=layernorm_epsilon,
            return_bias=not parallel_attention_mlp,
            activation=activation,
            **common,
        )
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0.0 else None
        if output_layernorm:
            self.layernorm = NORMS[normalization](
                hidden_size,
                eps=layernorm_epsilon,
                params_dtype=params_dtype,
                zero_centered_gamma=zero_centered_gamma,
                device=device,
            )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Masks = None,
        self_attn_mask_type: str | None = None,
        window_size: Window = None,
        bottom_right_diagonal: bool | None = None,
        encoder_output: Tensor | None = None,
        enc_dec_attn_mask: Masks = None,
        enc_dec_attn_mask_type: str | None = None,
        enc_dec_window_size: Window = None,
        enc_dec_bottom_right_diagonal: bool | None = None,
        is_first_microbatch: bool | None = None,
        checkpoint_core_attention: bool = False,
        inference_params: Any = None,
        rotary_pos_emb: Tensor | tuple[Tensor, Tensor] | None = None,
        core_attention_bias_type: str = "no_bias",
        core_attention_bias: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Tensor | None = None,
        cu_seqlens_kv_padded: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        fast_zero_fill: bool = True,
        pad_between_seqs: bool | None = None,
        thd_attention_policies: Any = None,
        thd_attention_policy_dispatch: str = "auto",
        softcap: float | None = None,
    ) -> Tensor:
        """Hidden_states [T, B, hidden_size], [B, T, hidden_size] or [N, hidden_size] → the same.

        Arguments as in `MultiheadAttention.forward`; those with enc_dec, and cu_seqlens_kv, are the cross-attention's.
        """
        check_arguments(
            "TransformerLayer",
            {
                "bottom_right_diagonal": bottom_right_diagonal,
                "enc_dec_bottom_right_diagonal": enc_dec_bottom_right_diagonal,
                "enc_dec_window_size": enc_dec_window_size,
                "checkpoint_core_attention": checkpoint_core_attention,
                "inference_params": inference_params,
                "core_attention_bias_type": core_attention_bias_type,
                "core_attention_bias": core_attention_bias,
                "alibi_slopes": alibi_slopes,
                "thd_attention_policies": thd_attention_policies,
                "thd_attention_policy_dispatch": thd_attention_policy_dispatch,
                "softcap": softcap,
            },
        )
        decoder = self.layer_type == "decoder"
        check_hidden_states("TransformerLayer", self.attn_input_format, hidden_states, encoder_output, cross=decoder)
        post = self.apply_residual_connection_post_layernorm
        attended = self.self_attention(
            hidden_states,
            attention_mask,
            attn_mask_type=self.self_attn_mask_type if self_attn_mask_type is None else self_attn_mask_type,
            window_size=self.window_size if window_size is None else window_size,
            bottom_right_diagonal=self.bottom_right_diagonal
            if bottom_right_diagonal is None
            else bottom_right_diagonal,
            checkpoint_core_attention=checkpoint_core_attention,
            rotary_pos_emb=rotary_pos_emb,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_q_padded=cu_seqlens_q_padded,
        )
        if self.parallel_attention_mlp:
            return self._add(attended, self.layernorm_mlp(hidden_states), hidden_states, self.drop_path)
        output, bias, *normed = attended
        residual = normed[0] if post and not self.output_layernorm else hidden_states
        hidden_states = self._add(output, bias, residual, self.drop_path)

        if decoder:
            output, bias, *normed = self.inter_attention(
                hidden_states,
                enc_dec_attn_mask,
                encoder_output,
                self.enc_dec_attn_mask_type if enc_dec_attn_mask_type is None else enc_dec_attn_mask_type,
                self.enc_dec_window_size if enc_dec_window_size is None else enc_dec_window_size,
                self.enc_dec_bottom_right_diagonal
                if enc_dec_bottom_right_diagonal is None
                else enc_dec_bottom_right_diagonal,
                checkpoint_core_attention=checkpoint_core_attention,
                rotary_pos_emb=rotary_pos_emb,
                cu_seqlens_q=cu_seqlens_q,
                cu_seqlens_kv=cu_seqlens_kv,
                cu_seqlens_q_padded=cu_seqlens_q_padded,
                cu_seqlens_kv_padded=cu_seqlens_kv_padded,
            )
            hidden_states = self._add(output, bias, normed[0] if post else hidden_states, None)

        output, bias, *normed = self.layernorm_mlp(hidden_states)
        hidden_states = self._add(output, bias, normed[0] if post else hidden_states, self.drop_path)
        return self.layernorm(hidden_states) if self.output_layernorm else hidden_states

    def _add(self, x: Tensor, bias: Tensor, residual: Tensor, drop_path: nn.Module | None) -> Tensor:
        """Residual + drop_path(dropout(x + bias))."""
        x = x + bias if bias.numel() else x
        x = F.dropout(x, self.hidden_dropout, self.training)
        return residual + (x if drop_path is None else drop_path(x))
