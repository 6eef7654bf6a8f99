"""GPT: the opponent. Pre-RMSNorm, rotary positions, SwiGLU, no biases, optional QK-norm, tied or untied.

Its conventions beside this one are subclasses: `ngpt_nvidia.NvidiaGPT`, and `nanogpt.NanoGPT`, which is GPT-2.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsphere.kv_cache import Slots
from nsphere.layers import Attention, Decoder, DecoderConfig, RopeTables, SwiGLU, check_positive, check_truth
from nsphere.norms import compute_dtype, make_norm
from nsphere.ops.embedding import embedding
from nsphere.ops.token_sums import share
from nsphere.qk_norm import QKNorm


@dataclass(frozen=True, kw_only=True)
class GPTConfig(DecoderConfig):
    """A GPT: the shape, and what is peculiar to this architecture."""

    convention: Literal["paper", "nvidia", "nanogpt"] = "paper"
    """nvidia: the rotary code of nGPT's authors, see nsphere.ngpt_nvidia; nanogpt: learned positions, LayerNorm and
    GELU, as in nanoGPT and GPT-2, see nsphere.nanogpt."""
    qk_norm: str = "none"
    """Norm of q and k per head before the rotary embedding: none, rms, layer, l2 or any registered norm."""
    qk_norm_over: Literal["head", "full"] = "head"
    """What one statistic of that norm spans: a head, or all heads together, as in OLMo 2."""
    # the two below are never None once constructed: __post_init__ fills them in
    tied: bool = None  # type: ignore[assignment]
    """Whether the output head is the token embedding; if not given, in nanogpt it is."""
    norm_eps: float = None  # type: ignore[assignment]
    """eps of the norms, inside the root; 1e-6 if not given, in nanogpt 1e-5."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; W_o and W_down are further divided by √(2 num_layers)."""
    bias: bool = False
    """Whether linear layers and LayerNorms have biases; of convention nanogpt alone."""
    gelu: Literal["exact", "tanh"] = "exact"
    """GELU with the error function, or GPT-2's approximation of it by tanh; of convention nanogpt alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        nanogpt = self.convention == "nanogpt"
        for name, default in (("tied", nanogpt), ("norm_eps", 1e-5 if nanogpt else 1e-6)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        check_positive(self, "norm_eps", "init_std")
        check_truth(self, "tied", "bias")
        if self.gelu not in ("exact", "tanh"):
            raise ValueError(f"gelu is {self.gelu!r}; choose exact or tanh")
        if not nanogpt and (self.bias or self.gelu != "exact"):
            raise ValueError(
                f"bias and gelu are nanoGPT's; got bias {self.bias} and gelu {self.gelu!r} with convention "
                f"{self.convention}; leave them at their defaults, or give convention nanogpt"
            )
        if nanogpt and self.rope_base != DecoderConfig.rope_base:
            raise ValueError(
                f"convention nanogpt learns its positions and rotates nothing; got rope_base {self.rope_base:g}; leave "
                "it at its default"
            )
        if self.qk_norm_over not in ("head", "full"):
            raise ValueError(f"qk_norm_over is {self.qk_norm_over!r}; choose head or full")
        if self.qk_norm != "none":
            make_norm(self.qk_norm, self.head_dim, num_heads=self.num_heads)  # refuses an unknown name
            if self.convention == "nvidia":
                raise ValueError(
                    f"convention nvidia is the authors' code, whose GPT has no QK-norm; got qk_norm {self.qk_norm!r}; "
                    "leave it at its default"
                )


class Embedding(nn.Module):
    """weight[tokens], with a deterministic gradient."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim))

    def forward(self, tokens: Tensor) -> Tensor:
        return embedding(tokens, self.weight)


class RMSNorm(nn.RMSNorm):
    """torch's; compiled on a CPU, its weight's gradient is summed by groups of tokens, see `ops.token_sums`."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return super().forward(x)
        wide = x.to(compute_dtype(x))
        y = F.rms_norm(wide, self.normalized_shape, eps=self.eps)
        return share(torch.mul, y, self.weight.to(y.dtype), x.dim() - 2).to(x.dtype)


class GPTBlock(nn.Module):
    """h ← h + ATTN(RMSNorm(h)); h ← h + MLP(RMSNorm(h))."""

    def __init__(self, config: GPTConfig, qk_norm: QKNorm) -> None:
        super().__init__()
        d, D = config.d_model, config.head_dim
        q_width, kv_width = config.num_heads * D, config.num_kv_heads * D

        def linear(in_features: int, out_features: int) -> nn.Linear:
            return nn.Linear(in_features, out_features, bias=False)

        self.attn_norm = RMSNorm(d, eps=config.norm_eps)
        self.attn = Attention(
            linear(d, q_width), linear(d, kv_width), linear(d, kv_width), linear(q_width, d), qk_norm, D
        )
        self.mlp_norm = RMSNorm(d, eps=config.norm_eps)
        self.mlp = SwiGLU(linear(d, config.d_mlp), linear(d, config.d_mlp), linear(config.d_mlp, d))

    def forward(
        self, h: Tensor, rope: RopeTables | None, mask: Tensor | None = None, cache: Slots | None = None
    ) -> Tensor:
        h = h + self.attn(self.attn_norm(h), rope, mask, cache)
        return h + self.mlp(self.mlp_norm(h))


class GPT(Decoder):
    """The GPT that nGPT is compared with; see GPTConfig.

    >>> model = GPT(GPTConfig(vocab_size=256, context=128, d_model=64, num_layers=2, num_heads=4))
    >>> loss = model.loss(tokens, targets)
    """

    config: GPTConfig

    def __init__(self, config: GPTConfig) -> None:
        self.check_convention(config)
        self.config = config
        blocks = [self.make_block(config) for _ in range(config.num_layers)]
        super().__init__(config, self.make_embedding(config), blocks, self.make_final_norm(config))
        if not config.tied:
            self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.init_weights()

    def make_block(self, config: GPTConfig) -> nn.Module:
        """One block."""
        return GPTBlock(config, self.make_qk_norm(config))

    def make_embedding(self, config: GPTConfig) -> nn.Module:
        """What tokens become."""
        return Embedding(config.vocab_size, config.d_model)

    def make_final_norm(self, config: GPTConfig) -> nn.Module:
        """What stands before the output head."""
        return RMSNorm(config.d_model, eps=config.norm_eps)

    def make_qk_norm(self, config: GPTConfig) -> QKNorm:
        """What one attention does to q and k: its norm, if any, then RoPE."""
        return QKNorm(
            None if config.qk_norm == "none" else config.qk_norm,
            head_dim=config.head_dim,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            rope=self.rope_spec(),
            place="before",
            over=config.qk_norm_over,
        )

    def reset_parameters(self) -> None:
        """As in a fresh model; see Decoder."""
        super().reset_parameters()
        self.init_weights()

    def init_weights(self) -> None:
        """N(0, init_std) everywhere, the two that write to the residual divided by √(2 num_layers)."""
        std = self.config.init_std
        for name, p in self.named_parameters():
            if p.dim() == 2:
                into_residual = name.endswith(("W_o.weight", "W_down.weight"))
                nn.init.normal_(p, std=std / math.sqrt(2 * self.config.num_layers) if into_residual else std)

    def output_weight(self) -> Tensor:
        return (self.embed if self.config.tied else self.head).weight  # type: ignore[return-value]
