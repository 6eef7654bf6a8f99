"""What a trained model looks like inside: condition numbers, attention logits, eigen learning rates, scales."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nsphere.hypersphere import Scale, max_norm_deviation
from nsphere.layers import Attention, Decoder, RopeTables
from nsphere.train.data import Batch

_HISTOGRAM_BINS = 40


def condition_number(weight: Tensor) -> float | None:
    """Largest over smallest singular value, in fp64; None for a singular matrix, which has none."""
    values = torch.linalg.svdvals(weight.detach().double())
    return (values[0] / values[-1]).item() if values[-1] > 0 else None


def distribution(values: Tensor) -> dict[str, Any]:
    """Mean, standard deviation, extremes and histogram of some numbers."""
    values = values.detach().double().flatten().cpu()
    counts, edges = torch.histogram(values, bins=_HISTOGRAM_BINS)
    return {
        "mean": values.mean().item(),
        "std": values.std(correction=0).item(),
        "min": values.min().item(),
        "max": values.max().item(),
        "histogram": {"edges": edges.tolist(), "counts": [int(c) for c in counts]},
    }


def max_attention_logits(model: Decoder, batch: Batch, max_rows: int = 8) -> list[float]:
    """Per block, the largest scale · q·k over heads and visible pairs, on the first rows of a batch."""
    largest: list[float] = [-math.inf] * len(model.blocks)

    def look(i: int, attention: Attention, args: tuple[Tensor, RopeTables, Tensor | None]) -> None:
        x, rope, mask = args[:3]
        q, k, _ = attention.qkv(x, rope)
        k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
        num_tokens = x.shape[1]
        visible = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=x.device).tril()
        for row in range(len(q)):
            seen = visible if mask is None else mask[row, 0]
            for head in range(q.shape[2]):  # one head at a time: T × T logits are as much as long contexts allow
                logits = q[row, :, head].float() @ k[row, :, head].float().t() * attention.qk_norm.softmax_scale
                largest[i] = max(largest[i], logits.masked_fill(~seen, -torch.inf).max().item())

    handles = [
        block.attn.register_forward_pre_hook(functools.partial(look, i))  # type: ignore[union-attr]
        for i, block in enumerate(model.blocks)
    ]
    try:
        with torch.no_grad():
            ids = batch.document_ids
            model.hidden(batch.inputs[:max_rows], None if ids is None else ids[:max_rows])
    finally:
        for handle in handles:
            handle.remove()
    return largest


def _matrices(block: nn.Module) -> dict[str, Tensor]:
    return {
        name.removesuffix(".weight").rpartition(".")[2]: weight
        for name, weight in block.named_parameters()
        if name.endswith(".weight") and weight.dim() == 2
    }


def inspect_model(model: Decoder, batch: Batch | None) -> dict[str, Any]:
    """The numbers behind the pictures of a model; see report/inside_figures.py for what each means.

    Args:
        model: not compiled, on the batch's device, in the autocast that is on.
        batch: validation data for the attention logits; None leaves them out.
    """
    layers = []
    max_logits: Sequence[float | None] = (
        [None] * len(model.blocks) if batch is None else max_attention_logits(model, batch)
    )
    for block, max_logit in zip(model.blocks, max_logits, strict=True):
        layer: dict[str, Any] = {
            "condition_numbers": {name: condition_number(weight) for name, weight in _matrices(block).items()},
            "max_attention_logit": max_logit,
        }
        for key, module in {
            "eigen_lr_attention": "eigen_lr_attn",
            "eigen_lr_mlp": "eigen_lr_mlp",
            "s_qk": "attn.qk_norm.multiplier.s_qk",
            "s_u": "mlp.W_u.scale",
            "s_v": "mlp.W_nu.scale",
        }.items():
            values = _scale(block, module)
            if values is not None:
                layer[key] = distribution(values.abs() if key.startswith("eigen_lr") else values)
        layers.append(layer)
    s_z = _scale(model, "head.scale")
    worst = max_norm_deviation(model)
    return {
        "layers": layers,
        "s_z": None if s_z is None else distribution(s_z),
        "max_norm_deviation": None if worst is None else worst.value,
    }


def _scale(owner: nn.Module, path: str) -> Tensor | None:
    module: Any = owner
    for name in path.split("."):
        module = getattr(module, name, None)
    return module() if isinstance(module, Scale) else None
