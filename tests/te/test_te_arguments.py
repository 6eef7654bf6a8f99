"""Every argument of Transformer Engine's that is not implemented says so; those that are hints are taken."""

import inspect

import pytest
import torch

import nsphere
from nsphere import te
from nsphere.te.base import UNSUPPORTED

OTHER = {  # a value that is not the default
    "tp_group": object(),
    "tp_size": 2,
    "cp_group": object(),
    "cp_global_ranks": [0],
    "cp_stream": object(),
    "fuse_wgrad_accumulation": True,
    "get_rng_state_tracker": lambda: None,
    "rng_tracker_name": "x",
    "ub_name": "qkv",
    "delay_wgrad_compute": True,
    "symmetric_ar_type": "x",
    "return_layernorm_output_gathered": True,
    "checkpoint": True,
    "activation_params": {"limit": 7.0},
    "softcap": 30.0,
    "softmax_type": "learnable",
    "inference_params": object(),
    "core_attention_bias_type": "alibi",
    "core_attention_bias": torch.zeros(1),
    "alibi_slopes": torch.zeros(2),
    "fp8_output": True,
    "fp8_grad": True,
    "thd_attention_policies": [{}],
    "thd_attention_policy_dispatch": "grouped",
    **{n: True for n in UNSUPPORTED if n.startswith("ub_") and n != "ub_name"},
}
MODULES = {
    te.MultiheadAttention: (16, 2),
    te.TransformerLayer: (16, 16, 2),
    te.DotProductAttention: (2, 8),
    te.Linear: (4, 4),
    te.LayerNormLinear: (4, 4),
    te.LayerNormMLP: (4, 4),
}


def unsupported(function, but=()):
    return [n for n in inspect.signature(function).parameters if n in UNSUPPORTED and n not in but]


NO_EFFECT_ALONE = ("ub_overlap_ag", "ub_overlap_rs", "ub_overlap_rs_dgrad", "ub_bulk_dgrad", "ub_bulk_wgrad")
IN_INIT = [
    (cls, name)
    for cls in MODULES
    for name in unsupported(cls.__init__, NO_EFFECT_ALONE if cls is te.TransformerLayer else ())
]
IN_FORWARD = [(cls, name) for cls in MODULES for name in unsupported(cls.forward)]


@pytest.mark.parametrize(("cls", "name"), IN_INIT, ids=lambda x: getattr(x, "__name__", x))
def test_construction_refuses(cls, name):
    with pytest.raises(ValueError, match=rf"{cls.__name__} got {name}=.*does not implement; leave it at"):
        cls(*MODULES[cls], **{name: OTHER[name]})


@pytest.mark.parametrize(("cls", "name"), IN_FORWARD, ids=lambda x: getattr(x, "__name__", x))
def test_a_call_refuses(cls, name):
    module = cls(*MODULES[cls])
    x = torch.randn(3, 2, 2, 8) if cls is te.DotProductAttention else torch.randn(3, 2, MODULES[cls][0])
    inputs = (x, x, x) if cls is te.DotProductAttention else (x,)
    with pytest.raises(ValueError, match=rf"{name}=.*does not implement; leave it at"):
        module(*inputs, **{name: OTHER[name]})


def test_the_table_of_unsupported_arguments_is_covered():
    seen = {name for _, name in IN_INIT + IN_FORWARD}
    assert seen == set(UNSUPPORTED) == set(OTHER)


