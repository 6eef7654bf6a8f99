"""What nsphere.te takes, and what it says to everything else, before any work is done.

`UNSUPPORTED` holds the arguments of Transformer Engine that are not implemented, `RULES` what the others may be. The
functions below them check what comes into a call.

Shape legend: B batch, T queries, S keys, H query heads, K key heads, D head_dim, N tokens of packed sequences.
"""

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# What is not implemented, and the default that means "not asked for". Arguments that only speed something up, or only
# name something, are accepted and need no entry: is_first_microbatch, fast_zero_fill, seq_length, micro_batch_size,
# max_seqlen_*, name, layer_number.
UNSUPPORTED: Mapping[str, Any] = {
    "tp_group": None,
    "tp_size": 1,
    "cp_group": None,
    "cp_global_ranks": None,
    "cp_stream": None,
    "fuse_wgrad_accumulation": False,
    "get_rng_state_tracker": None,
    "rng_tracker_name": None,
    "ub_tp_comm_overlap": False,
    "ub_overlap_ag": False,
    "ub_overlap_rs": False,
    "ub_overlap_rs_dgrad": False,
    "ub_bulk_dgrad": False,
    "ub_bulk_wgrad": False,
    "ub_name": None,
    "delay_wgrad_compute": False,
    "symmetric_ar_type": None,
    "return_layernorm_output_gathered": False,
    "checkpoint": False,
    "activation_params": None,
    "softcap": (0.0, None),
    "softmax_type": "vanilla",
    "inference_params": None,
    "core_attention_bias_type": "no_bias",
    "core_attention_bias": None,
    "alibi_slopes": None,
    "fp8_output": False,
    "fp8_grad": False,
    "thd_attention_policies": None,
    "thd_attention_policy_dispatch": "auto",
}

MASK_TYPES = (
    "no_mask",
    "padding",
    "causal",
    "padding_causal",
    "causal_bottom_right",
    "padding_causal_bottom_right",
    "arbitrary",
)
FORMATS = ("sbhd", "bshd", "thd")
NORMALIZATIONS = ("LayerNorm", "RMSNorm")
PLAIN_ACTIVATIONS = ("gelu", "qgelu", "relu", "srelu", "silu")
GATED_ACTIVATIONS = ("geglu", "qgeglu", "reglu", "sreglu", "swiglu", "glu")


@dataclass(frozen=True)
class Rule:
    """What an argument may be."""

    holds: Callable[[Any], bool]
    advice: str
    """What to give, as the end of a message."""


def _one_of(*allowed: Any) -> Rule:
    def holds(value: Any) -> bool:
        return (value is None and None in allowed) or (isinstance(value, str) and value in allowed)

    return Rule(holds, f"choose from {', '.join(map(repr, allowed))}")


def _or_none(rule: Rule) -> Rule:
    return Rule(lambda value: value is None or rule.holds(value), f"{rule.advice}, or leave it out")


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_window(value: Any) -> bool:
    pair = isinstance(value, tuple | list) and len(value) == 2
    return pair and all(_is_whole(side) and side >= -1 for side in value)


def _is_split(value: Any) -> bool:
    if not isinstance(value, tuple | list | Mapping) or not value:
        return False
    sizes = value.values() if isinstance(value, Mapping) else ()
    named = all(isinstance(name, str) and name.rstrip("_") and "." not in name for name in value)
    # "query_" and "query" both name query_weight
    return (
        named
        and len({name.rstrip("_") for name in value}) == len(value)
        and all(_is_whole(size) and size > 0 for size in sizes)
    )


def _is_device(value: Any) -> bool:
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError, ValueError):
        return False
    return device.type != "cuda" or (device.index or 0) < torch.cuda.device_count()


