"""Arms: what is compared with what. An arm is an architecture, what it changes in it, and how it is optimised.

`gpt-qknorm` names an arm; `ngpt:s_z_init=1,eigen_lr=scalar` changes fields of its architecture's config, and
`gpt:weight_decay=0.05,warmup_steps=100` its recipe.
"""

import dataclasses
import difflib
import typing
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, Literal

from nsphere.presets import ARCHITECTURES

OptimizerName = Literal["adamw", "muon"]
ScheduleName = Literal["cosine", "linear", "wsd"]


@dataclass(frozen=True)
class Arm:
    """One side of a comparison."""

    architecture: str
    about: str
    model: dict[str, Any] = field(default_factory=dict)
    """Fields of the architecture's config."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """Fields of the training config, which then hold for this arm alone."""


ARMS = {
    "gpt": Arm("gpt", "pre-RMSNorm, RoPE, SwiGLU"),
    "gpt-qknorm": Arm("gpt", "GPT with RMS QK-norm", {"qk_norm": "rms"}),
    "gpt-muon": Arm("gpt", "GPT, matrices trained by Muon", {}, {"optimizer": "muon"}),
    "gpt-qknorm-muon": Arm(
        "gpt", "GPT with RMS QK-norm, matrices trained by Muon", {"qk_norm": "rms"}, {"optimizer": "muon"}
    ),
    "gpt-tied": Arm("gpt", "GPT with one matrix for embedding and head", {"tied": True}),
    "ngpt": Arm("ngpt", "the normalized transformer"),
    "ngpt-no-qknorm": Arm("ngpt", "nGPT without QK-norm", {"qk_norm": False}),
    "ngpt-scalar-alpha": Arm("ngpt", "nGPT, one eigen learning rate per sub-block", {"eigen_lr": "scalar"}),
    "ngpt-scalar-sqk": Arm("ngpt", "nGPT, one s_qk per layer", {"s_qk": "scalar"}),
    "ngpt-scalar-suv": Arm("ngpt", "nGPT, one s_u and one s_v per layer", {"s_uv": "scalar"}),
    "ngpt-scalar-sz": Arm("ngpt", "nGPT, one s_z", {"s_z": "scalar"}),
    "ngpt-fixed-sqk": Arm("ngpt", "nGPT, s_qk not learned", {"s_qk": "fixed"}),
    "ngpt-fixed-suv": Arm("ngpt", "nGPT, s_u and s_v not learned", {"s_uv": "fixed"}),
    "ngpt-forward": Arm("ngpt", "nGPT, matrices normalised in every forward pass", {"projection": "forward"}),
}


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """The end of a message about an unknown word: what comes nearest, and everything there is."""
    known = list(known)
    close = difflib.get_close_matches(word.lower(), known, n=2, cutoff=0.4)
    return (f"did you mean {' or '.join(close)}? " if close else "") + f"known: {', '.join(known)}"


def parse_arm(name: str) -> Arm:
    """The arm of a name such as "ngpt" or "ngpt:s_z_init=10,eigen_lr=scalar".

    Raises:
        ValueError: an unknown arm or field, or a value that is none of the field's.
    """
    base, _, changes = name.partition(":")
    if base not in ARMS:
        raise ValueError(f"unknown arm {base!r}; {nearest(base, ARMS)}")
    arm = ARMS[base]
    if not changes:
        return arm
    config_class = ARCHITECTURES[arm.architecture][0]
    types = typing.get_type_hints(config_class) | RECIPE_FIELDS
    allowed = {f.name for f in dataclasses.fields(config_class)} - SHAPE_FIELDS
    allowed |= set(RECIPE_FIELDS)
    model, recipe = dict(arm.model), dict(arm.recipe)
    for change in changes.split(","):
        key, equals, text = change.partition("=")
        if not equals:
            raise ValueError(f"arm {name!r}: {change!r} is not FIELD=VALUE")
        if key not in allowed:
            raise ValueError(f"arm {name!r}: {arm.architecture} has no field {key!r}; {nearest(key, sorted(allowed))}")
        (recipe if key in RECIPE_FIELDS else model)[key] = _parse_value(types[key], text, f"arm {name!r}: {key}")
    return dataclasses.replace(arm, about=f"{arm.about}; {changes}", model=model, recipe=recipe)


SHAPE_FIELDS = {
    "vocab_size",
    "context",
    "d_model",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "d_mlp",
}
"""The fields that every arm of a comparison shares: flags of their own, not changes to an arm."""


RECIPE_FIELDS: dict[str, Any] = {
    "optimizer": OptimizerName,
    "schedule": ScheduleName,
    "warmup_steps": int,
    "weight_decay": float,
    "beta1": float,
    "beta2": float,
    "adam_eps": float,
    "grad_clip": float,
    "qk_clip": float,
}
"""The fields of the training config that an arm may set for itself. Its learning rate is given by --arm-lr."""


def _parse_value(kind: Any, text: str, where: str) -> Any:
    if typing.get_origin(kind) is Literal:
        allowed = typing.get_args(kind)
        if text not in allowed:
            raise ValueError(f"{where} is {text!r}; {nearest(text, allowed)}")
        return text
    kinds = [k for k in typing.get_args(kind) or (kind,) if k is not NoneType]
    if kinds[0] is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{where} is {text!r}; choose true or false")
        return text.lower() == "true"
    try:
        return kinds[0](text)
    except ValueError:
        raise ValueError(f"{where} is {text!r}, which is not a {kinds[0].__name__}") from None
