"""Transformer Engine's Linear, LayerNormLinear and LayerNormMLP, with their parameters' names."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsphere.te.base import TEModule, init_or_default, on_device
from nsphere.te.checks import COLUMN, GATED_ACTIVATIONS, PLAIN_ACTIVATIONS, check_arguments, check_features
from nsphere.te.norms import normalize

Init = Callable[[Tensor], Any] | None
Split = tuple[str, ...] | Mapping[str, int] | None


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


_FUNCTIONS = (_gelu, _quick_gelu, F.relu, _squared_relu, F.silu)
_PLAIN: dict[str, Callable[[Tensor], Tensor]] = dict(zip(PLAIN_ACTIVATIONS, _FUNCTIONS, strict=True))
_GATED: dict[str, Callable[[Tensor], Tensor]] = dict(zip(GATED_ACTIVATIONS, (*_FUNCTIONS, torch.sigmoid), strict=True))


class _Projection(TEModule):
    """Weights and biases, one or several that make up one product."""

    def _make_projection(
        self, in_features: int, out_features: int, bias: bool, split: Split, init: Init, device: Any, dtype: Any
    ) -> None:
        owner = type(self).__name__
        if split is None:
            self.weight_names, self.bias_names, sizes = ["weight"], ["bias"], [out_features]
        else:
            names = [name.rstrip("_") for name in split]
            self.weight_names, self.bias_names = [f"{n}_weight" for n in names], [f"{n}_bias" for n in names]
            if isinstance(split, Mapping):
                sizes = list(split.values())
            else:
                sizes = [out_features // max(len(names), 1)] * len(names)
        if sum(sizes) != out_features:
            raise ValueError(
                f"{owner} got parameters_split={split!r}, which makes {sum(sizes)} of out_features={out_features}; "
                "give sizes that add up to it"
            )
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias
        self._init = init_or_default(init)
        for name, size in zip(self.weight_names, sizes, strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(size, in_features, device=device, dtype=dtype)))
        for name, size in zip(self.bias_names, sizes, strict=True):
            if bias:
                self.register_parameter(name, nn.Parameter(torch.empty(size, device=device, dtype=dtype)))
            else:  # an empty tensor stands for no bias, as in Transformer Engine
                self.register_buffer(name, torch.empty(0, device=device, dtype=dtype), persistent=False)

    def _reset_projection(self) -> None:
        for name in self.weight_names:
            self._init(getattr(self, name))
        if self.use_bias:
            for name in self.bias_names:
                nn.init.zeros_(getattr(self, name))

    def _project(self, x: Tensor, *, add_bias: bool = True) -> tuple[Tensor, Tensor]:
        """The product, and the bias, which is empty where there is none."""
        weight, bias = self._joined(self.weight_names), self._joined(self.bias_names)
        return F.linear(x, weight, bias if add_bias and self.use_bias else None), bias

    def _joined(self, names: list[str]) -> Tensor:
        tensors = [getattr(self, name) for name in names]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def extra_repr(self) -> str:
        """Shape and parameters."""
        return f"{self.in_features}, {self.out_features}, bias={self.use_bias}, weights={self.weight_names}"


class Linear(_Projection):
    """y = x Wᵀ + b.

    Args:
        in_features: width of x.
        out_features: width of y.
        init_method: fills the weight; N(0, 0.023²) by default.
        bias: whether there is one.
        return_bias: return (y without bias, bias).
        params_dtype: of the parameters; the default dtype if not given.
        parallel_mode: None, "column" or "row"; with one tensor-parallel rank they are the same.
        parameters_split: names, or names and sizes, of parameters that hold the weight's rows in pieces.
        device: CUDA where there is one, else the CPU.
        **others: Transformer Engine's, which raise ValueError unless at their defaults.

    Raises:
        ValueError: for what is not implemented, or does not fit.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        rng_tracker_name: str | None = None,
        init_method: Init = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        parameters_split: Split = None,
        device: torch.device | str | None = None,
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        save_original_input: bool = False,
        name: str | None = None,
    ):
        check_arguments("Linear", locals())
        super().__init__()
        self.return_bias, self.name = return_bias, name
        self._make_projection(
            in_features, out_features, bias, parameters_split, init_method, on_device(device), params_dtype
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights by init_method, biases 0."""
        self._reset_projection()

    def forward(
        self, inp: Tensor, is_first_microbatch: bool | None = None, fp8_output: bool = False, fp8_grad: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Inp [..., in_features] → [..., out_features], with the bias apart if `return_bias`."""
        check_arguments("Linear", {"fp8_output": fp8_output, "fp8_grad": fp8_grad})
        check_features("Linear", "inp", inp, self.in_features, getattr(self, self.weight_names[0]))
        y, bias = self._project(inp, add_bias=not self.return_bias)
        return (y, bias) if self.return_bias else y


class LayerNormLinear(_Projection):
    """y = Norm(x) Wᵀ + b. Arguments as in `Linear`, and those of the norm.

    Args:
        eps: of the norm.
        normalization: "LayerNorm" or "RMSNorm".
        return_layernorm_output: return (y, Norm(x)), or (y, bias, Norm(x)).
        zero_centered_gamma: the norm's weight is stored as γ − 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        init_method: Init = None,
        bias: bool = True,
        normalization: str = "LayerNorm",
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        return_layernorm_output: bool = False,
        return_layernorm_output_gathered: bool = False,
        parameters_split: Split = None,
        zero_centered_gamma: bool = False,
        device: torch.device | str | None = None,
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        name: str | None = None,
    ):
        check_arguments("LayerNormLinear", locals(), other_rules={"parallel_mode": COLUMN})
        super().__init__()
        self.return_bias, self.return_layernorm_output, self.name = return_bias, return_layernorm_output, name
        make_layer_norm(self, in_features, eps, normalization, zero_centered_gamma, on_device(device), params_dtype)
        self._make_projection(
            in_features, out_features, bias, parameters_split, init_method, on_device(device), params_dtype
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The norm as the identity, weights by init_method, biases 0."""
        reset_layer_norm(self)
        self._reset_projection()

    def forward(
        self, inp: Tensor, is_first_microbatch: bool | None = None, fp8_output: bool = False, fp8_grad: bool = False
    ) -> Tensor | tuple[Tensor, ...]:
        """Inp [..., in_features] → [..., out_features], with what was asked to be returned beside it."""
        check_arguments("LayerNormLinear", {"fp8_output": fp8_output, "fp8_grad": fp8_grad})
        normed = apply_layer_norm(self, inp)
        y, bias = self._project(normed, add_bias=not self.return_bias)
        outputs = (y, *((bias,) if self.return_bias else ()), *((normed,) if self.return_layernorm_output else ()))
        return outputs if len(outputs) > 1 else y


class LayerNormMLP(TEModule):
    """y = act(Norm(x) W₁ᵀ + b₁) W₂ᵀ + b₂; gated activations take W₁ of twice the rows, the gate's first.

    Args:
        hidden_size: width of x and y.
        ffn_hidden_size: width in between.
        eps: of the norm.
        return_bias: return (y without b₂, b₂).
        init_method: fills W₁; N(0, 0.023²) by default.
        bias: whether there are any.
        normalization: "LayerNorm" or "RMSNorm".
        activation: gelu (tanh form), qgelu, relu, srelu, silu, and gated geglu, qgeglu, reglu, sreglu, swiglu, glu.
        output_layer_init_method: fills W₂.
        params_dtype: of the parameters; the default dtype if not given.
        return_layernorm_output: return Norm(x) as well, last.
        zero_centered_gamma: the norm's weight is stored as γ − 1.
        device: CUDA where there is one, else the CPU.
        **others: Transformer Engine's, which raise ValueError unless at their defaults.
    """

    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        return_bias: bool = False,
        get_rng_state_tracker: Any = None,
        tp_group: Any = None,
        tp_size: int = 1,
        init_method: Init = None,
        bias: bool = True,
        normalization: str = "LayerNorm",
        activation: str = "gelu",
        activation_params: dict[str, Any] | None = None,
        output_layer_init_method: Init = None,
        fuse_wgrad_accumulation: bool = False,
        params_dtype: torch.dtype | None = None,
        return_layernorm_output: bool = False,
        return_layernorm_output_gathered: bool = False,
        seq_length: int | None = None,
        micro_batch_size: int | None = None,
        set_parallel_mode: bool = False,
        zero_centered_gamma: bool = False,
        device: torch.device | str | None = None,
        ub_overlap_ag: bool = False,
        name: str | None = None,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        checkpoint: bool = False,
    ):
        check_arguments("LayerNormMLP", locals())
        super().__init__()
        self.return_bias, self.return_layernorm_output, self.name = return_bias, return_layernorm_output, name
        self.use_bias, self.activation = bias, activation
        self._inits = init_or_default(init_method), init_or_default(output_layer_init_method)
        where: dict[str, Any] = {"device": on_device(device), "dtype": params_dtype}
        make_layer_norm(self, hidden_size, eps, normalization, zero_centered_gamma, **where)
        fc1_rows = ffn_hidden_size * (2 if activation in _GATED else 1)
        shapes = {"fc1": (fc1_rows, hidden_size), "fc2": (hidden_size, ffn_hidden_size)}
        for fc, (rows, columns) in shapes.items():
            self.register_parameter(f"{fc}_weight", nn.Parameter(torch.empty(rows, columns, **where)))
            if bias:
                self.register_parameter(f"{fc}_bias", nn.Parameter(torch.empty(rows, **where)))
            else:
                self.register_buffer(f"{fc}_bias", torch.empty(0, **where), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The norm as the identity, weights by the init methods, biases 0."""
        reset_layer_norm(self)
        for fc, init in zip(("fc1", "fc2"), self._inits, strict=True):
            init(getattr(self, f"{fc}_weight"))
            if self.use_bias:
                nn.init.zeros_(getattr(self, f"{fc}_bias"))

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor | tuple[Tensor, ...]:
        """Inp [..., hidden_size] → [..., hidden_size], with what was asked to be returned beside it."""
        normed = apply_layer_norm(self, inp)
        h = F.linear(normed, self.fc1_weight, self.fc1_bias if self.use_bias else None)
        if self.activation in _GATED:
            gate, value = h.chunk(2, -1)
            h = _GATED[self.activation](gate) * value
        else:
            h = _PLAIN[self.activation](h)
        y = F.linear(h, self.fc2_weight, self.fc2_bias if self.use_bias and not self.return_bias else None)
        bias = (self.fc2_bias,) if self.return_bias else ()
        outputs = (y, *bias, *((normed,) if self.return_layernorm_output else ()))
        return outputs if len(outputs) > 1 else y


def make_layer_norm(
    module: nn.Module, width: int, eps: float, normalization: str, zero_centered_gamma: bool, device: Any, dtype: Any
) -> None:
    """Give a module the parameters layer_norm_weight and layer_norm_bias, and what `apply_layer_norm` reads."""
    module.eps, module.normalization, module.zero_centered_gamma = eps, normalization, zero_centered_gamma  # type: ignore[assignment]
    module.layer_norm_weight = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
    has_bias = normalization == "LayerNorm"
    bias = nn.Parameter(torch.empty(width, device=device, dtype=dtype)) if has_bias else None
    module.register_parameter("layer_norm_bias", bias)


def reset_layer_norm(module: Any) -> None:
    """γ 1 (stored as 0 if zero-centred), β 0."""
    nn.init.constant_(module.layer_norm_weight, 0.0 if module.zero_centered_gamma else 1.0)
    if module.layer_norm_bias is not None:
        nn.init.zeros_(module.layer_norm_bias)


def apply_layer_norm(module: Any, x: Tensor) -> Tensor:
    """Norm(x), in x's dtype; ValueError for another width or dtype than its weight's."""
    check_features(type(module).__name__, "inp", x, len(module.layer_norm_weight), module.layer_norm_weight)
    return normalize(
        x,
        module.layer_norm_weight,
        module.layer_norm_bias,
        module.eps,
        module.normalization,
        module.zero_centered_gamma,
    )
