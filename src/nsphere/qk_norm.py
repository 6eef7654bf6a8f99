"""QKNorm: the normalisation of queries and keys, with RoPE and multiplier, that any attention can use.

Shape legend: B batch, T positions, H query heads, Hkv key heads, D head_dim.
"""

import copy
import math
import warnings
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from nsphere.norms import L2Clip, StatisticNorm, compute_dtype, make_norm
from nsphere.ops.qk_norm_rope import SideSpec, SideTensors, qk_norm_rope
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
            raise ValueError(f"LearnedMultiplier got transform={transform!r}; choose identity, softplus or exp")
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
        """Store what stands for the initial value: `scale`, or its inverse under the transform."""
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

    q ← multiplier · RoPE(norm_q(q)), or the norm after RoPE as `place` says; k likewise. Statistics, rotation
    and multiplier are fp32 and rounded once to the caller's dtype, unless a norm names other rounding points:
    then each step rounds.

    Args:
        q: the norm of q: a name ("l2", "rms", "layer", or a registered one), a class, a partial, an instance,
            or None for RoPE and multiplier alone.
        k: the norm of k; by default of q's kind, with its own weight. Give one instance twice to share it.
        head_dim: D.
        num_heads: H, needed by weights per head and by over="full".
        num_kv_heads: Hkv; H by default.
        rope: what is rotated and how; None for no RoPE.
        place: the norm "before" or "after" RoPE.
        over: what one statistic spans: "head" (D); "full" (all heads); a number, for groups of that many
            consecutive dims, inside a head or across heads; or (start, stop), a slice of each head, the rest of
            which is left as it is.
        multiplier: a factor on q: a number; an nn.Module whose forward() returns a tensor broadcastable to
            [H, D] (see LearnedMultiplier), or, where its `takes_positions` is true, whose forward(positions)
            returns one broadcastable to [B, T, H, D]; or a function of the positions, fp32 [T] or [B, T], to
            factors of the same shape.
        k_multiplier: the same on k.
        multiplier_place: "last", or "before_rope" for a number that a family multiplies before rotating, which
            shows in the rounding alone.
        multiplier_dtype: "float32", or "input" to round the factors to q's dtype first, as some families do; with
            rounding points of their own only.
        softmax_scale: the scale attention should use; by default √D beside a unit norm, else 1/√D. "rsqrt" asks
            for 1/√D by name.
        layout: how the dims of q and k are ordered; thd is packed sequences, all tokens in one dim.
        backend: of the fused op, see nsphere.ops.backend; by default the best that can run.
        **norm_options: passed to both norms when they are built: eps=..., weight_cast=..., and so on.

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
        multiplier_place: Literal["last", "before_rope"] = "last",
        multiplier_dtype: Literal["float32", "input"] = "float32",
        softmax_scale: float | Literal["rsqrt"] | None = None,
        layout: Layout = "bshd",
        backend: str | None = None,
        **norm_options: Any,
    ):
        super().__init__()
        for name, value, allowed in (
            ("place", place, ("before", "after")),
            ("multiplier_place", multiplier_place, ("last", "before_rope")),
            ("multiplier_dtype", multiplier_dtype, ("float32", "input")),
            ("layout", layout, get_args(Layout)),
        ):
            if value not in allowed:
                raise ValueError(f"QKNorm got {name}={value!r}; choose from {', '.join(map(repr, allowed))}")
        if rope is not None and rope.dim > head_dim:
            raise ValueError(f"RopeSpec.dim={rope.dim} is more than head_dim={head_dim}; rotate at most those")
        for factor in (multiplier, k_multiplier):
            if multiplier_place == "before_rope" and factor is not None and not _is_number(factor):
                raise ValueError('multiplier_place="before_rope" is for a number; other factors come last')
        self.head_dim, self.num_heads = head_dim, num_heads
        self.num_kv_heads = num_kv_heads if num_kv_heads is not None else num_heads
        self.rope, self.place, self.over = rope, place, over
        self.layout, self.backend = layout, backend
        self.multiplier_place, self.multiplier_dtype = multiplier_place, multiplier_dtype
        if k is None:
            k = copy.deepcopy(q) if isinstance(q, nn.Module) else q
        self.q_norm = self._make("q", q, self.num_heads, norm_options)
        self.k_norm = self._make("k", k, self.num_kv_heads, norm_options)
        self.multiplier, self.k_multiplier = multiplier, k_multiplier
        self.softmax_scale = self._softmax_scale(softmax_scale)
        self._specs = self._side_spec(self.q_norm, multiplier), self._side_spec(self.k_norm, k_multiplier)

    def _make(self, side: str, norm: Any, heads: int | None, options: dict[str, Any]) -> nn.Module | None:
        if norm is None:
            return None
        width, rows = self._width(heads)
        made = make_norm(norm, width, num_heads=rows, **({} if isinstance(norm, nn.Module) else options))
        dim = getattr(made, "dim", None)
        if dim is not None and dim != width:
            raise ValueError(
                f"the norm of {side} is {dim} wide where over={self.over!r} with head_dim={self.head_dim} asks for "
                f"{width}; build it with dim={width}"
            )
        if isinstance(made, StatisticNorm) and made.num_heads is not None and rows is not None:
            per_head = made.spec.weight in ("per_head", "full", "scalar_per_head")
            if per_head and made.num_heads != rows:
                raise ValueError(
                    f"the norm of {side} has weights for {made.num_heads} heads and {side} has {rows}; "
                    f"build it with num_heads={rows}"
                )
        return made

    def _width(self, heads: int | None) -> tuple[int, int | None]:
        """The width one statistic spans, and how many rows of it a token has."""
        if isinstance(self.over, tuple):
            start, stop = self.over
            if not 0 <= start < stop <= self.head_dim:
                raise ValueError(f"over={self.over} is no slice of a head of {self.head_dim} dims")
            return stop - start, heads
        if self.over == "head":
            return self.head_dim, heads
        if heads is None:
            raise ValueError(f"QKNorm got over={self.over!r} without num_heads; give num_heads")
        width = heads * self.head_dim
        if self.over == "full":
            return width, None
        if not isinstance(self.over, int):
            raise ValueError(f'QKNorm got over={self.over!r}; choose "head", "full", a width, or (start, stop)')
        if width % self.over or (self.head_dim % self.over and self.over % self.head_dim):
            raise ValueError(
                f"over={self.over} does not divide {heads} heads of {self.head_dim} evenly; give a width that "
                "divides head_dim, or a multiple of it that divides all heads together"
            )
        return self.over, width // self.over

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
                "a unit norm with softmax scale 1/√D keeps every logit within ±1/√D: attention is nearly "
                'uniform; use √D (the default), a multiplier, or softmax_scale="rsqrt" if it is meant',
                stacklevel=3,
            )
        return asked

    def _side_spec(self, norm: nn.Module | None, multiplier: Any) -> SideSpec | None:
        """What the fused op does for this side; None where steps of their own rounding must be composed."""
        if norm is None:
            fused = self.rope is None or self.rope.compute_dtype != "input"
        else:
            fused = isinstance(norm, StatisticNorm) and norm.spec.weight_cast == "fused"
        if not fused:
            return None
        return SideSpec(
            norm=norm.spec if isinstance(norm, StatisticNorm) else None,
            rope=self.rope,
            norm_first=self.place == "before",
            over=self.over,
            constant=float(multiplier) if _is_number(multiplier) else 1.0,
        )

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
            positions: [T] or [B, T], for multipliers that depend on position.
            multiplier: a factor on q for this call, broadcastable to [H, D], beside the module's own.
            k_multiplier: the same on k.

        Returns:
            q and k in the shapes and dtype they came in.

        Raises:
            ValueError: for a width, head count, length or device that does not fit.
            TypeError: for integers.
        """
        q, k = self._to_bshd(q), self._to_bshd(k)
        self._check(q, k, rope)
        q_factors = self._factors(self.multiplier, multiplier, positions)
        k_factors = self._factors(self.k_multiplier, k_multiplier, positions)
        q_spec, k_spec = self._specs
        if q_spec is not None and k_spec is not None:
            q_tensors = self._tensors(self.q_norm, rope, q_factors)
            k_tensors = self._tensors(self.k_norm, rope, k_factors)
            q, k = qk_norm_rope(q, k, q_spec, k_spec, q_tensors, k_tensors, backend=self.backend)
        else:
            q = self._composed(q, self.q_norm, rope, self.multiplier, q_factors)
            k = self._composed(k, self.k_norm, rope, self.k_multiplier, k_factors)
        return self._from_bshd(q), self._from_bshd(k)

    def _to_bshd(self, x: Tensor) -> Tensor:
        if x.dim() != len(self.layout):
            raise ValueError(f"QKNorm with layout={self.layout!r} got {tuple(x.shape)}; give {len(self.layout)} dims")
        if self.layout == "thd":
            return x.unsqueeze(0)
        if self.layout == "sbhd":
            return x.transpose(0, 1)
        return x.transpose(1, 2) if self.layout == "bhsd" else x

    def _from_bshd(self, x: Tensor) -> Tensor:
        if self.layout == "thd":
            return x.squeeze(0)
        if self.layout == "sbhd":
            return x.transpose(0, 1)
        return x.transpose(1, 2) if self.layout == "bhsd" else x

    def _check(self, q: Tensor, k: Tensor, rope: Tables | None) -> None:
        for name, x, norm, heads in (
            ("q", q, self.q_norm, self.num_heads),
            ("k", k, self.k_norm, self.num_kv_heads),
        ):
            if not x.is_floating_point():
                raise TypeError(f"QKNorm got {name} of {x.dtype}; give floating-point tensors")
            if norm is not None and x.shape[-1] != self.head_dim:
                raise ValueError(
                    f"QKNorm has head_dim={self.head_dim} and got {name} with {x.shape[-1]} dims per head; "
                    f"build it with head_dim={x.shape[-1]}"
                )
            if self._counts_heads(norm) and x.shape[-2] != heads:
                raise ValueError(
                    f"QKNorm was built for {heads} heads of {name} and got {x.shape[-2]}; give it their number"
                )
            weight = getattr(norm, "weight", None)
            if isinstance(weight, Tensor) and weight.device != x.device:
                raise ValueError(f"{name} is on {x.device} and the norm's weight on {weight.device}; move one")
        if (self.rope is None) != (rope is None):
            raise ValueError(
                "QKNorm was built without RoPE: pass no tables"
                if self.rope is None
                else "QKNorm was built with RoPE: pass rope=(cos, sin), see RopeSpec.tables"
            )
        for table in rope or ():
            if table.device != q.device:
                raise ValueError(f"q is on {q.device} and the RoPE tables on {table.device}; move the tables")
            for name, x in (("q", q), ("k", k)):
                if table.shape[-2] not in (1, x.shape[1]):
                    raise ValueError(f"the RoPE tables have {table.shape[-2]} positions and {name} has {x.shape[1]}")

    def _counts_heads(self, norm: nn.Module | None) -> bool:
        """Whether the number of heads matters to this norm."""
        if norm is None or not isinstance(self.over, str):
            return isinstance(self.over, int)
        per_head = ("per_head", "full", "scalar_per_head")
        return self.over == "full" or (isinstance(norm, StatisticNorm) and norm.spec.weight in per_head)

    @staticmethod
    def _factors(own: Any, given: Tensor | None, positions: Tensor | None) -> list[Tensor]:
        """The factors that are tensors, each broadcastable to [B, T, H, D]."""
        factors = [] if given is None else [given]
        takes_positions = getattr(own, "takes_positions", callable(own) and not isinstance(own, nn.Module))
        if takes_positions and positions is None:
            raise ValueError("this QKNorm's multiplier depends on position; pass positions=")
        if isinstance(own, nn.Module):
            factors.append(own(positions) if takes_positions else own())
        elif callable(own) and positions is not None:
            factors.append(own(positions.float())[..., None, None])
        return factors

    @staticmethod
    def _tensors(norm: nn.Module | None, rope: Tables | None, factors: list[Tensor]) -> SideTensors:
        cos, sin = rope if rope is not None else (None, None)
        product = None if not factors else factors[0] if len(factors) == 1 else factors[0] * factors[1]
        return SideTensors(getattr(norm, "weight", None), getattr(norm, "bias", None), cos, sin, product)

    def _composed(
        self, x: Tensor, norm: nn.Module | None, rope: Tables | None, own: Any, factors: list[Tensor]
    ) -> Tensor:
        """Norm, rotation and factors one by one, each rounding to the dtype it leaves in."""
        if self.multiplier_dtype == "input":
            factors = [factor.to(x.dtype) for factor in factors]
        every = [own, *factors] if _is_number(own) else factors
        last = self.multiplier_place == "last"
        y = self._norm(x, norm) if self.place == "before" else x
        y = y if last else _multiply(y, every)
        if rope is not None and self.rope is not None:
            y = rotate(y, *rope, self.rope).to(y.dtype)
        y = self._norm(y, norm) if self.place == "after" else y
        return _multiply(y, every) if last else y

    def _norm(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        if norm is None:
            return x
        if self.over == "head":
            return norm(x)
        if isinstance(self.over, tuple):
            start, stop = self.over
            y = norm(x[..., start:stop])
            return torch.cat((x[..., :start].to(y.dtype), y, x[..., stop:].to(y.dtype)), -1)
        wide = x.flatten(-2)
        if isinstance(self.over, int):
            return norm(wide.unflatten(-1, (-1, self.over))).flatten(-2).unflatten(-1, x.shape[-2:])
        return norm(wide).unflatten(-1, x.shape[-2:])

    @torch.no_grad()
    def logit_bound(self) -> float | None:
        """The largest |softmax_scale · q·k| that can occur, None where no norm bounds it.

        ‖q‖ ≤ ‖γq‖∞ · radius + ‖bias‖₂, with radius 1 for L2 and √width for RMS and LayerNorm; k likewise; times
        the multipliers. It holds for norms over heads, groups inside a head, or all heads together.
        """
        lengths = [
            self._longest(self.q_norm, self.num_heads, self.multiplier),
            self._longest(self.k_norm, self.num_kv_heads, self.k_multiplier),
        ]
        if any(length is None for length in lengths):
            return None
        return self.softmax_scale * math.prod(length for length in lengths if length is not None)

    def _longest(self, norm: nn.Module | None, heads: int | None, multiplier: Any) -> float | None:
        if isinstance(norm, L2Clip) and self.over == "head":
            radius = norm.max_norm
        elif isinstance(norm, StatisticNorm) and not isinstance(self.over, tuple):
            radius = 1.0 if norm.spec.statistic == "l2" else norm.dim**0.5
            factor, shift = norm.factor(), norm.shift()
            radius *= abs(norm.spec.scale) * (1.0 if factor is None else factor.abs().max().item())
            if shift is not None:
                per_row = shift.expand(*shift.shape[:-1], norm.dim)
                radius += torch.linalg.vector_norm(per_row.float(), dim=-1).max().item()
            if isinstance(self.over, int) and self.over < self.head_dim:
                radius *= (self.head_dim // self.over) ** 0.5
        else:
            return None
        if _is_number(multiplier):
            return radius * abs(multiplier)
        if multiplier is None:
            return radius
        if not isinstance(multiplier, nn.Module) or getattr(multiplier, "takes_positions", False):
            return None
        return radius * multiplier().abs().max().item()

    def extra_repr(self) -> str:
        """What is not shown by the norms themselves."""
        rope = "" if self.rope is None else f", rope={self.rope.layout} {self.rope.dim}, norm {self.place} it"
        return f"head_dim={self.head_dim}, over={self.over!r}{rope}, softmax_scale={self.softmax_scale:.4g}"


def _is_number(factor: Any) -> bool:
    return isinstance(factor, int | float)


def _multiply(y: Tensor, factors: list[Any]) -> Tensor:
    for factor in factors:
        product = y.to(compute_dtype(y)) * factor
        y = product.to(y.dtype)
    return y
