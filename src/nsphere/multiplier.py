"""A learned factor on q or k: nGPT's s_qk, cosine attention's logit scale, a temperature per head."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nsphere.norms import compute_dtype


class LearnedMultiplier(nn.Module):
    """A learned factor on q or k, broadcastable to [H, D].

    "identity" is stored · init / scale, "softplus" log(1 + e^stored), "exp" e^min(stored, log max).

    Args:
        shape: () one scalar, (H, 1) per head, (D,) per dimension, (H, D) both.
        init: the factor's initial value.
        scale: of "identity": what is stored at the start; under Adam it sets the factor's own learning rate
            (nGPT §2.5).
        transform: "identity", "softplus" or "exp".
        max: the ceiling of "exp" (100 in Swin v2).

    Raises:
        ValueError: for what the transform has no use for, or cannot start from.
    """

    def __init__(
        self,
        shape: tuple[int, ...] = (),
        init: float = 1.0,
        *,
        scale: float = 1.0,
        transform: Literal["identity", "softplus", "exp"] = "identity",
        max: float = math.inf,
        device: Any = None,
    ):
        super().__init__()
        if transform not in ("identity", "softplus", "exp"):
            raise ValueError(f"LearnedMultiplier got transform={transform!r}; choose identity, softplus or exp")
        if transform != "identity" and init <= 0:
            raise ValueError(f"LearnedMultiplier got init={init}; {transform} needs a positive one")
        if transform != "identity" and scale != 1:
            raise ValueError(f'LearnedMultiplier got scale={scale} with {transform}; scale is for "identity"')
        if transform != "exp" and max != math.inf:
            raise ValueError(f'LearnedMultiplier got max={max} with {transform}; max is for "exp"')
        if init > max:
            raise ValueError(f"LearnedMultiplier got init={init} above max={max}; start at {max} or below")
        self.init, self.scale, self.transform, self.max = init, scale, transform, max
        self.weight = nn.Parameter(torch.empty(shape, device=device))
        self.reset_parameters()

    def _start(self) -> float:
        if self.transform == "exp":
            return math.log(self.init)
        return math.log(math.expm1(self.init)) if self.transform == "softplus" else self.init

    def reset_parameters(self) -> None:
        """Store what stands for the initial value: `scale`, or its inverse under the transform."""
        nn.init.constant_(self.weight, self.scale if self.transform == "identity" else self._start())

    def forward(self) -> Tensor:
        """The factor, fp32 (fp64 of an fp64 weight)."""
        weight = self.weight.to(compute_dtype(self.weight))
        if self.transform == "softplus":
            return nn.functional.softplus(weight)
        if self.transform == "exp":
            return weight.clamp(max=math.log(self.max)).exp()
        return weight * (self.init / self.scale)
