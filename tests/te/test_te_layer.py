"""nsphere.te's TransformerLayer against the formula, and the state dicts of all its modules against TE's keys."""

import math

import pytest
import te_formula as formula
import torch

import nsphere
from nsphere import te

HIDDEN, FFN, H, D = 16, 24, 2, 8


def layer(**kwargs):
    kwargs = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "params_dtype": torch.float64, "device": "cpu"} | kwargs
    module = te.TransformerLayer(HIDDEN, FFN, H, **kwargs)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator) + (1.0 if p.dim() == 1 else 0.0))
    return module


def part(state, prefix):
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS = {
    "gelu": gelu,
    "qgelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "relu": lambda x: x.clamp_min(0),
    "srelu": lambda x: x.clamp_min(0) ** 2,
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


def gated(act):
    return lambda x: act(x[..., :FFN]) * x[..., FFN:]


ACTIVATIONS |= {
    "geglu": gated(gelu),
    "qgeglu": gated(ACTIVATIONS["qgelu"]),
    "reglu": gated(ACTIVATIONS["relu"]),
    "sreglu": gated(ACTIVATIONS["srelu"]),
    "swiglu": gated(ACTIVATIONS["silu"]),
    "glu": gated(torch.sigmoid),
}


def normed(x, kind, state, zero=False):
    weight = state["layer_norm_weight"] + (1 if zero else 0)
    return formula.norm(x, kind, {"n.weight": weight, "n.bias": state.get("layer_norm_bias")}, "n", 1e-5)


def mlp(x, state, kind="LayerNorm", activation="gelu", zero=False):
    h = normed(x, kind, state, zero) @ state["fc1_weight"].T + state.get("fc1_bias", 0.0)
    return ACTIVATIONS[activation](h) @ state["fc2_weight"].T + state.get("fc2_bias", 0.0)


def check(module, expected_of, *, rotary=None, **kwargs):
    x = torch.randn(5, 2, HIDDEN, dtype=torch.float64, requires_grad=True)
    y = module(x, rotary_pos_emb=rotary, **kwargs)
    state = dict(module.named_parameters())
    expected = torch.stack([expected_of(x[:, b], state, b) for b in range(2)], 1)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    probe = torch.randn_like(y)
    leaves = [x, *state.values()]
    actual = torch.autograd.grad((y * probe).sum(), leaves)
    truth = torch.autograd.grad((expected * probe).sum(), leaves)
    for name, a, e in zip(["x", *state], actual, truth, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def causal(i, j):
    return j <= i


def attention(x, state, prefix="self_attention.", **kwargs):
    return formula.attention(x, part(state, prefix), H=H, K=H, D=D, **kwargs)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations(activation):
    module = layer(activation=activation).layernorm_mlp
    x = torch.randn(3, HIDDEN, dtype=torch.float64)
    y, bias = module(x)
    torch.testing.assert_close(y + bias, mlp(x, dict(module.named_parameters()), activation=activation))


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_encoder(fused, bias, normalization):
    rotary = te.RotaryPositionEmbedding(D)(5).cpu()
    module = layer(
        normalization=normalization, bias=bias, fuse_qkv_params=fused, qk_norm_type="RMSNorm", activation="swiglu"
    )

    def expected(x, state, b):
        angles = rotary.double()[:, 0, 0]
        h = x + attention(
            x, state, kind="RMSNorm", input_norm=normalization, fused=fused, angles=angles, allowed=causal
        )
        return h + mlp(h, part(state, "layernorm_mlp."), normalization, "swiglu")

    check(module, expected, rotary=rotary)


def test_parallel_attention_and_mlp():
    module = layer(parallel_attention_mlp=True, qk_norm_type="LayerNorm")
    check(
        module,
        lambda x, state, b: (
            x
            + attention(x, state, kind="LayerNorm", input_norm="LayerNorm", allowed=causal)
            + mlp(x, part(state, "layernorm_mlp."))
        ),
    )


def test_residual_after_the_norm():
    module = layer(apply_residual_connection_post_layernorm=True)

    def expected(x, state, b):
        own = part(state, "self_attention.layernorm_qkv.")
        h = normed(x, "LayerNorm", own) + attention(x, state, input_norm="LayerNorm", allowed=causal)
        own = part(state, "layernorm_mlp.")
        return normed(h, "LayerNorm", own) + mlp(h, own)

    check(module, expected)


def test_norm_at_the_output_and_zero_centered_gamma():
    module = layer(output_layernorm=True, zero_centered_gamma=True, normalization="RMSNorm")

    def expected(x, state, b):
        h = x + attention(x, state, allowed=causal)
        h = h + mlp(h, part(state, "layernorm_mlp."), "RMSNorm", zero=True)
        return formula.norm(h, "RMSNorm", {"n.weight": 1 + state["layernorm.weight"]}, "n", 1e-5)

    check(module, expected)


def test_decoder():
    module = layer(layer_type="decoder", qk_norm_type="L2Normalization", self_attn_mask_type="causal")
    encoder = torch.randn(7, 2, HIDDEN, dtype=torch.float64)

    def expected(x, state, b):
        kind = "L2Normalization"
        h = x + attention(x, state, kind=kind, input_norm="LayerNorm", allowed=causal)
        h = h + attention(h, state, "inter_attention.", kind=kind, input_norm="LayerNorm", encoder=encoder[:, b])
        return h + mlp(h, part(state, "layernorm_mlp."))

    check(module, expected, encoder_output=encoder)


def test_layouts_agree():
    module = layer(qk_norm_type="RMSNorm")
    x = torch.randn(5, 2, HIDDEN, dtype=torch.float64)
    y = module(x)
    for layout, mask in (("bshd", "causal"), ("thd", "padding_causal")):
        other = layer(qk_norm_type="RMSNorm", attn_input_format=layout, self_attn_mask_type=mask)
        given = x.transpose(0, 1)
        if layout == "thd":
            ends = torch.tensor([0, 5, 10], dtype=torch.int32)
            torch.testing.assert_close(other(given.flatten(0, 1), cu_seqlens_q=ends), y.transpose(0, 1).flatten(0, 1))
        else:
            torch.testing.assert_close(other(given), y.transpose(0, 1))


def test_hidden_dropout_and_drop_path():
    torch.manual_seed(0)
    x = torch.randn(64, 2, HIDDEN)
    module = te.TransformerLayer(
        HIDDEN, FFN, H, hidden_dropout=0.0, attention_dropout=0.0, drop_path_rate=0.5, device="cpu"
    )
    dropped = (module(x) == x).flatten(1).all(-1).float().mean()
    assert 0.1 < dropped < 0.45  # both blocks of a row: a quarter
    assert not torch.equal(te.TransformerLayer(HIDDEN, FFN, H, device="cpu")(x), x)
    module.eval()
    assert not (module(x) == x).flatten(1).all(-1).any()
    # what is kept is scaled up, so that the mean stays
    path = module.drop_path.train()
    assert set(path(torch.ones(64, 3)).unique().tolist()) == {0.0, 2.0}


def test_defaults_are_transformer_engines():
    """init: N(0, 0.023²), norms at 1, biases at 0; dropout 0.1; LayerNorm; sbhd."""
    torch.manual_seed(0)
    module = te.TransformerLayer(256, 512, 4, device="cpu")
    assert module.hidden_dropout == module.self_attention.core_attention.attention_dropout == 0.1
    for name, p in module.named_parameters():
        if name.endswith("layer_norm_weight"):
            assert torch.equal(p, torch.ones_like(p))
        elif p.dim() == 1:
            assert torch.equal(p, torch.zeros_like(p))
        else:
            assert abs(p.std().item() - 0.023) < 1e-3, name
    assert module.self_attention.core_attention.softmax_scale == 64**-0.5
    ones = te.MultiheadAttention(16, 2, init_method=torch.nn.init.ones_, device="cpu")
    assert torch.equal(ones.qkv.query_weight, torch.ones(16, 16)) and ones.proj.weight.std() > 0


def test_default_device():
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert {p.device.type for p in te.TransformerLayer(16, 16, 2, qk_norm_type="RMSNorm").parameters()} == {expected}


def test_meta_device_and_reset():
    module = te.MultiheadAttention(16, 2, qk_norm_type="RMSNorm", input_layernorm=True, device="meta")
    assert all(p.is_meta for p in module.parameters())
    module.to_empty(device="cpu")
    for m in module.modules():
        if hasattr(m, "reset_parameters"):
            m.reset_parameters()
    assert torch.isfinite(module(torch.randn(3, 1, 16))).all()


@pytest.mark.parametrize(
    "style", [{}, {"fuse_qkv_params": True, "num_gqa_groups": 1}, {"self_attn_mask_type": "padding"}]
)
def test_it_is_one_graph(style):
    module = layer(qk_norm_type="RMSNorm", **style)
    x, rotary = torch.randn(5, 2, HIDDEN, dtype=torch.float64), te.RotaryPositionEmbedding(4)(5).cpu()
    kwargs = {"rotary_pos_emb": rotary}
    if "self_attn_mask_type" in style:
        kwargs["attention_mask"] = (torch.arange(5) > 3).expand(2, 1, 1, 5)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, **kwargs), module(x, **kwargs))


