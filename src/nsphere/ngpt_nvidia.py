"""The conventions of the authors' code (NVIDIA/ngpt), for parity and for weights trained there.

Where it differs from the paper: its rotary code is not a rotation, in nGPT and in GPT; in nGPT h is normalised again
before each interpolation, both branches of the MLP carry √d, s_qk multiplies q and k each, norms do not guard zero.
"""

import math
import re
from typing import Any

import torch
from torch import Tensor

from nsphere.foreign_names import unwrapped_fp32
from nsphere.gpt import GPT, GPTConfig
from nsphere.kv_cache import Slots
from nsphere.layers import Decoder, RopeTables
from nsphere.ngpt import NGPT, NGPTBlock, NGPTConfig, QKScale, make_s_qk
from nsphere.ops.normalized_update import normalized_update, unit
from nsphere.qk_norm import QKNorm


class NvidiaRotary(QKNorm):
    """The reference's rotary code, without the x·cos term of a rotation, before norm and multiplier, if any.

    out[2i] = −x[2i+1] C[i], out[2i+1] = x[2i] S[i]: an odd step of the pairs, scaled by two different angles.
    """

    def forward(self, q: Tensor, k: Tensor, rope: RopeTables | None = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert rope is not None
        S, C = (table.unsqueeze(-2) for table in rope)  # [T, 1, D/2] against x [B, T, H, D/2]

        def rotary(x: Tensor) -> Tensor:
            return torch.stack((-x[..., 1::2] * C, x[..., 0::2] * S), dim=-1).flatten(-2)

        dtype = q.dtype
        # the fp32 tables promote q and k, and the norm sees them so
        q, k = super().forward(rotary(q), rotary(k), rope=None, **kwargs)
        return q.to(dtype), k.to(dtype)


class NvidiaQKNorm(NvidiaRotary):
    """The reference's QK-norm, after its rotary code; `multiplier` is for both."""

    multiplier: QKScale
    scales_k = True
    """Whether k is multiplied too; not where `nsphere.fold` has squared the multiplier of q instead."""

    def forward(self, q: Tensor, k: Tensor, rope: RopeTables | None = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return super().forward(q, k, rope, k_multiplier=self.multiplier() if self.scales_k else None)


class NvidiaTables(Decoder):
    """A decoder with the reference's rotary tables."""

    convention = "nvidia"

    def make_rope_tables(self, num_positions: int) -> RopeTables:
        """S and C [num_positions, D/2]: the two halves of the rows [sin pθ₀, cos pθ₀, sin pθ₁, cos pθ₁, …]."""
        cos, sin = super().make_rope_tables(num_positions)
        rows = torch.stack((sin, cos), dim=-1).flatten(-2)
        half = rows.shape[-1] // 2
        return rows[:, :half].contiguous(), rows[:, half:].contiguous()


class NvidiaBlock(NGPTBlock):
    """The block of equations 10 and 11 with h normalised once more, with gradient, before each interpolation."""

    def __init__(self, config: NGPTConfig, qk_norm: QKNorm) -> None:
        super().__init__(config, qk_norm)
        self.mlp.W_u.gain = math.sqrt(config.d_model)  # type: ignore[assignment]

    def forward(
        self, h: Tensor, rope: RopeTables | None, mask: Tensor | None = None, cache: Slots | None = None
    ) -> Tensor:
        dtype = h.dtype
        h = normalized_update(unit(h), self.attn(h, rope, mask, cache), self.eigen_lr_attn().abs()).to(dtype)
        return normalized_update(unit(h), self.mlp(h), self.eigen_lr_mlp().abs()).to(dtype)


class NvidiaNGPT(NvidiaTables, NGPT):
    """nGPT as the authors' code computes it: the architecture of `NGPTConfig(convention="nvidia")`."""

    def make_block(self, config: NGPTConfig) -> NGPTBlock:
        """A block in the reference's convention."""
        qk_norm = NvidiaQKNorm(
            "l2",
            head_dim=config.head_dim,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            multiplier=QKScale(make_s_qk(config), config.num_heads, power=1),
            softmax_scale=config.softmax_scale,
        )
        return NvidiaBlock(config, qk_norm)


class NvidiaGPT(NvidiaTables, GPT):
    """GPT as the authors' code computes it (`use_nGPT = 0`): the architecture of `GPTConfig(convention="nvidia")`."""

    def make_qk_norm(self, config: GPTConfig) -> QKNorm:
        """The reference's rotary code, and no norm."""
        return NvidiaRotary(None, head_dim=config.head_dim, num_heads=config.num_heads)


_NAMES = {
    "query.weight": "attn.W_q.weight",
    "key.weight": "attn.W_k.weight",
    "value.weight": "attn.W_v.weight",
    "att_c_proj.weight": "attn.W_o.weight",
    "mlp_c_proj.weight": "mlp.W_down.weight",
    "sqk": "attn.qk_norm.multiplier.s_qk.stored",
    "attn_alpha": "eigen_lr_attn.stored",
    "mlp_alpha": "eigen_lr_mlp.stored",
    "rmsnorm_att.weight": "attn_norm.weight",
    "rmsnorm_mlp.weight": "mlp_norm.weight",
}
_TOP = {
    "transformer.wte.weight": "embed.weight",
    "lm_head.weight": "head.weight",
    "sz": "head.scale.stored",
    "rmsnorm_f.weight": "final_norm.weight",
}


def from_reference_state_dict(reference: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the authors' nGPT or GPT under this library's names, in fp32 (or fp64 where it is).

    One matrix holds u and ν there: u is the first half of its rows and of suv, the gate ν the second.

    Raises:
        ValueError: a name that neither has (biases, or a position embedding, for two).
    """
    ours: dict[str, Tensor] = {}
    for full_name, name, tensor in unwrapped_fp32(reference):
        block = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", name)
        if name in _TOP:
            ours[_TOP[name]] = tensor
        elif block and block[2] == "c_fc.weight":
            ours[f"blocks.{block[1]}.mlp.W_u.weight"], ours[f"blocks.{block[1]}.mlp.W_nu.weight"] = tensor.chunk(2)
        elif block and block[2] == "suv":
            s_u, s_nu = tensor.chunk(2)
            ours[f"blocks.{block[1]}.mlp.W_u.scale.stored"] = s_u
            ours[f"blocks.{block[1]}.mlp.W_nu.scale.stored"] = s_nu
        elif block and block[2] in _NAMES:
            ours[f"blocks.{block[1]}.{_NAMES[block[2]]}"] = tensor
        else:
            raise ValueError(
                f"{full_name!r} is no parameter of the authors' models as nsphere has them (without biases, with "
                "rotary positions); give the state dict of such a one"
            )
    return ours


def make_ngpt(config: NGPTConfig) -> NGPT:
    """The model of a config, in the convention it names."""
    return NvidiaNGPT(config) if config.convention == "nvidia" else NGPT(config)
