"""nsphere.te's attention against the formula in fp64: values and every gradient."""

import functools
import itertools

import pytest
import te_formula as formula
import torch
from tolerances import assert_close, error, floor

import nsphere
from nsphere import te

HIDDEN, H, D, R = 24, 4, 8, 4
KINDS = [None, "L2Normalization", "RMSNorm", "LayerNorm"]


def build(dtype=torch.float64, seed=0, **kwargs):
    """An attention with every parameter moved off its initial value."""
    kwargs = {"attention_dropout": 0.0, "kv_channels": D, "params_dtype": dtype, "device": "cpu"} | kwargs
    mha = te.MultiheadAttention(HIDDEN, H, **kwargs)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in mha.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator) + (1.0 if p.dim() == 1 else 0.0))
    return mha


def doubles(mha):
    """The parameters in fp64, as leaves."""
    return {n: p.detach().double().requires_grad_() for n, p in mha.named_parameters()}


def causal(i, j):
    return j <= i


def arrange(sequences, layout):
    """[T, d] each → what the layout wants, and the ends of packed sequences."""
    ends = torch.tensor([0, *itertools.accumulate(len(s) for s in sequences)], dtype=torch.int32)
    if layout == "thd":
        return torch.cat(sequences), ends
    return torch.stack(sequences, 1 if layout == "sbhd" else 0), ends


def take_apart(y, layout, lengths):
    if layout == "thd":
        return list(y.split(lengths))
    return list(y.unbind(1 if layout == "sbhd" else 0))


def compare(mha, layout, *, cross=False, rotary=None, dtype=torch.float64, lengths=None, **formula_kwargs):
    """Outputs, and the gradients of input, encoder and every parameter, for two sequences."""
    lengths = lengths or ([5, 3] if layout == "thd" else [4, 4])
    k_lengths = ([4, 6] if layout == "thd" else [6, 6]) if cross else lengths
    generator = torch.Generator().manual_seed(1)

    def make(length):
        return torch.randn(length, HIDDEN, generator=generator).to(dtype).requires_grad_()

    xs, encoders = [make(n) for n in lengths], [make(n) for n in k_lengths] if cross else None
    x, ends = arrange(xs, layout)
    kwargs = {}
    if cross:
        kwargs["encoder_output"], k_ends = arrange(encoders, layout)
    if layout == "thd":
        kwargs["cu_seqlens_q"] = ends
        kwargs["cu_seqlens_kv"] = k_ends if cross else ends
    if rotary is not None:
        kwargs["rotary_pos_emb"] = rotary
    actual = take_apart(mha(x, **kwargs), layout, lengths)

    weights = [torch.randn(n, HIDDEN, generator=generator, dtype=torch.float64) for n in lengths]
    sum((y.double() * w).sum() for y, w in zip(actual, weights, strict=True)).backward()
    results = dict(zip(("output 0", "output 1"), actual, strict=True))
    results |= {f"input {i}": x.grad for i, x in enumerate(xs)}
    results |= {f"encoder {i}": e.grad for i, e in enumerate(encoders or ())}
    results |= {name: p.grad for name, p in mha.named_parameters()}

    def written_out(to):
        state = {n: p.detach().to(to).requires_grad_() for n, p in mha.named_parameters()}
        own_xs = [t.detach().to(to).requires_grad_() for t in xs]
        own_encoders = [t.detach().to(to).requires_grad_() for t in encoders] if cross else [None] * len(xs)
        angles = None
        if rotary is not None:
            both = rotary if isinstance(rotary, tuple) else (rotary, rotary)
            angles = tuple(t.to(torch.promote_types(to, torch.float32))[:, 0, 0] for t in both)
        ys = [
            formula.attention(x, state, H=H, D=D, angles=angles, encoder=e, **formula_kwargs)
            for x, e in zip(own_xs, own_encoders, strict=True)
        ]
        sum((y.double() * w).sum() for y, w in zip(ys, weights, strict=True)).backward()
        found = dict(zip(("output 0", "output 1"), ys, strict=True))
        found |= {f"input {i}": x.grad for i, x in enumerate(own_xs)}
        found |= {f"encoder {i}": e.grad for i, e in enumerate(own_encoders) if cross}
        return found | {name: p.grad for name, p in state.items()}

    truth, plain = written_out(torch.float64), written_out(dtype)
    assert set(truth) == set(results)
    scale = max(t.abs().max().item() for name, t in truth.items() if "put" not in name)
    for name, expected in truth.items():
        if expected.abs().max() < 1e-9 * scale:  # a bias of k shifts all logits of a query alike: rounding is left
            assert results[name].abs().max() < 64 * torch.finfo(dtype).eps * scale, name
        else:
            close(results[name], expected, plain[name], name)


