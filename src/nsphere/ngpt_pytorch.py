"""Weights of PyPI's nGPT-pytorch as this library's nGPT, where the two architectures agree.

Its state dict does not hold the options it was built with, though some change the function: those are given by hand.
What is taken over as it is: SwiGLU with √d on the gate, the softmax scale √D, unit rows and columns, a head of its own
or tied. What is translated: pairs of neighbouring dims are rotated there, halves here, so the rows of W_q and W_k and
the scale of q are reordered; s_qk is its square root, as it is on q alone there; matrices under the parametrisation
are normalised for good.
"""

import ast
import re
from typing import Any

import torch
from torch import Tensor

from nsphere.foreign_names import unwrapped
from nsphere.ngpt import NGPTConfig
from nsphere.ops.normalized_update import unit

DEFAULTS: dict[str, Any] = {
    "attn_norm_qk": True,
    "num_hyperspheres": 1,
    "causal": True,
    "add_value_residual": True,
    "norm_eps": 0.0,
    "alpha_init": None,
    "alpha_attn_init": None,
    "alpha_attn_scale": None,
    "alpha_ff_init": None,
    "alpha_ff_scale": None,
    "s_qk_init": 1.0,
    "s_qk_scale": None,
    "s_ff_hidden_init": 1.0,
    "s_ff_hidden_scale": 1.0,
    "s_ff_gate_init": 1.0,
    "s_ff_gate_scale": 1.0,
    "s_logit_init": 1.0,
    "s_logit_scale": None,
}
"""What nGPT-pytorch 0.2.16 does where nothing is said, of all that changes its function and is not in its file."""

_REFUSED = {
    "add_value_residual": (False, "averages values with those of the first layer"),
    "norm_eps": (0.0, "lets vectors off the sphere by norm_eps"),
    "num_hyperspheres": (1, "splits vectors over several spheres"),
    "causal": (True, "sees what comes after a token"),
}
_MATRICES = {
    "0.fn.to_q": ("attn.W_q.weight", 1),
    "0.fn.to_k": ("attn.W_k.weight", 1),
    "0.fn.to_v": ("attn.W_v.weight", 1),
    "0.fn.to_out": ("attn.W_o.weight", 0),
    "1.fn.to_hidden": ("mlp.W_u.weight", 1),
    "1.fn.to_gate": ("mlp.W_nu.weight", 1),
    "1.fn.to_out": ("mlp.W_down.weight", 0),
}


def parse_options(texts: tuple[str, ...]) -> dict[str, Any]:
    """NAME=VALUE, as in `nGPT(...)`, as options.

    Raises:
        ValueError: an option that nGPT-pytorch does not have, or whose value is no number, bool or tuple of numbers.
    """
    options = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in DEFAULTS:
            raise ValueError(f"nGPT-pytorch has no option {name!r} that matters here; known: {', '.join(DEFAULTS)}")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise ValueError(f"{text!r} is not NAME=VALUE, as in add_value_residual=False or alpha_init=0.1") from None
    return options


