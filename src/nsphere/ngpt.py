"""nGPT, the normalized transformer (arXiv 2410.01131): every vector on the unit hypersphere.

A hidden state is a point on the sphere. Each block moves it towards what attention and the MLP suggest, along the
chord and back onto the sphere, by a learned eigen learning rate per dimension. All matrices have unit rows or
columns along d_model, so every product with the hidden state is a cosine; learned scales give the cosines their
range back: s_qk for attention, s_u and s_v for the MLP, s_z for the logits.
"""

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from nsphere.hypersphere import Projection, Scale, ScaleKind, SphereEmbedding, SphereLinear
from nsphere.kv_cache import Slots
from nsphere.layers import Attention, Decoder, DecoderConfig, RopeTables, SwiGLU, check_positive, check_truth
from nsphere.norms import L2Norm
from nsphere.ops.normalized_update import normalized_update
from nsphere.qk_norm import QKNorm


@dataclass(frozen=True, kw_only=True)
class NGPTConfig(DecoderConfig):
    """An nGPT: the shape, and what is peculiar to this architecture. The defaults are the paper's.

    Each scale starts at `*_init`; `*_scale` is what is stored for it, which sets its learning rate under Adam and
    leaves the forward pass unchanged. `vector` learns a number per dimension, `scalar` one, `fixed` none.
    """

    convention: Literal["paper", "nvidia"] = "paper"
    """nvidia: the details of the authors' code, for weights trained there; see nsphere.ngpt_nvidia."""
    eigen_lr: ScaleKind = "vector"
    """α of attention and MLP, the eigen learning rates."""
    eigen_lr_init: float = 0.05
    """Start of α; of the order of 1/num_layers."""
    eigen_lr_scale: float = None  # type: ignore[assignment]
    """Stored start of α; 1/√d_model if not given."""
    s_qk: ScaleKind = "vector"
    """Scale of the normalised q and k."""
    s_qk_init: float = 1.0
    """Start of s_qk."""
    s_qk_scale: float = None  # type: ignore[assignment]
    """Stored start of s_qk; 1/√d_model if not given."""
    s_uv: ScaleKind = "vector"
    """Scales s_u and s_v of the MLP's two branches."""
    s_uv_init: float = 1.0
    """Start of s_u and s_v."""
    s_uv_scale: float = 1.0
    """Stored start of s_u and s_v."""
    s_z: ScaleKind = "vector"
    """Scale of the logits."""
    s_z_init: float = 1.0
    """Start of s_z."""
    s_z_scale: float = None  # type: ignore[assignment]
    """Stored start of s_z; 1/√d_model if not given."""
    qk_norm: bool = True
    """Whether q and k are normalised; False is the paper's ablation."""
    softmax_scale: float = None  # type: ignore[assignment]
    """Factor on q·k; √head_dim if not given."""
    projection: Projection = "step"
    """step: matrices are normalised after every optimizer step; forward: in every forward pass, with gradient."""

    def __post_init__(self) -> None:
        super().__post_init__()
        default = 1 / math.sqrt(self.d_model)
        for name in ("eigen_lr_scale", "s_qk_scale", "s_z_scale"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        for name in ("eigen_lr", "s_qk", "s_uv", "s_z"):
            if getattr(self, name) not in ("vector", "scalar", "fixed"):
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose vector, scalar or fixed")
            check_positive(self, f"{name}_init", f"{name}_scale")
        if self.softmax_scale is None:
            object.__setattr__(self, "softmax_scale", math.sqrt(self.head_dim))
        check_positive(self, "softmax_scale")
        check_truth(self, "qk_norm")
        if self.projection not in ("step", "forward"):
            raise ValueError(f"projection is {self.projection!r}; choose step or forward")
        if self.convention == "nvidia" and not self.qk_norm:
            raise ValueError(
                "convention nvidia is the authors' code, whose nGPT has QK-norm; got qk_norm False; leave it out"
            )


class QKScale(nn.Module):
    """s_qk as the factor on q: [H, D] (or [1, 1]), fp32.

    The paper multiplies both q and k by s_qk. s_qk² on q alone is the same function with the same gradient, costs
    half, leaves the cached keys unit vectors, and is what remains defined when there are fewer key than query heads.
    """

    def __init__(self, s_qk: Scale, num_heads: int, power: int = 2) -> None:
        super().__init__()
        self.s_qk, self.num_heads, self.power = s_qk, num_heads, power

    def forward(self) -> Tensor:
        s = self.s_qk()
        return s.view(self.num_heads if s.numel() > 1 else 1, -1) ** self.power


def make_s_qk(config: NGPTConfig) -> Scale:
    """s_qk of one layer, [H·D]."""
    return Scale(config.num_heads * config.head_dim, config.s_qk_init, config.s_qk_scale, config.s_qk)


class NGPTBlock(nn.Module):
    """h ← Norm(h + |α_A| (Norm(ATTN(h)) − h)); h ← Norm(h + |α_M| (Norm(MLP(h)) − h))  (equations 10, 11)."""

    def __init__(self, config: NGPTConfig, qk_norm: QKNorm) -> None:
        super().__init__()
        d, D, projection = config.d_model, config.head_dim, config.projection
        q_width, kv_width, d_mlp = config.num_heads * D, config.num_kv_heads * D, config.d_mlp

        def inward(width: int, scale: Scale | None = None, gain: float = 1.0) -> SphereLinear:
            return SphereLinear(d, width, 1, scale, gain, projection)

        def outward(width: int) -> SphereLinear:
            return SphereLinear(width, d, 0, projection=projection)

        def eigen_lr() -> Scale:
            return Scale(d, config.eigen_lr_init, config.eigen_lr_scale, config.eigen_lr)

        def s_uv() -> Scale:
            return Scale(d_mlp, config.s_uv_init, config.s_uv_scale, config.s_uv)

        self.attn = Attention(inward(q_width), inward(kv_width), inward(kv_width), outward(q_width), qk_norm, D)
        # ν = W_ν h is a cosine of size 1/√d: √d brings it to where SiLU is not linear (section 2.4.2)
        self.mlp = SwiGLU(inward(d_mlp, s_uv()), inward(d_mlp, s_uv(), math.sqrt(d)), outward(d_mlp))
        self.eigen_lr_attn, self.eigen_lr_mlp = eigen_lr(), eigen_lr()

    def forward(
        self, h: Tensor, rope: RopeTables | None, mask: Tensor | None = None, cache: Slots | None = None
    ) -> Tensor:
        h = normalized_update(h, self.attn(h, rope, mask, cache), self.eigen_lr_attn().abs())
        return normalized_update(h, self.mlp(h), self.eigen_lr_mlp().abs())


class NGPT(Decoder):
    """The normalized transformer; see NGPTConfig.

    With `projection="step"` train it with `keep_on_hypersphere(model, optimizer)`.

    >>> model = NGPT(NGPTConfig(vocab_size=256, context=128, d_model=64, num_layers=2, num_heads=4))
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0)
    >>> keep_on_hypersphere(model, optimizer)
    """

    config: NGPTConfig

    def __init__(self, config: NGPTConfig) -> None:
        self.check_convention(config)
        self.config = config
        blocks = [self.make_block(config) for _ in range(config.num_layers)]
        embed = SphereEmbedding(config.vocab_size, config.d_model, config.projection)
        super().__init__(config, embed, blocks, nn.Identity())
        self.unit_keys = config.qk_norm and config.convention == "paper"
        s_z = Scale(config.vocab_size, config.s_z_init, config.s_z_scale, config.s_z)
        self.head = SphereLinear(config.d_model, config.vocab_size, 1, s_z, projection=config.projection)

    def make_block(self, config: NGPTConfig) -> NGPTBlock:
        """One block with its own q/k norm: L2 after RoPE, s_qk² on q, softmax scale √D (equations 15, 16)."""
        norm = L2Norm if config.qk_norm else None
        qk_norm = QKNorm(
            norm,
            head_dim=config.head_dim,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            rope=self.rope_spec(),
            place="after",
            multiplier=QKScale(make_s_qk(config), config.num_heads),
            softmax_scale=config.softmax_scale,
        )
        return NGPTBlock(config, qk_norm)

    def output_weight(self) -> Tensor:
        return self.head.folded_weight()
