"""Tiny attentions of transformers, and what they hand to the attention kernel.

A Case builds one from its config class, offline, with random weights. `run` feeds it, stops it at the kernel and
returns the q, k, v it brought there together with the outputs of its projections, from which ours must make the same.
"""

import dataclasses
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

B, T, H, HKV, D = 2, 6, 4, 2, 32
HIDDEN = H * D
# lines that conftest.py prints after the tests, by title
REPORT: dict[str, list[str]] = {}
# keywords that most configs share; a config keeps as an attribute what it does not know
COMMON = {
    "hidden_size": HIDDEN,
    "num_attention_heads": H,
    "num_key_value_heads": HKV,
    "head_dim": D,
    "num_hidden_layers": 4,
    "intermediate_size": 64,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
    "attn_implementation": "nsphere_capture",
}


class AtKernel(Exception):
    """The attention has reached its kernel."""


@dataclasses.dataclass
class Run:
    """One attention stopped at its kernel."""

    module: nn.Module
    config: Any
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scaling: Any
    outputs: dict[str, torch.Tensor]
    """What each submodule returned, by its name."""
    tables: Any
    """What the rotary module made."""
    positions: torch.Tensor
    extra: dict[str, Any]
    """The keywords of forward."""


@dataclasses.dataclass(frozen=True)
class Case:
    """How to build and feed one family's attention."""

    family: str
    attention: str
    """directory:class."""
    config: str = ""
    """The config's class; by default the attention's directory tells."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Config keywords beside COMMON."""
    args: tuple[Any, ...] = (0,)
    """Arguments of the attention after its config."""
    rotary: str | None = ""
    """The rotary class; "" finds it, None has none."""
    tables: Callable[[torch.Tensor, torch.Tensor], Any] | None = None
    """(hidden, positions) -> tables, where the family's own maker needs an image."""
    forward: Callable[..., dict[str, Any]] | None = None
    """(hidden, tables, positions, module) -> keywords of forward; by default the usual three."""
    raw: Callable[[Run], tuple[torch.Tensor, ...]] | None = None
    """Run -> q, k, v before norm and RoPE, each [B, T, heads, D]; by default from q_proj, k_proj, v_proj."""
    built: Callable[[Any], nn.Module] | None = None
    """config -> attention, for unusual constructors."""
    from_zero: bool = False
    """The attention counts positions itself, from 0."""
    mrope: bool = False
    """Positions have three axes."""
    note: str = ""
    """What makes this case worth having."""

    @property
    def name(self) -> str:
        """The family and the class."""
        return f"{self.family}:{self.attention.split(':')[1]}" + (f" {self.note}" if self.note else "")


def _capture(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kw: Any):
    raise AtKernel(query, key, value, kw.get("scaling"))


AttentionInterface.register("nsphere_capture", _capture)


def modeling(case: Case) -> Any:
    directory = case.attention.split(":")[0]
    return importlib.import_module(f"transformers.models.{directory}.modeling_{directory}")


def make_config(case: Case) -> Any:
    directory = case.config.split(":")[0] if ":" in case.config else case.attention.split(":")[0]
    module = importlib.import_module(f"transformers.models.{directory}.configuration_{directory}")
    if case.config:
        return getattr(module, case.config.split(":")[-1])(**{**COMMON, **case.options})
    names = [
        n for n, c in vars(module).items() if n.endswith("Config") and getattr(c, "__module__", "") == module.__name__
    ]
    name = next((n for n in names if n.endswith("TextConfig")), names[0])
    return getattr(module, name)(**{**COMMON, **case.options})


def make_module(case: Case, config: Any, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(3)
    module = (
        case.built(config) if case.built else getattr(modeling(case), case.attention.split(":")[1])(config, *case.args)
    )
    for p in module.parameters():
        if p.dim() == 1 or p.shape[0] <= H:
            nn.init.normal_(p, 1.0, 0.4)
        else:
            nn.init.normal_(p, 0.0, p.shape[-1] ** -0.5)
    return module.to(dtype).eval()


def make_tables(case: Case, config: Any, hidden: torch.Tensor, positions: torch.Tensor) -> Any:
    if case.tables is not None:
        return case.tables(hidden, positions)
    if case.rotary is None:
        return None
    source = modeling(case)
    if ":" in case.rotary:
        directory, name = case.rotary.split(":")
        source = importlib.import_module(f"transformers.models.{directory}.modeling_{directory}")
    else:
        name = case.rotary
    name = name or next(
        n for n in vars(source) if n.endswith("RotaryEmbedding") and not any(w in n for w in ("Vision", "Audio"))
    )
    if case.mrope:
        positions = torch.stack((positions, positions // 2, positions % 3))
    rotary = getattr(source, name)(config)
    layer = {}
    if "layer_type" in inspect.signature(rotary.forward).parameters and getattr(config, "layer_types", None):
        layer = {"layer_type": config.layer_types[0]}
    with torch.no_grad():
        return rotary(hidden, positions, **layer)


def run(case: Case, dtype: torch.dtype, scale: float) -> Run:
    config = make_config(case)
    module = make_module(case, config, dtype)
    hidden = (torch.randn(B, T, HIDDEN, generator=torch.Generator().manual_seed(4)) * scale).to(dtype)
    positions = (torch.arange(T) + 5).expand(B, T)
    tables = make_tables(case, config, hidden, positions)
    if case.forward is None:
        keywords = {"hidden_states": hidden, "position_embeddings": tables, "attention_mask": None}
    else:
        keywords = case.forward(hidden, tables, positions, module)
    outputs: dict[str, torch.Tensor] = {}
    hooks = [
        sub.register_forward_hook(lambda m, i, o, name=name: outputs.__setitem__(name, o))
        for name, sub in module.named_modules()
        if name
    ]
    try:
        with torch.no_grad():
            module(**keywords)
    except AtKernel as reached:
        q, k, v, scaling = reached.args
    else:
        raise AssertionError(f"{case.name} never called its attention kernel")
    finally:
        for hook in hooks:
            hook.remove()
    tables = outputs.get("rotary_emb", tables)  # the module's own, whose frequencies were rounded with it
    positions = positions - positions[0, 0] if case.from_zero else positions
    return Run(module, config, q, k, v, scaling, outputs, tables, positions, keywords)


def given_tables(hidden: torch.Tensor, positions: torch.Tensor, width: int = D) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables as transformers makes them, every angle twice, in the dtype of hidden."""
    angles = positions.unsqueeze(-1).float() * 100.0 ** (-torch.arange(0, width, 2) / width)
    angles = torch.cat((angles, angles), -1)
    return angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype)


def heads(x: torch.Tensor, width: int = D) -> torch.Tensor:
    """[B, T, H·width] -> [B, T, H, width]."""
    return x.reshape(*x.shape[:-1], -1, width)


def raw(case: Case, r: Run) -> tuple[torch.Tensor, ...]:
    if case.raw is not None:
        return case.raw(r)
    return tuple(heads(r.outputs[f"{n}_proj"]) for n in "qkv")
