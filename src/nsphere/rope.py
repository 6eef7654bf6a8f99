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
    twice: Literal["halves", "pairs"] | None = None
    """How a table of width R repeats its angles: in "halves" or in "pairs"; None goes by the layout."""
    blocks: int = 1
    """The rotated dims split into this many equal blocks, each paired within itself (2 for two-axis RoPE)."""
    table_dtype: torch.dtype | Literal["input"] | None = None
    """The tables are rounded to this first; "input" is the dtype of q and k, None takes them as they are."""
    compute_dtype: torch.dtype | Literal["input"] = torch.float32
    """The rotation's dtype; "input" is that of q and k (Hugging Face's usual order, which rounds three times)."""

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise ValueError(f"RopeSpec got blocks={self.blocks}; give at least 1")
        if self.dim <= 0 or self.dim % (2 * self.blocks):
            raise ValueError(
                f"RopeSpec got dim={self.dim} in {self.blocks} block(s); dims turn in pairs, "
                f"so give a positive multiple of {2 * self.blocks}"
            )
        for field, allowed in {
            "layout": ("half", "interleaved"),
            "where": ("leading", "trailing"),
            "sign": (1, -1),
            "output": ("same", "half"),
            "twice": ("halves", "pairs", None),
        }.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"RopeSpec got {field}={getattr(self, field)!r}; choose from {allowed}")
        for field, others in {"table_dtype": ("input", None), "compute_dtype": ("input",)}.items():
            value = getattr(self, field)
            if value not in others and not isinstance(value, torch.dtype):
                raise ValueError(f"RopeSpec got {field}={value!r}; give a torch.dtype or one of {others}")

    def tables(self, positions: int | Tensor, *, offset: int = 0, device: object = None) -> tuple[Tensor, Tensor]:
        """The cosines and sines of position · base^(-2i/R), from angles in fp64: in fp32 they drift with length.

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
        cos: [T, R/2], [B, T, R/2], or [B, T, H, R/2] where the angles differ from head to head; the [.., R] of
            Hugging Face, where every angle stands twice, serves too.
        sin: as cos.
        spec: pairs, place, sign and rounding.

    Returns:
        x's shape and dtype.
    """
    return rotate(x, cos, sin, spec).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, spec: RopeSpec, *, inverse: bool = False) -> Tensor:
    """`apply_rope` without the final rounding: the result has the dtype of the rotation.

    With inverse=True the rotation is undone, which is also its transpose: what gradients go back through.
    """
    if spec.dim > x.shape[-1]:
        raise ValueError(f"RopeSpec.dim={spec.dim}, but x has {x.shape[-1]} dims per head; rotate at most those")
    cos, sin = _pair_tables(x, cos, sin, spec, inverse)
    x = x.to(cos.dtype)
    still_dims = x.shape[-1] - spec.dim
    if not still_dims:
        return _turn(x, cos, sin, spec, inverse)
    if spec.where == "trailing":
        still, turned = x.split((still_dims, spec.dim), -1)
        return torch.cat((still, _turn(turned, cos, sin, spec, inverse)), -1)
    turned, still = x.split((spec.dim, still_dims), -1)
    return torch.cat((_turn(turned, cos, sin, spec, inverse), still), -1)


def split_pairs(x: Tensor, spec: RopeSpec, *, rotated: bool = False) -> list[Tensor]:
    """Take the pairs of x apart: [a, b], each [..., R/2], and the dims that pass unchanged [..., D - R], if any.

    With rotated=True, x is ordered as `rotate` leaves it, which `spec.output` may have changed.
    """
    still_dims = x.shape[-1] - spec.dim
    start = still_dims if spec.where == "trailing" else 0
    turned = x[..., start : start + spec.dim]
    if spec.layout == "half" or (rotated and spec.output == "half"):
        a, b = (t.flatten(-2) for t in turned.unflatten(-1, (spec.blocks, 2, -1)).unbind(-2))
    else:
        a, b = turned.unflatten(-1, (-1, 2)).unbind(-1)
    if not still_dims:
        return [a, b]
    return [a, b, x[..., :still_dims] if start else x[..., spec.dim :]]


def join_pairs(parts: list[Tensor], spec: RopeSpec, *, rotated: bool = False) -> Tensor:
    """Undo `split_pairs`, with one concatenation."""
    a, b, *still = parts
    if spec.layout == "half" or (rotated and spec.output == "half"):
        blocks = zip(a.chunk(spec.blocks, -1), b.chunk(spec.blocks, -1), strict=True)
        turned = [half for block in blocks for half in block]
    else:
        turned = [torch.stack((a, b), -1).flatten(-2)]
    return torch.cat((*still, *turned) if spec.where == "trailing" else (*turned, *still), -1)


def rotate_pairs(
    parts: list[Tensor], cos: Tensor, sin: Tensor, spec: RopeSpec, *, inverse: bool = False
) -> list[Tensor]:
    """`rotate` on what `split_pairs` took apart."""
    a, b, *still = parts
    cos, sin = _pair_tables(a, cos, sin, spec, inverse)
    a, b = a.to(cos.dtype), b.to(cos.dtype)
    return [a * cos - b * sin, b * cos + a * sin, *still]


def pair_table(table: Tensor, spec: RopeSpec, input_dtype: torch.dtype) -> Tensor:
    """The table as [..., 1 or H, R/2], rounded as the spec asks."""
    if table.shape[-1] == spec.dim:  # every angle stands twice
        if spec.twice == "pairs" or (spec.twice is None and spec.layout == "interleaved"):
            table = table[..., ::2]
        else:
            table = table.unflatten(-1, (spec.blocks, 2, -1))[..., 0, :].flatten(-2)
    elif table.shape[-1] != spec.dim // 2:
        raise ValueError(
            f"a RoPE table of width {table.shape[-1]} does not fit RopeSpec.dim={spec.dim}; "
            f"give {spec.dim // 2} (or {spec.dim}, every angle twice)"
        )
    if spec.table_dtype is not None:
        table = table.to(input_dtype if spec.table_dtype == "input" else spec.table_dtype)
    return table if table.dim() == 4 else table.unsqueeze(-2)


def _pair_tables(x: Tensor, cos: Tensor, sin: Tensor, spec: RopeSpec, inverse: bool) -> tuple[Tensor, Tensor]:
    """Both tables by pairs, in the dtype of the rotation, of the angles that x turns by."""
    compute = x.dtype if spec.compute_dtype == "input" else torch.promote_types(x.dtype, spec.compute_dtype)
    cos, sin = (pair_table(t, spec, x.dtype).to(compute) for t in (cos, sin))
    return cos, -sin if (spec.sign < 0) != inverse else sin


def _turn(x: Tensor, cos: Tensor, sin: Tensor, spec: RopeSpec, inverse: bool) -> Tensor:
    source = spec.layout
    target = "half" if spec.output == "half" else spec.layout
    if inverse:
        source, target = target, source
    if spec.blocks > 1:
        cos, sin = (t.unflatten(-1, (spec.blocks, -1)) for t in (cos, sin))
        x = x.unflatten(-1, (spec.blocks, -1))
    pair = -2 if source == "half" else -1
    x = x.unflatten(-1, (2, -1) if source == "half" else (-1, 2))
    # (a, b)·cos + (b, a)·(-sin, sin): the compiler fuses a flip with what surrounds it, and makes a copy of a cat
    turned = x * cos.unsqueeze(pair) + x.flip(pair) * torch.stack((-sin, sin), pair)
    turned = (turned if source == target else turned.transpose(-1, -2)).flatten(-2)
    return turned.flatten(-2) if spec.blocks > 1 else turned
