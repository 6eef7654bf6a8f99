"""QKNorm: the normalisation of queries and keys, with RoPE and multiplier, that any attention can use.

Shape legend: B batch, T positions, H query heads, Hkv key heads, D head_dim.
"""

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from nsphere.norms import _StatisticNorm, compute_dtype, make_norm
from nsphere.rope import RopeSpec, rotate

Tables: TypeAlias = tuple[Tensor, Tensor]
Over: TypeAlias = Literal["head", "full"] | int | tuple[int, int]
Layout: TypeAlias = Literal["bshd", "sbhd", "bhsd", "thd"]


class LearnedMultiplier(nn.Module):
    """A learned factor on q or k: transform(stored · init / scale), as a tensor broadcastable to [H, D].

    Args:
        shape: () one scalar, (H, 1) per head, (D,) per dimension, (H, D) both.
        init: the factor's initial value.
        scale: what is stored at the start; under Adam it sets the factor's own learning rate (nGPT §2.5).
        transform: "identity"; "softplus"; "exp" of the stored logarithm, clamped at log(max).
        max: the ceiling of "exp" (100 in Swin v2).
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
            raise ValueError(
                f"LearnedMultiplier got transform={transform!r}; choose identity, softplus or exp"
            )
        if transform != "identity" and init <= 0:
            raise ValueError(f"LearnedMultiplier got init={init}; {transform} needs a positive one")
        self.init, self.scale, self.transform, self.max = init, scale, transform, max
        self.weight = nn.Parameter(torch.empty(shape, device=device))
        self.reset_parameters()

    def _start(self) -> float:
        if self.transform == "exp":
            return math.log(self.init)
        return math.log(math.expm1(self.init)) if self.transform == "softplus" else self.init

    def reset_parameters(self) -> None:
        """Store `scale`, which stands for the initial value."""
        nn.init.constant_(self.weight, self.scale if self.transform == "identity" else self._start())

    def forward(self) -> Tensor:
        """The factor, fp32."""
        weight = self.weight.float()
        if self.transform == "softplus":
            return nn.functional.softplus(weight)
        if self.transform == "exp":
            return weight.clamp(max=math.log(self.max)).exp()
        return weight * (self.init / self.scale)


class QKNorm(nn.Module):
    """Normalises, rotates and scales q and k: q, k = qk_norm(q, k, rope=(cos, sin)).

    q ← multiplier · RoPE(norm_q(q)), or norm after RoPE as `place` says; k likewise. Statistics, rotation and
    multiplier are fp32 and rounded once to the caller's dtype, unless the norms name other rounding points.

    Args:
        q: the norm of q: a name ("l2", "rms", "layer", or registered), a class, a partial, an instance, or None.
        k: the norm of k; by default of q's kind, with its own weight.
        head_dim: D.
        num_heads: H, needed by weights per head and by over="full".
        num_kv_heads: Hkv; H by default.
        rope: what is rotated and how; None for no RoPE.
        place: the norm "before" or "after" RoPE.
        over: what one statistic spans: "head" (D), "full" (all heads), an int (groups of that many consecutive
            dims, inside a head or across heads), or (start, stop), a slice of each head; the rest is left alone.
        multiplier: a factor on q: a number; an nn.Module whose forward() returns a tensor broadcastable to [H, D]
            (see LearnedMultiplier); or a function of the positions, fp32 [T] or [B, T] -> [..., T].
        k_multiplier: the same on k.
        softmax_scale: the scale attention should use; by default √D beside a unit norm, else 1/√D.
            "rsqrt" asks for 1/√D by name.
        layout: how the dims of q and k are ordered; thd is packed sequences, all tokens in one dim.
        **norm_options: passed to both norms when they are built (eps=..., weight_cast=..., and so on).

    State-dict keys: q_norm.*, k_norm.*, multiplier.*, k_multiplier.*.

    Raises:
        ValueError: for a width, head count or choice that does not fit.
    """

    def __init__(
        self,
        q: Any = None,
        k: Any = None,
        *,
        head_dim: int,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        rope: RopeSpec | None = None,
        place: Literal["before", "after"] = "before",
        over: Over = "head",
        multiplier: Any = None,
        k_multiplier: Any = None,
        softmax_scale: float | Literal["rsqrt"] | None = None,
        layout: Layout = "bshd",
        **norm_options: Any,
    ):
        super().__init__()
        if place not in ("before", "after"):
            raise ValueError(f'QKNorm got place={place!r}; choose "before" or "after" (RoPE)')
        if layout not in ("bshd", "sbhd", "bhsd", "thd"):
            raise ValueError(f"QKNorm got layout={layout!r}; choose bshd, sbhd, bhsd or thd")
        if rope is not None and rope.dim > head_dim:
            raise ValueError(
                f"RopeSpec.dim is {rope.dim}, more than head_dim={head_dim}; rotate at most head_dim dims"
            )
        self.head_dim, self.num_heads = head_dim, num_heads
        self.num_kv_heads = num_kv_heads if num_kv_heads is not None else num_heads
        self.rope, self.place, self.over, self.layout = rope, place, over, layout
        if k is None:
            k = copy.deepcopy(q) if isinstance(q, nn.Module) else q
        self.q_norm = self._make(q, self.num_heads, norm_options)
        self.k_norm = self._make(k, self.num_kv_heads, norm_options)
        self.multiplier, self.k_multiplier = multiplier, k_multiplier
        self.softmax_scale = self._softmax_scale(softmax_scale)

    def _make(self, norm: Any, heads: int | None, options: dict[str, Any]) -> nn.Module | None:
        if norm is None:
            return None
        if self.over == "full":
            if heads is None:
                raise ValueError('QKNorm got over="full" without num_heads; give num_heads')
            return make_norm(norm, heads * self.head_dim, **options)
        if isinstance(self.over, int):
            groups = None if heads is None else heads * self.head_dim // self.over
            return make_norm(norm, self.over, num_heads=groups, **options)
        width = self.over[1] - self.over[0] if isinstance(self.over, tuple) else self.head_dim
        return make_norm(norm, width, num_heads=heads, **options)

    def _softmax_scale(self, asked: float | str | None) -> float:
        plain = self.head_dim**-0.5
        spec = getattr(self.q_norm, "spec", None)
        unit = spec is not None and spec.statistic == "l2" and spec.scale == 1
        if asked is None:
            return self.head_dim**0.5 if unit else plain
        if isinstance(asked, str):
            if asked != "rsqrt":
                raise ValueError(f'softmax_scale is a number, None or "rsqrt"; got {asked!r}')
            return plain
        if unit and self.multiplier is None and math.isclose(asked, plain, rel_tol=1e-6):
            warnings.warn(
                "a unit norm with softmax scale 1/√D keeps every logit within ±1/√D, so attention is nearly uniform; "
                'use √D (the default), a multiplier, or softmax_scale="rsqrt" if it is meant',
                stacklevel=3,
            )
        return asked

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        rope: Tables | None = None,
        *,
        positions: Tensor | None = None,
        multiplier: Tensor | None = None,
        k_multiplier: Tensor | None = None,
    ) -> Tables:
        """Normalise, rotate and scale.

        Args:
            q: [B, T, H, D] (or as `layout` orders it), any floating dtype, strided or not.
            k: [B, T, Hkv, D], of q's dtype.
            rope: the tables (cos, sin), each [T, R/2] or [B, T, R/2]; see RopeSpec.tables.
            positions: [T] or [B, T], for multipliers that are functions of position.
            multiplier: a factor on q for this call, broadcastable to [H, D], beside the module's own.
            k_multiplier: the same on k.

        Returns:
            q and k in the shapes and dtype they came in.
        """
        if (self.rope is None) != (rope is None):
            have = "was built without RoPE" if self.rope is None else "was built with RoPE"
            raise ValueError(
                f"QKNorm {have}: {'pass no tables' if self.rope is None else 'pass rope=(cos, sin)'}"
            )
        q = self._side(q, self.q_norm, rope, self._factors(self.multiplier, multiplier, positions))
        k = self._side(k, self.k_norm, rope, self._factors(self.k_multiplier, k_multiplier, positions))
        return q, k

    @staticmethod
    def _factors(own: Any, given: Tensor | None, positions: Tensor | None) -> list[Any]:
        factors: list[Any] = [] if given is None else [given.float()]
        if isinstance(own, nn.Module):
            factors.append(own().float())
        elif callable(own):
            if positions is None:
                raise ValueError("this QKNorm's multiplier is a function of position; pass positions=")
            factors.append(own(positions.float())[..., None, None])
        elif own is not None:
            factors.append(own)
        return factors

    def _side(self, x: Tensor, norm: nn.Module | None, rope: Tables | None, factors: list[Any]) -> Tensor:
        dtype = x.dtype
        order: dict[str, int] = {"sbhd": 1, "bhsd": 2}
        if self.layout == "sbhd":
            x = x.transpose(0, 1)
        elif self.layout == "bhsd":
            x = x.transpose(1, 2)
        y = self._norm(x, norm) if self.place == "before" else x
        if rope is not None and self.rope is not None:
            y = rotate(y, *rope, self.rope, self.rope.compute_dtype or y.dtype)
            y = y if norm is None or _is_fused(norm) else y.to(dtype)
        if self.place == "after":
            y = self._norm(y, norm)
        for factor in factors:
            y = y.to(compute_dtype(y)) * factor
        y = y.to(dtype)
        if self.layout in order:
            return y.transpose(0, 1) if self.layout == "sbhd" else y.transpose(1, 2)
        return y

    def _norm(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        if norm is None:
            return x
        if isinstance(norm, _StatisticNorm) and _is_fused(norm):
            function: Callable[[Tensor], Tensor] = norm.apply_fp32
        else:
            function = norm
        if self.over == "head":
            return function(x)
        if isinstance(self.over, tuple):
            start, stop = self.over
            y = function(x[..., start:stop])
            return torch.cat((x[..., :start].to(y.dtype), y, x[..., stop:].to(y.dtype)), -1)
        wide = x.flatten(-2)
        if isinstance(self.over, int):
            wide = wide.unflatten(-1, (-1, self.over))
            return function(wide).flatten(-2).unflatten(-1, x.shape[-2:])
        return function(wide).unflatten(-1, x.shape[-2:])


def _is_fused(norm: nn.Module) -> bool:
    return isinstance(norm, _StatisticNorm) and norm.spec.weight_cast == "fused"