def from_ngpt_pytorch(
    state: dict[str, Tensor], context: int, options: dict[str, Any] | None = None
) -> tuple[NGPTConfig, dict[str, Tensor]]:
    """A state dict of `nGPT_pytorch.nGPT` as the config and the state dict of this library's nGPT.

    Args:
        state: of 0.2.16; fp32, with the parametrisation or with manual_norm_weights=True.
        context: tokens of a training sequence, which it does not say.
        options: what it was built with, where it is not the default; see DEFAULTS.

    Raises:
        ValueError: an option, or weights, for which this library has no equal function.
    """
    given = DEFAULTS | (options or {})
    for name, (agrees, what) in _REFUSED.items():
        if given[name] != agrees:
            default = " (its default)" if name not in (options or {}) else ""
            raise ValueError(
                f"nGPT-pytorch with {name}={given[name]}{default} {what}, which nsphere's nGPT does not; "
                f"if it was built otherwise, say so: --option {name}={agrees}"
            )
    state = _Whole({unwrapped(name): t.float() for name, t in state.items()})
    d_model = _matrix(state, "token_embed", 1).shape[1]
    num_layers = 1 + max((int(m[1]) for name in state if (m := re.match(r"layers\.(\d+)\.", name))), default=0)
    head_dim = 2 * len(state["rotary_embed.freqs"])
    expected = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    if not torch.allclose(state["rotary_embed.freqs"], expected, rtol=1e-5):
        raise ValueError("this nGPT-pytorch model rotates with other frequencies than those of base 10000")
    width = state["layers.0.0.fn.qk_scale.scale"].numel()
    config = NGPTConfig(
        vocab_size=state["logit_scale.scale"].numel(),
        context=context,
        d_model=d_model,
        num_layers=num_layers,
        num_heads=width // head_dim,
        head_dim=head_dim,
        d_mlp=state["layers.0.1.fn.hidden_scale.scale"].numel(),
        eigen_lr_init=1 / num_layers,
        qk_norm=bool(given["attn_norm_qk"]),
    )

    def effective(name: str, init: Any, scale: Any, default_scale: float, layer: int = 0) -> Tensor:
        """A scale as it is used: stored · init / scale."""
        init, scale = (x[layer] if isinstance(x, list | tuple) else x for x in (init, scale))
        return state[f"{name}.scale"] * (init / (default_scale if scale is None else scale))

    def halves(x: Tensor) -> Tensor:
        """Rows of heads: even dims first, then odd ones, so that what was rotated as neighbours is as halves."""
        return x.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)

    embed = _matrix(state, "token_embed", 1)
    tied = "to_logits.linear.weight" not in state and "to_logits.linear.parametrizations.weight.original" not in state
    ours = {"embed.weight": embed, "head.weight": embed.clone() if tied else _matrix(state, "to_logits", 1)}
    s_z = effective("logit_scale", given["s_logit_init"], given["s_logit_scale"], d_model**-0.5)
    ours["head.scale.stored"] = s_z * config.s_z_scale / config.s_z_init
    for i in range(num_layers):
        for theirs, (name, dim) in _MATRICES.items():
            weight = _matrix(state, f"layers.{i}.{theirs}", dim)
            ours[f"blocks.{i}.{name}"] = halves(weight) if theirs.endswith(("to_q", "to_k")) else weight
        on_q = effective(f"layers.{i}.0.fn.qk_scale", given["s_qk_init"], given["s_qk_scale"], 1 / d_model, i)
        if (on_q < 0).any():
            raise ValueError(f"the scale of q in layer {i} has negative numbers, which s_qk² can't be")
        ours[f"blocks.{i}.attn.qk_norm.multiplier.s_qk.stored"] = halves(on_q).sqrt() * config.s_qk_scale
        for branch, name, ours_name in (("attn", "0", "eigen_lr_attn"), ("ff", "1", "eigen_lr_mlp")):
            init = given[f"alpha_{branch}_init"]
            if init is None:
                init = 1 / num_layers if given["alpha_init"] is None else given["alpha_init"]
            scale = given[f"alpha_{branch}_scale"]
            alpha = effective(f"layers.{i}.{name}.branch_scale", init, scale, d_model**-0.5, i)
            if (alpha < 0).any():
                raise ValueError(f"α of layer {i} has negative numbers, and nsphere's nGPT steps by |α|")
            ours[f"blocks.{i}.{ours_name}.stored"] = alpha * config.eigen_lr_scale / config.eigen_lr_init
        for theirs, name in (("hidden", "W_u"), ("gate", "W_nu")):
            scale = given[f"s_ff_{theirs}_scale"]
            ours[f"blocks.{i}.mlp.{name}.scale.stored"] = effective(
                f"layers.{i}.1.fn.{theirs}_scale", given[f"s_ff_{theirs}_init"], scale, 1.0, i
            )
    return config, ours


class _Whole(dict[str, Tensor]):
    """A state dict that says what it lacks."""

    def __missing__(self, name: str) -> Tensor:
        raise ValueError(f"this is no whole nGPT-pytorch model: it lacks {name}")


def _matrix(state: dict[str, Tensor], name: str, dim: int) -> Tensor:
    """A matrix on the sphere: normalised if it was under the parametrisation, else checked to be."""
    if (original := state.get(f"{name}.linear.parametrizations.weight.original")) is not None:
        return unit(original, dim)
    weight = state[f"{name}.linear.weight"]
    if weight.dim() != 2:
        raise ValueError(f"{name} of this nGPT-pytorch model is no matrix: its shape is {tuple(weight.shape)}")
    if (weight.norm(dim=dim) - 1).abs().max() > 1e-4:
        raise ValueError(
            f"{name} is off the sphere, as manual_norm_weights=True leaves it before norm_weights_(); call that, and "
            "save the model again"
        )
    return weight
