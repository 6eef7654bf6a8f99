"""Every argument of Transformer Engine's that is not implemented says so; those that are hints are taken."""

import inspect
import math
import re

import pytest
import torch

import nsphere
from nsphere import te
from nsphere.te.checks import RULES, UNSUPPORTED

NAN, INF = math.nan, math.inf

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


ATTENTIONS = ("MultiheadAttention", "TransformerLayer", "DotProductAttention")
LINEARS = ("Linear", "LayerNormLinear")
WITH_WEIGHTS = tuple(cls.__name__ for cls in MODULES if cls is not te.DotProductAttention)
NORMS = ("RMSNorm", "LayerNorm")
# (modules that take it, by name; the argument; values it can't have; what the message advises)
WRONG = [
    (ATTENTIONS[:2], "num_attention_heads", (0, -2, 2.0, True, None), "at least 1"),
    (("MultiheadAttention", "TransformerLayer", "LayerNormMLP"), "hidden_size", (0, "16"), "at least 1"),
    (("TransformerLayer", "LayerNormMLP"), "ffn_hidden_size", (0,), "at least 1"),
    (LINEARS, "in_features", (0, 4.0), "at least 1"),
    (LINEARS, "out_features", (-1,), "at least 1"),
    (ATTENTIONS, "num_gqa_groups", (0, -1), "at least 1, or"),
    (ATTENTIONS, "num_gqa_groups", (3,), "divisor"),
    (ATTENTIONS[:2], "kv_channels", (0, (8, 8)), "at least 1, or leave it out"),
    (("DotProductAttention",), "kv_channels", (0, (8,), None), "width of a head"),
    (("TransformerLayer",), "hidden_dropout", (-0.1, 1.5, NAN, "0.1"), "probability, from 0 to 1"),
    (ATTENTIONS, "attention_dropout", (2.0,), "probability"),
    (("TransformerLayer",), "drop_path_rate", (2.0, 1.0, -1.0), "from 0 to below 1"),
    (ATTENTIONS, "softmax_scale", (0.0, -1.0, NAN, INF, "x"), "positive"),
    (ATTENTIONS, "window_size", (4, (1,), (-2, 0), (1.0, 0), (True, 0)), "left, right"),
    (("TransformerLayer",), "enc_dec_window_size", (4,), "left, right"),
    (ATTENTIONS[::2], "attn_mask_type", ("cusal", None, 3), "choose from 'no_mask'"),
    (("TransformerLayer",), "self_attn_mask_type", ("cusal",), "choose from 'no_mask'"),
    (("TransformerLayer",), "enc_dec_attn_mask_type", ("cusal",), "choose from 'no_mask'"),
    (ATTENTIONS[::2], "qkv_format", ("bhsd",), "choose from 'sbhd'"),
    (("TransformerLayer",), "attn_input_format", ("bhsd",), "choose from 'sbhd'"),
    (ATTENTIONS[::2], "attention_type", ("both",), "choose from 'self', 'cross'"),
    (("TransformerLayer",), "layer_type", ("both",), "choose from 'encoder', 'decoder'"),
    (("MultiheadAttention", "LayerNormLinear", "LayerNormMLP"), "normalization", ("Batch",), "'RMSNorm'"),
    (ATTENTIONS[:2], "layernorm_epsilon", (-1e-5, NAN), "small positive"),
    (("LayerNormLinear", "LayerNormMLP"), "eps", (-1e-5,), "small positive"),
    (ATTENTIONS[:2], "qk_norm_eps", (-1e-5, None), "small positive"),
    (("TransformerLayer", "LayerNormMLP"), "activation", ("clamped_swiglu",), "choose from 'gelu'"),
    (("Linear",), "parallel_mode", ("both",), "None, 'column', 'row'"),
    (("LayerNormLinear",), "parallel_mode", ("row",), "None, 'column'"),
    (LINEARS, "parameters_split", ("query", {"a": 0}, (), ("a", "a"), ("a", "a_"), ("a.b",)), "give different names"),
    (("MultiheadAttention", "TransformerLayer", "Linear"), "init_method", ("normal",), "fills a weight"),
    (("MultiheadAttention", "TransformerLayer", "LayerNormMLP"), "output_layer_init_method", (0.02,), "fills a weight"),
    (WITH_WEIGHTS, "params_dtype", (torch.int64, "bf16"), "dtype"),
    (("RotaryPositionEmbedding",), "rotary_percent", (0.0, 1.5), "share"),
    (("RotaryPositionEmbedding",), "dim", (8.0, 0), "at least 1"),
    (("RotaryPositionEmbedding",), "rotary_base", (0.0,), "positive"),
    (("RotaryPositionEmbedding",), "seq_len_interpolation_factor", (0,), "positive"),
    ((*WITH_WEIGHTS, *NORMS), "device", ("gpu", "cuda:99", 1.5), "a device that is there"),
    (WITH_WEIGHTS, "bias", ("no", 1, None), "True or False"),
    (("MultiheadAttention", *LINEARS, "LayerNormMLP"), "return_bias", ("no",), "True or False"),
    ((*ATTENTIONS[:2], "LayerNormLinear", "LayerNormMLP", *NORMS), "zero_centered_gamma", ("no",), "True or False"),
    (("MultiheadAttention", "LayerNormMLP"), "return_layernorm_output", (1,), "True or False"),
    (("MultiheadAttention",), "input_layernorm", (0,), "True or False"),
    (ATTENTIONS[:2], "fuse_qkv_params", ("no",), "True or False"),
    (ATTENTIONS[:2], "qkv_weight_interleaved", ("no",), "True or False"),
    (ATTENTIONS[:2], "rotary_pos_interleaved", ("no",), "True or False"),
    (ATTENTIONS[:2], "qk_norm_before_rope", ("before",), "True or False"),
    (ATTENTIONS[:2], "set_parallel_mode", ("no",), "True or False"),
    (("TransformerLayer",), "apply_residual_connection_post_layernorm", ("no",), "True or False"),
    (("TransformerLayer",), "output_layernorm", ("no",), "True or False"),
    (("TransformerLayer",), "parallel_attention_mlp", ("no",), "True or False"),
    (("Linear",), "save_original_input", ("no",), "True or False"),
    (("DotProductAttention",), "return_max_logit", ("no",), "True or False"),
    (("RotaryPositionEmbedding",), "interleaved", ("no",), "True or False"),
    ((*ATTENTIONS, *LINEARS), "sequence_parallel", ("no",), "True or False, or leave it out"),
    (ATTENTIONS, "bottom_right_diagonal", ("no",), "True or False, or leave it out"),
    (("TransformerLayer",), "enc_dec_bottom_right_diagonal", ("no",), "True or False, or leave it out"),
    (NORMS, "normalized_shape", (0, "8", 4.0, (8.0,)), "at least 1"),
    ((*NORMS, "L2Normalization"), "eps", (-1e-5, "x"), "small positive"),
]  # fmt: skip


