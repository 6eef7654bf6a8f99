"""A factor that can be divided by later, as backwards do that start from what was multiplied."""

import torch
from torch import Tensor

LEAST = 2.0**-60
"""The least size of a factor. It leaves nothing that a sum of products could show, and keeps the digits: a unit
vector's components times this are normal numbers of fp32 and bf16."""


def nonzero(factor: Tensor) -> Tensor:
    """The factor, 2⁻⁶⁰ in place of what is smaller in size."""
    return torch.where(factor.abs() < LEAST, LEAST, factor)