BOOL = Rule(lambda v: isinstance(v, bool), "give True or False")
COUNT = Rule(lambda v: _is_whole(v) and v > 0, "give a whole number, at least 1")
COUNT_OR_NONE = _or_none(COUNT)
FROM_ZERO = Rule(lambda v: _is_whole(v) and v >= 0, "give a whole number, at least 0")
POSITIVE = Rule(lambda v: _is_number(v) and v > 0, "give a positive number")
EPS = Rule(lambda v: _is_number(v) and v >= 0, "give 0 or a small positive number")
RATE = Rule(lambda v: _is_number(v) and 0 <= v <= 1, "give a probability, from 0 to 1")
BELOW_ONE = Rule(lambda v: _is_number(v) and 0 <= v < 1, "give a probability, from 0 to below 1")
SHARE = Rule(lambda v: _is_number(v) and 0 < v <= 1, "give a share, above 0 and at most 1")
WINDOW = _or_none(Rule(_is_window, "give (left, right), each a whole number of at least 0, or -1 for no limit"))
MASK = Rule(lambda v: isinstance(v, str) and mask_type(v) in MASK_TYPES, _one_of(*MASK_TYPES).advice)
FILLS = _or_none(Rule(callable, "give a function that fills a weight in place"))
DTYPE = _or_none(
    Rule(lambda v: isinstance(v, torch.dtype) and v.is_floating_point, "give a floating-point dtype, as torch.bfloat16")
)
DEVICE = _or_none(Rule(_is_device, "give a device that is there, as 'cpu' or 'cuda:0'"))
COLUMN = _one_of(None, "column")
HEAD_DIMS = Rule(
    lambda v: COUNT.holds(v) or (isinstance(v, tuple | list) and len(v) == 2 and all(map(COUNT.holds, v))),
    "give the width of a head, a whole number, or a pair of q's and k's width and v's",
)

RULES: Mapping[str, Rule] = {
    **dict.fromkeys(
        ("hidden_size", "ffn_hidden_size", "num_attention_heads", "in_features", "out_features", "dim"), COUNT
    ),
    **dict.fromkeys(("num_gqa_groups", "kv_channels"), COUNT_OR_NONE),
    **dict.fromkeys(("eps", "layernorm_epsilon", "qk_norm_eps"), EPS),
    **dict.fromkeys(("hidden_dropout", "attention_dropout"), RATE),
    "drop_path_rate": BELOW_ONE,
    "softmax_scale": _or_none(POSITIVE),
    **dict.fromkeys(("window_size", "enc_dec_window_size"), WINDOW),
    **dict.fromkeys(("attn_mask_type", "self_attn_mask_type", "enc_dec_attn_mask_type"), MASK),
    **dict.fromkeys(("qkv_format", "attn_input_format"), _one_of(*FORMATS)),
    "attention_type": _one_of("self", "cross"),
    "layer_type": _one_of("encoder", "decoder"),
    "normalization": _one_of(*NORMALIZATIONS),
    "activation": _one_of(*PLAIN_ACTIVATIONS, *GATED_ACTIVATIONS),
    "parallel_mode": _one_of(None, "column", "row"),
    "parameters_split": _or_none(
        Rule(_is_split, "give different names in a tuple, or a dict of names and numbers of rows")
    ),
    **dict.fromkeys(("init_method", "output_layer_init_method"), FILLS),
    **dict.fromkeys(("params_dtype", "dtype"), DTYPE),
    "device": DEVICE,
    **dict.fromkeys(("bias", "return_bias", "return_layernorm_output", "input_layernorm", "output_layernorm"), BOOL),
    **dict.fromkeys(("fuse_qkv_params", "qkv_weight_interleaved", "rotary_pos_interleaved", "interleaved"), BOOL),
    **dict.fromkeys(("apply_residual_connection_post_layernorm", "parallel_attention_mlp"), BOOL),
    **dict.fromkeys(("qk_norm_before_rope", "zero_centered_gamma", "return_max_logit"), BOOL),
    **dict.fromkeys(("set_parallel_mode", "save_original_input", "checkpoint_core_attention"), BOOL),
    **dict.fromkeys(("sequence_parallel", "bottom_right_diagonal", "enc_dec_bottom_right_diagonal"), _or_none(BOOL)),
    "max_seq_len": COUNT,
    "offset": FROM_ZERO,
    "rotary_percent": SHARE,
    "rotary_base": POSITIVE,
    **dict.fromkeys(("seq_len_interpolation_factor", "pretrained_max_position_embeddings"), _or_none(POSITIVE)),
}
"""What an argument of that name may be, wherever it is taken."""


