"""What GPT and nGPT share: attention, SwiGLU, and the decoder around the blocks.

Shapes: B batch, T tokens, S cached and new, H query heads, K key and value heads, D head_dim, d d_model, V words.
"""

import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsphere.kv_cache import CacheDtype, KVCache, Slots
from nsphere.ops.attention import attention_with_max_logits, record_max_logits
from nsphere.ops.linear_cross_entropy import VocabShard, linear_cross_entropy
from nsphere.qk_norm import QKNorm
from nsphere.rope import RopeSpec

RopeTables = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shape of a decoder-only transformer, the same for every architecture."""

    vocab_size: int
    """Rows of the embedding."""
    context: int
    """Tokens of a training sequence."""
    d_model: int
    """Width of the hidden state."""
    num_layers: int
    """Blocks, each of one attention and one MLP."""
    num_heads: int
    """Query heads."""
    # the three below are never None once constructed: __post_init__ fills them in
    num_kv_heads: int = None  # type: ignore[assignment]
    """Key and value heads; num_heads (multi-head attention) if not given, 1 is multi-query attention."""
    head_dim: int = None  # type: ignore[assignment]
    """Width of a head; d_model / num_heads if not given."""
    d_mlp: int = None  # type: ignore[assignment]
    """Hidden width of the MLP; 4 d_model if not given."""
    rope_base: float = 10000.0
    """Base of the rotary embedding's wavelengths."""
    convention: str = "paper"
    """Whose details; each architecture says which it knows."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "d_model", "num_layers", "num_heads"):
            _check_count(name, getattr(self, name))
        if self.head_dim is None:
            if self.d_model % self.num_heads:
                raise ValueError(
                    f"d_model {self.d_model} is not divisible by num_heads {self.num_heads}; "
                    "choose a divisor, or give head_dim"
                )
            object.__setattr__(self, "head_dim", self.d_model // self.num_heads)
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.d_mlp is None:
            object.__setattr__(self, "d_mlp", 4 * self.d_model)
        for name in ("num_kv_heads", "head_dim", "d_mlp"):
            _check_count(name, getattr(self, name))
        if self.has_rope and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; the rotary embedding turns pairs, choose an even one")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not divisible by num_kv_heads {self.num_kv_heads}; "
                "each key/value head serves the same number of query heads"
            )
        check_positive(self, "rope_base")
        known = typing.get_args(typing.get_type_hints(type(self))["convention"])
        if known and self.convention not in known:
            raise ValueError(f"convention is {self.convention!r}; choose {' or '.join(known)}")
        if self.convention == "nvidia" and self.num_kv_heads != self.num_heads:
            raise ValueError(
                "convention nvidia is the authors' code, which has as many key/value heads as query heads; got "
                f"num_kv_heads {self.num_kv_heads}; leave it at its default"
            )

    @property
    def has_rope(self) -> bool:
        """Whether q and k are rotated; else positions are learned and added to the embedding."""
        return self.convention != "nanogpt"


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, Integral):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_truth(config: object, *names: str) -> None:
    """Raise ValueError for the first field that is neither True nor False."""
    for name in names:
        if not isinstance(value := getattr(config, name), bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")


def check_positive(config: object, *names: str) -> None:
    """Raise ValueError for the first field that is not a positive finite number."""
    for name in names:
        value = getattr(config, name)
        if not (isinstance(value, int | float) and value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be a positive number, got {value!r}")


class Attention(nn.Module):
    """Causal self-attention: y = W_o softmax(scale · q kᵀ) v, with q and k normalised and rotated by `qk_norm`.

    Args:
        W_q: maps [B, T, d] to [B, T, H·D].
        W_k: maps [B, T, d] to [B, T, K·D].
        W_v: like W_k.
        W_o: maps [B, T, H·D] to [B, T, d].
        qk_norm: acts on q and k per head and knows the softmax scale that belongs with it.
        head_dim: D.
    """

    def __init__(
        self, W_q: nn.Module, W_k: nn.Module, W_v: nn.Module, W_o: nn.Module, qk_norm: QKNorm, head_dim: int
    ) -> None:
        super().__init__()
        self.W_q, self.W_k, self.W_v, self.W_o = W_q, W_k, W_v, W_o
        self.qk_norm, self.head_dim = qk_norm, head_dim
        self.register_buffer("max_logits", None, persistent=False)  # fp32 [H] where QKClip asks for it

    def qkv(self, x: Tensor, rope: RopeTables | None) -> tuple[Tensor, Tensor, Tensor]:
        """The q [B, T, H, D], k and v [B, T, K, D] that attention sees."""
        q, k, v = (W(x).unflatten(-1, (-1, self.head_dim)) for W in (self.W_q, self.W_k, self.W_v))
        q, k = self.qk_norm(q, k, rope=rope)
        return q, k, v

    def forward(
        self, x: Tensor, rope: RopeTables | None, mask: Tensor | None = None, cache: Slots | None = None
    ) -> Tensor:
        """X [B, T, d] → [B, T, d].

        Args:
            x: the block's input.
            rope: tables of the T positions; None where q and k are not rotated.
            mask: bool [B or 1, 1, T, S], true where q may see k; None is the causal mask of T = S.
            cache: keys and values of earlier tokens; what is new is appended.
        """
        q, k, v = self.qkv(x, rope)
        if cache is not None:
            k, v = cache.append(k, v)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        scale = self.qk_norm.softmax_scale
        if self.max_logits is not None and torch.is_grad_enabled():
            y, largest = attention_with_max_logits(q, k, v, mask=mask, is_causal=mask is None, scale=scale)
            record_max_logits(self, largest)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
            )
        return self.W_o(y.transpose(1, 2).flatten(-2))


class SwiGLU(nn.Module):
    """y = W_down (u ⊙ SiLU(ν)), u = W_u x, ν = W_ν x.

    Args:
        W_u: maps [..., d] to [..., d_mlp].
        W_nu: the gate, like W_u.
        W_down: maps [..., d_mlp] to [..., d].
    """

    def __init__(self, W_u: nn.Module, W_nu: nn.Module, W_down: nn.Module) -> None:
        super().__init__()
        self.W_u, self.W_nu, self.W_down = W_u, W_nu, W_down

    def forward(self, x: Tensor) -> Tensor:
        return self.W_down(self.W_u(x) * F.silu(self.W_nu(x)))


def _note_convention(model: "Decoder", state: object, prefix: str, metadata: dict[str, Any]) -> None:
    metadata["convention"] = model.config.convention


def _check_noted_convention(model: "Decoder", state: object, prefix: str, metadata: dict[str, Any], *_: object) -> None:
    """Weights of paper and nvidia have the same names and shapes; a state dict notes which they are."""
    if (theirs := metadata.get("convention", model.config.convention)) != model.config.convention:
        raise ValueError(
            f"these weights are of convention {theirs!r} and the model is of {model.config.convention!r}, which would "
            f"compute something else with them; make it with convention={theirs!r}"
        )


class Decoder(nn.Module):
    """Embedding, blocks, final norm, output head: the frame that GPT and nGPT fill.

    Args:
        config: the shape.
        embed: maps tokens [B, T] to [B, T, d]; its `weight` is [V, d].
        blocks: each maps (h [B, T, d], rope, mask, cache) to [B, T, d].
        final_norm: maps [B, T, d] to [B, T, d].
    """

    convention = "paper"
    """That of the configs that this class is the model of."""
    rope_cos: Tensor
    rope_sin: Tensor
    max_length: int | None = None
    """The longest sequence that it has positions for; None: any, as a rotation has no end."""
    unit_keys = False
    """Whether the keys that attention sees are unit vectors, which a cache in eight bits makes use of."""
    vocab_shard: VocabShard | None = None
    """The rows of the output head that are here, where tensor parallelism has split it."""

    def __init__(
        self, config: DecoderConfig, embed: nn.Module, blocks: Sequence[nn.Module], final_norm: nn.Module
    ) -> None:
        super().__init__()
        self.config = config
        self.embed, self.blocks, self.final_norm = embed, nn.ModuleList(blocks), final_norm
        # constants of the shape, not state: made again from the config, never saved
        if config.has_rope:
            cos, sin = self.make_rope_tables(config.context)
            self.register_buffer("rope_cos", cos, persistent=False)
            self.register_buffer("rope_sin", sin, persistent=False)
        self.register_state_dict_post_hook(_note_convention)
        self.register_load_state_dict_pre_hook(_check_noted_convention)

    def check_convention(self, config: DecoderConfig) -> None:
        """Raise ValueError for a config of which this class is not the model."""
        if config.convention != self.convention:
            raise ValueError(
                f"{type(self).__name__} is the model of convention {self.convention!r}, the config says "
                f"{config.convention!r}; build it with nsphere.make_model(config)"
            )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.embed.weight.device  # type: ignore[return-value]

    def rope_spec(self) -> RopeSpec | None:
        """How q and k are rotated, if they are."""
        config = self.config
        return RopeSpec(dim=config.head_dim, base=config.rope_base) if config.has_rope else None

    def make_rope_tables(self, num_positions: int) -> RopeTables:
        """The tables of positions 0 … num_positions − 1, each [num_positions, D/2] in fp32."""
        spec = self.rope_spec()
        assert spec is not None
        return spec.tables(num_positions)

    def reset_parameters(self) -> None:
        """Parameters and tables as in a fresh model: what one built on the meta device needs after `to_empty`."""
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]
        if self.config.has_rope:
            self._set_rope_tables(self.config.context)

    def _set_rope_tables(self, num_positions: int) -> None:
        device = self.rope_cos.device
        # made while generating, the tables may still serve training afterwards, which inference tensors cannot
        with torch.inference_mode(False):
            cos, sin = self.make_rope_tables(num_positions)
            self.rope_cos, self.rope_sin = cos.to(device), sin.to(device)

    def output_weight(self) -> Tensor:
        """[V, d]: logits = h · output_weightᵀ, scales folded in."""
        raise NotImplementedError

    def check_length(self, num_tokens: int) -> None:
        """Raise ValueError for sequences longer than the model has positions for."""
        if self.max_length is not None and num_tokens > self.max_length:
            raise ValueError(
                f"the model learned {self.max_length} positions and has none for sequences of {num_tokens} tokens; "
                f"give at most {self.max_length}"
            )

    def place(self, tokens: Tensor, positions: Tensor | None, end: int) -> tuple[Tensor, RopeTables | None]:
        """What enters the first block: the embedded tokens [B, T, d], and the rotary tables of their positions.

        Args:
            tokens: int64 [B, T].
            positions: int64 [B, T]; None: 0 … T − 1.
            end: above every position.
        """
        if end > self.rope_cos.shape[0]:  # longer than the training context: extrapolation, or generation
            self._set_rope_tables(end)
        at = slice(end) if positions is None else positions
        return self.embed(tokens), (self.rope_cos[at], self.rope_sin[at])

    def hidden(
        self,
        tokens: Tensor,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Tokens [B, T] → what the last block returns [B, T, d], before `final_norm`; see `forward`."""
        if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"tokens are int64 [B, T], got {tokens.dtype} {list(tokens.shape)}")
        num_tokens = end = tokens.shape[1]
        mask = None
        if positions is not None and cache is None:
            raise ValueError("positions are those of a cache; without one they follow from document_ids")
        if document_ids is not None:
            if cache is not None:
                raise ValueError("document_ids and a cache exclude each other; a cache holds one document a row")
            same_document = document_ids.unsqueeze(-1) == document_ids.unsqueeze(-2)
            mask = same_document.tril().unsqueeze(1)
            # positions count from the start of each document: nGPT's attention sees more than their differences,
            # because s_qk scales the two dims of a rotated pair apart
            positions = mask.sum(-1).squeeze(1) - 1
        elif cache is not None:
            if positions is None:
                start = cache.end
                cache.reserve(start + num_tokens)
                positions = torch.arange(start, cache.end, device=tokens.device).expand(tokens.shape)
            if num_tokens < cache.end:  # else the row begins here, and the mask is the causal one
                mask = cache.mask(positions)
            end = cache.end
        h, rope = self.place(tokens, positions, end)
        for i, block in enumerate(self.blocks):
            h = block(h, rope, mask, None if cache is None else cache.layer(i, positions))  # type: ignore[arg-type]
        return h

    def forward(
        self,
        tokens: Tensor,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Tokens [B, T] → logits [B, T, V].

        Args:
            tokens: int64.
            document_ids: int [B, T], the document that each token of a packed row belongs to: tokens see only
                their own document, and get the logits they would get in a row of their own. None: the row is one
                document.
            cache: of earlier tokens, for generation; see `make_cache`.
            positions: int64 [B, T], where the tokens stand in their rows of the cache, each before `cache.end`. If
                not given they follow what the cache holds, the same for every row.

        Raises:
            ValueError: tokens of another kind, more of them than the model or the cache has positions for, or arguments
                that exclude each other.
        """
        h = self.final_norm(self.hidden(tokens, document_ids, cache, positions))
        return F.linear(h, self.output_weight())

    def loss(self, tokens: Tensor, targets: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Mean cross-entropy in nats per token, fp32 []; targets int64 [B, T], -100 where none."""
        if targets.shape != tokens.shape:
            raise ValueError(f"tokens are {list(tokens.shape)} and targets {list(targets.shape)}; give each its target")
        return self.hidden_loss(self.hidden(tokens, document_ids), targets)

    def hidden_loss(self, h: Tensor, targets: Tensor) -> Tensor:
        """The loss from what the last block returned."""
        h = self.final_norm(h)
        return linear_cross_entropy(h.flatten(0, 1), self.output_weight(), targets.flatten(), vocab=self.vocab_shard)

    def compile_parts(self) -> None:
        """Compile each block and the loss, in place.

        Blocks of one shape share one compiled function, so that compiling takes as long for 36 blocks as for one;
        on CPU the step is also faster than with the whole model compiled in one piece (docs/lab-notes.md). Each shape
        gets code of its own: code for any shape, made at the first odd one, would change the last bits midway.
        """
        for block in self.blocks:
            block.compile(dynamic=False)
        self.hidden_loss = torch.compile(self.hidden_loss, dynamic=False)  # type: ignore[method-assign]

    def num_parameters(self) -> int:
        """All learned numbers, shared ones once."""
        return sum(p.numel() for p in self.parameters())

    def make_cache(
        self, batch_size: int, max_tokens: int, dtype: CacheDtype = torch.float32, *, grow: bool = False
    ) -> KVCache:
        """An empty cache for generation; see KVCache."""
        self.check_length(max_tokens)
        config = self.config
        return KVCache(
            len(self.blocks),
            batch_size,
            max_tokens,
            config.num_kv_heads,
            config.head_dim,
            dtype,
            self.device,
            unit_keys=self.unit_keys,
            grow=grow,
        )