def close(actual, expected, plain, what):
    if actual.dtype == torch.float64:  # the cosines are fp32, whatever q is
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())
    else:
        # four times plain PyTorch's: gradients of eight numbers, in which one rounding more or less is a factor of two
        allowed = 2 * floor(actual.dtype) + 4 * error(plain, expected)
        assert error(actual, expected) <= allowed, f"{what}: {error(actual, expected):.3g} of {allowed:.3g}"


def table(S=8, width=R, **kwargs):
    return te.RotaryPositionEmbedding(width, **kwargs)(S).cpu()


@pytest.mark.parametrize("K", [4, 2])
@pytest.mark.parametrize("attention_type", ["self", "cross"])
@pytest.mark.parametrize("layout", ["sbhd", "bshd", "thd"])
@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_attention_is_the_formula(dtype, kind, before, layout, attention_type, K):
    cross = attention_type == "cross"
    mask = "no_mask" if cross else "causal"
    if layout == "thd":
        mask = "padding" if cross else "padding_causal"
    mha = build(
        dtype,
        num_gqa_groups=K,
        attention_type=attention_type,
        qkv_format=layout,
        attn_mask_type=mask,
        qk_norm_type=kind,
        qk_norm_before_rope=before,
    )
    allowed = None if cross else causal
    compare(mha, layout, cross=cross, rotary=table(), dtype=dtype, K=K, kind=kind, before=before, allowed=allowed)


@pytest.mark.parametrize("layout", ["sbhd", "thd"])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("K", [4, 2])
@pytest.mark.parametrize("attention_type", ["self", "cross"])
def test_fused_parameters_hold_q_k_and_v_group_by_group_or_one_after_the_other(attention_type, K, interleaved, layout):
    cross, thd = attention_type == "cross", layout == "thd"
    mha = build(
        num_gqa_groups=K,
        attention_type=attention_type,
        qkv_format=layout,
        attn_mask_type="padding" if thd else "no_mask",
        qk_norm_type="RMSNorm",
        fuse_qkv_params=True,
        qkv_weight_interleaved=interleaved,
        input_layernorm=True,
    )
    names = {n for n, _ in mha.named_parameters()}
    assert ("layernorm_query.weight" if cross else "layernorm_qkv.weight") in names
    compare(mha, layout, cross=cross, K=K, kind="RMSNorm", fused=True, interleaved=interleaved, input_norm="LayerNorm")


@pytest.mark.parametrize("rotary_interleaved", [False, True])
@pytest.mark.parametrize("width", [2, 4, 8])
def test_rotary_table_narrower_than_the_head_and_in_either_order(width, rotary_interleaved):
    mha = build(qk_norm_type="RMSNorm", rotary_pos_interleaved=rotary_interleaved)
    rotary = table(width=width, interleaved=rotary_interleaved)
    compare(
        mha,
        "sbhd",
        rotary=rotary,
        K=4,
        kind="RMSNorm",
        allowed=causal,
        rotary_interleaved=rotary_interleaved,
    )


def test_q_and_k_may_have_tables_of_their_own():
    mha = build(attention_type="cross", attn_mask_type="no_mask", qk_norm_type="LayerNorm", qk_norm_before_rope=True)
    tables = (table(S=4), table(S=6, rotary_base=100.0))
    compare(mha, "sbhd", cross=True, rotary=tables, K=4, kind="LayerNorm", before=True)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("layout", ["sbhd", "thd"])
@pytest.mark.parametrize("rotary_interleaved", [False, True])
def test_a_table_that_is_no_rotation_is_used_as_it_stands(rotary_interleaved, layout, before):
    rotary = torch.randn(6, 1, 1, R, generator=torch.Generator().manual_seed(3))
    mha = build(
        qk_norm_type="RMSNorm",
        qk_norm_before_rope=before,
        rotary_pos_interleaved=rotary_interleaved,
        qkv_format=layout,
        attn_mask_type="padding_causal" if layout == "thd" else "causal",
    )
    compare(
        mha,
        layout,
        rotary=rotary,
        K=4,
        kind="RMSNorm",
        before=before,
        allowed=causal,
        rotary_interleaved=rotary_interleaved,
    )