def check_arguments(
    owner: str,
    arguments: Mapping[str, Any],
    *,
    ignored: tuple[str, ...] = (),
    other_rules: Mapping[str, Rule] | None = None,
) -> None:
    """Raise ValueError for the first argument that is not implemented, or not what it may be.

    Args:
        owner: who was given them.
        arguments: by name, such as `locals()` at the start of a constructor.
        ignored: names that have no effect in this place.
        other_rules: those of this owner, where they differ from `RULES`.
    """
    for name, default in UNSUPPORTED.items():
        if name in ignored or name not in arguments:
            continue
        value, defaults = arguments[name], default if isinstance(default, tuple) else (default,)
        if not any(value is d or value == d for d in defaults):
            raise ValueError(
                f"{owner} got {name}={value!r}, which nsphere.te does not implement; leave it at {defaults[0]!r}"
            )
    for name, rule in {**RULES, **(other_rules or {})}.items():
        if name in arguments and not rule.holds(arguments[name]):
            raise ValueError(f"{owner} got {name}={arguments[name]!r}; {rule.advice}")


def check_groups(owner: str, num_attention_heads: int, num_gqa_groups: int | None) -> None:
    """Raise ValueError unless the groups divide the heads."""
    if num_gqa_groups is not None and num_attention_heads % num_gqa_groups:
        raise ValueError(
            f"{owner} got num_gqa_groups={num_gqa_groups} for {num_attention_heads} heads; give a divisor of the heads"
        )


def mask_type(name: str) -> str:
    """The mask type by its usual name: "padding,causal" and "causal,padding" are "padding_causal"."""
    name = name.replace(",", "_")
    return "padding_causal" if name == "causal_padding" else name


def check_features(owner: str, name: str, x: Any, width: int, weight: Tensor | None = None) -> None:
    """Raise ValueError unless x is a floating-point tensor [..., width], of the weight's dtype and device if given.

    Under autocast any dtype will do.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise ValueError(f"{owner} got {name} {_shown(x)}; give a floating-point tensor [..., {width}]")
    if x.dim() == 0 or x.shape[-1] != width:
        raise ValueError(
            f"{owner} takes {name} [..., {width}] and got {_shown(x)}; give that width, or build it for another"
        )
    if weight is None:
        return
    if x.device != weight.device:
        raise ValueError(f"{owner} has parameters on {weight.device} and got {name} on {x.device}; move one")
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(
            f"{owner} has parameters of {weight.dtype} and got {x.dtype}; cast the input, give params_dtype={x.dtype}, "
            "or use torch.autocast"
        )


def check_hidden_states(owner: str, layout: str, x: Any, encoder_output: Any, *, cross: bool) -> None:
    """Raise ValueError for input of the wrong number of dims, and for an encoder's that does not go with it."""
    dims = {"sbhd": "[T, B, hidden_size]", "bshd": "[B, T, hidden_size]", "thd": "[N, hidden_size]"}[layout]
    rank = dims.count(",") + 1
    if cross != (encoder_output is not None):
        raise ValueError(
            f"{owner} attends to an encoder and got none; pass encoder_output"
            if cross
            else f"{owner} attends to its own input and takes no encoder_output; leave it out"
        )
    for name, given in (("hidden_states", x), *((("encoder_output", encoder_output),) if cross else ())):
        if not isinstance(given, Tensor) or given.dim() != rank:
            raise ValueError(f"{owner} with qkv_format={layout!r} got {name} {_shown(given)}; give {rank} dims, {dims}")
    if cross and _batch_and_length(layout, x)[0] != _batch_and_length(layout, encoder_output)[0]:
        raise ValueError(
            f"{owner} with qkv_format={layout!r} got hidden_states {_shown(x)} and encoder_output "
            f"{_shown(encoder_output)}; give as many sequences"
        )


