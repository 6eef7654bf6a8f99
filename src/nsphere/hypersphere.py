"""Matrices on the unit hypersphere, and the learned scales that come with them.

The module that owns a matrix says once which of its dims is the embedding axis (`sphere_dims`); projection,
checks and sharding read it there. Roles live on modules because an attribute on a parameter is lost when a
sharding wrapper replaces the parameter.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsphere.ops import row_scaled_linear
from nsphere.ops.embedding import embedding
from nsphere.ops.normalize_matrices import normalize_matrices_ as _normalize_matrices_
from nsphere.ops.normalize_matrices.sharded import norms as sharded_norms
from nsphere.ops.normalized_update import unit

ScaleKind = Literal["vector", "scalar", "fixed"]
Projection = Literal["step", "forward"]


class Scale(nn.Module):
    """A learned scaling factor, stored so that Adam moves it at its own pace.

    effective = stored · init / scale, with `stored` starting at `scale`. Under Adam a step changes `stored` by
    about the learning rate whatever its size, so `scale` sets the effective learning rate (lr · init / scale)
    and leaves the forward pass unchanged.

    Args:
        size: number of entries of the vector.
        init: the effective value at the start.
        scale: what is stored at the start; > 0.
        kind: "vector" learns every entry, "scalar" one number for all, "fixed" keeps `init` for good.

    Returns (forward): fp32 [size], or [1] for scalar and fixed; it broadcasts like the vector.

    Source: arXiv 2410.01131, section 2.5.
    """

    stored: nn.Parameter | None
    constant: Tensor

    def __init__(self, size: int, init: float, scale: float, kind: ScaleKind = "vector") -> None:
        super().__init__()
        if kind not in ("vector", "scalar", "fixed"):
            raise ValueError(f"scale kind {kind!r} is unknown; choose vector, scalar or fixed")
        if not scale > 0:
            raise ValueError(f"a scale's stored start must be positive, got {scale}; it sets the learning rate")
        self.size, self.init, self.scale, self.kind = size, float(init), float(scale), kind
        if kind == "fixed":
            self.register_parameter("stored", None)
            self.register_buffer("constant", torch.full((1,), self.init), persistent=False)
        else:
            self.stored = nn.Parameter(torch.empty(size if kind == "vector" else 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to the start: the effective value is `init`."""
        if self.stored is None:
            nn.init.constant_(self.constant, self.init)
        else:
            nn.init.constant_(self.stored, self.scale)

    def forward(self) -> Tensor:
        return self.constant if self.stored is None else self.stored * (self.init / self.scale)

    def extra_repr(self) -> str:
        return f"{self.size}, init={self.init:g}, scale={self.scale:g}, kind={self.kind}"


class SphereLinear(nn.Module):
    """y = x Wᵀ ⊙ s · gain, with the rows or columns of W on the unit hypersphere.

    The scale and the gain are folded into W's rows before the product: O(weights) work instead of O(tokens), the
    same value and the same gradients, and no activation is promoted to fp32. The fold is in fp32 and the folded
    weight is rounded once.

    Args:
        in_features: columns of W.
        out_features: rows of W.
        sphere_dim: the embedding axis of W [out, in], along which it has unit norm: 1 where the input is the
            embedding (W_q, W_k, W_v, W_u, W_ν, the output head), 0 where the output is (W_o, W_down).
        scale: learned output scale s [out_features], or None.
        gain: constant factor on the output.
        projection: "step": the optimizer keeps W on the sphere. "forward": W is normalised in every forward
            pass and the gradient goes through the normalisation.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sphere_dim: int,
        scale: Scale | None = None,
        gain: float = 1.0,
        projection: Projection = "step",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.scale, self.gain, self.projection = scale, gain, projection
        self.sphere_dims = {"weight": sphere_dim}
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A uniformly random direction for every row or column; the same bits whatever backend runs later."""
        nn.init.normal_(self.weight)
        if not self.weight.is_meta:
            _normalize_matrices_([(self.weight, self.sphere_dims["weight"])], backend="reference")

    def _unit_weight(self) -> Tensor:
        return unit(self.weight, self.sphere_dims["weight"]) if self.projection == "forward" else self.weight

    def folded_weight(self) -> Tensor:
        """[out, in]: the matrix that acts on x, its scale and gain folded in; fp32 where the weight is."""
        weight = self._unit_weight()
        if self.scale is not None:
            return weight * (self.scale() * self.gain).unsqueeze(-1)
        return weight if self.gain == 1.0 else weight * self.gain

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is not None:
            weight, factor = self._unit_weight(), self.scale() * self.gain
            if row_scaled_linear.suits(x, weight, factor):
                return row_scaled_linear.row_scaled_linear(x, weight, factor)
        return F.linear(x, self.folded_weight())

    def extra_repr(self) -> str:
        where = "columns" if self.sphere_dims["weight"] == 0 else "rows"
        return f"{self.in_features}, {self.out_features}, unit {where}, gain={self.gain:g}"


