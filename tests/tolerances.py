"""How far a result may be from the truth, in one place.

The rule: the error against fp64 may be at most twice that of plain PyTorch in the same dtype, plus a floor of a few
roundings for results that plain PyTorch happens to get exactly.
"""

import torch
from torch import Tensor

FACTOR = 2.0
ROUNDINGS = 4.0


def error(actual: Tensor, truth: Tensor) -> float:
    """The largest difference from the fp64 truth, relative to the truth's largest value."""
    assert actual.shape == truth.shape, f"{tuple(actual.shape)} against {tuple(truth.shape)}"
    if truth.numel() == 0:
        return 0.0
    difference = (actual.double() - truth).abs().max().item()
    return difference / max(truth.abs().max().item(), 1e-300)


def floor(dtype: torch.dtype) -> float:
    """The error that is always allowed: a few roundings of the dtype."""
    return ROUNDINGS * torch.finfo(dtype).eps


def assert_close(actual: Tensor, truth: Tensor, plain: Tensor | None = None, what: str = "result") -> None:
    """`actual` is as near to the fp64 `truth` as its dtype allows, or as twice the error of `plain`."""
    allowed = floor(actual.dtype) + (0.0 if plain is None else FACTOR * error(plain, truth))
    got = error(actual, truth)
    assert got <= allowed, f"{what}: error {got:.3g} where {allowed:.3g} is allowed ({actual.dtype})"
