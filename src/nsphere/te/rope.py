"""Transformer Engine's rotary table: the angles themselves, [S, 1, 1, R], each standing twice."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from nsphere.te.base import on_device
from nsphere.te.checks import check_arguments

Tables = tuple[Tensor, Tensor]
_halves: Any = WeakIdKeyDictionary()


class RotaryPositionEmbedding(nn.Module):
    """Makes the table of angles: position · base^(−2i/R).

    Args:
        dim: R.
        rotary_percent: below 1, the share of dim that turns.
        seq_len_interpolation_factor: positions are divided by it (arXiv 2306.15595).
        pretrained_max_position_embeddings: with the factor: sequences longer than the product of both are squeezed
            into this many positions instead.
        rotary_base: of the wavelengths.
        interleaved: the angle of pair i stands at 2i and 2i + 1, not at i and i + R/2.
    """

    inv_freq: Tensor

    def __init__(
        self,
        dim: int,
        rotary_percent: float = 1.0,
        seq_len_interpolation_factor: float | None = None,
        pretrained_max_position_embeddings: int | None = None,
        rotary_base: float = 10000.0,
        interleaved: bool = False,
    ):
        check_arguments("RotaryPositionEmbedding", locals())
        super().__init__()
        if rotary_percent < 1.0:
            dim = int(dim * rotary_percent)
        if dim < 2 or dim % 2:
            raise ValueError(f"RotaryPositionEmbedding would turn {dim} dims; they turn in pairs, give an even number")
        self.seq_len_interpolation_factor = seq_len_interpolation_factor
        self.pretrained_max_position_embeddings = pretrained_max_position_embeddings
        self.rotary_base, self.interleaved = rotary_base, interleaved
        powers = torch.arange(0, dim, 2, dtype=torch.float32, device=on_device(None)) / dim
        self.register_buffer("inv_freq", rotary_base**-powers)

    def forward(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """The angles of positions offset … offset + max_seq_len − 1, fp32 [max_seq_len, 1, 1, R]."""
        check_arguments("RotaryPositionEmbedding", {"max_seq_len": max_seq_len, "offset": offset})
        with torch.autocast(self.inv_freq.device.type, enabled=False):
            positions = torch.arange(max_seq_len, device=self.inv_freq.device, dtype=self.inv_freq.dtype) + offset
            pretrained, factor = self.pretrained_max_position_embeddings, self.seq_len_interpolation_factor
            if pretrained is not None and factor is not None:
                positions = positions / (factor if max_seq_len <= pretrained * factor else max_seq_len / pretrained)
            angles = torch.outer(positions, self.inv_freq)
        twice = angles.repeat_interleave(2, -1) if self.interleaved else torch.cat((angles, angles), -1)
        return twice[:, None, None]


def turns_pairs(table: Tensor, interleaved: bool) -> bool:
    """Whether the two angles of every pair agree, so that the table is a rotation.

    Looked at once per table. What is being traced cannot be looked at, and is taken to be one.
    """
    return torch.compiler.is_compiling() or _known(table, interleaved)[2]


def tables(table: Tensor, interleaved: bool) -> Tables:
    """The cosines and sines [S, R/2] of a rotation's angles, fp32, made once per table."""
    if torch.compiler.is_compiling():
        angles = _split(table, interleaved)[0]
        return angles.cos(), angles.sin()
    cos, sin, _ = _known(table, interleaved)
    return cos, sin


def _split(table: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    angles = table.detach().float()[:, 0, 0]
    return (angles[:, ::2], angles[:, 1::2]) if interleaved else tuple(angles.chunk(2, -1))  # type: ignore[return-value]


def _known(table: Tensor, interleaved: bool) -> tuple[Tensor, Tensor, bool]:
    # layers and steps share their table: what was made of it lives as long as it does
    key = (interleaved, None if table.is_inference() else table._version)
    known = _halves.get(table)
    if known is None or known[0] != key:
        first, second = _split(table, interleaved)
        with torch.inference_mode(False):
            known = _halves[table] = key, (first.cos(), first.sin(), torch.equal(first, second))
    return known[1]


def turn_each(x: Tensor, table: Tensor, interleaved: bool) -> Tensor:
    """Transformer Engine's formula, x·cos + rotate_half(x)·sin with every dim's own angle.

    For tables that are no rotation.

    Args:
        x: [..., T, H, D].
        table: angles [T, R] of x's positions.
        interleaved: which dims pair up.
    """
    angles = table.float()[:, None]
    turned, still = x.float().split((angles.shape[-1], x.shape[-1] - angles.shape[-1]), -1)
    pairs = turned.unflatten(-1, (-1, 2)) if interleaved else turned.unflatten(-1, (2, -1)).transpose(-1, -2)
    a, b = pairs.unbind(-1)
    half = torch.stack((-b, a), -1) if interleaved else torch.stack((-b, a), -2)
    return torch.cat((turned * angles.cos() + half.flatten(-2) * angles.sin(), still), -1).to(x.dtype)
