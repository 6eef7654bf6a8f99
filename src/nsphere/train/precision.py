"""What products are computed in: float32, or bfloat16 by autocast."""

import contextlib
import dataclasses

import torch

from nsphere.train.config import TrainConfig
from nsphere.train.machine import has_bf16


def pin_dtype(config: TrainConfig, device: torch.device) -> TrainConfig:
    """The config with dtype auto replaced by what this machine has: a run does not change precision on another."""
    if config.dtype != "auto":
        return config
    return dataclasses.replace(config, dtype="bfloat16" if has_bf16(device).available else "float32")


def choose_dtype(config: TrainConfig, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, or None for plain float32."""
    return torch.bfloat16 if pin_dtype(config, device).dtype == "bfloat16" else None


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[None]:
    """The context in which products run in this dtype, as `choose_dtype` gave it."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def dtype_name(dtype: torch.dtype | None) -> str:
    """What products are computed in, in words."""
    return "float32" if dtype is None else "bfloat16 autocast"