# The keys below are what Transformer Engine 2.20 gives: read from its code, see docs/transformer-engine.md.
def keys(*names):
    return sorted(names)


def test_state_dict_keys_of_attention():
    apart = te.MultiheadAttention(16, 2, qk_norm_type="LayerNorm", input_layernorm=True, device="cpu")
    assert sorted(apart.state_dict()) == keys(
        "q_norm.weight", "q_norm.bias", "q_norm._extra_state", "k_norm.weight", "k_norm.bias", "k_norm._extra_state",
        "layernorm_qkv.layer_norm_weight", "layernorm_qkv.layer_norm_bias", "layernorm_qkv._extra_state",
        "layernorm_qkv.query_weight", "layernorm_qkv.key_weight", "layernorm_qkv.value_weight",
        "layernorm_qkv.query_bias", "layernorm_qkv.key_bias", "layernorm_qkv.value_bias",
        "core_attention._extra_state", "proj.weight", "proj.bias", "proj._extra_state",
    )  # fmt: skip
    fused = te.MultiheadAttention(16, 2, qk_norm_type="L2Normalization", fuse_qkv_params=True, bias=False, device="cpu")
    assert sorted(fused.state_dict()) == keys(
        "q_norm._extra_state", "k_norm._extra_state", "qkv.weight", "qkv._extra_state",
        "core_attention._extra_state", "proj.weight", "proj._extra_state",
    )  # fmt: skip
    cross = te.MultiheadAttention(16, 2, attention_type="cross", bias=False, device="cpu")
    assert sorted(cross.state_dict()) == keys(
        "query_layer.weight", "query_layer._extra_state", "key_value.key_weight", "key_value.value_weight",
        "key_value._extra_state", "core_attention._extra_state", "proj.weight", "proj._extra_state",
    )  # fmt: skip
    cross = te.MultiheadAttention(16, 2, attention_type="cross", bias=False, input_layernorm=True, device="cpu")
    assert {"layernorm_query.query_weight", "layernorm_query.layer_norm_weight"} <= set(cross.state_dict())