@pytest.mark.parametrize(("modules", "name", "values", "advice"), WRONG, ids=[f"{w[1]}-{w[3]}" for w in WRONG])
def test_a_value_that_can_not_be(modules, name, values, advice):
    shapes = {cls.__name__: shape for cls, shape in MODULES.items()}
    shapes |= {"RotaryPositionEmbedding": (8,), "RMSNorm": (8,), "LayerNorm": (8,), "L2Normalization": ()}
    for owner in modules:
        cls = getattr(te, owner)
        taken = list(inspect.signature(cls).parameters)[: len(shapes[owner])]
        arguments = dict(zip(taken, shapes[owner], strict=True))
        cls(**arguments)
        for value in values:
            with pytest.raises(
                ValueError, match=rf"{owner} got {name}={re.escape(repr(value))}.*; .*{re.escape(advice)}"
            ):
                cls(**arguments | {name: value})


def test_the_table_of_rules_is_covered():
    elsewhere = {"dtype", "pretrained_max_position_embeddings", "checkpoint_core_attention", "max_seq_len", "offset"}
    assert {name for _, name, _, _ in WRONG} >= set(RULES) - elsewhere
    with pytest.raises(ValueError, match="RMSNorm got dtype=torch.int64; give a floating-point dtype"):
        te.RMSNorm(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="LayerNorm got eps=nan; give 0 or a small"):
        te.LayerNorm(4, eps=NAN)
    with pytest.raises(ValueError, match="pretrained_max_position_embeddings=-1; give a positive"):
        te.RotaryPositionEmbedding(4, pretrained_max_position_embeddings=-1)
    for length in (-1, 0, 2.0, "4"):
        with pytest.raises(
            ValueError, match=f"RotaryPositionEmbedding got max_seq_len={length!r}; give a whole number"
        ):
            te.RotaryPositionEmbedding(4)(length)
    with pytest.raises(ValueError, match="RotaryPositionEmbedding got offset=-1; give a whole number, at least 0"):
        te.RotaryPositionEmbedding(4)(4, offset=-1)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"hidden_size": 15}, "not divisible by num_attention_heads=2"),
        ({"qk_norm_type": "Lp"}, "qk_norm_type='Lp': unknown norm.*or 'L2Normalization', 'RMSNorm', 'LayerNorm'"),
        ({"qk_norm_type": "rms", "qk_norm_eps": 1e-3}, "qk_norm_eps=0.001 is for L2Normalization"),
        (
            {"qk_norm_type": nsphere.QKNorm("rms", head_dim=8), "qk_norm_eps": 1e-3},
            "qk_norm_eps=0.001 is for L2Normalization",
        ),
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


