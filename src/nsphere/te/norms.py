"""Transformer Engine's norms: L2Normalization, RMSNorm, LayerNorm. Each is a norm of this library by another name."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from nsphere import norms
from nsphere.norms import NormSpec, StatisticNorm, compute_dtype, standardize
from nsphere.te.base import TEModule, on_device
from nsphere.te.checks import COUNT, COUNT_OR_NONE, NORMALIZATIONS, check_arguments


class L2Normalization(TEModule, StatisticNorm):
    """x / √(Σx² + eps) over the last dimension, of any width: a true unit norm, without a weight.

    Args:
        eps: added to the sum of squares.
        seq_length: accepted; it warms up kernels in Transformer Engine.
        micro_batch_size: as seq_length.
    """

    def __init__(self, *, eps: float = 1e-6, seq_length: int | None = None, micro_batch_size: int | None = None):
        check_arguments("L2Normalization", locals())
        super().__init__(1, NormSpec("l2", eps))
        self.dim = None  # type: ignore[assignment]  # whatever comes
        self.eps = eps

    def check_input(self, x: Tensor) -> None:
        """Raises TypeError for integers, and what is no tensor."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(
                f"L2Normalization got {getattr(x, 'dtype', type(x).__name__)}; give it a floating-point tensor"
            )


class RMSNorm(TEModule, norms.RMSNorm):
    """x / √(mean x² + eps) · γ, or · (1 + γ) if zero-centred.

    Args:
        normalized_shape: width of the last dimension.
        eps: added to the mean.
        sequence_parallel: False or None.
        params_dtype: of the weight; the default dtype if not given.
        zero_centered_gamma: γ is stored as γ − 1, starting at 0.
        hidden_size: older name of normalized_shape.
        device: CUDA where there is one, else the CPU.
        dtype: newer name of params_dtype.
        sm_margin: accepted, without effect.
    """

    def __init__(
        self,
        normalized_shape: Iterable[int] | int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        sm_margin: Any = 0,
    ):
        check_arguments("RMSNorm", locals(), other_rules={"hidden_size": COUNT_OR_NONE})
        dim, dtype = _width("RMSNorm", normalized_shape, hidden_size), _dtype("RMSNorm", params_dtype, dtype)
        _no_sequence_parallel("RMSNorm", sequence_parallel)
        super().__init__(dim, eps=eps, zero_centered=zero_centered_gamma, device=on_device(device), dtype=dtype)
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma


class LayerNorm(TEModule, norms.LayerNorm):
    """(x − mean) / √(var + eps) · γ + β. Arguments as in `RMSNorm`."""

    def __init__(
        self,
        normalized_shape: Iterable[int] | int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        sm_margin: Any = 0,
    ):
        check_arguments("LayerNorm", locals(), other_rules={"hidden_size": COUNT_OR_NONE})
        dim, dtype = _width("LayerNorm", normalized_shape, hidden_size), _dtype("LayerNorm", params_dtype, dtype)
        _no_sequence_parallel("LayerNorm", sequence_parallel)
        super().__init__(dim, eps=eps, zero_centered=zero_centered_gamma, device=on_device(device), dtype=dtype)
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma


NORMS = dict(zip(NORMALIZATIONS, (LayerNorm, RMSNorm), strict=True))
"""By the names that `normalization` takes."""


def normalize(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, normalization: str, zero_centered_gamma: bool
) -> Tensor:
    """The norm with weights that live in another module: x [..., D] → [..., D], fp32 inside, rounded once."""
    wide = compute_dtype(x)
    spec = NormSpec("layer" if normalization == "LayerNorm" else "rms", eps)
    y, _ = standardize(x.to(wide), spec, eps)
    factor = weight.to(wide)
    y = y * (1 + factor if zero_centered_gamma else factor)
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def _width(owner: str, normalized_shape: Iterable[int] | int | None, hidden_size: int | None) -> int:
    if (normalized_shape is None) == (hidden_size is None):
        raise ValueError(f"{owner} takes normalized_shape, or hidden_size, and not both; give normalized_shape")
    shape = hidden_size if normalized_shape is None else normalized_shape
    widths: tuple[Any, ...] = tuple(shape) if isinstance(shape, Iterable) and not isinstance(shape, str) else (shape,)
    if len(widths) != 1:
        raise ValueError(
            f"{owner} normalises the last dimension alone and got normalized_shape={widths}; give its width"
        )
    if not COUNT.holds(widths[0]):
        raise ValueError(f"{owner} got normalized_shape={shape!r}; {COUNT.advice}")
    return int(widths[0])


def _dtype(owner: str, params_dtype: torch.dtype | None, dtype: torch.dtype | None) -> torch.dtype | None:
    if params_dtype is not None and dtype is not None:
        raise ValueError(f"{owner} got both dtype and params_dtype, two names of one thing; give dtype")
    return dtype if params_dtype is None else params_dtype


def _no_sequence_parallel(owner: str, sequence_parallel: bool | None) -> None:
    if sequence_parallel:
        raise ValueError(f"{owner} got sequence_parallel=True, which nsphere.te does not implement; leave it out")
