"""Transformer Engine's MultiheadAttention, with the fused norm and RoPE of this library.

Shape legend: B batch, T queries, S keys, H query heads, K key heads, D head_dim, R rotated dims.
"""

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nsphere.ops.attention import record_max_logits
from nsphere.qk_norm import QKNorm
from nsphere.rope import RopeSpec
from nsphere.te import rope
from nsphere.te.base import on_device
from nsphere.te.checks import (
    check_arguments,
    check_features,
    check_groups,
    check_hidden_states,
    check_masks,
    check_positions,
    check_rotary,
    mask_type,
)
from nsphere.te.dot_product import DotProductAttention, Masks, Window, packed_positions
from nsphere.te.linear import Init, LayerNormLinear, Linear
from nsphere.te.norms import L2Normalization, LayerNorm, RMSNorm

QK_NORM_TYPES = ("L2Normalization", "RMSNorm", "LayerNorm")


class MultiheadAttention(nn.Module):
    """Attention with its projections, and q and k normalised: Transformer Engine's names, order and defaults.

    Args:
        hidden_size: width of the input and the output.
        num_attention_heads: H.
        kv_channels: D; hidden_size / H by default.
        attention_dropout: probability of dropping an attention weight (0.1 by default, as there).
        layernorm_epsilon: of the input norm.
        init_method: fills the weights of q, k and v; N(0, 0.023²) by default.
        output_layer_init_method: fills the output projection.
        attn_mask_type: see `DotProductAttention`; also window_size and bottom_right_diagonal.
        num_gqa_groups: K; H by default.
        params_dtype: of the parameters; the default dtype if not given.
        return_bias: return (output without bias, bias).
        return_layernorm_output: return the normed input as well, with input_layernorm.
        input_layernorm: normalise the input first.
        attention_type: "self", or "cross": keys and values from encoder_output.
        fuse_qkv_params: one parameter for q, k and v (for k and v in cross-attention).
        zero_centered_gamma: of the input norm (for q's and k's, see qk_norm_type).
        qkv_weight_interleaved: the fused parameter's rows go group by group, (q … q, k, v), not q, k, v.
        rotary_pos_interleaved: pairs are (2i, 2i + 1), not (i, i + R/2).
        bias: whether projections have one.
        normalization: of the input norm, "LayerNorm" or "RMSNorm".
        device: CUDA where there is one, else the CPU.
        qkv_format: "sbhd", "bshd" or "thd".
        qk_norm_type: None, "L2Normalization" (one shared instance), "RMSNorm" or "LayerNorm" (one each); beyond
            Transformer Engine: a registered name, a class, a partial or an instance of a norm, or a QKNorm, which
            brings its place, its multipliers and its softmax scale. functools.partial(te.RMSNorm,
            zero_centered_gamma=True) is zero-centred, functools.partial(nsphere.RMSNorm, weight="per_head") has
            weights per head.
        qk_norm_eps: of Transformer Engine's three.
        qk_norm_before_rope: normalise before the rotation.
        softmax_scale: beyond Transformer Engine; by default its 1/√D, also beside L2Normalization, where attention is
            then nearly uniform until √D (or a multiplier) is asked for. A norm of this library has QKNorm's default.
        **others: Transformer Engine's, which raise ValueError unless at their defaults.

    Attributes q_norm and k_norm are None without a norm. State-dict keys are Transformer Engine's.

    Raises:
        ValueError: for what is not implemented, or does not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        kv_channels: int | None = None,
        attention_dropout: float = 0.1,
        layernorm_epsilon: float = 1e-5,
        init_method: Init = None,
        output_layer_init_method: Init = None,
        layer_number: int | None = None,
        attn_mask_type: str = "causal",
        window_size: Window = None,
        bottom_right_diagonal: bool | None = None,
        softcap: float = 0.0,
        tp_group: Any = None,
        tp_size: int = 1,
        num_gqa_groups: int | None = None,
        fuse_wgrad_accumulation: bool = False,
        get_rng_state_tracker: Any = None,
        sequence_parallel: bool = False,
        params_dtype: torch.dtype | None = None,
        return_bias: bool = False,
        return_layernorm_output: bool = False,
        input_layernorm: bool = False,
        attention_type: str = "self",
        set_parallel_mode: bool = False,
        fuse_qkv_params: bool = False,
        zero_centered_gamma: bool = False,
        qkv_weight_interleaved: bool = True,
        rotary_pos_interleaved: bool = False,
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        bias: bool = True,
        normalization: str = "LayerNorm",
        device: torch.device | str | None = None,
        qkv_format: str = "sbhd",
        name: str | None = None,
        qk_norm_type: Any = None,
        qk_norm_eps: float = 1e-6,
        qk_norm_before_rope: bool = False,
        seq_length: int | None = None,
        micro_batch_size: int | None = None,
        softmax_type: str = "vanilla",
        *,
        softmax_scale: float | None = None,
    ):
        check_arguments("MultiheadAttention", locals())
        check_groups("MultiheadAttention", num_attention_heads, num_gqa_groups)
        super().__init__()
        if kv_channels is None:
            if hidden_size % num_attention_heads:
                raise ValueError(
                    f"hidden_size={hidden_size} is not divisible by num_attention_heads={num_attention_heads}; "
                    "choose a divisor, or give kv_channels"
                )
            kv_channels = hidden_size // num_attention_heads
        self.attn_mask_type, self.window_size = attn_mask_type, window_size
        self.bottom_right_diagonal = bottom_right_diagonal
        self.qkv_format, self.attention_type = qkv_format, attention_type
        self.input_layernorm, self.return_layernorm_output = input_layernorm, return_layernorm_output
        self.return_bias, self.name = return_bias, name
        self.layer_number = 1 if layer_number is None else layer_number
        self.qkv_weight_interleaved = qkv_weight_interleaved and fuse_qkv_params
        self.rotary_pos_interleaved = rotary_pos_interleaved
        self.num_attention_heads = num_attention_heads
        self.num_gqa_groups = num_attention_heads if num_gqa_groups is None else num_gqa_groups
        self.hidden_size_per_attention_head = kv_channels
        self.hidden_size_q, self.hidden_size_kv = kv_channels * num_attention_heads, kv_channels * self.num_gqa_groups
        where: dict[str, Any] = {"device": on_device(device), "params_dtype": params_dtype}
        self.core_attention = DotProductAttention(
            num_attention_heads,
            kv_channels,
            num_gqa_groups,
            attention_dropout,
            qkv_format,
            attn_mask_type,
            layer_number=layer_number,
            attention_type=attention_type,
        )
        self.register_buffer("max_logits", None, persistent=False)  # fp32 [H] where QKClip asks for it
        self._make_qk_norm(qk_norm_type, qk_norm_eps, qk_norm_before_rope, softmax_scale, where)

        norm: dict[str, Any] = {
            "eps": layernorm_epsilon,
            "normalization": normalization,
            "zero_centered_gamma": zero_centered_gamma,
            "return_layernorm_output": return_layernorm_output,
        }
        common: dict[str, Any] = {"init_method": init_method, "bias": bias, **where}
        if attention_type == "self":
            width, sizes = self.hidden_size_q + 2 * self.hidden_size_kv, None
            if not fuse_qkv_params:
                sizes = {"query": self.hidden_size_q, "key": self.hidden_size_kv, "value": self.hidden_size_kv}
            if input_layernorm:
                self.layernorm_qkv = LayerNormLinear(hidden_size, width, parameters_split=sizes, **norm, **common)
            else:
                self.qkv = Linear(hidden_size, width, parameters_split=sizes, **common)
        else:
            if input_layernorm:
                self.layernorm_query = LayerNormLinear(
                    hidden_size,
                    self.hidden_size_q,
                    parameters_split=None if fuse_qkv_params else ("query",),
                    **norm,
                    **common,
                )
            else:
                self.query_layer = Linear(hidden_size, self.hidden_size_q, **common)
            split = None if fuse_qkv_params else ("key", "value")
            self.key_value = Linear(hidden_size, 2 * self.hidden_size_kv, parameters_split=split, **common)
        self.proj = Linear(
            self.hidden_size_q,
            hidden_size,
            init_method=output_layer_init_method,
            bias=bias,
            return_bias=return_bias,
            **where,
        )

    def _make_qk_norm(
        self, kind: Any, eps: float, before_rope: bool, softmax_scale: float | None, where: dict[str, Any]
    ) -> None:
        head_dim, own_scale = self.hidden_size_per_attention_head, None
        if kind is not None and kind not in QK_NORM_TYPES and eps != 1e-6:
            raise ValueError(
                f"qk_norm_eps={eps} is for {', '.join(QK_NORM_TYPES)}; give another norm its eps where it is made, as "
                "functools.partial(nsphere.RMSNorm, eps=…)"
            )
        if isinstance(kind, QKNorm):
            if before_rope and kind.place == "after":
                raise ValueError(
                    "qk_norm_before_rope=True and a QKNorm with place='after' exclude each other; drop one"
                )
            if kind.head_dim != head_dim:
                raise ValueError(f"the QKNorm has head_dim={kind.head_dim} and the attention {head_dim}; build it so")
            if kind.layout not in ("bshd", self.qkv_format):
                raise ValueError(
                    f"the QKNorm has layout={kind.layout!r} and the attention {self.qkv_format!r}; drop it"
                )
            own, own_scale = kind, kind.softmax_scale
            self.qk_norm = own.to(where["device"])
            # visible under Transformer Engine's names, registered once, in the QKNorm
            self.__dict__.update(q_norm=own.q_norm, k_norm=own.k_norm)
        else:
            options: dict[str, Any] = {
                "head_dim": head_dim,
                "num_heads": self.num_attention_heads,
                "num_kv_heads": self.num_gqa_groups,
                "place": "before" if before_rope else "after",
            }
            if kind == "L2Normalization":
                shared = L2Normalization(eps=eps)
                own = QKNorm(shared, shared, softmax_scale="rsqrt", **options)
            elif kind in ("RMSNorm", "LayerNorm"):
                cls = RMSNorm if kind == "RMSNorm" else LayerNorm
                q, k = (cls(head_dim, eps=eps, **where) for _ in range(2))
                own = QKNorm(q, k, **options)
            elif kind is None:
                own = QKNorm(**options)
            else:
                try:
                    own = QKNorm(kind, **options).to(where["device"])
                except ValueError as error:
                    names = ", ".join(map(repr, QK_NORM_TYPES)) if isinstance(kind, str) else ""
                    raise ValueError(f"qk_norm_type={kind!r}: {error}" + (f"; or {names}" if names else "")) from None
                own_scale = own.softmax_scale
            self.q_norm, self.k_norm = own.q_norm, own.k_norm
        self.qk_norm_before_rope = own.place == "before"
        scale = own_scale if softmax_scale is None else softmax_scale
        if scale is not None:
            self.core_attention.softmax_scale = scale
        own.layout = self.qkv_format  # type: ignore[assignment]
        # in a tuple, because norms and multipliers are registered already; the sibling shares the dicts that hold them
        self._qk_norms = (own, copy.copy(own))
        pairs: Literal["half", "interleaved"] = "interleaved" if self.rotary_pos_interleaved else "half"
        self._ropes = {width: RopeSpec(width, layout=pairs) for width in range(2, head_dim + 1, 2)}

    def _qk_norm_for(self, rotated: int | None) -> QKNorm:
        """The QKNorm as it was built, or one that turns that many dims."""
        own, turning = self._qk_norms
        chosen = own if rotated is None else turning
        if rotated is not None:
            turning.rope = self._ropes[rotated]
        if "qk_norm" not in self._modules and (
            chosen.q_norm is not self.q_norm or chosen.k_norm is not self.k_norm
        ):  # replaced by others
            chosen.q_norm, chosen.k_norm = self.q_norm, self.k_norm
        return chosen

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Masks = None,
        encoder_output: Tensor | None = None,
        attn_mask_type: str | None = None,
        window_size: Window = None,
        bottom_right_diagonal: bool | None = None,
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
    ) -> Tensor | tuple[Tensor, ...]:
        """Attend.

        Args:
            hidden_states: [T, B, hidden_size], [B, T, hidden_size] or [N, hidden_size], as qkv_format says.
            attention_mask: see `DotProductAttention`; also the mask type, window and cu_seqlens_*.
            encoder_output: where keys and values come from in cross-attention, shaped as hidden_states.
            checkpoint_core_attention: recompute the attention in the backward pass.
            rotary_pos_emb: angles [S, 1, 1, R], R ≤ D, from `RotaryPositionEmbedding`, or a tuple of q's and k's. A
                table that gives the two dims of a pair different angles, and so is no rotation, is used as Transformer
                Engine does; under torch.compile the first of the two angles is taken for both.
            **others: Transformer Engine's; those that only save time are accepted, the rest raise ValueError.

        Returns:
            As hidden_states; with return_bias also the bias, with return_layernorm_output also the normed input.
        """
        kind = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        window_size = self.window_size if window_size is None else window_size
        check_arguments(
            "MultiheadAttention",
            {
                "attn_mask_type": kind,
                "window_size": window_size,
                "bottom_right_diagonal": bottom_right_diagonal,
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
        ends = {
            "cu_seqlens_q": cu_seqlens_q,
            "cu_seqlens_kv": cu_seqlens_kv,
            "cu_seqlens_q_padded": cu_seqlens_q_padded,
            "cu_seqlens_kv_padded": cu_seqlens_kv_padded,
        }
        self._check(hidden_states, encoder_output, mask_type(kind), attention_mask, ends, rotary_pos_emb)
        q, k, v, normed = self._qkv(hidden_states, encoder_output)
        cu_seqlens_kv = cu_seqlens_q if cu_seqlens_kv is None else cu_seqlens_kv
        cu_seqlens_kv_padded = cu_seqlens_q_padded if cu_seqlens_kv_padded is None else cu_seqlens_kv_padded
        starts = (
            cu_seqlens_q if cu_seqlens_q_padded is None else cu_seqlens_q_padded,
            cu_seqlens_kv if cu_seqlens_kv_padded is None else cu_seqlens_kv_padded,
        )
        q, k = self._normalize_and_turn(q, k, rotary_pos_emb, starts)
        context = self.core_attention(
            q,
            k,
            v,
            attention_mask,
            self.qkv_format,
            cu_seqlens_q,
            cu_seqlens_kv,
            cu_seqlens_q_padded,
            cu_seqlens_kv_padded,
            attn_mask_type=kind,
            window_size=window_size,
            bottom_right_diagonal=self.bottom_right_diagonal
            if bottom_right_diagonal is None
            else bottom_right_diagonal,
            checkpoint_core_attention=checkpoint_core_attention,
        )
        if isinstance(context, tuple):  # QKClip asked core_attention for its largest logits
            context, largest = context
            record_max_logits(self, largest)
        projected = self.proj(context)
        outputs = projected if isinstance(projected, tuple) else (projected,)
        if self.input_layernorm and self.return_layernorm_output:
            outputs = (*outputs, normed)
        return outputs if len(outputs) > 1 else outputs[0]

    def _check(
        self, x: Any, encoder_output: Any, kind: str, attention_mask: Any, ends: dict[str, Any], rotary: Any
    ) -> None:
        """ValueError for what does not fit this attention, or does not fit together."""
        owner, cross = "MultiheadAttention", self.attention_type == "cross"
        check_hidden_states(owner, self.qkv_format, x, encoder_output, cross=cross)
        check_features(owner, "hidden_states", x, self._first().in_features)
        if cross:
            check_features(owner, "encoder_output", encoder_output, self.key_value.in_features)
        keys = encoder_output if cross else x
        check_masks(owner, self.qkv_format, kind, attention_mask, ends, x, keys, self.num_attention_heads)
        if rotary is not None:
            check_rotary(owner, self.qkv_format, rotary, self.hidden_size_per_attention_head, x, keys)
        elif self._qk_norms[0].rope is not None:
            raise ValueError("this attention's QKNorm was built with RoPE: pass rotary_pos_emb")

    def _first(self) -> Any:
        """The projection that the input goes through first."""
        name = "query" if self.attention_type == "cross" else "qkv"
        if self.input_layernorm:
            return self._modules[f"layernorm_{name}"]
        return self._modules["query_layer" if name == "query" else name]

    def _qkv(self, x: Tensor, encoder_output: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k and v with their heads apart, as views of what a projection wrote, and the normed input."""
        out = self._first()(x)
        mixed, normed = out if isinstance(out, tuple) else (out, None)
        K, D, group = (
            self.num_gqa_groups,
            self.hidden_size_per_attention_head,
            self.num_attention_heads // self.num_gqa_groups,
        )
        if encoder_output is not None:
            q = mixed.unflatten(-1, (-1, D))
            kv = self.key_value(encoder_output)
            k, v = (
                kv.unflatten(-1, (K, 2, D)).unbind(-2)
                if self.qkv_weight_interleaved
                else kv.unflatten(-1, (2, K, D)).unbind(-3)
            )
        elif self.qkv_weight_interleaved:
            grouped = mixed.unflatten(-1, (K, group + 2, D))
            q, k, v = grouped[..., :group, :].flatten(-3, -2), grouped[..., group, :], grouped[..., group + 1, :]
        else:
            q, k, v = mixed.unflatten(-1, (-1, D)).split((K * group, K, K), -2)
        return q, k, v, normed

    def _normalize_and_turn(
        self,
        q: Tensor,
        k: Tensor,
        rotary: Tensor | tuple[Tensor, Tensor] | None,
        starts: tuple[Tensor | None, Tensor | None],
    ) -> tuple[Tensor, Tensor]:
        own = self._qk_norms[0]
        if rotary is None:
            qk_norm = self._qk_norm_for(None)
            bare = qk_norm.q_norm is None and qk_norm.k_norm is None and "qk_norm" not in self._modules
            return (q, k) if bare else qk_norm(q, k)
        tables = (rotary, rotary) if isinstance(rotary, Tensor) else rotary
        interleaved = self.rotary_pos_interleaved if own.rope is None else own.rope.layout == "interleaved"
        places = [self._places(x, table, begun) for x, table, begun in zip((q, k), tables, starts, strict=True)]
        if all(rope.turns_pairs(table, interleaved) for table in tables):
            qk_norm = self._qk_norm_for(tables[0].shape[-1] if own.rope is None else None)
            q_table, k_table = (
                tuple(t[place] for t in rope.tables(table, interleaved))
                for table, place in zip(tables, places, strict=True)
            )
            return qk_norm(q, k, rope=q_table, k_rope=k_table)
        if own.rope is not None:
            raise ValueError("rotary_pos_emb gives the dims of a pair different angles, and the QKNorm turns pairs")
        return self._turn_each(q, k, tables, places)

    def _turn_each(
        self, q: Tensor, k: Tensor, tables: tuple[Tensor, Tensor], places: list[Any]
    ) -> tuple[Tensor, Tensor]:
        """What Transformer Engine does with a table that is no rotation, in steps that round."""
        qk_norm = self._qk_norm_for(None)
        if self.qk_norm_before_rope:
            q, k = qk_norm(q, k)
        turned = []
        for x, table, place in zip((q, k), tables, places, strict=True):
            x = x.transpose(0, 1) if self.qkv_format == "sbhd" else x
            x = rope.turn_each(x, table[:, 0, 0][place], self.rotary_pos_interleaved)
            turned.append(x.transpose(0, 1) if self.qkv_format == "sbhd" else x)
        q, k = turned
        return (q, k) if self.qk_norm_before_rope else qk_norm(q, k)

    def _places(self, x: Tensor, table: Tensor, starts: Tensor | None) -> Any:
        """Which rows of the table belong to x: as many as it is long, or for packed sequences their own."""
        if self.qkv_format != "thd":
            return slice(x.shape[0 if self.qkv_format == "sbhd" else 1])
        assert starts is not None
        positions = packed_positions(starts.to(x.device), x.shape[0])
        if not torch.compiler.is_compiling():
            check_positions("MultiheadAttention", table, int(positions.max()) + 1)
        return positions

    def extra_repr(self) -> str:
        """Heads and what happens to q and k."""
        place = "before" if self.qk_norm_before_rope else "after"
        return (
            f"heads={self.num_attention_heads}, groups={self.num_gqa_groups}, norm {place} RoPE, "
            f"softmax_scale={self.core_attention.softmax_scale:.4g}"
        )
