"""QK-clip: after the optimizer's step, heads whose logits grew beyond a threshold get smaller query and key weights.

Shape legend: H query heads, K key heads, D head_dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nsphere.hypersphere import SphereLinear

Share = Literal["q", "k", "whole"]


@dataclass(frozen=True)
class HeadRows:
    """Rows of a weight or bias that make the queries or keys of each head."""

    parameter: Tensor
    """[rows, ...]."""
    rows: Tensor
    """int64 [H, n], or [K, n] of keys, on the parameter's device: the rows of each head."""
    share: Share
    """What they are multiplied by: "q" and "k" make γ together, "whole" is γ (queries whose keys are shared by all)."""


def clip_factors(
    max_logits: Tensor, threshold: float, num_kv_heads: int | None = None, alpha: float = 0.5
) -> dict[Share, Tensor]:
    """What the rows of each head are multiplied by.

    γ_h = min(1, threshold / S_h) takes head h's largest logit S_h down to the threshold. Of it k gets
    κ = (largest γ of the heads that share this k)^(1 − α), what all of them can do with, and q the rest, γ_h / κ.
    So without grouped queries both get √γ_h at α = ½, as in Kimi K2, and a head below the threshold keeps its logits
    and its weights to the last bit, whoever shares its keys (Megatron clips the whole group by its largest logit).

    Args:
        max_logits: S, [H], of logits as they enter the softmax. A head whose S is not finite is left alone.
        threshold: τ, positive.
        num_kv_heads: K; H by default.
        alpha: the exponent of γ that q gets.

    Returns:
        "whole" γ [H], "q" [H] and "k" κ [K], fp32, all in (0, 1].

    Raises:
        ValueError: for numbers that can't be.
    """
    check_threshold("threshold", threshold)
    _check_alpha(alpha)
    if not isinstance(max_logits, Tensor) or max_logits.dim() != 1 or len(max_logits) % (num_kv_heads or 1):
        shown = tuple(max_logits.shape) if isinstance(max_logits, Tensor) else type(max_logits).__name__
        raise ValueError(
            f"clip_factors got max_logits {shown} and num_kv_heads={num_kv_heads}; give a tensor [H] and a divisor of H"
        )
    max_logits = max_logits.float()
    above = torch.isfinite(max_logits) & (max_logits > threshold)
    gamma = torch.where(above, threshold / max_logits, 1.0)
    groups = gamma.view(num_kv_heads or len(gamma), -1)
    k = groups.amax(-1) ** (1 - alpha)
    return {"whole": gamma, "q": (groups / k[:, None]).flatten(), "k": k}


@torch.no_grad()
def scale_heads_(rows: HeadRows, factors: Tensor) -> None:
    """Multiply each head's rows in place by factors [H] or [K]; 1 changes no bit. DTensors stay where they are."""
    parameter = rows.parameter
    column = factors.new_ones(parameter.shape[0], *[1] * (parameter.dim() - 1))
    column[rows.rows.to(factors.device)] = factors.view(-1, *[1] * parameter.dim())
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import DTensor, Replicate

        mesh = parameter.device_mesh
        column = DTensor.from_local(column, mesh, [Replicate()] * mesh.ndim, run_check=False)
    parameter.mul_(column)