CROSS = {"attention_type": "cross", "attn_mask_type": "no_mask"}
PADDING = {"attn_mask_type": "padding"}
PACKED = {"qkv_format": "thd", "attn_mask_type": "padding"}
X, ENCODER = torch.randn(4, 2, 16), torch.randn(5, 2, 16)
ENDS = torch.tensor([0, 3, 7])


@pytest.mark.parametrize(
    ("build", "x", "call", "message"),
    [
        ({}, X, {"encoder_output": X}, "takes no encoder_output; leave it out"),
        (CROSS, X, {}, "got none; pass encoder_output"),
        (CROSS, X, {"encoder_output": ENCODER[:, :1]}, r"16\) and encoder_output .*\(5, 1, 16\); give as many"),
        (CROSS | {"qkv_format": "bshd"}, X, {"encoder_output": ENCODER}, "give as many sequences"),
        (CROSS, X, {"encoder_output": ENCODER[0]}, r"encoder_output .*\(2, 16\); give 3 dims, \[T, B"),
        (CROSS, X, {"encoder_output": ENCODER[..., :9]}, r"encoder_output \[..., 16\] and got .*\(5, 2, 9\)"),
        (PACKED, X, {}, "give 2 dims"),
        ({}, X[0], {}, r"hidden_states torch.float32 \(2, 16\); give 3 dims, \[T, B, hidden_size\]"),
        ({}, [[1.0]], {}, r"hidden_states \[\[1.0\]\] of list; give 3 dims"),
        ({}, X[..., :9], {}, r"MultiheadAttention takes hidden_states \[..., 16\] and got torch.float32 \(4, 2, 9\)"),
        ({}, torch.ones(4, 2, 16, dtype=torch.int64), {}, r"torch.int64 \(4, 2, 16\); give a floating-point tensor"),
        ({"params_dtype": torch.bfloat16}, X, {}, "parameters of torch.bfloat16 and got torch.float32; cast the input"),
        ({}, X, {"rotary_pos_emb": torch.randn(4, 8)}, r"\(4, 8\); give the angles as \[S, 1, 1, R\]"),
        ({}, X, {"rotary_pos_emb": "rope"}, r"'rope' of str; give the angles as"),
        ({}, X, {"rotary_pos_emb": (torch.zeros(4, 1, 1, 8),)}, r"tuple of \(torch.float32 .*; give the angles"),
        ({}, X, {"rotary_pos_emb": torch.ones(4, 1, 1, 8, dtype=torch.int64)}, "give the angles"),
        ({}, X, {"rotary_pos_emb": torch.randn(4, 1, 1, 10)}, "turns 10 dims of 8"),
        ({}, X, {"rotary_pos_emb": torch.randn(4, 1, 1, 0)}, "turns 0 dims of 8"),
        ({}, X, {"rotary_pos_emb": torch.randn(3, 1, 1, 8)}, "3 positions and the sequence has 4"),
        (CROSS, X, {"encoder_output": ENCODER, "rotary_pos_emb": torch.randn(4, 1, 1, 8)}, "4 positions .* has 5"),
        ({}, X, {"rotary_pos_emb": (torch.zeros(4, 1, 1, 8), torch.zeros(4, 1, 1, 4))}, "tables of one width"),
        ({"qk_norm_type": nsphere.QKNorm("rms", head_dim=8, rope=nsphere.RopeSpec(8))}, X, {}, "pass rotary_pos_emb"),
        ({}, X, {"attn_mask_type": "cusal"}, "choose from"),
        ({}, X, {"window_size": 4}, r"MultiheadAttention got window_size=4; give \(left, right\)"),
        ({}, X, {"checkpoint_core_attention": "no"}, "checkpoint_core_attention='no'; give True or False"),
        ({}, X, {"bottom_right_diagonal": "no"}, "bottom_right_diagonal='no'; give True or False, or leave it out"),
        (PADDING, X, {}, "takes attention_mask or cu_seqlens_q; give one"),
        (PADDING, X, {"attention_mask": torch.zeros(3, 1, 1, 4).bool()}, r"queries .*\(3, 1, 1, 4\); give.*B = 2"),
        (PADDING, X, {"attention_mask": torch.zeros(2, 4).bool()}, r"torch.bool \(2, 4\); give bool \[B, 1, 1, 4\]"),
        (PADDING, X, {"attention_mask": torch.zeros(2, 1, 1, 4)}, "torch.float32 .*; give bool"),
        (PADDING, X, {"attention_mask": [[True]]}, "1 attention masks; give one, or two"),
        (
            CROSS | PADDING,
            X,
            {"encoder_output": ENCODER, "attention_mask": torch.zeros(2, 1, 1, 4).bool()},
            r"padding mask of the keys .*\[B, 1, 1, 5\]",
        ),
        ({}, X.to("meta"), {}, "Linear has parameters on cpu and got inp on meta; move one"),
        ({}, X, {"rotary_pos_emb": torch.zeros(4, 1, 1, 8, device="meta")}, "rotary_pos_emb on meta and input on cpu"),
        (PADDING, X, {"attention_mask": torch.zeros(2, 1, 1, 4, device="meta").bool()}, "mask on meta and input on"),
        ({"attn_mask_type": "arbitrary"}, X, {}, "attention_mask None of NoneType; give bool, broadcastable to"),
        ({}, X, {"attn_mask_type": "arbitrary", "attention_mask": torch.zeros(3, 1, 4, 4).bool()}, r"\[2, 2, 4, 4\]"),
        ({}, X, {"attn_mask_type": "arbitrary", "attention_mask": X[None, None, None] > 0}, "broadcastable"),
        (PADDING, X, {"cu_seqlens_q": torch.tensor([0.0, 3.0, 7.0])}, r"cu_seqlens_q torch.float32 \(3,\); give where"),
        (PADDING, X, {"cu_seqlens_q": [0, 3, 7]}, r"cu_seqlens_q \[0, 3, 7\] of list; give where"),
        (PADDING, X, {"cu_seqlens_q": torch.tensor([0, 3])}, "_q of 1 sequences and a batch of 2; give as many"),
        (PADDING, X, {"cu_seqlens_q": torch.tensor([0, 3, 9])}, r"_q=\[0, 3, 9\] for sequences of 4; .*at most 4"),
        (PADDING, X, {"cu_seqlens_q": torch.tensor([1, 3, 7])}, "begin with 0"),
        (PADDING, X, {"cu_seqlens_q": torch.tensor([0, 3, 2])}, "grow"),
        (PACKED, X[:, 0], {}, "without cu_seqlens_q; give the sequences' ends"),
        (PACKED, X.flatten(0, 1), {"cu_seqlens_q": ENDS, "attn_mask_type": "causal"}, "packed sequences take"),
        (PACKED, X.flatten(0, 1), {"cu_seqlens_q": ENDS, "cu_seqlens_kv": ENDS[:2]}, "1 sequences and 2 of queries"),
        (PACKED, X.flatten(0, 1), {"cu_seqlens_q": ENDS, "cu_seqlens_q_padded": ENDS[:2]}, "q_padded of 1 seq"),
        (PACKED, X.flatten(0, 1), {"cu_seqlens_q": torch.tensor([0, 9])}, r"\[\(0, 9\)\].*within 8 tokens; give cu"),
        (PACKED, X.flatten(0, 1), {"cu_seqlens_q": torch.tensor([1, 4])}, "begin with 0"),
        (PACKED, X.flatten(0, 1), {"cu_seqlens_q": torch.tensor([0, 4, 2])}, "do not follow each other"),
        (
            PACKED,
            X.flatten(0, 1),
            {"cu_seqlens_q": ENDS, "rotary_pos_emb": torch.randn(3, 1, 1, 8)},
            "3 positions and the sequence has 4",
        ),
    ],
)  # fmt: skip
def test_a_call_that_makes_no_sense(build, x, call, message):
    module = te.MultiheadAttention(16, 2, device="cpu", **build)
    with pytest.raises(ValueError, match=message):
        module(x, **call)


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        (
            (4, 2, 3, 8),
            None,
            None,
            r"query_layer torch.float32 \(4, 2, 3, 8\); give .*\[T, B, 2, 8\]",
        ),
        ((4, 2, 2, 6), None, None, r"give a floating-point tensor \[T, B, 2, 8\]"),
        (None, (4, 2, 2, 8), None, r"key_layer .*\[T, B, 1, 8\]"),
        (None, None, (4, 2, 1, 8), r"value_layer .*\[T, B, 1, 6\]"),
        (None, (4, 3, 1, 8), (4, 3, 1, 6), "give all one batch"),
        (None, None, (5, 2, 1, 6), "k and v one length"),
        ((4, 2, 8), None, None, "query_layer"),
    ],
)
def test_q_k_and_v_that_do_not_go_together(q, k, v, message):
    attention = te.DotProductAttention(2, (8, 6), 1)
    shapes = (q or (4, 2, 2, 8), k or (4, 2, 1, 8), v or (4, 2, 1, 6))
    with pytest.raises(ValueError, match=message):
        attention(*map(torch.randn, shapes))


