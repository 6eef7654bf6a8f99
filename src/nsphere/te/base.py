"""What Transformer Engine's modules have in common: refused arguments, default device, and `_extra_state`."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# What is not implemented, and the default that means "not asked for". Arguments that only speed something up, or only
# name something, are accepted and need no entry: is_first_microbatch, fast_zero_fill, seq_length, micro_batch_size,
# max_seqlen_*, name, layer_number.
UNSUPPORTED: Mapping[str, Any] = {
    "tp_group": None,
    "tp_size": 1,
    "cp_group": None,
    "cp_global_ranks": None,
    "cp_stream": None,
    "fuse_wgrad_accumulation": False,
    "get_rng_state_tracker": None,
    "rng_tracker_name": None,
    "ub_tp_comm_overlap": False,
    "ub_overlap_ag": False,
    "ub_overlap_rs": False,
    "ub_overlap_rs_dgrad": False,
    "ub_bulk_dgrad": False,
    "ub_bulk_wgrad": False,
    "ub_name": None,
    "delay_wgrad_compute": False,
    "symmetric_ar_type": None,
    "return_layernorm_output_gathered": False,
    "checkpoint": False,
    "activation_params": None,
    "softcap": (0.0, None),
    "softmax_type": "vanilla",
    "inference_params": None,
    "core_attention_bias_type": "no_bias",
    "core_attention_bias": None,
    "alibi_slopes": None,
    "fp8_output": False,
    "fp8_grad": False,
    "thd_attention_policies": None,
    "thd_attention_policy_dispatch": "auto",
}


def refuse_unsupported(owner: str, arguments: Mapping[str, Any], *, ignored: tuple[str, ...] = ()) -> None:
    """Raise ValueError for the first argument that is not implemented and not at its default.

    Args:
        owner: who was given them.
        arguments: by name, such as `locals()` at the start of a function.
        ignored: names that have no effect in this place.
    """
    for name, default in UNSUPPORTED.items():
        if name in ignored or name not in arguments:
            continue
        value, defaults = arguments[name], default if isinstance(default, tuple) else (default,)
        if not any(value is d or value == d for d in defaults):
            raise ValueError(
                f"{owner} got {name}={value!r}, which nsphere.te does not implement; leave it at {defaults[0]!r}"
            )


def choice(owner: str, name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise ValueError for a value that is not among those allowed."""
    if value not in allowed:
        raise ValueError(f"{owner} got {name}={value!r}; choose from {', '.join(map(repr, allowed))}")


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