class QKClip:
    """Kimi K2's QK-clip (MuonClip) for a model, with any optimizer: call it after `optimizer.step()`.

    >>> clip = QKClip(model, threshold=100.0)
    >>> loss.backward()
    >>> optimizer.step()
    >>> gammas = clip()

    From its construction on, the model's attentions note the largest logit of every head in the forward passes of
    training (accumulated micro-batches included), without a second pass: eager attention reads it off the logits,
    FlexAttention on CUDA keeps it anyway. A call scales down the heads above the threshold by what they were above it,
    and forgets what was seen. The optimizer's moments are not touched.

    It knows nsphere's own attention, nsphere.te's, and those of transformers that have q_proj and k_proj (Llama,
    Mistral, Qwen 2 …) or are MLA (DeepSeek V2 and V3, Kimi K2), after `nsphere.hf.report_max_logits(model)`. In MLA, q
    and k get √γ each where they come from the latents, and the rotated part of q, whose key all heads share, gets γ.

    Args:
        model: has such attentions, without QK-norm: a norm undoes what is done to the weights before it, and bounds
            the logits itself (`QKNorm.logit_bound`). Already cast, moved and sharded.
        threshold: τ, the largest logit that is let be; 100 in Kimi K2.
        alpha: the exponent of γ that q gets, k the rest.
        group: the data-parallel ranks, which must clip alike; all ranks by default where torch.distributed is
            initialised.

    Attributes:
        max_logits: what the last call saw, over all ranks: the largest logit of every head by the attention's name,
            fp32 [H]; -inf for a head that was not used.

    Raises:
        ValueError: for a model that it can't clip, or numbers that can't be.

    Source: Kimi K2, arXiv 2507.20534, section 2.1.
    """

    def __init__(self, model: nn.Module, threshold: float = 100.0, *, alpha: float = 0.5, group: Any = None) -> None:
        check_threshold("threshold", threshold)
        _check_alpha(alpha)
        if not isinstance(model, nn.Module):
            raise ValueError(f"QKClip takes a model, got {type(model).__name__}")
        self.threshold, self.alpha, self.group = threshold, alpha, group
        self.attentions: dict[str, nn.Module] = {
            name: module for name, module in model.named_modules() if next(_rows(module), None) is not None
        }
        if not self.attentions:
            raise ValueError(
                f"{type(model).__name__} has no attention that QK-clip knows: nsphere's own, nsphere.te's, or one of "
                "transformers with q_proj and k_proj or MLA; use clip_factors and scale_heads_ for another"
            )
        for name, module in self.attentions.items():
            _refuse_qk_norm(name, module)
        for name, module in self.attentions.items():
            _start_reporting(name, module)
        self.max_logits: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self) -> dict[str, Tensor]:
        """Clip. γ of every head by the attention's name, fp32 [H]; 1 where nothing was done.

        Raises:
            RuntimeError: at the first call, if no attention has noted a logit since the construction.
        """
        everything = torch.cat([module.max_logits.float() for module in self.attentions.values()])  # type: ignore[misc]
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(everything, dist.ReduceOp.MAX, group=self.group)
        if not self.max_logits and bool((everything == -torch.inf).all()):  # once: it waits for the device
            raise RuntimeError(
                "QKClip has seen no logits: call it after a forward pass with gradients through the model it was made "
                "of, and leave its attention implementation as hf.report_max_logits set it"
            )
        gammas = {}
        seen = everything.split([module.max_logits.numel() for module in self.attentions.values()])  # type: ignore[operator]
        self.max_logits = dict(zip(self.attentions, seen, strict=True))
        for name, module in self.attentions.items():
            rows = list(_rows(module))
            num_kv_heads = next(len(r.rows) for r in rows if r.share == "k")
            factors = clip_factors(self.max_logits[name], self.threshold, num_kv_heads, self.alpha)
            for r in rows:
                scale_heads_(r, factors[r.share])
            gammas[name] = factors["whole"]
        self.forget()
        return gammas

    @torch.no_grad()
    def forget(self) -> None:
        """Drop what was seen since the last call, as after a step that was skipped."""
        for module in self.attentions.values():
            module.max_logits.fill_(-torch.inf)  # type: ignore[operator]


def check_threshold(name: str, threshold: Any) -> None:
    """Raises ValueError for a threshold that is no positive number; name is what the user calls it."""
    if not _is_number(threshold) or not 0 < threshold < float("inf"):
        raise ValueError(f"{name} must be a positive number, got {threshold!r}; Kimi K2's is 100")


def _check_alpha(alpha: Any) -> None:
    if not _is_number(alpha) or not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, got {alpha!r}; ½ shares the clip between q and k")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _rows(module: Any) -> Iterator[HeadRows]:
    """The rows of an attention's queries and keys; nothing for any other module.

    Attentions are told by their parameters, so that neither transformers nor nsphere.te need be imported.
    """
    if hasattr(module, "W_q") and hasattr(module, "W_k") and hasattr(module, "head_dim"):
        yield from _whole(module.W_q, module.head_dim, "q")
        yield from _whole(module.W_k, module.head_dim, "k")
    elif hasattr(module, "kv_b_proj") and hasattr(module, "qk_nope_head_dim"):
        yield from _latent(module)
    elif hasattr(module, "qkv_weight_interleaved"):
        yield from _transformer_engine(module)
    elif isinstance(getattr(module, "q_proj", None), nn.Linear) and hasattr(module, "head_dim"):
        yield from _whole(module.q_proj, module.head_dim, "q")
        yield from _whole(module.k_proj, module.head_dim, "k")