def test_q_k_and_v_of_different_dtypes():
    x = torch.randn(4, 2, 2, 8)
    with pytest.raises(ValueError, match="give all one dtype"):
        te.DotProductAttention(2, 8)(x, x.double(), x)
    with pytest.raises(ValueError, match="torch.int64 .*; give a floating-point tensor"):
        te.DotProductAttention(2, 8)(x.long(), x.long(), x.long())


@pytest.mark.parametrize("cls", [te.Linear, te.LayerNormLinear, te.LayerNormMLP, te.RMSNorm, te.LayerNorm])
def test_input_of_another_width_or_dtype(cls):
    linear = cls in (te.Linear, te.LayerNormLinear, te.LayerNormMLP)
    module = cls(*(6, 4) if linear else (6,), device="cpu")
    with pytest.raises(ValueError, match=r"6.* and got .*\(3, 5\)"):
        module(torch.randn(3, 5))
    with pytest.raises(
        ValueError if linear else TypeError, match="torch.int64.*; give .*floating-point tensor"
    ) as told:
        module(torch.ones(3, 6, dtype=torch.int64))
    assert "params_dtype" not in str(told.value)
    if linear:
        with pytest.raises(ValueError, match="got inp None of NoneType"):
            module(None)
        with pytest.raises(ValueError, match="give params_dtype=torch.float64"):
            module(torch.randn(3, 6).double())


