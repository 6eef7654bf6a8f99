"""Between the ways in which a state dict may hold q, k and v: apart, one after the other, or interleaved by group."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

# what each projection of an attention makes
_PARTS = {
    "qkv": ("query", "key", "value"),
    "layernorm_qkv": ("query", "key", "value"),
    "key_value": ("key", "value"),
    "layernorm_query": ("query",),
}


def convert_state_dict(
    state_dict: Mapping[str, Any], module: nn.Module, *, qkv_weight_interleaved: bool = True
) -> dict[str, Any]:
    """A state dict as `module` takes it, whatever fuse_qkv_params and qkv_weight_interleaved it was saved with.

    The module is one of this library's, or one of Transformer Engine's (untested on real Transformer Engine); nothing
    but its attributes and keys is read. A module built like the one that was saved needs no conversion: keys and layout
    are Transformer Engine's.

    Args:
        state_dict: of a MultiheadAttention, a TransformerLayer, or a model that holds some.
        module: what is to load it.
        qkv_weight_interleaved: of fused parameters in the state dict, which do not show it: whether their rows go
            group by group.

    Returns:
        A dict with the same tensors, those of q, k and v rearranged.

    Raises:
        ValueError: for a module without attention, a state dict that holds nothing of its attentions' q, k and v, or
            one saved with other heads, groups or widths.
    """
    if not isinstance(state_dict, Mapping) or not isinstance(module, nn.Module):
        raise ValueError(
            f"convert_state_dict got {type(state_dict).__name__} and {type(module).__name__}; give a state dict and "
            "the module that is to load it"
        )
    converted = dict(state_dict)
    attentions = {
        name: m
        for name, m in module.named_modules()
        if hasattr(m, "qkv_weight_interleaved") and hasattr(m, "num_gqa_groups")
    }
    if not attentions:
        raise ValueError(
            f"{type(module).__name__} holds no MultiheadAttention; convert_state_dict takes the module that is to load "
            "the state dict"
        )
    found = False
    for name, attention in attentions.items():
        prefix = f"{name}." if name else ""
        for child, names in _PARTS.items():
            target = getattr(attention, child, None)
            if target is not None:
                for kind in ("weight", "bias"):
                    fused = target.weight_names == ["weight"]
                    where = f"{prefix}{child}."
                    found |= _convert(converted, where, kind, names, attention, fused, qkv_weight_interleaved)
    if not found:
        keys, where = next(iter(state_dict), ""), next(iter(attentions)) or "the module itself"
        raise ValueError(
            f"the state dict, with keys such as {keys!r}, holds no q, k and v of {type(module).__name__}'s attentions, "
            f"the first of which is {where}; give the module that is to load it, and keys without a prefix"
        )
    return converted


def _convert(
    state: dict[str, Any],
    prefix: str,
    kind: str,
    names: tuple[str, ...],
    attention: Any,
    fused: bool,
    interleaved: bool,
) -> bool:
    """Rearrange one weight or bias in place; whether the state dict holds it."""
    apart_keys, fused_key = [f"{prefix}{name}_{kind}" for name in names], f"{prefix}{kind}"
    groups, head_dim = attention.num_gqa_groups, attention.hidden_size_per_attention_head
    heads = {"query": attention.num_attention_heads // groups, "key": 1, "value": 1}
    counts = [heads[name] for name in names]
    rows = {key: count * groups * head_dim for key, count in zip(apart_keys, counts, strict=True)}
    for key, expected in {**rows, fused_key: sum(rows.values())}.items():
        if key in state and len(state[key]) != expected:
            raise ValueError(
                f"{key} has {len(state[key])} rows, and {attention.num_attention_heads} heads of {head_dim} in "
                f"num_gqa_groups={groups} take {expected}; give a module of the heads and groups it was saved with"
            )
    if fused_key in state:
        parts = _apart(state.pop(fused_key), counts, groups, head_dim, interleaved and len(names) > 1)
    elif apart_keys[0] in state:
        missing = [key for key in apart_keys if key not in state]
        if missing:
            raise ValueError(f"the state dict has {apart_keys[0]} and not {', '.join(missing)}; give all of them")
        parts = [state.pop(key) for key in apart_keys]
    else:
        return False
    if fused:
        state[fused_key] = _together(
            parts, counts, groups, head_dim, attention.qkv_weight_interleaved and len(names) > 1
        )
    else:
        state.update(zip(apart_keys, parts, strict=True))
    return True


def _apart(rows: Tensor, counts: list[int], groups: int, head_dim: int, interleaved: bool) -> list[Tensor]:
    if not interleaved:
        return list(rows.split([count * groups * head_dim for count in counts]))
    by_group = rows.unflatten(0, (groups, sum(counts) * head_dim))
    return [part.flatten(0, 1) for part in by_group.split([count * head_dim for count in counts], 1)]


def _together(parts: list[Tensor], counts: list[int], groups: int, head_dim: int, interleaved: bool) -> Tensor:
    if not interleaved:
        return torch.cat(parts)
    by_group = [part.unflatten(0, (groups, count * head_dim)) for part, count in zip(parts, counts, strict=True)]
    return torch.cat(by_group, 1).flatten(0, 1)