def test_a_hint_is_taken():
    layer = te.TransformerLayer(
        16, 16, 2, seq_length=4, micro_batch_size=2, layer_number=3, name="block", set_parallel_mode=True,
        sequence_parallel=True, ub_overlap_ag=False, qk_norm_type="L2Normalization", device="cpu",
    )  # fmt: skip
    x = torch.randn(4, 2, 16)
    layer.eval()
    y = layer(x, is_first_microbatch=True, fast_zero_fill=False, max_seqlen_q=4, max_seqlen_kv=4)
    torch.testing.assert_close(y, layer(x))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"hidden_size": 15}, "not divisible by num_attention_heads=2"),
        ({"num_gqa_groups": 3}, "give a divisor"),
        ({"attention_type": "both"}, "attention_type='both'; choose from 'self', 'cross'"),
        ({"qkv_format": "bhsd"}, "qkv_format='bhsd'"),
        ({"normalization": "BatchNorm", "input_layernorm": True}, "normalization='BatchNorm'"),
        ({"qk_norm_type": "Lp"}, "qk_norm_type='Lp': unknown norm.*or 'L2Normalization', 'RMSNorm', 'LayerNorm'"),
        ({"qk_norm_type": "rms", "qk_norm_eps": 1e-3}, "qk_norm_eps=0.001 is for L2Normalization"),
        ({"qk_norm_type": nsphere.QKNorm("rms", head_dim=4)}, "head_dim=4 and the attention 8"),
        (
            {"qk_norm_type": nsphere.QKNorm("rms", head_dim=8, place="after"), "qk_norm_before_rope": True},
            "exclude each other",
        ),
        ({"qk_norm_type": nsphere.QKNorm("rms", head_dim=8, layout="bhsd")}, "layout='bhsd'"),
    ],
)
def test_attention_that_can_not_be_built(kwargs, message):
    with pytest.raises(ValueError, match=message):
        te.MultiheadAttention(**{"hidden_size": 16, "num_attention_heads": 2, "device": "cpu"} | kwargs)


@pytest.mark.parametrize(
    ("build", "call", "message"),
    [
        ({}, {"encoder_output": torch.randn(4, 2, 16)}, "takes no encoder_output"),
        ({"attention_type": "cross"}, {}, "takes encoder_output"),
        ({"qkv_format": "thd", "attn_mask_type": "padding"}, {}, "give 2 dims"),
        ({}, {"rotary_pos_emb": torch.randn(4, 8)}, r"\[S, 1, 1, R\]"),
        ({}, {"rotary_pos_emb": torch.randn(4, 1, 1, 10)}, "turns 10 dims of 8"),
        ({}, {"rotary_pos_emb": torch.randn(3, 1, 1, 8)}, "3 positions and the sequence 4"),
        ({}, {"rotary_pos_emb": (torch.zeros(4, 1, 1, 8), torch.zeros(4, 1, 1, 4))}, "tables of one width"),
        ({"params_dtype": torch.bfloat16}, {}, "parameters of torch.bfloat16 and got torch.float32"),
        ({"qk_norm_type": nsphere.QKNorm("rms", head_dim=8, rope=nsphere.RopeSpec(8))}, {}, "pass rotary_pos_emb"),
    ],
)
def test_a_call_that_makes_no_sense(build, call, message):
    module = te.MultiheadAttention(16, 2, device="cpu", **build)
    with pytest.raises(ValueError, match=message):
        module(torch.randn(4, 2, 16), **call)


def test_other_errors():
    with pytest.raises(ValueError, match="layer_type='encoder' takes no"):
        te.TransformerLayer(16, 16, 2, device="cpu")(torch.randn(3, 2, 16), encoder_output=torch.randn(3, 2, 16))
    with pytest.raises(ValueError, match="parallel_attention_mlp=True excludes"):
        te.TransformerLayer(16, 16, 2, parallel_attention_mlp=True, output_layernorm=True)
    with pytest.raises(ValueError, match="activation='clamped_swiglu'"):
        te.LayerNormMLP(4, 4, activation="clamped_swiglu")
    with pytest.raises(ValueError, match="add up"):
        te.Linear(4, 6, parameters_split={"a": 2, "b": 2})
    with pytest.raises(ValueError, match="the last dimension alone"):
        te.RMSNorm((2, 3))
    with pytest.raises(ValueError, match="two names of one thing"):
        te.LayerNorm(4, dtype=torch.float32, params_dtype=torch.float32)
    with pytest.raises(ValueError, match="sequence_parallel=True"):
        te.RMSNorm(4, sequence_parallel=True)
    with pytest.raises(ValueError, match="even number"):
        te.RotaryPositionEmbedding(5)
    with pytest.raises(ValueError, match="two attentions"):
        te.TransformerLayer(16, 16, 2, layer_type="decoder", qk_norm_type=nsphere.RMSNorm(8), device="cpu")
    with pytest.raises(TypeError, match="floating-point"):
        te.L2Normalization()(torch.ones(3, dtype=torch.int64))