def test_a_changed_table_is_looked_at_again():
    mha = build(qk_norm_type="RMSNorm")
    x, rotary = torch.randn(4, 1, HIDDEN, dtype=torch.float64), table()
    first = mha(x, rotary_pos_emb=rotary)
    rotary.mul_(2)
    second = mha(x, rotary_pos_emb=rotary)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(second, mha(x, rotary_pos_emb=rotary.clone()))


@pytest.mark.parametrize("eps", [1e-6, 0.5])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_eps(kind, eps):
    compare(build(qk_norm_type=kind, qk_norm_eps=eps), "sbhd", K=4, kind=kind, eps=eps, allowed=causal)


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("attention_type", ["self", "cross"])
def test_input_layernorm(attention_type, normalization):
    cross = attention_type == "cross"
    mha = build(
        attention_type=attention_type,
        input_layernorm=True,
        normalization=normalization,
        attn_mask_type="no_mask",
        bias=False,
    )
    compare(mha, "sbhd", cross=cross, K=4, input_norm=normalization)


def test_zero_centered_gamma_of_the_input_norm():
    one, other = (build(input_layernorm=True, zero_centered_gamma=zero) for zero in (False, True))
    other.load_state_dict(one.state_dict())
    with torch.no_grad():
        other.layernorm_qkv.layer_norm_weight -= 1
    x = torch.randn(4, 2, HIDDEN, dtype=torch.float64)
    torch.testing.assert_close(one(x), other(x))
    fresh = te.MultiheadAttention(HIDDEN, H, input_layernorm=True, zero_centered_gamma=True, device="cpu")
    assert torch.equal(fresh.layernorm_qkv.layer_norm_weight, torch.zeros(HIDDEN))