def test_what_a_layer_is_given():
    x = torch.randn(3, 2, 16)
    decoder = te.TransformerLayer(16, 16, 2, layer_type="decoder", device="cpu")
    with pytest.raises(ValueError, match="TransformerLayer .*give as many sequences"):
        decoder(x, encoder_output=torch.randn(3, 1, 16))
    with pytest.raises(ValueError, match="TransformerLayer attends to an encoder and got none"):
        decoder(x)
    with pytest.raises(ValueError, match="window_size=3"):
        decoder(x, encoder_output=x, enc_dec_window_size=3)
    with pytest.raises(ValueError, match="TransformerLayer got enc_dec_bottom_right_diagonal=3; give True or False"):
        decoder(x, encoder_output=x, enc_dec_bottom_right_diagonal=3)


def test_fp8_is_not_here_and_says_so():
    for context in (te.autocast, te.fp8_autocast, te.quantized_model_init, te.fp8_model_init):
        with context(enabled=False):
            assert te.Linear(4, 4, device="cpu")(torch.ones(1, 4)).dtype == torch.float32
        with pytest.raises(ValueError, match=f"te.{context.__name__} was asked for FP8.*no FP8; give enabled=False"):
            context()
    with te.fp8_autocast(enabled=False, fp8_recipe=object(), fp8_group=None):
        pass
    with pytest.raises(ValueError, match="asked for FP8"):
        te.autocast(enabled=False, calibrating=True)
    assert te.is_fp8_available() is False
    assert te.is_fp8_available(return_reason=True) == (False, "nsphere.te has no FP8")


