"""What Transformer Engine's modules have in common: default device and init, and `_extra_state`."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def on_device(device: torch.device | str | None) -> torch.device:
    """The device asked for; by default CUDA where there is one (Transformer Engine's own default), else the CPU."""
    if device is not None:
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def init_or_default(init_method: Callable[[Tensor], Any] | None) -> Callable[[Tensor], Any]:
    """The function that fills a weight; by default N(0, 0.023²), as in Transformer Engine."""
    return init_method if init_method is not None else lambda weight: nn.init.normal_(weight, std=0.023)


class TEModule(nn.Module):
    """A module whose state dict has Transformer Engine's keys.

    Its `_extra_state` is empty, as Transformer Engine's is without FP8. It may be missing from what is loaded; FP8
    metadata found there is dropped with a warning, and never unpickled.
    """

    def get_extra_state(self) -> Tensor:
        """Nothing: uint8 [0]."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Drop it."""
        if isinstance(state, Tensor) and state.numel() > 0:
            warnings.warn(
                f"the FP8 metadata of a {type(self).__name__} ({state.numel()} bytes of _extra_state) is dropped: "
                "nsphere.te has no FP8",
                stacklevel=2,
            )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        state_dict.setdefault(f"{prefix}_extra_state", self.get_extra_state())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