def test_fp32_norm_weights_beside_bf16_do_not_widen_the_result():
    mha = build(torch.bfloat16, qk_norm_type="RMSNorm")
    mha.q_norm.float(), mha.k_norm.float()
    assert mha(torch.randn(4, 2, HIDDEN, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_autocast():
    mha = build(torch.float32, qk_norm_type="RMSNorm", input_layernorm=True)
    x = torch.randn(4, 2, HIDDEN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mha(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), mha(x), rtol=0.05, atol=0.1)


def test_beyond_transformer_engine_any_norm():
    per_head = build(
        torch.float32, qk_norm_type=functools.partial(nsphere.RMSNorm, weight="per_head"), num_gqa_groups=2
    )
    assert per_head.q_norm.weight.shape == (H, D) and per_head.k_norm.weight.shape == (2, D)
    zero = build(
        torch.float64, qk_norm_type=functools.partial(te.RMSNorm, zero_centered_gamma=True, dtype=torch.float64)
    )
    plain = build(torch.float64, qk_norm_type="RMSNorm", qk_norm_eps=1e-5)
    with torch.no_grad():
        for side in ("q_norm", "k_norm"):
            getattr(zero, side).weight.copy_(getattr(plain, side).weight - 1)
    x = torch.randn(4, 2, HIDDEN, dtype=torch.float64)
    torch.testing.assert_close(zero(x), plain(x))
    instance = nsphere.RMSNorm(D)
    assert build(torch.float32, qk_norm_type=instance).q_norm is instance
    assert build(torch.float32, qk_norm_type="l2").core_attention.softmax_scale == pytest.approx(D**0.5)


def test_each_head_has_its_own_weight():
    mha = build(torch.float64, qk_norm_type=functools.partial(nsphere.RMSNorm, weight="per_head", dtype=torch.float64))
    x = torch.randn(4, 2, HIDDEN, dtype=torch.float64)
    before = mha(x)
    state = doubles(mha)
    expected = []
    for b in range(2):
        parts = formula.project(x[:, b], state, "qkv", H, H, D, False, True, ("query", "key", "value"))
        heads = []
        for h in range(H):
            q, k = (
                formula.norm(parts[part][h], "RMSNorm", {"n.weight": state[f"{side}.weight"][h]}, "n", 1e-6)
                for part, side in (("query", "q_norm"), ("key", "k_norm"))
            )
            logits = (q @ k.T * D**-0.5).masked_fill(torch.ones(4, 4).triu(1).bool(), -torch.inf)
            heads.append(logits.softmax(-1) @ parts["value"][h])
        expected.append(torch.cat(heads, -1) @ state["proj.weight"].T + state["proj.bias"])
    torch.testing.assert_close(before, torch.stack(expected, 1))


def test_a_qk_norm_brings_its_place_its_multiplier_and_its_scale():
    from nsphere.multiplier import LearnedMultiplier

    own = nsphere.QKNorm("l2", head_dim=D, multiplier=LearnedMultiplier((H, D), init=1.5), place="before").double()
    mha = build(qk_norm_type=own)
    assert mha.qk_norm_before_rope and mha.core_attention.softmax_scale == pytest.approx(D**0.5)
    assert mha.q_norm is own.q_norm and "qk_norm.multiplier.weight" in mha.state_dict()
    x, rotary = torch.randn(4, 1, HIDDEN, dtype=torch.float64), table()
    y = mha(x, rotary_pos_emb=rotary)
    y.sum().backward()
    assert own.multiplier.weight.grad.abs().max() > 0
    with torch.no_grad():
        own.multiplier.weight.zero_()
    assert not torch.allclose(y, mha(x, rotary_pos_emb=rotary))


def test_softmax_scale():
    compare(
        build(qk_norm_type="L2Normalization", softmax_scale=3.0),
        "sbhd",
        K=4,
        kind="L2Normalization",
        scale=3.0,
        allowed=causal,
    )


def test_a_replaced_norm_is_used_and_a_copied_module_is_its_own():
    import copy

    mha = build(torch.float32, qk_norm_type="RMSNorm")
    x = torch.randn(4, 1, HIDDEN)
    before = mha(x, rotary_pos_emb=table())
    twin = copy.deepcopy(mha)
    with torch.no_grad():
        twin.q_norm.weight.zero_()
    torch.testing.assert_close(mha(x, rotary_pos_emb=table()), before)
    assert not torch.allclose(twin(x, rotary_pos_emb=table()), before)
    mha.q_norm = te.RMSNorm(D, device="cpu")
    with torch.no_grad():
        mha.q_norm.weight.fill_(3.0)
    assert not torch.allclose(mha(x, rotary_pos_emb=table()), before)


def test_norm_classes():
    x = torch.randn(3, D, dtype=torch.float64)
    state = {"n.weight": torch.randn(D).double(), "n.bias": torch.randn(D).double()}
    torch.testing.assert_close(te.L2Normalization(eps=0.1)(x), formula.norm(x, "L2Normalization", state, "n", 0.1))
    for cls in (te.RMSNorm, te.LayerNorm):
        module = cls(D, eps=0.1, device="cpu", dtype=torch.float64)
        assert torch.equal(module.weight, torch.ones(D).double())
        with torch.no_grad():
            for name, p in module.named_parameters():
                p.copy_(state[f"n.{name}"])
        assert_close(module(x), formula.norm(x, cls.__name__, state, "n", 0.1), what=cls.__name__)
        zero = cls((D,), eps=0.1, zero_centered_gamma=True, device="cpu", params_dtype=torch.float64)
        assert torch.equal(zero.weight, torch.zeros(D).double())
        torch.testing.assert_close(zero(x), cls(D, eps=0.1, device="cpu", dtype=torch.float64)(x))


def test_rotary_embedding():
    made = te.RotaryPositionEmbedding(8, rotary_percent=0.5, rotary_base=100.0)(3, offset=2).cpu()
    expected = torch.tensor([[p, p / 10.0] for p in (2.0, 3.0, 4.0)])
    torch.testing.assert_close(made, torch.cat((expected, expected), -1)[:, None, None])
    pairs = te.RotaryPositionEmbedding(4, rotary_base=100.0, interleaved=True)(3).cpu()
    torch.testing.assert_close(pairs[1, 0, 0], torch.tensor([1.0, 1.0, 0.1, 0.1]))
    squeezed = te.RotaryPositionEmbedding(4, 1.0, 2, 4)
    torch.testing.assert_close(squeezed(8)[7, 0, 0, 0].item(), 3.5)
    torch.testing.assert_close(squeezed(16)[12, 0, 0, 0].item(), 3.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda eps: te.LayerNormLinear(16, 24, eps=eps, bias=False),
        lambda eps: te.MultiheadAttention(
            16, 2, layernorm_epsilon=eps, input_layernorm=True, qk_norm_type="L2Normalization", qk_norm_eps=eps,
            attention_dropout=0.0, attn_mask_type="causal",
        ),
    ],
    ids=["LayerNormLinear", "MultiheadAttention"],
)  # fmt: skip
def test_one_compiled_function_meets_several_eps(make):
    torch._dynamo.reset()
    x = torch.randn(5, 2, 16, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(lambda module, x: module(x).sin(), backend="aot_eager", fullgraph=True)
    for eps in (1e-6, 0.5, 2.0):
        module, found = make(eps), []
        for call in (compiled, lambda module, x: module(x).sin()):
            leaf = x.clone().requires_grad_()
            y = call(module, leaf)
            found.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaf)))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
