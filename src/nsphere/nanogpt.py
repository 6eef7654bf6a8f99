"""nanoGPT's model, which is GPT-2: learned positions, LayerNorm, an MLP with GELU, tied embeddings, biases or none.

It is the GPT of `GPTConfig(convention="nanogpt")`, for weights trained there and for comparisons with it. Dropout it
has none, which changes nothing about a trained model.
"""

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsphere.foreign_names import unwrapped_fp32
from nsphere.gpt import GPT, Embedding, GPTConfig
from nsphere.kv_cache import Slots
from nsphere.layers import Attention, RopeTables
from nsphere.ops.embedding import embedding


class PlacedEmbedding(Embedding):
    """weight[tokens] + positions[their positions], both learned."""

    def __init__(self, num_embeddings: int, num_positions: int, embedding_dim: int) -> None:
        super().__init__(num_embeddings, embedding_dim)
        self.positions = nn.Parameter(torch.empty(num_positions, embedding_dim))

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(tokens) + embedding(positions, self.positions)


class GELUMLP(nn.Module):
    """y = W_down GELU(W_u x), with GELU exact (x Φ(x)) or approximated by tanh."""

    def __init__(self, W_u: nn.Module, W_down: nn.Module, gelu: str) -> None:
        super().__init__()
        self.W_u, self.W_down = W_u, W_down
        self.approximate = "none" if gelu == "exact" else "tanh"

    def forward(self, x: Tensor) -> Tensor:
        return self.W_down(F.gelu(self.W_u(x), approximate=self.approximate))


class NanoGPTBlock(nn.Module):
    """h ← h + ATTN(LayerNorm(h)); h ← h + MLP(LayerNorm(h))."""

    def __init__(self, config: GPTConfig, attn: Attention, mlp: GELUMLP) -> None:
        super().__init__()
        self.attn_norm, self.attn = layer_norm(config), attn
        self.mlp_norm, self.mlp = layer_norm(config), mlp

    def forward(
        self, h: Tensor, rope: RopeTables | None, mask: Tensor | None = None, cache: Slots | None = None
    ) -> Tensor:
        h = h + self.attn(self.attn_norm(h), rope, mask, cache)
        return h + self.mlp(self.mlp_norm(h))


def layer_norm(config: GPTConfig) -> nn.LayerNorm:
    """(x − mean) / √(variance + eps) · weight, + bias if there are biases."""
    return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)


class NanoGPT(GPT):
    """GPT as nanoGPT and GPT-2 compute it: the architecture of `GPTConfig(convention="nanogpt")`."""

    convention = "nanogpt"

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.max_length = config.context

    def make_block(self, config: GPTConfig) -> nn.Module:
        """One block, with biases in every linear layer or in none."""
        d, D = config.d_model, config.head_dim
        q_width, kv_width = config.num_heads * D, config.num_kv_heads * D

        def linear(in_features: int, out_features: int) -> nn.Linear:
            return nn.Linear(in_features, out_features, bias=config.bias)

        attn = Attention(
            linear(d, q_width),
            linear(d, kv_width),
            linear(d, kv_width),
            linear(q_width, d),
            self.make_qk_norm(config),
            D,
        )
        return NanoGPTBlock(config, attn, GELUMLP(linear(d, config.d_mlp), linear(config.d_mlp, d), config.gelu))

    def make_embedding(self, config: GPTConfig) -> nn.Module:
        """Tokens and positions, as many as the context has."""
        return PlacedEmbedding(config.vocab_size, config.context, config.d_model)

    def make_final_norm(self, config: GPTConfig) -> nn.Module:
        """Another LayerNorm."""
        return layer_norm(config)

    def init_weights(self) -> None:
        """As GPT's, of the positions too; biases zero."""
        super().init_weights()
        for name, p in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(p)

    def place(self, tokens: Tensor, positions: Tensor | None, end: int) -> tuple[Tensor, RopeTables | None]:
        """Tokens and positions embedded; nothing is rotated. See Decoder.place."""
        self.check_length(end)
        if positions is None:
            positions = torch.arange(end, device=tokens.device)
        return self.embed(tokens, positions), None


_TOP = {
    "transformer.wte.weight": "embed.weight",
    "transformer.wpe.weight": "embed.positions",
    "transformer.ln_f.weight": "final_norm.weight",
    "transformer.ln_f.bias": "final_norm.bias",
    "lm_head.weight": "head.weight",
}
_MODULES = {
    "ln_1": "attn_norm",
    "ln_2": "mlp_norm",
    "attn.c_proj": "attn.W_o",
    "mlp.c_fc": "mlp.W_u",
    "mlp.c_proj": "mlp.W_down",
}
_PACKED = ("attn.W_q", "attn.W_k", "attn.W_v")
"""What `attn.c_attn` holds, its rows in this order."""