def test_state_dict_keys_of_a_layer():
    module = te.TransformerLayer(16, 24, 2, layer_type="decoder", normalization="RMSNorm", bias=False, device="cpu")
    assert sorted(k for k in module.state_dict() if not k.startswith(("self_attention", "inter_attention"))) == keys(
        "layernorm_mlp.layer_norm_weight", "layernorm_mlp.fc1_weight", "layernorm_mlp.fc2_weight",
        "layernorm_mlp._extra_state",
    )  # fmt: skip
    post = te.TransformerLayer(16, 24, 2, output_layernorm=True, device="cpu")
    assert {"layernorm.weight", "layernorm.bias", "self_attention.qkv.query_weight"} <= set(post.state_dict())


@pytest.mark.parametrize("attention_type", ["self", "cross"])
@pytest.mark.parametrize("input_layernorm", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_state_dicts_convert_between_all_layouts_and_back(bias, input_layernorm, attention_type):
    def make(fused, interleaved):
        torch.manual_seed(2)
        module = te.MultiheadAttention(
            24, 4, 8, num_gqa_groups=2, attention_type=attention_type, input_layernorm=input_layernorm, bias=bias,
            fuse_qkv_params=fused, qkv_weight_interleaved=interleaved, qk_norm_type="RMSNorm", attn_mask_type="no_mask",
            attention_dropout=0.0, device="cpu",
        )  # fmt: skip
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(torch.randn_like(p))
        return module

    x = torch.randn(3, 2, 24)
    kwargs = {"encoder_output": torch.randn(5, 2, 24)} if attention_type == "cross" else {}
    kinds = [(False, False), (True, False), (True, True)]
    for source_kind in kinds:
        source = make(*source_kind)
        for target_kind in kinds:
            target = make(*target_kind)
            there = te.convert_state_dict(source.state_dict(), target, qkv_weight_interleaved=source_kind[1])
            target.load_state_dict(there)
            torch.testing.assert_close(target(x, **kwargs), source(x, **kwargs))
            back = te.convert_state_dict(target.state_dict(), source, qkv_weight_interleaved=target_kind[1])
            assert sorted(back) == sorted(source.state_dict())
            for name, tensor in source.state_dict().items():
                assert torch.equal(back[name], tensor), name


def test_converting_a_whole_layer_touches_nothing_else():
    source, target = layer(fuse_qkv_params=True, layer_type="decoder"), layer(layer_type="decoder")
    target.load_state_dict(te.convert_state_dict(source.state_dict(), target))
    x, encoder = torch.randn(3, 2, HIDDEN).double(), torch.randn(4, 2, HIDDEN).double()
    torch.testing.assert_close(target(x, encoder_output=encoder), source(x, encoder_output=encoder))


def test_extra_state_may_be_missing_and_fp8_metadata_is_dropped():
    module = layer(qk_norm_type="RMSNorm")
    state = module.state_dict()
    assert all(t.numel() == 0 for name, t in state.items() if name.endswith("_extra_state"))
    module.load_state_dict({n: t for n, t in state.items() if not n.endswith("_extra_state")})
    state["layernorm_mlp._extra_state"] = torch.zeros(99, dtype=torch.uint8)
    with pytest.warns(UserWarning, match="FP8 metadata of a LayerNormMLP"):
        module.load_state_dict(state)
    state = module.state_dict()
    del state["layernorm_mlp.fc1_weight"]
    with pytest.raises(RuntimeError, match="fc1_weight"):
        module.load_state_dict(state)


class LikeTransformerEngine(torch.nn.Module):
    """Calls q_norm and k_norm where TE's MultiheadAttention does: around a rotation, before the softmax."""

    def __init__(self):
        super().__init__()
        self.q_norm = self.k_norm = None
        self.qk_norm_before_rope, self.hidden_size_per_attention_head = False, D

    def forward(self, q, k, table):
        if self.q_norm is not None and self.qk_norm_before_rope:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (te.rope.turn_each(x.transpose(0, 1), table[:, 0, 0], False).transpose(0, 1) for x in (q, k))
        if self.q_norm is not None and not self.qk_norm_before_rope:
            q, k = self.q_norm(q), self.k_norm(k)
        return torch.einsum("sbhd,tbhd->bhst", q, k) * D**-0.5


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("norm", ["l2", "rms"])
def test_install(norm, place):
    holder = torch.nn.Module()
    holder.attn = LikeTransformerEngine()
    per_dim = (H, 1 if place == "before" else D)
    options = {"multiplier": torch.rand(per_dim), "k_multiplier": 2.0} if norm == "rms" else {}
    own = nsphere.QKNorm(norm, head_dim=D, place=place, **options)
    assert te.install(holder, own) == ["attn"]
    q, k = torch.randn(4, 2, H, D), torch.randn(4, 2, H, D)
    rotary = te.RotaryPositionEmbedding(D)(4).cpu()
    logits = holder.attn(q, k, rotary)
    spec = nsphere.RopeSpec(D)
    whole = nsphere.QKNorm(own.q_norm, own.k_norm, head_dim=D, place=place, rope=spec, layout="sbhd", **options)
    q, k = whole(q, k, rope=spec.tables(4))
    torch.testing.assert_close(logits, torch.einsum("sbhd,tbhd->bhst", q, k) * own.softmax_scale, rtol=1e-4, atol=1e-5)


def test_install_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="install got 'rms'; give a nsphere.QKNorm"):
        te.install(LikeTransformerEngine(), "rms")
    with pytest.raises(ValueError, match="takes a QKNorm without rope="):
        te.install(LikeTransformerEngine(), nsphere.QKNorm("rms", head_dim=D, rope=nsphere.RopeSpec(D)))
    with pytest.raises(ValueError, match="head_dim=4 and the attention 8"):
        te.install(LikeTransformerEngine(), nsphere.QKNorm("rms", head_dim=4))
    with pytest.raises(ValueError, match="holds no MultiheadAttention"):
        te.install(torch.nn.Linear(2, 2), nsphere.QKNorm("rms", head_dim=D))
    with pytest.raises(ValueError, match="positions"):
        te.install(LikeTransformerEngine(), nsphere.QKNorm("rms", head_dim=D, multiplier=lambda p: p))
    with pytest.raises(ValueError, match="differs within a head"):
        te.install(LikeTransformerEngine(), nsphere.QKNorm("rms", head_dim=D, multiplier=torch.ones(D)))
