"""Shapes by name, and the models built from them."""

from dataclasses import dataclass
from typing import Any

from nsphere.gpt import GPT, GPTConfig
from nsphere.layers import Decoder
from nsphere.ngpt import NGPTConfig
from nsphere.ngpt_nvidia import make_ngpt


@dataclass(frozen=True)
class Preset:
    """A shape, and the vocabulary it is known with."""

    d_model: int
    num_layers: int
    num_heads: int
    context: int
    vocab_size: int
    about: str

    def shape(self) -> dict[str, int]:
        """The fields of a model config that the preset gives; the vocabulary is the data's."""
        return {name: getattr(self, name) for name in ("d_model", "num_layers", "num_heads", "context")}


PRESETS = {
    "demo": Preset(256, 4, 4, 256, 256, "trains in minutes on two CPU cores, on bytes"),
    "gpt2-small": Preset(768, 12, 12, 1024, 50304, "the size of GPT-2 small"),
    "0.5b": Preset(1024, 24, 16, 4096, 32000, "the paper's 0.5B: 468,491,520 parameters as nGPT"),
    "1b": Preset(1280, 36, 20, 4096, 32000, "the paper's 1B: 1,026,177,280 parameters as nGPT"),
}

ARCHITECTURES: dict[str, tuple[type, Any]] = {"gpt": (GPTConfig, GPT), "ngpt": (NGPTConfig, make_ngpt)}


def make_config(architecture: str, **fields: Any) -> Any:
    """The config of an architecture, "gpt" or "ngpt"."""
    return ARCHITECTURES[architecture][0](**fields)


def make_model(config: Any) -> Decoder:
    """The model of a config, freshly initialised from torch's global random state."""
    for config_class, build in ARCHITECTURES.values():
        if isinstance(config, config_class):
            return build(config)
    raise ValueError(f"no architecture has a config of type {type(config).__name__}")