def from_nanogpt_state_dict(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of nanoGPT under this library's names, in fp32 (or fp64 where it is).

    The head is left out where it is the embedding, and so are the masks that older versions kept as `attn.bias`.

    Raises:
        ValueError: a name that nanoGPT does not have, or rows that are no q, k and v.
    """
    ours: dict[str, Tensor] = {}
    for full_name, name, tensor in unwrapped_fp32(theirs):
        block = re.fullmatch(r"transformer\.(h\.\d+)\.(.+)\.(weight|bias)", name)
        if name in _TOP:
            ours[_TOP[name]] = tensor
        elif block and (module := _MODULES.get(block[2])):
            ours[f"blocks{block[1][1:]}.{module}.{block[3]}"] = tensor
        elif block and block[2] == "attn.c_attn":
            if len(tensor) % 3:
                raise ValueError(f"{full_name!r} has {len(tensor)} rows, which are no q, k and v of one width each")
            for module, part in zip(_PACKED, tensor.chunk(3), strict=True):
                ours[f"blocks{block[1][1:]}.{module}.{block[3]}"] = part
        elif not re.fullmatch(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)", name):
            raise ValueError(f"{full_name!r} is no parameter of nanoGPT; give the state dict of its unchanged model")
    if {"head.weight", "embed.weight"} <= ours.keys() and torch.equal(ours["head.weight"], ours["embed.weight"]):
        del ours["head.weight"]
    return ours


def not_in_nanogpt(config: GPTConfig) -> list[str]:
    """What a config of convention nanogpt asks for, and neither nanoGPT nor GPT-2 has."""
    width = config.num_heads * config.head_dim
    against = {
        f"qk_norm {config.qk_norm!r}": config.qk_norm != "none",
        f"num_kv_heads {config.num_kv_heads} of {config.num_heads} heads": config.num_kv_heads != config.num_heads,
        f"heads of {config.head_dim} in a d_model of {config.d_model}": width != config.d_model,
    }
    return [what for what, there in against.items() if there]


def to_nanogpt_state_dict(model: NanoGPT) -> dict[str, Tensor]:
    """The reverse: a model's parameters under nanoGPT's names, the head among them.

    Raises:
        ValueError: what nanoGPT does not have, see `not_in_nanogpt`.
    """
    config = model.config
    if faults := not_in_nanogpt(config):
        raise ValueError(f"nanoGPT has no {' and no '.join(faults)}; it can't hold this model")
    ours = {name: p.detach() for name, p in model.named_parameters()}
    theirs = {there: ours[here] for there, here in _TOP.items() if here in ours}
    theirs["lm_head.weight"] = model.output_weight().detach()
    for i in range(config.num_layers):
        for kind in ("weight", "bias"):
            at = f"blocks.{i}"
            for there, here in _MODULES.items():
                if (tensor := ours.get(f"{at}.{here}.{kind}")) is not None:
                    theirs[f"transformer.h.{i}.{there}.{kind}"] = tensor
            if f"{at}.{_PACKED[0]}.{kind}" in ours:
                packed = torch.cat([ours[f"{at}.{module}.{kind}"] for module in _PACKED])
                theirs[f"transformer.h.{i}.attn.c_attn.{kind}"] = packed
    return theirs


def config_of(ours: dict[str, Tensor], num_heads: int, **fields: object) -> GPTConfig:
    """The config of a state dict that `from_nanogpt_state_dict` returned; what shapes do not tell is given.

    Raises:
        ValueError: tensors that are missing, or shapes that can't be.
    """
    needed = ("embed.weight", "embed.positions", "blocks.0.mlp.W_u.weight")
    if missing := [name for name in needed if name not in ours]:
        raise ValueError(f"this is no whole nanoGPT model: it lacks what becomes {missing[0]}")
    if flat := [name for name in needed if ours[name].dim() != 2]:
        raise ValueError(f"this is no nanoGPT model: what becomes {flat[0]} is no matrix")
    vocab_size, d_model = ours["embed.weight"].shape
    return GPTConfig(
        vocab_size=vocab_size,
        context=len(ours["embed.positions"]),
        d_model=d_model,
        num_layers=1 + max(int(m[1]) for name in ours if (m := re.match(r"blocks\.(\d+)\.", name))),
        num_heads=num_heads,
        d_mlp=len(ours["blocks.0.mlp.W_u.weight"]),
        convention="nanogpt",
        tied="head.weight" not in ours,
        bias="final_norm.bias" in ours,
        **fields,  # type: ignore[arg-type]
    )