def check_q_k_v(
    owner: str, layout: str, q: Any, k: Any, v: Any, heads: int, groups: int, head_dims: tuple[int, int]
) -> None:
    """Raise ValueError unless q, k and v are what an attention of this layout, heads and widths takes."""
    dims = {"sbhd": "[T, B, {}, {}]", "bshd": "[B, T, {}, {}]", "thd": "[N, {}, {}]"}[layout]
    sides = (("query_layer", q, heads, head_dims[0]), ("key_layer", k, groups, head_dims[0]))
    for name, x, count, width in (*sides, ("value_layer", v, groups, head_dims[1])):
        floats = isinstance(x, Tensor) and x.is_floating_point() and x.dim() == len(layout)
        if not floats or tuple(x.shape[-2:]) != (count, width):
            raise ValueError(
                f"{owner} with qkv_format={layout!r} got {name} {_shown(x)}; give a floating-point tensor "
                f"{dims.format(count, width)}"
            )
    if {k.dtype, v.dtype} != {q.dtype} or {k.device, v.device} != {q.device}:
        raise ValueError(
            f"{owner} got q {_shown(q)} on {q.device}, k {_shown(k)} on {k.device} and v {_shown(v)} on {v.device}; "
            "give all one dtype and one device"
        )
    if k.shape[:-2] != v.shape[:-2] or _batch_and_length(layout, q)[0] != _batch_and_length(layout, k)[0]:
        raise ValueError(
            f"{owner} got q {_shown(q)}, k {_shown(k)} and v {_shown(v)}; give all one batch, and k and v one length"
        )


def check_masks(
    owner: str, layout: str, kind: str, attention_mask: Any, ends: Mapping[str, Any], q: Tensor, k: Tensor, heads: int
) -> None:
    """Raise ValueError for a mask, or ends of sequences, that do not go with the mask type and the input.

    Only padding masks and "arbitrary" look at attention_mask. The numbers in `ends` are read on the CPU alone: on a
    GPU that would wait for it.

    Args:
        owner: who was given them.
        layout: of q and k.
        kind: the mask type.
        attention_mask: as it was given.
        ends: cu_seqlens_q, cu_seqlens_kv, cu_seqlens_q_padded and cu_seqlens_kv_padded, as they were given.
        q: the queries, or what they are made of.
        k: the keys, or what they are made of.
        heads: H.
    """
    (B, T), (_, S) = _batch_and_length(layout, q), _batch_and_length(layout, k)
    for mask in attention_mask if isinstance(attention_mask, tuple | list) else (attention_mask,):
        if isinstance(mask, Tensor) and mask.device != q.device and ("padding" in kind or kind == "arbitrary"):
            raise ValueError(f"{owner} got attention_mask on {mask.device} and input on {q.device}; move one")
    _check_ends(owner, layout, {name: given for name, given in ends.items() if given is not None}, B, (T, S))
    given = ends["cu_seqlens_q"] is not None
    if layout == "thd":
        if "padding" not in kind:
            raise ValueError(
                f"{owner} got qkv_format='thd' with attn_mask_type={kind!r}; packed sequences take 'padding', "
                "'padding_causal' or 'padding_causal_bottom_right'"
            )
        if not given:
            raise ValueError(f"{owner} got qkv_format='thd' without cu_seqlens_q; give the sequences' ends")
    elif "padding" in kind and attention_mask is not None:
        pair = attention_mask if isinstance(attention_mask, tuple | list) else (attention_mask, attention_mask)
        if len(pair) != 2:
            raise ValueError(
                f"{owner} got {len(pair)} attention masks; give one, or two: of the queries and of the keys"
            )
        for what, mask, length in (("queries", pair[0], T), ("keys", pair[1], S)):
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != (B, 1, 1, length):
                raise ValueError(
                    f"{owner} got a padding mask of the {what} that is {_shown(mask)}; give bool [B, 1, 1, {length}] "
                    f"with B = {B}, true where masked, or two such, of queries and of keys"
                )
    elif "padding" in kind and not given:
        raise ValueError(f"{owner} got attn_mask_type={kind!r}, which takes attention_mask or cu_seqlens_q; give one")
    elif kind == "arbitrary":
        whole = (B, heads, T, S)
        is_mask = isinstance(attention_mask, Tensor) and attention_mask.dtype == torch.bool
        if not is_mask or attention_mask.dim() > 4 or not _broadcasts(tuple(attention_mask.shape), whole):
            raise ValueError(
                f"{owner} got attn_mask_type='arbitrary' and attention_mask {_shown(attention_mask)}; give bool, "
                f"broadcastable to [B, H, T, S] = {list(whole)}, true where masked"
            )


