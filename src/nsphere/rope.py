"""Rotary position embedding: which dims turn, in which pairs, by which angles.

Shape legend: B batch, T positions, H heads, D head_dim, R rotated dims (spec.dim).
"""

import dataclasses
from typing import Literal

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class RopeSpec:
    """How q and k are rotated (RoFormer, arXiv 2104.09864, and the variants of the published families).

    Raises:
        ValueError: for an odd or non-positive dim, or an unknown choice.
    """

    dim: int
    """R, the number of rotated dims of each head, even; the rest pass unchanged."""
    base: float = 10000.0
    """θ: pair i turns by position · base^(-2i/R)."""
    layout: Literal["half", "interleaved"] = "half"
    """Which dims form pair i: "half" (i, i + R/2), GPT-NeoX and Hugging Face; "interleaved" (2i, 2i + 1)."""
    where: Literal["leading", "trailing"] = "leading"
    """Which dims of the head turn when R < D."""
    sign: Literal[1, -1] = 1
    """1: (a, b) -> (a·cos - b·sin, b·cos + a·sin). -1 turns the other way."""
    output: Literal["same", "half"] = "same"
    """"half" leaves interleaved pairs in half order, as the DeepSeek family does."""
    blocks: int = 1
    """The rotated dims split into this many equal blocks, each paired within itself (2 for two-axis vision RoPE)."""
    table_dtype: torch.dtype | None = None
    """The tables are rounded to this first; None is the compute dtype."""
    compute_dtype: torch.dtype | None = torch.float32
    """The rotation's dtype; None is the input's (Hugging Face's usual order, which rounds three times)."""

    def __post_init__(self) -> None:
        if self.dim <= 0 or self.dim % (2 * self.blocks):
            raise ValueError(
                f"RopeSpec got dim={self.dim} in {self.blocks} block(s); give a positive multiple of {2 * self.blocks}: "
                "dims turn in pairs"
            )
        for field, allowed in {
            "layout": ("half", "interleaved"),
            "where": ("leading", "trailing"),
            "sign": (1, -1),
            "output": ("same", "half"),
        }.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"RopeSpec got {field}={getattr(self, field)!r}; choose from {allowed}")

    def tables(
        self, positions: int | Tensor, *, offset: int = 0, device: object = None
    ) -> tuple[Tensor, Tensor]:
        """cos and sin of position · base^(-2i/R), fp32, from angles in fp64 (fp32 angles drift at long context).

        Args:
            positions: the number of positions T, or a tensor of positions [...].
            offset: added to the positions.
            device: where the tables are made; the tensor's own device by default.

        Returns:
            (cos, sin), each fp32 [T, R/2] or [..., R/2].
        """
        if isinstance(positions, int):
            place = torch.arange(positions, dtype=torch.float64, device=device)  # type: ignore[call-overload]
        else:
            place = positions.to(device=device or positions.device, dtype=torch.float64)  # type: ignore[call-overload]
        per_block = self.dim // self.blocks
        powers = torch.arange(0, per_block, 2, dtype=torch.float64, device=place.device) / per_block
        frequencies = (self.base**-powers).repeat(self.blocks)
        angles = (place + offset).unsqueeze(-1) * frequencies
        return angles.cos().float(), angles.sin().float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, spec: RopeSpec) -> Tensor:
    """Rotate the pairs of x by the tables' angles.

    Args:
        x: [B, T, H, D] (or [T, H, D]).
        cos: [T, R/2] or [B, T, R/2]; the [.., R] of Hugging Face, where every angle stands twice, serves too.
        sin: as cos.
        spec: pairs, place, sign and rounding.

    Returns:
        x's shape and dtype.
    """
    x_turned = rotate(x, cos, sin, spec, compute=spec.compute_dtype or x.dtype)
    return x_turned.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, spec: RopeSpec, compute: torch.dtype) -> Tensor:
    """`apply_rope` in the dtype `compute` (or x's where that is wider), which is also what it returns."""
    if spec.dim > x.shape[-1]:
        raise ValueError(
            f"RopeSpec.dim is {spec.dim} and x has {x.shape[-1]} dims per head; give at most that"
        )
    compute = torch.promote_types(x.dtype, compute)
    cos, sin = (_table(t, spec, compute) for t in (cos, sin))
    if spec.sign < 0:
        sin = -sin
    x = x.to(compute)
    rest = x.shape[-1] - spec.dim
    if rest:
        trailing = spec.where == "trailing"
        still, turned = x.split((rest, spec.dim) if trailing else (spec.dim, rest), -1)[
            :: 1 if trailing else -1
        ]
    else:
        still, turned = None, x
    turned = _rotate_pairs(turned, cos, sin, spec)
    if still is None:
        return turned
    return torch.cat((still, turned) if spec.where == "trailing" else (turned, still), -1)


def _table(table: Tensor, spec: RopeSpec, compute: torch.dtype) -> Tensor:
    if table.shape[-1] == spec.dim:
        per_block = table.unflatten(-1, (spec.blocks, spec.dim // spec.blocks))
        if spec.layout == "half":
            table = per_block[..., : spec.dim // spec.blocks // 2].flatten(-2)
        else:
            table = table[..., ::2]
    elif table.shape[-1] != spec.dim // 2:
        raise ValueError(
            f"a RoPE table of width {table.shape[-1]} does not fit RopeSpec.dim={spec.dim}; give {spec.dim // 2} "
            f"(or {spec.dim}, every angle twice)"
        )
    if spec.table_dtype is not None:
        table = table.to(spec.table_dtype)
    return table.to(compute).unsqueeze(-2)


def _rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor, spec: RopeSpec) -> Tensor:
    pair = (2, -1) if spec.layout == "half" else (-1, 2)
    pair_dim = -2 if spec.layout == "half" else -1
    if spec.blocks > 1:
        cos, sin = (t.unflatten(-1, (spec.blocks, -1)) for t in (cos, sin))
        x = x.unflatten(-1, (spec.blocks, -1))
    a, b = x.unflatten(-1, pair).unbind(pair_dim)
    out_dim = -2 if spec.output == "half" else pair_dim
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), out_dim).flatten(-2)
    return turned.flatten(-2) if spec.blocks > 1 else turned
