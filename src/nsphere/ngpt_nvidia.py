"""The conventions of the authors' code (NVIDIA/ngpt), for parity and for weights trained there.

Where it differs from the paper: its rotary code is not a rotation; h is normalised again before each interpolation;
both branches of the MLP carry √d; s_qk multiplies q and k each; norms have no guard for zero.
"""

import math
import re

import torch
from torch import Tensor

from nsphere.kv_cache import Slots
from nsphere.layers import RopeTables
from nsphere.ngpt import NGPT, NGPTBlock, NGPTConfig, QKScale, make_s_qk
from nsphere.ops.normalized_update import normalized_update, unit
from nsphere.qk_norm import QKNorm


class NvidiaQKNorm(QKNorm):
    """QK-norm after the reference's rotary code, without the x·cos term of a rotation; `multiplier` is for both.

    out[2i] = −x[2i+1] C[i], out[2i+1] = x[2i] S[i]: an odd step of the pairs, scaled by two different angles.
    """

    multiplier: QKScale
    scales_k = True
    """Whether k is multiplied too; not where `nsphere.fold` has squared the multiplier of q instead."""

    def forward(self, q: Tensor, k: Tensor, rope: RopeTables | None = None, **kwargs: object) -> tuple[Tensor, Tensor]:
        assert rope is not None
        S, C = (table.unsqueeze(-2) for table in rope)  # [T, 1, D/2] against x [B, T, H, D/2]

        def rotary(x: Tensor) -> Tensor:
            return torch.stack((-x[..., 1::2] * C, x[..., 0::2] * S), dim=-1).flatten(-2)

        dtype = q.dtype
        # the fp32 tables promote q and k, and the norm sees them so
        on_k = self.multiplier() if self.scales_k else None
        q, k = super().forward(rotary(q), rotary(k), rope=None, k_multiplier=on_k)
        return q.to(dtype), k.to(dtype)


class NvidiaBlock(NGPTBlock):
    """The block of equations 10 and 11 with h normalised once more, with gradient, before each interpolation."""

    def __init__(self, config: NGPTConfig, qk_norm: QKNorm) -> None:
        super().__init__(config, qk_norm)
        self.mlp.W_u.gain = math.sqrt(config.d_model)  # type: ignore[assignment]

    def forward(self, h: Tensor, rope: RopeTables, mask: Tensor | None = None, cache: Slots | None = None) -> Tensor:
        dtype = h.dtype
        h = normalized_update(unit(h), self.attn(h, rope, mask, cache), self.eigen_lr_attn().abs()).to(dtype)
        return normalized_update(unit(h), self.mlp(h), self.eigen_lr_mlp().abs()).to(dtype)


class NvidiaNGPT(NGPT):
    """nGPT as the authors' code computes it: the architecture of `NGPTConfig(convention="nvidia")`."""

    convention = "nvidia"

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

    def make_rope_tables(self, num_positions: int) -> RopeTables:
        """S and C [num_positions, D/2]: the two halves of the rows [sin pθ₀, cos pθ₀, sin pθ₁, cos pθ₁, …]."""
        cos, sin = super().make_rope_tables(num_positions)
        rows = torch.stack((sin, cos), dim=-1).flatten(-2)
        half = rows.shape[-1] // 2
        return rows[:, :half].contiguous(), rows[:, half:].contiguous()


_NAMES = {
    "query.weight": "attn.W_q.weight",
    "key.weight": "attn.W_k.weight",
    "value.weight": "attn.W_v.weight",
    "att_c_proj.weight": "attn.W_o.weight",
    "mlp_c_proj.weight": "mlp.W_down.weight",
    "sqk": "attn.qk_norm.multiplier.s_qk.stored",
    "attn_alpha": "eigen_lr_attn.stored",
    "mlp_alpha": "eigen_lr_mlp.stored",
}


def from_reference_state_dict(reference: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the authors' code under this library's names, in fp32 (or fp64 where it is).

    One matrix holds u and ν there: u is the first half of its rows and of suv, the gate ν the second.

    Raises:
        ValueError: a name that the authors' nGPT does not have (a GPT's RMS norms, for one).
    """
    ours: dict[str, Tensor] = {}
    for full_name, tensor in reference.items():
        name = re.sub(r"^((_orig_mod|module)\.)+", "", full_name)  # as torch.compile and DDP leave it
        tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        block = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", name)
        if name == "transformer.wte.weight":
            ours["embed.weight"] = tensor
        elif name == "lm_head.weight":
            ours["head.weight"] = tensor
        elif name == "sz":
            ours["head.scale.stored"] = tensor
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
                f"{full_name!r} is no parameter of the authors' nGPT; give the state dict of a model with use_nGPT=1"
            )
    return ours


def make_ngpt(config: NGPTConfig) -> NGPT:
    """The model of a config, in the convention it names."""
    return NvidiaNGPT(config) if config.convention == "nvidia" else NGPT(config)
