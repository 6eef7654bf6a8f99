"""Norm, RoPE and multiplier of q or k, forward and backward, in plain PyTorch: the truth for every other backend.

Shape legend: x is [B, T, H, D]; R rotated dims. Everything is fp32 inside (fp64 for fp64) and rounded once.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nsphere.norms import NormSpec, compute_dtype, eps_of, standardize
from nsphere.ops.backend import cast
from nsphere.ops.token_sums import share, sum_to
from nsphere.rope import RopeSpec, join_pairs, rotate, rotate_pairs, split_pairs


@dataclasses.dataclass(frozen=True)
class SideSpec:
    """What happens to q, or to k: everything that is fixed when a QKNorm is built."""

    norm: NormSpec | None
    """The norm; None for RoPE and multiplier alone."""
    rope: RopeSpec | None
    """The rotation; None for none."""
    norm_first: bool = True
    """The norm before RoPE, or after it."""
    over: str | int | tuple[int, int] = "head"
    """"head", "full", the width of a group of consecutive dims, or a slice (start, stop) of each head."""


@dataclasses.dataclass(frozen=True)
class SideTensors:
    """The values that go with a SideSpec, which may change from call to call; None for what it does not have."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    multiplier: Tensor | None = None
    constant: float | Tensor = 1.0
    """A factor beside the multiplier that gets no gradient: a number, or a tensor [] for code that serves them all."""


def forward(x: Tensor, t: SideTensors, spec: SideSpec) -> tuple[Tensor, Tensor | None]:
    """Multiplier · RoPE(weight · (x / root) + bias), or the norm after RoPE.

    Args:
        x: [B, T, H, D], any strides.
        t: the weights in the shapes of `NormSpec.weight`, tables [T, R/2], [B, T, R/2] or [B, T, H, R/2], and a
            multiplier that broadcasts to [B, T, H, D].
        spec: what to do.

    Returns:
        y, as x; and 1/root, fp32 [B, T, H, 1] ([B, T, 1, 1] over all heads, one per group over groups), None
        without a norm.
    """
    dtype, eps = x.dtype, 0.0 if spec.norm is None else eps_of(spec.norm, x.dtype)
    x = x.to(compute_dtype(x))
    inverse = None
    if spec.norm is not None and spec.norm_first:
        x, inverse = _norm(x, t, spec, eps)
    if spec.rope is not None and t.cos is not None and t.sin is not None:
        x = rotate(x, t.cos, t.sin, spec.rope)
    if spec.norm is not None and not spec.norm_first:
        x, inverse = _norm(x, t, spec, eps)
    return cast(_multiply(x, t.multiplier, t.constant), dtype), inverse


def from_output(t: SideTensors) -> bool:
    """Whether the backward can start from the output, so that the input need not be kept.

    It can where the output gives the standardised input back: no weight, no multiplier that is a tensor. (Nor may
    the constant or the norm's scale be 0, see `loses_the_input`.)
    """
    return t.weight is None and t.multiplier is None


def loses_the_input(spec: SideSpec, t: SideTensors) -> bool:
    """Whether a factor of 0 leaves nothing to start a backward from: such a side takes autograd's."""
    return bool(t.constant == 0) or (spec.norm is not None and spec.norm.scale == 0)


