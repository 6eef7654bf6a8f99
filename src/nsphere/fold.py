"""A trained model made ready for inference: what was learned apart from the weights is folded into them."""

import copy

import torch
from torch import Tensor, nn

from nsphere.hypersphere import SphereEmbedding, SphereLinear
from nsphere.layers import Attention, Decoder, DecoderConfig
from nsphere.ngpt import NGPTBlock, QKScale
from nsphere.ngpt_nvidia import NvidiaQKNorm
from nsphere.ops.normalized_update import unit


class Constant(nn.Module):
    """What was learned, fixed: forward() returns the tensor."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self) -> Tensor:
        return self.value


@torch.no_grad()
def fold(model: Decoder, dtype: torch.dtype | None = None) -> Decoder:
    """A copy of a model that computes the same with less: the one to generate with.

    s_u, s_v·√d and s_z are multiplied into the rows of their matrices; s_qk²·√D becomes one vector on q, so that the
    softmax scale is 1 and keys are unit vectors (in the authors' convention too, which scales both); |α| is taken
    once; matrices that are normalised in every forward pass are normalised for good. Products are in fp32 and are
    rounded once. Of a GPT it is a copy.

    Args:
        model: GPT or NGPT, compiled or not.
        dtype: of the matrices, embedding apart; their own if not given. Run the copy under the autocast of that
            dtype: it then rounds where the model does under the same autocast, and reads half the memory.

    Returns:
        A model of the same class, in evaluation mode, that can't be trained.

    Raises:
        ValueError: a model of another kind, or a dtype that is no floating one.
    """
    if not isinstance(getattr(model, "config", None), DecoderConfig):
        raise ValueError(f"fold is for GPT and NGPT of this library, got a {type(model).__name__}; see hf.from_hf")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"matrices of {dtype} are not supported; give float32, bfloat16 or float16")
    folded = copy.deepcopy(model)
    folded.__dict__.pop("hidden_loss", None)  # a compiled one is the original's
    for module in list(folded.modules()):
        if isinstance(module, SphereLinear):
            module.weight = nn.Parameter(module.folded_weight())
            module.scale, module.gain, module.projection, module.sphere_dims = None, 1.0, "step", {}
        elif isinstance(module, SphereEmbedding):
            if module.projection == "forward":
                module.weight = nn.Parameter(unit(module.weight))
            module.projection, module.sphere_dims = "step", {}
        elif isinstance(module, NGPTBlock):
            module.eigen_lr_attn = Constant(module.eigen_lr_attn().abs())  # type: ignore[assignment]
            module.eigen_lr_mlp = Constant(module.eigen_lr_mlp().abs())  # type: ignore[assignment]
        elif isinstance(module, Attention) and isinstance(module.qk_norm.multiplier, QKScale):
            _fold_s_qk(module)
            folded.unit_keys |= isinstance(module.qk_norm, NvidiaQKNorm)
        if dtype is not None and isinstance(module, SphereLinear | nn.Linear):
            module.weight = nn.Parameter(module.weight.to(dtype))
    return folded.eval().requires_grad_(False)


def _fold_s_qk(attention: Attention) -> None:
    qk_norm = attention.qk_norm
    on_q = qk_norm.multiplier()  # type: ignore[operator]  # s_qk², [H, D] or [1, 1]
    if isinstance(qk_norm, NvidiaQKNorm):
        on_q, qk_norm.scales_k = on_q**2, False
    qk_norm.multiplier = Constant(on_q * qk_norm.softmax_scale)
    qk_norm.softmax_scale = 1.0
