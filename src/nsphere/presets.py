"""Shapes by name, and the models built from them."""

from dataclasses import dataclass, field
from typing import Any

from nsphere.gpt import GPT, GPTConfig
from nsphere.layers import Decoder
from nsphere.nanogpt import NanoGPT
from nsphere.ngpt import NGPTConfig
from nsphere.ngpt_nvidia import NvidiaGPT, make_ngpt


@dataclass(frozen=True)
class Preset:
    """A shape, the vocabulary it is known with, and how long it is trained by default."""

    d_model: int
    num_layers: int
    num_heads: int
    context: int
    vocab_size: int
    about: str
    steps: int
    batch_size: int
    micro_batch_size: int
    eval_sequences: int
    ngpt: dict[str, Any] = field(default_factory=dict)
    """Fields of NGPTConfig that differ from the paper's at this size."""
    ngpt_warmup: float = 0.0
    """Share of the steps in which nGPT warms up; the paper's nGPT does not."""
    tuned_lr: dict[str, float] = field(default_factory=dict)
    """Peak learning rates by arm, from a sweep at this preset's own shape, steps, batch and the embedded text."""

    def shape(self) -> dict[str, int]:
        """The fields of a model config that the preset gives; the vocabulary is the data's."""
        return {name: getattr(self, name) for name in ("d_model", "num_layers", "num_heads", "context")}

    def model_defaults(self, architecture: str) -> dict[str, Any]:
        """The architecture's fields that the preset changes."""
        return dict(self.ngpt) if architecture == "ngpt" else {}


USUAL_LR = {"gpt": 6e-4, "ngpt": 1.5e-3}
"""Where nothing was tuned: GPT-3's rate for small models, and the paper's best for nGPT at a context of 4096."""

PRESETS = {
    "demo": Preset(
        d_model=256,
        num_layers=4,
        num_heads=4,
        context=256,
        vocab_size=256,
        about="trains in minutes on two CPU cores, on bytes",
        steps=600,
        batch_size=16,
        micro_batch_size=16,
        eval_sequences=256,
        # α = 0.05 and s_z = 1 start far from where they end, which costs a short run its first hundreds of steps
        ngpt={"eigen_lr_init": 0.25, "s_z_init": 10.0},
        # which helps here, whatever the paper says of long runs: see docs/demo-sweep.md
        ngpt_warmup=0.1,
        tuned_lr={"gpt": 6.3e-4, "gpt-qknorm": 6.3e-4, "ngpt": 2.5e-3},
    ),
    "gpt2-small": Preset(768, 12, 12, 1024, 50304, "the size of GPT-2 small", 20_000, 480, 16, 512),
    "0.5b": Preset(1024, 24, 16, 4096, 32000, "the paper's 0.5B: 468,491,520 parameters as nGPT", 100_000, 256, 4, 256),
    "1b": Preset(1280, 36, 20, 4096, 32000, "the paper's 1B: 1,026,177,280 parameters as nGPT", 100_000, 256, 2, 256),
}

_GPTS = {model.convention: model for model in (GPT, NvidiaGPT, NanoGPT)}


def make_gpt(config: GPTConfig) -> GPT:
    """The GPT of a config, in the convention it names."""
    return _GPTS[config.convention](config)


ARCHITECTURES: dict[str, tuple[type, Any]] = {"gpt": (GPTConfig, make_gpt), "ngpt": (NGPTConfig, make_ngpt)}


def make_config(architecture: str, **fields: Any) -> Any:
    """The config of an architecture, "gpt" or "ngpt"; ValueError for another."""
    if architecture not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {architecture!r}; choose {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[architecture][0](**fields)


def make_model(config: Any) -> Decoder:
    """The model of a config, freshly initialised from torch's global random state."""
    for config_class, build in ARCHITECTURES.values():
        if isinstance(config, config_class):
            return build(config)
    raise ValueError(f"no architecture has a config of type {type(config).__name__}")
