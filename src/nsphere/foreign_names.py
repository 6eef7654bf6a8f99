"""What every reader of a foreign state dict does first: the wrappers' prefixes off, and at least fp32."""

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


def unwrapped(name: str) -> str:
    """A parameter's name without what torch.compile and DDP put before it."""
    return re.sub(r"^((_orig_mod|module)\.)+", "", name)


def unwrapped_fp32(state: Mapping[str, Tensor]) -> Iterator[tuple[str, str, Tensor]]:
    """(name as it stands there, name without wrappers, tensor in fp32, or fp64 where it is) of each parameter."""
    for name, tensor in state.items():
        yield name, unwrapped(name), tensor.to(torch.promote_types(tensor.dtype, torch.float32))
