"""QKNorm: the normalisation of queries and keys, with RoPE and multiplier, that any attention can use.

Shape legend: B batch, T positions, H query heads, Hkv key heads, D head_dim.
"""

import copy
import dataclasses
import math
import warnings
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from nsphere.norms import L2Clip, NormSpec, StatisticNorm, compute_dtype, has_hooks, is_plain, make_norm
from nsphere.ops import backend as backends
from nsphere.ops.qk_norm_rope import SideSpec, SideTensors, norm_rope, qk_norm_rope
from nsphere.rope import RopeSpec, rotate

Tables: TypeAlias = tuple[Tensor, Tensor]
Over: TypeAlias = Literal["head", "full"] | int | tuple[int, int]
Layout: TypeAlias = Literal["bshd", "sbhd", "bhsd", "thd"]


def statistic_width(over: Over, head_dim: int, num_heads: int | None) -> tuple[int, int | None]:
    """The width that one statistic spans, and how many rows of it a token has (None where it is all the same).

    Raises:
        ValueError: for what is no part of heads of this width.
    """
    if isinstance(over, tuple):
        start, stop = over
        if not 0 <= start < stop <= head_dim:
            raise ValueError(f"over={over} is no slice of a head of {head_dim} dims")
        return stop - start, num_heads
    if over == "head":
        return head_dim, num_heads
    if num_heads is None:
        raise ValueError(f"QKNorm got over={over!r} without num_heads; give num_heads")
    width = num_heads * head_dim
    if over == "full":
        return width, None
    if not isinstance(over, int) or over < 1:
        raise ValueError(f'QKNorm got over={over!r}; choose "head", "full", a width, or (start, stop)')
    if width % over or (head_dim % over and over % head_dim):
        raise ValueError(
            f"over={over} does not divide {num_heads} heads of {head_dim} evenly; give a width that "
            "divides head_dim, or a multiple of it that divides all heads together"
        )
    return over, width // over


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
        multiplier: a factor on q: a number; a Parameter or tensor broadcastable to [H, D], the latter kept as a
            buffer; an nn.Module whose forward() returns a tensor broadcastable to
            [H, D] (see LearnedMultiplier), or, where its `takes_positions` is true, whose forward(positions)
            returns one broadcastable to [B, T, H, D]; or a function of the positions, fp32 [T] or [B, T], to
            factors of the same shape.
        k_multiplier: the same on k.
        multiplier_place: "last", or "before_rope" for a number that a family multiplies before rotating, which
            shows in the rounding alone; with place="before" only, as a norm after it would undo it.
        multiplier_dtype: "float32", or "input" to round the factors to q's dtype first, as some families do; with
            rounding points of their own only.
        softmax_scale: the scale attention should use, decided at construction; by default √D where q and k both
            have length 1 per head, else 1/√D, with a warning where an L2 norm makes that a guess: on one side
            alone, or over anything but a head. "rsqrt" asks for 1/√D by name.
        layout: how the dims of q and k are ordered; thd is packed sequences, all tokens in one dim.
        backend: of the fused op, see nsphere.ops.backend; by default the best that can run.
        **norm_options: passed to both norms when they are built: eps=..., weight_cast=..., and so on.

    A norm that is no plain built-in (a subclass with a forward of its own, one with hooks) is called as it is, and
    the rest is fused beside it. Norms and multipliers may be replaced later; the next call sees them.

    State-dict keys: q_norm.*, k_norm.*, multiplier.*, k_multiplier.*.

    Raises:
        ValueError: for a width, head count or choice that does not fit.
        TypeError: for a multiplier that is nothing of the above, or a rope that is no RopeSpec.
        RuntimeError: for a backend that cannot run.
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
        if head_dim < 1:
            raise ValueError(f"QKNorm got head_dim={head_dim}; give the width of a head, at least 1")
        if rope is not None and not isinstance(rope, RopeSpec):
            raise TypeError(f"QKNorm got rope={rope!r}; give a RopeSpec, which says what turns, or None")
        if rope is not None and rope.dim > head_dim:
            raise ValueError(f"RopeSpec.dim={rope.dim} is more than head_dim={head_dim}; rotate at most those")
        if multiplier_place == "before_rope" and place == "after":
            raise ValueError(
                'multiplier_place="before_rope" with place="after" lets the norm undo the multiplier; '
                'give place="before" or multiplier_place="last"'
            )
        if backend is not None:
            backends.check_name(backend)
        for name, factor in (("multiplier", multiplier), ("k_multiplier", k_multiplier)):
            if not (factor is None or _is_number(factor) or isinstance(factor, Tensor) or callable(factor)):
                raise TypeError(
                    f"QKNorm got {name}={factor!r}; give a number, a tensor, an nn.Module or a function of positions"
                )
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
        if norm_options and (isinstance(q, nn.Module) or isinstance(k, nn.Module) or q is k is None):
            raise ValueError(
                f"QKNorm got {', '.join(sorted(norm_options))} for norms that are built already or absent; set them "
                "where the norms are made"
            )
        for name, factor in (("multiplier", multiplier), ("k_multiplier", k_multiplier)):
            if isinstance(factor, Tensor) and not isinstance(factor, nn.Parameter):
                self.register_buffer(name, factor)
            else:
                setattr(self, name, factor)
        self.softmax_scale = self._softmax_scale(softmax_scale)

    def _make(self, side: str, norm: Any, heads: int | None, options: dict[str, Any]) -> nn.Module | None:
        if norm is None:
            return None
        width, rows = statistic_width(self.over, self.head_dim, heads)
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

    def _softmax_scale(self, asked: float | str | None) -> float:
        plain = self.head_dim**-0.5
        norms = (self.q_norm, self.k_norm)
        sides = [isinstance(n, StatisticNorm) and n.spec.statistic == "l2" and n.spec.scale == 1 for n in norms]
        unit = all(sides) and self.over == "head"
        if asked is None:
            if any(sides) and not unit:
                warnings.warn(
                    "an L2 norm of one side alone, or over anything but a head, has no softmax scale of its own: "
                    '1/√D is taken; give softmax_scale=, a number or "rsqrt"',
                    stacklevel=3,
                )
            return self.head_dim**0.5 if unit else plain
        if isinstance(asked, str):
            if asked != "rsqrt":
                raise ValueError(f'softmax_scale is a number, None or "rsqrt"; got {asked!r}')
            return plain
        if not (_is_number(asked) and 0 < asked < math.inf):
            raise ValueError(f'QKNorm got softmax_scale={asked!r}; give a positive number, None or "rsqrt"')
        if unit and self.multiplier is None and math.isclose(asked, plain, rel_tol=1e-6):
            warnings.warn(
                "a unit norm with softmax scale 1/√D keeps every logit within ±1/√D: attention is nearly "
                'uniform; use √D (the default), a multiplier, or softmax_scale="rsqrt" if it is meant',
                stacklevel=3,
            )
        return asked

    def _side_spec(self, spec: NormSpec | None) -> SideSpec | None:
        """What the fused op does for this side; None where rounding points of its own must be composed."""
        fused = spec.weight_cast == "fused" if spec else self.rope is None or self.rope.compute_dtype != "input"
        return SideSpec(spec, self.rope, self.place == "before", self.over) if fused else None

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        rope: Tables | None = None,
        *,
        k_rope: Tables | None = None,
        positions: Tensor | None = None,
        multiplier: Tensor | None = None,
        k_multiplier: Tensor | None = None,
    ) -> Tables:
        """Normalise, rotate and scale.

        Args:
            q: [B, T, H, D] (or as `layout` orders it), any floating dtype, strided or not.
            k: [B, T, Hkv, D], of q's dtype and device.
            rope: the tables (cos, sin), each [T, R/2], [B, T, R/2] or [1, T, R/2], or [B, T, H, R/2] where the
                angles differ from head to head; see RopeSpec.tables.
            k_rope: those of k, where they are not q's: in cross-attention, or per head with fewer heads of k.
            positions: [T] or [B, T], for multipliers that depend on position.
            multiplier: a factor on q for this call, broadcastable to [H, D], beside the module's own.
            k_multiplier: the same on k.

        Returns:
            q and k in the shapes and dtype they came in.

        Raises:
            ValueError: for a width, head count, length, dtype or device that does not fit.
            TypeError: for integers, and for what is no tensor.
            RuntimeError: for a backend that cannot run these norms.
        """
        q, k = self._to_bshd(q, "q"), self._to_bshd(k, "k")
        k_rope = rope if k_rope is None else k_rope
        self._check(q, k, rope, k_rope)
        q_factors = self._factors("q", q, self.multiplier, multiplier, positions)
        k_factors = self._factors("k", k, self.k_multiplier, k_multiplier, positions)
        sides = (
            _Side(q, self.q_norm, rope, self.multiplier, q_factors),
            _Side(k, self.k_norm, k_rope, self.k_multiplier, k_factors),
        )
        fused = []
        for side in sides:
            spec = self._side_spec(side.plain.spec if side.plain else None)
            if spec is None:
                side.x = self._composed(side)
            else:
                fused.append((side, spec))
        self._fuse(fused)
        q, k = (self._from_bshd(side.x) for side in sides)
        return q, k

    def _fuse(self, sides: list[tuple["_Side", SideSpec]]) -> None:
        """The fused op on these sides, around a norm of the user's that is called for itself."""
        around = [side for side, _ in sides if side.is_custom]
        if self.place == "before":
            for side in around:
                side.x = self._norm(side.x, side.norm).to(side.x.dtype)
        todo = []
        for side, spec in sides:
            values = side.values(with_factors=side not in around or self.place == "before")
            if spec.norm is not None or spec.rope is not None or values.multiplier is not None or values.constant != 1:
                todo.append((side, spec, values))
        if len(todo) == 2:
            (q, q_spec, q_values), (k, k_spec, k_values) = todo
            q.x, k.x = qk_norm_rope(q.x, k.x, q_spec, k_spec, q_values, k_values, backend=self.backend)
        for side, spec, values in todo if len(todo) == 1 else ():
            side.x = norm_rope(side.x, spec, values, backend=self.backend)
        if self.place == "after":
            for side in around:
                side.x = _multiply(self._norm(side.x, side.norm).to(side.x.dtype), side.every_factor())

    def _to_bshd(self, x: Tensor, name: str) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"QKNorm got {name} of {type(x).__name__}; give a tensor")
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

    def _check_side(self, x: Tensor, norm: nn.Module | None, heads: int | None, name: str) -> None:
        if not x.is_floating_point():
            raise TypeError(f"QKNorm got {name} of {x.dtype}; give floating-point tensors")
        if norm is None:
            return
        if x.shape[-1] != self.head_dim:
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

    def _check(self, q: Tensor, k: Tensor, rope: Tables | None, k_rope: Tables | None) -> None:
        self._check_side(q, self.q_norm, self.num_heads, "q")
        self._check_side(k, self.k_norm, self.num_kv_heads, "k")
        if k.dtype != q.dtype or k.device != q.device:
            raise ValueError(
                f"QKNorm got q of {q.dtype} on {q.device} and k of {k.dtype} on {k.device}; give both the same"
            )
        if (self.rope is None) != (rope is None) or (self.rope is None) != (k_rope is None):
            raise ValueError(
                "QKNorm was built without RoPE: pass no tables"
                if self.rope is None
                else "QKNorm was built with RoPE: pass rope=(cos, sin), see RopeSpec.tables"
            )
        for name, x, tables in (("q", q, rope), ("k", k, k_rope)):
            if tables is not None:
                _check_tables(name, x, *tables)

    def _counts_heads(self, norm: nn.Module) -> bool:
        """Whether the number of heads matters to this norm."""
        if self.over == "full" or isinstance(self.over, int):
            return True
        if isinstance(norm, L2Clip):
            return norm.weight is not None
        return isinstance(norm, StatisticNorm) and norm.spec.weight in ("per_head", "full", "scalar_per_head")

    @staticmethod
    def _factors(name: str, x: Tensor, own: Any, given: Tensor | None, positions: Tensor | None) -> list[Tensor]:
        """The factors on x that are tensors, each broadcastable to [B, T, H, D]."""
        factors = [] if given is None else [given]
        own = None if _is_number(own) else own  # a compiled graph may have a variable in its place, without attributes
        takes_positions = getattr(own, "takes_positions", callable(own) and not isinstance(own, nn.Module | Tensor))
        if takes_positions and positions is None:
            raise ValueError("this QKNorm's multiplier depends on position; pass positions=")
        if isinstance(own, Tensor):
            factors.append(own)
        elif isinstance(own, nn.Module):
            factors.append(own(positions) if takes_positions else own())
        elif callable(own) and positions is not None:
            factors.append(own(positions.float())[..., None, None])
        for factor in factors:
            _check_factor(name, factor, x)
        return factors

    def _composed(self, side: "_Side") -> Tensor:
        """Norm, rotation and factors one by one, each rounding to the dtype it leaves in."""
        if self.backend not in (None, "reference"):
            raise RuntimeError(
                f"the backend {self.backend!r} was asked for and cannot run: a norm or RoPE of this QKNorm rounds "
                'between its steps; leave backend=None, or use weight_cast="fused" and a RopeSpec without '
                'compute_dtype="input"'
            )
        x, norm, rounded = side.x, side.norm, self.multiplier_dtype == "input"
        factors = side.every_factor(side.x.dtype if rounded else None)
        last = self.multiplier_place == "last"
        y = self._norm(x, norm) if self.place == "before" else x
        y = y if last else _multiply(y, factors)
        if side.rope is not None and self.rope is not None:
            y = rotate(y, *side.rope, self.rope).to(y.dtype)
        y = self._norm(y, norm) if self.place == "after" else y
        y = _multiply(y, factors) if last else y
        return y if isinstance(norm, StatisticNorm) and norm.spec.promote else y.to(x.dtype)

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
        the module's own multipliers. It holds for built-in norms over heads, groups inside a head, or all heads
        together. A multiplier given for one call comes on top, and so does the factor of scaled RoPE tables
        (YaRN's), on q and on k each, unless the norm comes after.
        """
        lengths = [
            self._longest(self.q_norm, self.num_heads, self.multiplier),
            self._longest(self.k_norm, self.num_kv_heads, self.k_multiplier),
        ]
        if any(length is None for length in lengths):
            return None
        return self.softmax_scale * math.prod(length for length in lengths if length is not None)

    def _longest(self, norm: nn.Module | None, heads: int | None, multiplier: Any) -> float | None:
        if type(norm) is L2Clip and not has_hooks(norm) and self.over == "head":
            radius = norm.max_norm
        elif isinstance(norm, StatisticNorm) and is_plain(norm) and not isinstance(self.over, tuple):
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
        if isinstance(multiplier, Tensor):
            return radius * multiplier.abs().max().item()
        if not isinstance(multiplier, nn.Module) or getattr(multiplier, "takes_positions", False):
            return None
        return radius * multiplier().abs().max().item()

    def extra_repr(self) -> str:
        """What is not shown by the norms themselves."""
        rope = "" if self.rope is None else f", rope={self.rope.layout} {self.rope.dim}, norm {self.place} it"
        return f"head_dim={self.head_dim}, over={self.over!r}{rope}, softmax_scale={self.softmax_scale:.4g}"


@dataclasses.dataclass(eq=False)
class _Side:
    """q or k on its way through, and what comes to it."""

    x: Tensor
    norm: nn.Module | None
    rope: Tables | None
    own: Any
    """The module's own multiplier; `factors` holds it if it is no number."""
    factors: list[Tensor]
    plain: StatisticNorm | None = dataclasses.field(init=False)
    """The norm, if calling it does what its spec says and nothing more."""

    def __post_init__(self) -> None:
        self.plain = self.norm if is_plain(self.norm) else None

    @property
    def is_custom(self) -> bool:
        """Whether the norm must be called to know what it does."""
        norm = self.norm
        return self.plain is None and norm is not None and (type(norm) is not nn.Identity or has_hooks(norm))

    def values(self, *, with_factors: bool) -> SideTensors:
        """What the fused op takes."""
        weight, bias = (None, None) if self.plain is None else (self.plain.weight, self.plain.bias)
        cos, sin = (None, None) if self.rope is None else self.rope
        if not with_factors:
            return SideTensors(weight, bias, cos, sin)
        product = math.prod(self.factors[1:], start=self.factors[0]) if self.factors else None
        return SideTensors(weight, bias, cos, sin, product, float(self.own) if _is_number(self.own) else 1.0)

    def every_factor(self, dtype: torch.dtype | None = None) -> list[Any]:
        """The factors one by one, those that are tensors rounded to a dtype."""
        factors = self.factors if dtype is None else [factor.to(dtype) for factor in self.factors]
        return [self.own, *factors] if _is_number(self.own) else factors


def _is_number(factor: Any) -> bool:
    return isinstance(factor, int | float)


def _check_tables(name: str, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    if cos.shape != sin.shape or cos.dim() not in (2, 3, 4):
        raise ValueError(
            f"the RoPE tables are {tuple(cos.shape)} and {tuple(sin.shape)}; give two of [T, R/2], [B, T, R/2] or "
            "[B, T, H, R/2]"
        )
    for table in (cos, sin):
        if table.device != x.device:
            raise ValueError(f"{name} is on {x.device} and the RoPE tables on {table.device}; move the tables")
    batch, length, heads = (
        cos.shape[0] if cos.dim() > 2 else 1,
        cos.shape[min(cos.dim() - 2, 1)],
        cos.shape[2] if cos.dim() > 3 else 1,
    )
    for what, rows, there in (("sequences", batch, x.shape[0]), ("heads", heads, x.shape[2])):
        if rows not in (1, there):
            raise ValueError(f"the RoPE tables have {rows} {what} and {name} has {there}")
    if length != x.shape[1]:
        raise ValueError(
            f"the RoPE tables have {length} positions and {name} has {x.shape[1]}"
            + ("; give k its own, k_rope=" if name == "k" else "")
        )


def _check_factor(name: str, factor: Tensor, x: Tensor) -> None:
    if not isinstance(factor, Tensor):
        raise TypeError(f"the multiplier of {name} is of {type(factor).__name__}; give a tensor")
    if factor.device != x.device and factor.dim():
        raise ValueError(f"{name} is on {x.device} and its multiplier on {factor.device}; move one")
    pairs = zip(reversed(factor.shape), reversed(x.shape), strict=False)
    if factor.dim() > x.dim() or any(n != 1 and n != m for n, m in pairs):
        raise ValueError(
            f"the multiplier of {name} is {tuple(factor.shape)} and {name} is {tuple(x.shape)} (as [B, T, H, D]); "
            "give one that broadcasts to that"
        )


def _multiply(y: Tensor, factors: list[Any]) -> Tensor:
    for factor in factors:
        product = y.to(compute_dtype(y)) * factor
        y = product.to(y.dtype)
    return y
