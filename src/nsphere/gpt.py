"""GPT: the opponent. Pre-RMSNorm, rotary positions, SwiGLU, no biases, optional QK-norm, tied or untied."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from nsphere.kv_cache import Slots
from nsphere.layers import Attention, Decoder, DecoderConfig, RopeTables, SwiGLU, check_positive
from nsphere.norms import make_norm
from nsphere.ops.embedding import embedding
from nsphere.qk_norm import QKNorm


@dataclass(frozen=True, kw_only=True)
class GPTConfig(DecoderConfig):
    """A GPT: the shape, and what is peculiar to this architecture."""

    qk_norm: str = "none"
    """Norm of q and k per head before the rotary embedding: none, rms, layer, l2 or any registered norm."""
    qk_norm_over: Literal["head", "full"] = "head"
    """What one statistic of that norm spans: a head, or all heads together, as in OLMo 2."""
    tied: bool = False
    """Whether the output head is the token embedding."""
    norm_eps: float = 1e-6
    """eps of the RMS norms, inside the root."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; W_o and W_down are further divided by √(2 num_layers)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "norm_eps", "init_std")
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


class GPTBlock(nn.Module):
    """h ← h + ATTN(RMSNorm(h)); h ← h + MLP(RMSNorm(h))."""

    def __init__(self, config: GPTConfig, qk_norm: QKNorm) -> None:
        super().__init__()
        d, D = config.d_model, config.head_dim
        q_width, kv_width = config.num_heads * D, config.num_kv_heads * D

        def linear(in_features: int, out_features: int) -> nn.Linear:
            return nn.Linear(in_features, out_features, bias=False)

        self.attn_norm = nn.RMSNorm(d, eps=config.norm_eps)
        self.attn = Attention(
            linear(d, q_width), linear(d, kv_width), linear(d, kv_width), linear(q_width, d), qk_norm, D
        )
        self.mlp_norm = nn.RMSNorm(d, eps=config.norm_eps)
        self.mlp = SwiGLU(linear(d, config.d_mlp), linear(d, config.d_mlp), linear(config.d_mlp, d))

    def forward(self, h: Tensor, rope: RopeTables, mask: Tensor | None = None, cache: Slots | None = None) -> Tensor:
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
        blocks = [GPTBlock(config, self.make_qk_norm(config)) for _ in range(config.num_layers)]
        super().__init__(
            config,
            Embedding(config.vocab_size, config.d_model),
            blocks,
            nn.RMSNorm(config.d_model, eps=config.norm_eps),
        )
        if not config.tied:
            self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.init_weights()

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
