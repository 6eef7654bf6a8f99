"""Norms over the last dimension: L2, RMS, LayerNorm, and the registry that gives any other norm a name.

Shape legend: x is [..., D], or [..., H, D] where weights differ per head; D is the width that is normalised.
"""

import abc
import dataclasses
import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeAlias, TypeGuard, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Statistic: TypeAlias = Literal["l2", "rms", "layer"]
EpsPlace: TypeAlias = Literal["inside", "clamp", "added"]
WeightShape: TypeAlias = Literal["none", "shared", "per_head", "full", "scalar_per_head", "scalar"]
WeightCast: TypeAlias = Literal["fused", "before", "after", "input", "torch"]
Root: TypeAlias = Literal["rsqrt", "pow", "sqrt"]


@dataclasses.dataclass(frozen=True)
class NormSpec:
    """A built-in norm as data: what fused kernels and sharding rules read instead of the module."""

    statistic: Statistic
    """What x is divided by: "l2" √Σx², "rms" √mean x², "layer" the standard deviation, after centring."""
    eps: float | None
    """Added as `eps_place` says; None is the eps of the input's dtype, or under "torch" whatever torch takes."""
    eps_place: EpsPlace = "inside"
    """"inside" the root, "clamp" (the root is at least eps), or "added" to the root."""
    weight: WeightShape = "none"
    """"none", "shared" [D], "per_head" [H, D], "full" [H·D], "scalar_per_head" [H] or "scalar" [1]."""
    bias: bool = False
    """Whether a bias of the weight's shape is added."""
    zero_centered: bool = False
    """The factor is 1 + weight, with weight initialised to 0."""
    weight_cast: WeightCast = "fused"
    """Where values are rounded to the input's dtype (see `Norm`)."""
    promote: bool = False
    """Let a weight wider than the input widen the output, as a module that multiplies after the cast does."""
    root: Root = "rsqrt"
    """How 1/√ is computed, which shows in the last bit: rsqrt(s), s^-½ by pow, or a division by sqrt(s)."""
    scale: float = 1.0
    """A constant factor on the result, applied where the weight is."""


class Norm(nn.Module, abc.ABC):
    """A map from x to a normalised x over its last dimension, which owns its eps, weight and rounding.

    Subclass it and write `forward`, and it works wherever a norm is asked for; `register_norm` names it.

    The rounding points of the built-in norms (`weight_cast`), for inputs below fp32. The sums are fp32 always.
        "fused":  fp32 throughout, one rounding at the end; QKNorm carries fp32 on through RoPE and multiplier.
        "before": weight and bias in fp32, then one rounding (Gemma, OLMo 2, torch.nn.RMSNorm).
        "after":  rounded to the input's dtype, then weight and bias (Llama, T5).
        "input":  1/root rounded to the input's dtype, in which everything is then multiplied.
        "torch":  torch's own F.layer_norm, F.rms_norm or F.normalize in the input's dtype.
    """

    @abc.abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., D] to [..., D], in the dtype of x."""


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype statistics are kept in: fp32, or fp64 for fp64 input."""
    return torch.promote_types(x.dtype, torch.float32)


def eps_of(spec: NormSpec, dtype: torch.dtype) -> float:
    """The eps used on input of this dtype: the one given, or the dtype's own."""
    return torch.finfo(dtype).eps if spec.eps is None else spec.eps


def inverse_root(s: Tensor, spec: NormSpec, eps: float) -> Tensor:
    """1/√s with eps where `spec.eps_place` says; 0 where nothing keeps the root from being zero.

    "inside" is 1/√(s + eps), "clamp" 1/max(√s, eps), "added" 1/(√s + eps); s is a mean or sum of squares.
    """
    if spec.eps_place == "inside" and eps > 0:
        s = s + eps
        if spec.root == "rsqrt":
            return torch.rsqrt(s)
        return torch.pow(s, -0.5) if spec.root == "pow" else 1 / torch.sqrt(s)
    # √ has an infinite slope at zero: zero rows take a detour through 1 and leave with value and slope 0
    alive = s > 0
    safe = torch.where(alive, s, 1.0)
    if eps == 0:
        inverse = torch.rsqrt(safe)
    elif spec.eps_place == "clamp":
        inverse = 1 / torch.sqrt(safe).clamp_min(eps)
    else:
        inverse = 1 / (torch.sqrt(safe) + eps)
    return torch.where(alive, inverse, 0.0)