class SphereEmbedding(nn.Module):
    """Token embeddings whose rows are unit vectors; the gradient of the look-up is deterministic.

    Args:
        num_embeddings: rows, the vocabulary size.
        embedding_dim: d_model.
        projection: as for SphereLinear.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, projection: Projection = "step") -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim))
        self.projection = projection
        self.sphere_dims = {"weight": 1}
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A uniformly random direction for every token; the same bits whatever backend runs later."""
        nn.init.normal_(self.weight)
        if not self.weight.is_meta:
            _normalize_matrices_([(self.weight, 1)], backend="reference")

    def forward(self, tokens: Tensor) -> Tensor:
        return embedding(tokens, unit(self.weight) if self.projection == "forward" else self.weight)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, unit rows"


def on_sphere(module: nn.Module, dim: int, parameter: str = "weight") -> nn.Module:
    """Say that `module.parameter` belongs on the sphere along `dim`, for any module of your own.

    >>> on_sphere(nn.Linear(64, 256, bias=False), dim=1)

    Returns the module. Raises ValueError if there is no such parameter or dim.
    """
    weight = getattr(module, parameter, None)
    if not isinstance(weight, nn.Parameter):
        raise ValueError(f"{type(module).__name__} has no parameter {parameter!r} to put on the sphere")
    if not -weight.dim() <= dim < weight.dim():
        raise ValueError(f"dim {dim} is outside {parameter!r} of shape {tuple(weight.shape)}")
    module.sphere_dims = {**getattr(module, "sphere_dims", {}), parameter: dim % weight.dim()}  # type: ignore[assignment]
    return module


class SphereMatrix(NamedTuple):
    """A matrix on the sphere: its name in the model, the parameter, and its embedding axis."""

    name: str
    weight: Tensor
    dim: int


def sphere_matrices(model: nn.Module) -> Iterator[SphereMatrix]:
    """Every parameter of the model that belongs on the sphere, each once, in module order.

    What is normalised in every forward pass (`projection="forward"`) is not among them: its raw rows have any length.
    """
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        # every optimizer step walks here, and a getattr of what most modules lack is slow
        own = vars(module).get("sphere_dims") is not None or hasattr(type(module), "sphere_dims")
        dims = module.sphere_dims if own else {}
        if not dims or getattr(module, "projection", "step") == "forward":
            continue
        for parameter, dim in dims.items():
            # not the attribute: under tensor parallelism that is this rank's part of the parameter
            weight = module._parameters[parameter]
            assert weight is not None
            if id(weight) not in seen:
                seen.add(id(weight))
                yield SphereMatrix(f"{prefix}.{parameter}" if prefix else parameter, weight, dim)


def normalize_matrices_(model: nn.Module) -> None:
    """Project every matrix of the model that belongs on the sphere back onto it, in place."""
    _normalize_matrices_([(m.weight, m.dim) for m in sphere_matrices(model)])


class NormDeviation(NamedTuple):
    """The worst vector of a model: |‖w‖ − 1|, the matrix it is in, and its index there."""

    value: float
    name: str
    row: int


def _deviations(weight: Tensor, dim: int) -> Tensor:
    """|‖w‖ − 1| of every vector of a matrix, of all ranks' parts where it is a DTensor."""
    if hasattr(weight, "device_mesh"):
        norms = sharded_norms(weight.detach(), dim)
    else:
        norms = torch.linalg.vector_norm(weight.detach(), dim=dim, dtype=torch.float64).flatten()
    return (norms - 1).abs().nan_to_num(nan=torch.inf)


def project_what_is_off_(model: nn.Module) -> None:
    """Project those matrices that have a vector with |‖w‖ − 1| > 1e-6 (or the dtype's eps, where that is more).

    The others keep every bit, which a matrix that is on the sphere does not when it is projected again.
    """
    off = [
        (m.weight, m.dim)
        for m in sphere_matrices(model)
        if _deviations(m.weight, m.dim).max() > max(1e-6, torch.finfo(m.weight.dtype).eps)
    ]
    _normalize_matrices_(off)


@torch.no_grad()
def max_norm_deviation(model: nn.Module) -> NormDeviation | None:
    """The largest |‖w‖ − 1| over all sphere matrices, norms taken in fp64; None where there are none."""
    worst: NormDeviation | None = None
    for name, weight, dim in sphere_matrices(model):
        value, index = _deviations(weight, dim).max(0)
        if worst is None or value.item() > worst.value:
            worst = NormDeviation(value.item(), name, int(index))
    return worst


def assert_on_hypersphere(model: nn.Module, atol: float = 1e-6) -> None:
    """Raise AssertionError naming the worst vector if any |‖w‖ − 1| exceeds `atol` (1e-6 suits fp32, 1e-2 bf16).

    Raises ValueError if the model has no matrix that belongs on the sphere: such a check would pass for nothing.
    """
    worst = max_norm_deviation(model)
    if worst is None:
        raise ValueError("no module of this model says that a matrix belongs on the sphere; mark them with on_sphere")
    if not worst.value <= atol:
        raise AssertionError(
            f"{worst.name}[{worst.row}] has norm off by {worst.value:.3g}, more than {atol:g}; "
            "call normalize_matrices_(model), or keep_on_hypersphere(model, optimizer) before training"
        )