def backward(
    grad: Tensor,
    saved: Tensor | None,
    inverse: Tensor | None,
    t: SideTensors,
    spec: SideSpec,
    undo: Tensor | None = None,
    wanted: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight, bias and multiplier.

    With u the gradient at the standardised x̂ and r = 1/root: dx = r · (u - x̂ · mean(u · x̂)) for RMS; the sum in
    place of the mean for L2; and less the mean of u for LayerNorm.

    Args:
        grad: [B, T, H, D].
        saved: the output where `from_output`, else the input; None where neither is needed.
        inverse: 1/root, as `forward` returned it.
        t: as in `forward`.
        spec: as in `forward`.
        undo: what `undo_factors` returns, where it was made before.
        wanted: whether the gradients of weight, bias and multiplier are; what is not is None.
    """
    dtype, wide = grad.dtype, compute_dtype(grad)
    grad = grad.to(wide)
    parts = _Parts(spec, t)
    if spec.norm is None:
        dm = None
        if t.multiplier is not None and saved is not None and wanted[2]:
            dm = sum_to(grad * parts.turn([saved.to(wide)])[0] * t.constant, t.multiplier.shape, 1)
        [dx] = parts.turn([_multiply(grad, t.multiplier, t.constant)], back=True)
        return dx.to(dtype), None, None, dm

    norm, eps = spec.norm, eps_of(spec.norm, dtype)
    assert saved is not None and inverse is not None
    saved = saved.to(wide)
    row, dims = groups(grad, spec.over)
    width = 1 if norm.statistic == "l2" else math.prod([row.shape[i] for i in dims])

    def over_row(products: list[Tensor]) -> Tensor:
        total = _add([p.sum(dims, keepdim=True) for p in products])
        return total if width == 1 else total / width

    def along(products: list[Tensor], squares: Callable[[], list[Tensor]]) -> Tensor:
        """How much of u · x̂ the statistic takes away again; `squares` are those of x̂."""
        taken = over_row(products)
        if norm.eps_place == "clamp" and eps > 0:
            # a clamped row's 1/root is 1/eps but for rounding, which differs between compilers
            return torch.where(inverse < (1 - 4 * torch.finfo(wide).eps) / eps, taken, 0.0)
        if norm.eps_place == "added" and eps > 0:
            # √s / (√s + eps) from x̂ itself: 1 - eps/root cancels in short rows
            share = over_row(squares()).sqrt()
            return torch.where(share > 0, taken / share, 0.0)
        return taken

    def centred(each: list[Tensor], by: list[Tensor] | None = None) -> list[Tensor]:
        if norm.statistic != "layer":
            return each
        centre = over_row(by or each)
        return [x - centre for x in each]

    if from_output(t) and undo is None and spec.norm_first and spec.rope is not None and t.cos is not None:
        assert t.sin is not None
        undo = undo_factors(t.cos, t.sin, spec.rope, grad.shape[-1], wide)

    if from_output(t) and spec.norm_first and isinstance(spec.over, str):
        # R turns within what a statistic spans, so u · x̂ = grad · y, and one rotation takes back both terms of dx
        constant = t.constant * norm.scale
        turned = saved if undo is None else saved * undo
        part = along([grad * saved], lambda: [saved * turned / constant**2]) / constant
        [dx] = centred(parts.turn([grad * constant - part * turned], back=True))
        return (dx * inverse).to(dtype), None, None, None

    u = parts.split(_multiply(grad, t.multiplier, t.constant), turned=True)
    u = parts.turn(u, back=True) if spec.norm_first else u
    wholes = u
    u = [groups(p, spec.over)[0] for p in wholes]
    factor = broadcast(t.weight, spec, grad.shape, wide)
    shift = broadcast(t.bias, spec, grad.shape, wide)
    if from_output(t):
        normed = [saved / t.constant]
        if spec.norm_first and undo is not None:
            normed = parts.turn([normed[0] * undo], back=True)
        standard = [groups(normed[0], spec.over)[0] / norm.scale]
    else:
        normed = parts.split(saved) if spec.norm_first else parts.turn([saved])
        standard = [groups(p, spec.over)[0] for p in normed]
        standard = [p * inverse for p in centred(standard)]

    dw = db = dm = None
    if t.weight is not None and factor is not None:
        if wanted[0]:
            dw = parts.sum_to([p * norm.scale for p in _times(u, standard)], factor).reshape(t.weight.shape)
        if t.bias is not None and wanted[1]:
            db = parts.sum_to(u, factor).reshape(t.bias.shape)
    factor = 1 + factor if factor is not None and norm.zero_centered else factor
    factors = parts.spread(factor, len(u))
    if t.multiplier is not None and wanted[2]:
        shifts = parts.spread(shift, len(u))
        before = [_affine(*p, norm.scale) for p in zip(standard, factors, shifts, strict=True)]
        before = [put_back(b, p, spec.over) for b, p in zip(before, normed, strict=True)]
        y = parts.turn(before) if spec.norm_first else before
        products = _times(parts.split(grad, turned=True), y)
        dm = parts.sum_to([p * t.constant for p in products], t.multiplier, turned=True)

    u = [_affine(p, f, None, norm.scale) for p, f in zip(u, factors, strict=True)]
    part = along(_times(u, standard), lambda: _times(standard, standard))
    steps = centred([a - b * part for a, b in zip(u, standard, strict=True)], u)
    steps = [put_back(d * inverse, whole, spec.over) for d, whole in zip(steps, wholes, strict=True)]
    steps = steps if spec.norm_first else parts.turn(steps, back=True)
    return parts.join([d.to(dtype) for d in steps]), dw, db, dm


class _Parts:
    """What the backward works on: x, or, where R turns within a statistic, the halves of its pairs and the rest.

    These are joined once, at the end: of a pair that is turned whole the compiler loads each half twice.
    """

    def __init__(self, spec: SideSpec, t: SideTensors):
        self.rope, self.cos, self.sin = spec.rope, t.cos, t.sin
        rows = spec.norm is not None and spec.norm_first and isinstance(spec.over, str)
        # without the sums of a weight's gradient the whole is as fast or faster
        self.apart = rows and not from_output(t)

    def split(self, x: Tensor, *, turned: bool = False) -> list[Tensor]:
        if not self.apart or self.rope is None:
            return [x]
        return split_pairs(x, self.rope, rotated=turned)

    def join(self, parts: list[Tensor], *, turned: bool = False) -> Tensor:
        if not self.apart or self.rope is None:
            return parts[0]
        return join_pairs(parts, self.rope, rotated=turned)

    def turn(self, parts: list[Tensor], *, back: bool = False) -> list[Tensor]:
        if self.rope is None or self.cos is None or self.sin is None:
            return parts
        if self.apart:
            return rotate_pairs(parts, self.cos, self.sin, self.rope, inverse=back)
        return [rotate(parts[0], self.cos, self.sin, self.rope, inverse=back)]

    def spread(self, w: Tensor | None, number: int, *, turned: bool = False) -> list[Any]:
        """What of w meets each part."""
        return [w] * number if w is None or w.dim() == 0 or w.shape[-1] == 1 else self.split(w, turned=turned)

    def sum_to(self, parts: list[Tensor], like: Tensor, *, turned: bool = False) -> Tensor:
        """Sum over what broadcasting gave the parts beyond `like`."""
        likes = self.spread(like, len(parts), turned=turned)
        sums = [sum_to(p, w.shape, 1) for p, w in zip(parts, likes, strict=True)]
        return _add(sums) if likes[0] is like else self.join(sums, turned=turned)


def _times(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    return [x * y for x, y in zip(a, b, strict=True)]


def _add(terms: list[Tensor]) -> Tensor:
    return functools.reduce(operator.add, terms)


def undo_factors(cos: Tensor, sin: Tensor, rope: RopeSpec, head_dim: int, dtype: torch.dtype) -> Tensor:
    """1/(cos² + sin²) as [..., 1 or H, D], which makes the transposed rotation the inverse one.

    Tables that carry a factor (YaRN's) or were rounded (to bf16) are no exact rotation. A pair whose tables are
    both 0, as padding has them, gives nothing back: its factor is 0.
    """
    shape = (*cos.shape[:-1], head_dim) if cos.dim() == 4 else (*cos.shape[:-1], 1, head_dim)
    ones = torch.ones(shape, dtype=dtype, device=cos.device)
    squares = rotate(rotate(ones, cos, sin, rope, inverse=True), cos, sin, rope)
    return torch.where(squares == 0, 0.0, 1 / squares)


def groups(x: Tensor, over: str | int | tuple[int, int]) -> tuple[Tensor, tuple[int, ...]]:
    """Show of x what is normalised, the dims that one statistic spans last, and say which those are; a view."""
    if isinstance(over, tuple):
        return x[..., slice(*over)], (-1,)
    if over == "head":
        return x, (-1,)
    if over == "full":
        return x, (-2, -1)
    assert isinstance(over, int)
    head_dim = x.shape[-1]
    if over <= head_dim:
        return x.unflatten(-1, (head_dim // over, over)), (-1,)
    return x.unflatten(-2, (x.shape[-2] * head_dim // over, over // head_dim)), (-2, -1)


def put_back(grouped: Tensor, x: Tensor, over: str | int | tuple[int, int]) -> Tensor:
    """What `groups` showed of x, changed, in its place."""
    if isinstance(over, tuple):
        return torch.cat((x[..., : over[0]], grouped, x[..., over[1] :]), -1)
    return grouped.reshape(x.shape)


def broadcast(w: Tensor | None, spec: SideSpec, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
    """A weight or bias as a view that broadcasts to `groups(x)`."""
    if w is None or spec.norm is None:
        return None
    w, kind, (heads, head_dim) = w.to(dtype), spec.norm.weight, shape[-2:]
    if kind == "scalar":
        return w
    if spec.over == "head" or isinstance(spec.over, tuple):
        width = spec.over[1] - spec.over[0] if isinstance(spec.over, tuple) else head_dim
        shapes = {"shared": (width,), "scalar_per_head": (heads, 1)}
        return w.view(shapes.get(kind, (heads, width)))
    if spec.over == "full":
        return w.view(heads, head_dim) if kind != "scalar_per_head" else w
    assert isinstance(spec.over, int)
    width = spec.over
    if width <= head_dim:
        shapes = {"shared": (width,), "scalar_per_head": (heads, head_dim // width, 1)}
        return w.view(shapes.get(kind, (heads, head_dim // width, width)))
    num_groups = heads * head_dim // width
    shapes = {"shared": (width // head_dim, head_dim), "scalar_per_head": (num_groups, 1, 1)}
    return w.view(shapes.get(kind, (num_groups, width // head_dim, head_dim)))


def _norm(x: Tensor, t: SideTensors, spec: SideSpec, eps: float) -> tuple[Tensor, Tensor]:
    assert spec.norm is not None
    grouped, dims = groups(x, spec.over)
    y, inverse = standardize(grouped, spec.norm, eps, dims)
    factor = broadcast(t.weight, spec, x.shape, x.dtype)
    factor = 1 + factor if factor is not None and spec.norm.zero_centered else factor
    y = _affine(y, factor, broadcast(t.bias, spec, x.shape, x.dtype), spec.norm.scale)
    return put_back(y, x, spec.over), inverse


def _affine(x: Tensor, factor: Tensor | None, shift: Tensor | None, scale: float) -> Tensor:
    x = x if factor is None else share(torch.mul, x, factor, 1)
    x = x if scale == 1 else x * scale
    return x if shift is None else share(torch.add, x, shift, 1)


def _multiply(x: Tensor, multiplier: Tensor | None, constant: float | Tensor) -> Tensor:
    x = x if multiplier is None else share(torch.mul, x, multiplier.to(x.dtype), 1)
    return x if isinstance(constant, float) and constant == 1 else x * constant