def _check_ends(owner: str, layout: str, ends: Mapping[str, Any], B: int, lengths: tuple[int, int]) -> None:
    for name, given in ends.items():
        whole = isinstance(given, Tensor) and given.dtype in (torch.int32, torch.int64) and given.dim() == 1
        if not whole or len(given) < 2:
            raise ValueError(
                f"{owner} got {name} {_shown(given)}; give where the sequences end, an int32 tensor [B + 1] such as "
                "torch.tensor([0, 3, 8], dtype=torch.int32)"
            )
        first = ends.get("cu_seqlens_q", given)
        count = len(first) if layout == "thd" else B + 1
        if len(given) != count:
            sequences = f"{len(first) - 1} of queries" if layout == "thd" else f"a batch of {B}"
            raise ValueError(
                f"{owner} got {name} of {len(given) - 1} sequences and {sequences}; give as many ([B + 1] numbers)"
            )
        # of packed sequences the numbers are read, and looked at, where they are needed
        if layout != "thd" and given.device.type == "cpu" and not torch.compiler.is_compiling():
            length, each = lengths["kv" in name], given.diff()
            if given[0] != 0 or bool((each < 0).any()) or ("padded" not in name and bool((each > length).any())):
                raise ValueError(
                    f"{owner} got {name}={given.tolist()} for sequences of {length}; give numbers that begin with 0 "
                    f"and grow by at most {length}"
                )


def _batch_and_length(layout: str, x: Tensor) -> tuple[int, int]:
    """B and T of what is laid out so; of packed sequences 1 and N."""
    if layout == "thd":
        return 1, x.shape[0]
    return (x.shape[1], x.shape[0]) if layout == "sbhd" else (x.shape[0], x.shape[1])


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return all(n in (1, m) for n, m in zip(reversed(shape), reversed(to), strict=False))


def check_rotary(owner: str, layout: str, rotary: Any, head_dim: int, q: Tensor, k: Tensor) -> None:
    """Raise ValueError unless a table, or q's and k's, is [S, 1, 1, R] with R even, at most D, and S long enough.

    Args:
        owner: who was given it.
        layout: of q and k. How many positions packed sequences take is not looked at, see `check_positions`.
        rotary: one table or two.
        head_dim: D.
        q: the queries, or what they are made of.
        k: the keys, or what they are made of.
    """
    tables = rotary if isinstance(rotary, tuple | list) else (rotary, rotary)
    for table in tables:
        floats = isinstance(table, Tensor) and table.is_floating_point()
        if len(tables) != 2 or not floats or table.dim() != 4 or table.shape[1:3] != (1, 1):
            raise ValueError(
                f"{owner} got rotary_pos_emb {_shown(rotary)}; give the angles as [S, 1, 1, R], see "
                "RotaryPositionEmbedding, or a tuple of q's and k's"
            )
        if table.shape[3] % 2 or not 0 < table.shape[3] <= head_dim:
            raise ValueError(
                f"{owner} got rotary_pos_emb that turns {table.shape[3]} dims of {head_dim}; give an even number, at "
                "most those"
            )
        if table.device != q.device:
            raise ValueError(f"{owner} got rotary_pos_emb on {table.device} and input on {q.device}; move one")
    if tables[0].shape[3] != tables[1].shape[3]:
        raise ValueError(
            f"{owner} got rotary_pos_emb that turns {tables[0].shape[3]} dims of q and {tables[1].shape[3]} of k; give "
            "tables of one width"
        )
    if layout != "thd":
        for table, x in zip(tables, (q, k), strict=True):
            check_positions(owner, table, _batch_and_length(layout, x)[1])


def check_positions(owner: str, table: Tensor, num_positions: int) -> None:
    """Raise ValueError for a rotary table with fewer positions than that."""
    if len(table) < num_positions:
        raise ValueError(
            f"{owner} got rotary_pos_emb of {len(table)} positions and the sequence has {num_positions}; make it longer"
        )


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    if isinstance(value, tuple | list) and any(isinstance(item, Tensor) for item in value):
        return f"{type(value).__name__} of ({', '.join(map(_shown, value))})"
    return f"{value!r} of {type(value).__name__}"