def standardize(x: Tensor, spec: NormSpec, eps: float, dims: tuple[int, ...] = (-1,)) -> tuple[Tensor, Tensor]:
    """((x - centre) / root, 1/root) over `dims`, in x's own dtype, without weight, bias or scale."""
    if spec.statistic == "layer":
        x = x - x.mean(dims, keepdim=True)
    squares = x.pow(2)
    s = squares.sum(dims, keepdim=True) if spec.statistic == "l2" else squares.mean(dims, keepdim=True)
    inverse = inverse_root(s, spec, eps)
    return x * inverse, inverse


class StatisticNorm(Norm):
    """The built-in family: (x - centre) / root(statistic) · weight + bias, described by its `spec`."""

    spec: NormSpec

    def __init__(
        self, dim: int, spec: NormSpec, *, num_heads: int | None = None, device: Any = None, dtype: Any = None
    ):
        super().__init__()
        if dim < 1:
            raise ValueError(f"{type(self).__name__} got dim={dim}; give the width it normalises, at least 1")
        _check_choices(type(self).__name__, spec)
        self.spec = spec
        self.dim = dim
        self.num_heads = num_heads
        shape = _weight_shape(type(self).__name__, dim, spec.weight, num_heads)
        if shape is None and spec.bias:
            raise ValueError(f'{type(self).__name__} got bias=True with weight="none"; give the weight a shape')
        empty = None if shape is None else torch.empty(shape, device=device, dtype=dtype)
        self.weight = None if empty is None else nn.Parameter(empty)
        self.bias = nn.Parameter(torch.empty_like(empty)) if spec.bias and empty is not None else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to 1 (0 if zero-centred) and the bias to 0."""
        if self.weight is not None:
            nn.init.constant_(self.weight, 0.0 if self.spec.zero_centered else 1.0)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def factor(self, dtype: torch.dtype | None = None) -> Tensor | None:
        """The weight as it multiplies, 1 + w where zero-centred, broadcastable to [..., D] or [..., H, D]."""
        weight = self._shaped(self.weight, dtype)
        return 1 + weight if weight is not None and self.spec.zero_centered else weight

    def shift(self, dtype: torch.dtype | None = None) -> Tensor | None:
        """The bias, broadcastable to [..., D] or [..., H, D]."""
        return self._shaped(self.bias, dtype)

    def _shaped(self, w: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
        if w is None:
            return None
        w = w if dtype is None else w.to(dtype)
        if self.spec.weight == "full":
            return w.view(-1, self.dim)
        return w.unsqueeze(-1) if self.spec.weight == "scalar_per_head" else w

    def apply_fp32(self, x: Tensor) -> Tensor:
        """The whole norm without any rounding below fp32: x [..., D] of any dtype -> fp32 (fp64 for fp64)."""
        dtype = compute_dtype(x)
        y, _ = standardize(x.to(dtype), self.spec, eps_of(self.spec, x.dtype))
        return self._affine(y, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., D] (or [..., H, D] with weights per head), rounded as `weight_cast` says."""
        self.check_input(x)
        cast, eps = self.spec.weight_cast, eps_of(self.spec, x.dtype)
        if cast in ("fused", "before"):
            return self.apply_fp32(x).to(x.dtype)
        in_torch = cast == "torch" or (cast == "after" and self.spec.statistic == "layer")
        if in_torch and eps == 0 and self.spec.statistic != "l2":
            return self._around_zero_rows(x)
        return self._rounded_between(x, eps)

    def _rounded_between(self, x: Tensor, eps: float) -> Tensor:
        """The norm under the casts that round before the end."""
        cast = self.spec.weight_cast
        if cast == "torch":
            return self._torch(x, eps)
        weight_dtype = None if self.spec.promote else x.dtype
        if cast == "input":
            return self._in_input_dtype(x, eps, weight_dtype)
        if self.spec.statistic == "layer" and self.spec.eps_place == "inside":
            return self._affine(F.layer_norm(x, (self.dim,), eps=eps), weight_dtype)
        y, _ = standardize(x.to(compute_dtype(x)), self.spec, eps)
        return self._affine(y.to(x.dtype), weight_dtype)

    def check_input(self, x: Tensor) -> None:
        """Raises ValueError for another width or head count, TypeError for integers, and what is no tensor."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(
                f"{type(self).__name__} got {getattr(x, 'dtype', type(x).__name__)}; give it a floating-point tensor"
            )
        if x.shape[-1] != self.dim:
            raise ValueError(
                f"{type(self).__name__} normalises a last dimension of {self.dim} and got {tuple(x.shape)}; "
                f"build it with dim={x.shape[-1]}"
            )
        per_head = self.spec.weight in ("per_head", "full", "scalar_per_head")
        if per_head and (x.dim() < 2 or x.shape[-2] != self.num_heads):
            raise ValueError(
                f"{type(self).__name__} has weights for {self.num_heads} heads and got {tuple(x.shape)}; "
                f"give [..., {self.num_heads}, {self.dim}]"
            )

    def _affine(self, y: Tensor, dtype: torch.dtype | None, scale: float | None = None) -> Tensor:
        factor, shift = self.factor(dtype), self.shift(dtype)
        scale = self.spec.scale if scale is None else scale
        y = y if factor is None else y * factor
        y = y if scale == 1 else y * scale
        return y if shift is None else y + shift

    def _in_input_dtype(self, x: Tensor, eps: float, weight_dtype: torch.dtype | None) -> Tensor:
        spec = self.spec
        if spec.statistic == "l2" and spec.eps_place == "clamp":
            # scale and root meet in one division, as the module this reproduces (Zaya's) writes it
            y = x * (spec.scale / x.norm(dim=-1, keepdim=True).clamp_min(eps))
            return self._affine(y, weight_dtype, scale=1.0)
        centred = x - x.mean(-1, keepdim=True) if spec.statistic == "layer" else x
        _, inverse = standardize(x.to(compute_dtype(x)), spec, eps)
        return self._affine(centred * inverse.to(x.dtype), weight_dtype)

    def _around_zero_rows(self, x: Tensor) -> Tensor:
        """Without eps torch's functions make NaN of rows of no length: those leave as the bias, with no gradient."""
        zero = x[..., :1] if self.spec.statistic == "layer" else 0.0
        alive = (x != zero).any(-1, keepdim=True)
        ramp = torch.arange(1, self.dim + 1, dtype=x.dtype, device=x.device)
        y = self._rounded_between(torch.where(alive, x, ramp), 0.0)
        shift = self.shift(y.dtype)
        return torch.where(alive, y, 0.0 if shift is None else shift)

    def _torch(self, x: Tensor, eps: float) -> Tensor:
        spec, width = self.spec, (self.dim,)
        weight, bias = self.factor(x.dtype), self.shift(x.dtype)
        if spec.weight in ("per_head", "full") and spec.statistic != "l2" and weight is not None:
            biases = [None] * len(weight) if bias is None else list(bias)
            rows = zip(x.unbind(-2), weight, biases, strict=True)
            return torch.stack([self._torch_row(row, w, b, eps) for row, w, b in rows], -2)
        if spec.weight in ("none", "shared") and spec.statistic != "l2":
            return self._torch_row(x, weight, bias, eps)
        if spec.statistic == "layer":
            y = F.layer_norm(x, width, eps=eps)
        elif spec.statistic == "rms":
            y = F.rms_norm(x, width, eps=self._rms_eps(eps))
        else:
            y = F.normalize(x, dim=-1, eps=eps or torch.finfo(x.dtype).tiny)  # 0/0 in a zero row without
        return self._affine(y, x.dtype)

    def _torch_row(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        scale = self.spec.scale
        if self.spec.statistic == "layer" and scale == 1:
            return F.layer_norm(x, (self.dim,), weight, bias, eps)
        if self.spec.statistic == "layer":
            y = F.layer_norm(x, (self.dim,), weight, None, eps)
        else:
            y = F.rms_norm(x, (self.dim,), weight, self._rms_eps(eps))
        y = y if scale == 1 else y * scale
        return y if bias is None else y + bias

    def _rms_eps(self, eps: float) -> float | None:
        # given None, F.rms_norm takes the eps of the dtype it computes in, which is fp32 for bf16
        return None if self.spec.eps is None else eps

    def extra_repr(self) -> str:
        """The fields that differ from their defaults."""
        shown = [f"{self.dim}", f"eps={self.spec.eps}", f"weight={self.spec.weight!r}"]
        defaults = NormSpec(self.spec.statistic, self.spec.eps)
        for field in dataclasses.fields(self.spec):
            value = getattr(self.spec, field.name)
            if field.name not in ("statistic", "eps", "weight") and value != getattr(defaults, field.name):
                shown.append(f"{field.name}={value!r}")
        return ", ".join(shown)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_plain(norm: nn.Module | None) -> TypeGuard[StatisticNorm]:
    """Whether calling the norm does what its spec says and nothing more: no other forward, no hooks."""
    if not isinstance(norm, StatisticNorm) or has_hooks(norm) or "forward" in vars(norm):
        return False
    kind = type(norm)
    return (
        kind.forward is StatisticNorm.forward
        and kind.factor is StatisticNorm.factor
        and kind.shift is StatisticNorm.shift
        and kind.apply_fp32 is StatisticNorm.apply_fp32
        and kind._affine is StatisticNorm._affine
        and kind._shaped is StatisticNorm._shaped
    )


def _spec(norm: type, statistic: Statistic, eps: float | None, /, **fields: Any) -> NormSpec:
    """The NormSpec of a norm's arguments; ValueError, listing what there is, for one that it does not have."""
    known = [field.name for field in dataclasses.fields(NormSpec) if field.name != "statistic"]
    if unknown := sorted(fields.keys() - set(known)):
        raise ValueError(
            f"{norm.__name__} has no option {', '.join(unknown)}; choose from {', '.join(known)}, num_heads, device, "
            "dtype"
        )
    return NormSpec(statistic, eps, **fields)


class L2Norm(StatisticNorm):
    """The unit norm, x / ‖x‖₂ · weight (nGPT; Henry et al. 2020); a zero row stays zero, with zero gradient.

    With the default eps=0 nothing distorts short rows: a row of norm 1e-4 leaves with norm 1.

    Args:
        dim: D, the width of the normalised dimension.
        eps: 0, or a small number; None takes the eps of the input's dtype.
        weight: "none", "shared" [D], "per_head" [H, D], "full" [H·D], "scalar_per_head" [H] or "scalar" [1].
        num_heads: H, needed by weights that differ per head.
        device: where the weight lives.
        dtype: the weight's dtype.
        **fields: the other fields of NormSpec: eps_place, bias, zero_centered, weight_cast, promote, root, scale.
    """

    def __init__(
        self,
        dim: int,
        *,
        eps: float | None = 0.0,
        weight: WeightShape = "none",
        num_heads: int | None = None,
        device: Any = None,
        dtype: Any = None,
        **fields: Any,
    ):
        spec = _spec(type(self), "l2", eps, weight=weight, **fields)
        super().__init__(dim, spec, num_heads=num_heads, device=device, dtype=dtype)


class RMSNorm(StatisticNorm):
    """x / √(mean x² + eps) · weight. Arguments as in `L2Norm`; by default one weight [D] shared by the heads."""

    def __init__(
        self,
        dim: int,
        *,
        eps: float | None = 1e-6,
        weight: WeightShape = "shared",
        num_heads: int | None = None,
        device: Any = None,
        dtype: Any = None,
        **fields: Any,
    ):
        spec = _spec(type(self), "rms", eps, weight=weight, **fields)
        super().__init__(dim, spec, num_heads=num_heads, device=device, dtype=dtype)


class LayerNorm(StatisticNorm):
    """(x - mean) / √(var + eps) · weight + bias. Arguments as in `L2Norm`; by default weight and bias [D]."""

    def __init__(
        self,
        dim: int,
        *,
        eps: float | None = 1e-5,
        weight: WeightShape = "shared",
        bias: bool | None = None,
        num_heads: int | None = None,
        device: Any = None,
        dtype: Any = None,
        **fields: Any,
    ):
        bias = weight != "none" if bias is None else bias
        spec = _spec(type(self), "layer", eps, weight=weight, bias=bias, **fields)
        super().__init__(dim, spec, num_heads=num_heads, device=device, dtype=dtype)


class L2Clip(Norm):
    """w·x · min(1, max_norm / (‖w·x‖₂ + eps)): long rows shrink to max_norm, short ones pass (Inkling 2).

    Args:
        dim: D.
        max_norm: the longest norm a row leaves with.
        eps: added to the norm.
        num_heads: with it, a weight [H, D] multiplies x first; without it there is none.
    """

    def __init__(self, dim: int, *, max_norm: float, eps: float = 1e-6, num_heads: int | None = None):
        super().__init__()
        self.dim, self.max_norm, self.eps = dim, max_norm, eps
        self.weight = nn.Parameter(torch.ones(num_heads, dim)) if num_heads else None

    def forward(self, x: Tensor) -> Tensor:
        """Clip x [..., D] (or [..., H, D]) in fp32, rounding once."""
        y = x.to(compute_dtype(x))
        y = y if self.weight is None else y * self.weight.to(y.dtype)
        norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        return (y * (self.max_norm / (norm + self.eps)).clamp(max=1.0)).to(x.dtype)


class FunctionNorm(Norm):
    """A weightless norm made of a function from [..., D] to [..., D]."""

    def __init__(self, function: Callable[[Tensor], Tensor], dim: int | None = None):
        super().__init__()
        self.function = function
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """Call the function on x [..., D]; its result leaves in the dtype of x."""
        return self.function(x).to(x.dtype)

    def extra_repr(self) -> str:
        """The function's name."""
        return getattr(self.function, "__name__", repr(self.function))


_NORMS: dict[str, Callable[..., nn.Module]] = {"l2": L2Norm, "rms": RMSNorm, "layer": LayerNorm}


def register_norm(name: str) -> Callable[[Any], Any]:
    """Decorator that makes a norm available by name wherever a norm is asked for.

    Args:
        name: a new name; one that is taken raises ValueError.

    Returns:
        A decorator for an nn.Module class built as cls(dim), or cls(dim, num_heads=...) if it takes num_heads, or
        a functools.partial of one; or for a function from a tensor [..., D] to one of the same shape.
    """
    if name == "none":
        raise ValueError("the norm name 'none' stands for no norm; choose another name")
    if name in _NORMS:
        raise ValueError(f"the norm name {name!r} is taken by {_NORMS[name]!r}; choose another name")

    def register(norm: Any) -> Any:
        made_of = norm.func if isinstance(norm, partial) else norm
        is_class = isinstance(made_of, type) and issubclass(made_of, nn.Module)
        if not is_class and not callable(norm):
            raise TypeError(f"register_norm got {norm!r}; give an nn.Module class or a function of one tensor")
        _NORMS[name] = norm if is_class else partial(FunctionNorm, norm)
        return norm

    return register


def norm_names() -> list[str]:
    """The names a norm can be asked for by, sorted."""
    return sorted(_NORMS)


def make_norm(norm: Any, dim: int, *, num_heads: int | None = None, **options: Any) -> nn.Module | None:
    """Build a norm from whatever way it was asked for.

    Args:
        norm: a registered name, an nn.Module class, a functools.partial of one, an nn.Module instance
            (returned as it is) or None (no norm).
        dim: D, passed as the first argument.
        num_heads: H, passed on to what takes it.
        **options: further keyword arguments of the norm.

    Raises:
        ValueError: for an unknown name, listing the known ones.
    """
    if norm is None or isinstance(norm, nn.Module):
        if options:
            raise ValueError(f"{sorted(options)} cannot be applied to {norm!r}; set them where it is made")
        return norm
    if isinstance(norm, str):
        if norm not in _NORMS:
            raise ValueError(
                f"unknown norm {norm!r}; known: {', '.join(norm_names())}; add one with register_norm (on the command "
                "line, --import the file that does)"
            )
        norm = _NORMS[norm]
    if not callable(norm):
        raise TypeError(f"a norm is a name, a class, a partial, an instance or None; got {norm!r}")
    if num_heads is not None and "num_heads" not in options and _takes(norm, "num_heads"):
        options["num_heads"] = num_heads
    return norm(dim, **options)


def _takes(function: Callable[..., Any], name: str) -> bool:
    parameters = inspect.signature(function).parameters
    bound = function.keywords if isinstance(function, partial) else {}
    return name in parameters and name not in bound


def _check_choices(owner: str, spec: NormSpec) -> None:
    for field, alias in (
        ("statistic", Statistic),
        ("eps_place", EpsPlace),
        ("weight", WeightShape),
        ("weight_cast", WeightCast),
        ("root", Root),
    ):
        value, choices = getattr(spec, field), get_args(alias)
        if value not in choices:
            raise ValueError(f"{owner} got {field}={value!r}; choose from {', '.join(map(repr, choices))}")
    for field in ("bias", "zero_centered", "promote"):
        if not isinstance(value := getattr(spec, field), bool):
            raise ValueError(f"{owner} got {field}={value!r}; give True or False")
    if not (isinstance(spec.scale, int | float) and math.isfinite(spec.scale)):
        raise ValueError(f"{owner} got scale={spec.scale!r}; give a number")
    torch_place = "clamp" if spec.statistic == "l2" else "inside"
    if spec.weight_cast == "torch" and spec.eps_place != torch_place and spec.eps != 0:
        raise ValueError(
            f'{owner} got eps_place={spec.eps_place!r} with weight_cast="torch", whose function has it '
            f'"{torch_place}"; choose that, or another weight_cast'
        )
    if spec.eps is not None and not (isinstance(spec.eps, int | float) and spec.eps >= 0):
        raise ValueError(f"{owner} got eps={spec.eps!r}; give 0 or a small positive number")


def _weight_shape(owner: str, dim: int, weight: WeightShape, num_heads: int | None) -> tuple[int, ...] | None:
    if weight in ("per_head", "full", "scalar_per_head") and not num_heads:
        raise ValueError(f"{owner} got weight={weight!r} without num_heads; give num_heads")
    heads = num_heads or 0
    return {
        "none": None,
        "shared": (dim,),
        "per_head": (heads, dim),
        "full": (heads * dim,),
        "scalar_per_head": (heads,),
        "scalar": (1,),
    }[weight]