def test_what_is_no_module():
    module = te.MultiheadAttention(16, 2, device="cpu")
    for given in ((3, module), (module, module), (module.state_dict(), module.state_dict())):
        with pytest.raises(ValueError, match="give a state dict and the module that is to load it"):
            te.convert_state_dict(*given)
    with pytest.raises(ValueError, match="install got None; give a module of Transformer Engine"):
        te.install(None, nsphere.QKNorm("rms", head_dim=8))


def test_state_dicts_that_can_not_be_converted():
    def make(**kwargs):
        return te.MultiheadAttention(16, 4, device="cpu", fuse_qkv_params=True, **kwargs)

    with pytest.raises(ValueError, match="Linear holds no MultiheadAttention; convert_state_dict takes the module"):
        te.convert_state_dict(make().state_dict(), torch.nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match="qkv.weight has 32 rows, and 4 heads of 4 in num_gqa_groups=4 take 48; give a"
    ):
        te.convert_state_dict(make(num_gqa_groups=2).state_dict(), make())
    apart = te.MultiheadAttention(16, 4, device="cpu", num_gqa_groups=2)
    with pytest.raises(ValueError, match="qkv.key_weight has 8 rows, and 4 heads of 4 in num_gqa_groups=1 take 4"):
        te.convert_state_dict(apart.state_dict(), make(num_gqa_groups=1))
    layer = te.TransformerLayer(16, 16, 4, device="cpu")
    with pytest.raises(ValueError, match="holds no q, k and v of TransformerLayer's attentions.*is self_attention"):
        te.convert_state_dict(make().state_dict(), layer)
    state = apart.state_dict()
    del state["qkv.value_weight"]
    with pytest.raises(ValueError, match="has qkv.query_weight and not qkv.value_weight; give all"):
        te.convert_state_dict(state, make(num_gqa_groups=2))


def test_other_errors():
    with pytest.raises(ValueError, match="parallel_attention_mlp=True excludes"):
        te.TransformerLayer(16, 16, 2, parallel_attention_mlp=True, output_layernorm=True)
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
    for norm in (te.L2Normalization(), te.RMSNorm(1), te.LayerNorm(1)):
        with pytest.raises(TypeError, match="Norm.* got list; give it a floating-point tensor"):
            norm([1.0])