def _parameters(linear: Any) -> Iterator[Tensor]:
    yield linear.weight
    if getattr(linear, "bias", None) is not None:
        yield linear.bias


def _blocks(parameter: Tensor, width: int, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows start … stop of every head, where each head has `width` of them: int64 [heads, stop − start].

    Made on the parameter's device, so that a clip copies nothing to it and waits for nothing.
    """
    return torch.arange(parameter.shape[0], device=parameter.device).view(-1, width)[:, start:stop]


def _whole(linear: Any, head_dim: int, share: Share) -> Iterator[HeadRows]:
    for parameter in _parameters(linear):
        yield HeadRows(parameter, _blocks(parameter, head_dim), share)


def _latent(module: Any) -> Iterator[HeadRows]:
    nope, width = module.qk_nope_head_dim, module.qk_nope_head_dim + module.qk_rope_head_dim
    q = module.q_b_proj if getattr(module, "q_b_proj", None) is not None else module.q_proj
    for parameter in _parameters(q):
        yield HeadRows(parameter, _blocks(parameter, width, 0, nope), "q")
        yield HeadRows(parameter, _blocks(parameter, width, nope), "whole")
    for parameter in _parameters(module.kv_b_proj):
        yield HeadRows(parameter, _blocks(parameter, nope + module.v_head_dim, 0, nope), "k")


def _transformer_engine(module: Any) -> Iterator[HeadRows]:
    groups, D = module.num_gqa_groups, module.hidden_size_per_attention_head
    per_group = {"query": module.num_attention_heads // groups, "key": 1, "value": 1}
    shares: dict[str, Share] = {"query": "q", "key": "k"}
    for child, parts in {
        "qkv": ("query", "key", "value"),
        "layernorm_qkv": ("query", "key", "value"),
        "query_layer": ("query",),
        "layernorm_query": ("query",),
        "key_value": ("key", "value"),
    }.items():
        linear = getattr(module, child, None)
        if linear is None:
            continue
        counts = [per_group[part] for part in parts]
        for names in (linear.weight_names, linear.bias_names if linear.use_bias else []):
            if len(names) == len(parts):
                parameters = [getattr(linear, name) for name in names]
                heads = [_blocks(parameter, D) for parameter in parameters]
            elif names:
                parameters = [getattr(linear, names[0])] * len(parts)
                heads_of_all = _blocks(parameters[0], D)
                if module.qkv_weight_interleaved:
                    by_group = heads_of_all.view(groups, sum(counts), D)
                    heads = [part.reshape(-1, D) for part in by_group.split(counts, 1)]
                else:
                    heads = list(heads_of_all.split([count * groups for count in counts]))
            else:
                continue
            for part, parameter, rows in zip(parts, parameters, heads, strict=True):
                if part in shares:
                    yield HeadRows(parameter, rows, shares[part])


def _refuse_qk_norm(name: str, module: Any) -> None:
    holders = [module, getattr(module, "qk_norm", None)]
    attributes = ("q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_layernorm", "qk_norm")
    for holder in holders:
        for attribute in attributes:
            norm = getattr(holder, attribute, None)
            if isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity) and not hasattr(norm, "logit_bound"):
                raise ValueError(
                    f"{name or type(module).__name__} has QK-norm ({attribute}), which undoes a change of the weights "
                    "before it and bounds the logits itself; leave QK-clip out, see QKNorm.logit_bound"
                )
    if isinstance(getattr(module, "W_q", None), SphereLinear):
        raise ValueError(
            f"{name or type(module).__name__} has query weights on the hypersphere, which a clip would take off it; "
            "rows of unit length can't grow, so leave QK-clip out"
        )


def _start_reporting(name: str, module: Any) -> None:
    rows = list(_rows(module))
    heads = max(len(r.rows) for r in rows if r.share == "q")
    device = rows[0].parameter.device
    if hasattr(module, "core_attention"):
        module.core_attention.return_max_logit = True
    elif "max_logits" not in module._buffers:
        raise ValueError(
            f"{name} does not say how large its logits are; call nsphere.hf.report_max_logits(model) before QKClip"
        )
    module.max_logits = torch.full((heads,), -torch.inf, device=device)
