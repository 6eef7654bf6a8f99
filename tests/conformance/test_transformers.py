"""QK-norm against transformers' own attentions: q, k and v as their kernel receives them."""

import dataclasses
import warnings

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from check import ours, tables_of  # noqa: E402
from hf_attentions import REPORT, D, H, Run, raw, run  # noqa: E402
from hf_cases import CASES  # noqa: E402

from nsphere import families, hf  # noqa: E402
from nsphere.norms import L2Clip, StatisticNorm  # noqa: E402

transformers.logging.set_verbosity_error()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALES = (1.0, 1e-3)
COMBINATIONS = [(dtype, scale) for dtype in DTYPES for scale in SCALES]
_RUNS: dict[tuple[str, torch.dtype, float], Run] = {}


def cached_run(case, dtype, scale):
    key = case.name, dtype, scale
    if key not in _RUNS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of transformers' configs, which are tiny on purpose
            _RUNS[key] = run(case, dtype, scale)
    return _RUNS[key]


def theirs(r: Run, like) -> list[torch.Tensor]:
    """What reached the kernel; cross keys that follow the layer's own are cut off."""
    return [t[:, :, : o.shape[2]] for t, o in zip((r.q, r.k, r.v), like, strict=True)]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_what_reaches_the_kernel_is_the_same_bit_for_bit(case):
    for dtype, scale in COMBINATIONS:
        r = cached_run(case, dtype, scale)
        assert hf.family_of(r.module) == case.family
        got = ours(case, r)
        for name, a, b in zip("qkv", got, theirs(r, got), strict=True):
            assert a.dtype == b.dtype == dtype
            assert torch.equal(a, b), f"{name} differs in {(a != b).float().mean():.1%} ({dtype}, scale {scale})"
            assert a.abs().max() > 0
        if r.scaling is not None:
            qk = hf.qk_norm(r.module, rope=None if r.tables is not None else False)
            assert qk.softmax_scale == pytest.approx(float(r.scaling), rel=1e-6)
    line = f"{case.family:28s} {case.name.split(':')[1]:44s} fp32 bf16 fp16  x1 x1e-3  exact"
    REPORT.setdefault("conformance with transformers " + transformers.__version__, []).append(line)


def test_at_least_sixty_families():
    distinct = {case.family for case in CASES}
    assert len(distinct) >= 60
    REPORT.setdefault("conformance, summary", []).append(
        f"{len(distinct)} distinct families, {len(CASES)} attentions, {len(CASES) * len(COMBINATIONS)} comparisons"
    )


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def built(case, r, dtype, rounding="fused"):
    """Our QKNorm in this dtype, the raw q and k, and its result on them."""
    module_dtype = next(r.module.parameters()).dtype
    qk = hf.qk_norm(r.module, rounding=rounding, rope=None if r.tables is not None else False)
    qk = qk.to(dtype)  # shares its weights with the module, which is put back below
    q, k, _ = raw(case, r) if dtype == module_dtype else raw_in(case, r, module_dtype)
    tables = tables_of(r) if qk.rope is not None else None
    with torch.no_grad():
        result = qk(q.to(dtype), k.to(dtype), rope=tables, positions=r.positions)
    r.module.to(module_dtype)
    return result


def raw_in(case, r, module_dtype):
    r.module.to(module_dtype)
    return raw(case, r)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_fused_rounding_is_no_further_from_the_truth_than_the_module(case):
    r = cached_run(case, torch.bfloat16, 1.0)
    exact = [t.transpose(1, 2) for t in built(case, r, torch.float64)]
    fused = [t.transpose(1, 2) for t in built(case, r, torch.bfloat16)]
    for name, a, b, truth in zip("qk", fused, theirs(r, [*fused, fused[1]]), exact, strict=False):
        assert a.dtype == torch.bfloat16
        fused_error, module_error = rms(a.double() - truth), rms(b.double() - truth)
        # both are mere roundings of the truth where the module too rounds once
        assert fused_error <= module_error * 1.001, f"{name}: {fused_error:.3g} against {module_error:.3g}"


def _with_spec(qk, **changes):
    """The same module with each built-in norm's spec changed."""
    changed = False
    for name in ("q_norm", "k_norm"):
        norm = getattr(qk, name)
        if not isinstance(norm, StatisticNorm):
            continue
        new = {k: v(norm.spec) if callable(v) else v for k, v in changes.items()}
        spec = dataclasses.replace(norm.spec, **new)
        if spec != norm.spec:
            norm.spec, changed = spec, True
    return changed


def eps_times_ten(qk):
    specs = [n.spec for n in (qk.q_norm, qk.k_norm) if isinstance(n, StatisticNorm)]
    if not specs or any(not s.eps or s.eps_place != "inside" for s in specs):
        return False
    return _with_spec(qk, eps=lambda s: s.eps * 10)


def other_place(qk):
    if qk.rope is None or not isinstance(qk.k_norm, StatisticNorm):
        return False
    qk.place = "after" if qk.place == "before" else "before"
    return True


def other_cast(qk):
    def cast(spec):
        return {"after": "before", "before": "after", "torch": "before", "input": "before"}[spec.weight_cast]

    specs = [n.spec for n in (qk.q_norm, qk.k_norm) if isinstance(n, StatisticNorm)]
    if not specs or all(s.weight == "none" and s.weight_cast in ("before", "after") for s in specs):
        return False  # with nothing after the rounding there is one order only
    return _with_spec(qk, weight_cast=cast)


def zero_centred(qk):
    if not any(isinstance(n, StatisticNorm) and n.weight is not None for n in (qk.q_norm, qk.k_norm)):
        return False
    return _with_spec(qk, zero_centered=lambda s: not s.zero_centered)


def other_kind(qk):
    # RMS and L2 differ by √D; LayerNorm centres
    return _with_spec(qk, statistic=lambda s: {"rms": "layer", "layer": "rms", "l2": "rms"}[s.statistic])


def other_layout(qk):
    if qk.rope is None:
        return False
    layout = "interleaved" if qk.rope.layout == "half" else "half"
    qk.rope = dataclasses.replace(qk.rope, layout=layout, output="same", twice=qk.rope.twice or "halves")
    return True


def other_sign(qk):
    if qk.rope is None:
        return False
    qk.rope = dataclasses.replace(qk.rope, sign=-qk.rope.sign)
    return True


def other_rounding_of_rope(qk):
    if qk.rope is None:
        return False
    compute = torch.float32 if qk.rope.compute_dtype == "input" else "input"
    qk.rope = dataclasses.replace(qk.rope, compute_dtype=compute, table_dtype="input")
    return True


MUTATIONS = [
    eps_times_ten,
    other_place,
    other_cast,
    zero_centred,
    other_kind,
    other_layout,
    other_sign,
    other_rounding_of_rope,
]


def is_caught(case, mutation) -> bool | None:
    """Whether any comparison fails with the mutation; None where it does not apply."""
    for dtype, scale in COMBINATIONS:
        r = cached_run(case, dtype, scale)
        qk = hf.qk_norm(r.module, rope=None if r.tables is not None else False)
        if not mutation(qk):
            return None
        q, k, _ = raw(case, r)
        with torch.no_grad():
            q, k = qk(q, k, rope=tables_of(r) if qk.rope is not None else None, positions=r.positions)
        for a, b in zip((q, k), (r.q, r.k), strict=True):
            if not torch.equal(a.transpose(1, 2), b[:, :, : a.shape[1]]):
                return True
    return False


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.__name__)
def test_a_wrong_parameter_is_caught(mutation):
    caught, missed = [], []
    for case in CASES:
        result = is_caught(case, mutation)
        if result is not None:
            (caught if result else missed).append(case.name)
    REPORT.setdefault("mutations", []).append(
        f"{mutation.__name__:24s} caught in {len(caught)} of {len(caught) + len(missed)} attentions"
    )
    assert len(caught) >= 10
    assert not missed, f"{mutation.__name__} goes unseen in {missed}"


def test_l2_clip_is_inkling2s():
    modeling = pytest.importorskip("transformers.models.inkling2.modeling_inkling2")
    torch.manual_seed(0)
    scaled, plain = modeling.Inkling2ScaledL2Clip(H, D, 3.0), modeling.Inkling2L2Clip(3.0)
    nn.init.normal_(scaled.scale, 1.0, 0.3)
    our_scaled, our_plain = L2Clip(D, max_norm=3.0, num_heads=H), L2Clip(D, max_norm=3.0)
    our_scaled.weight = scaled.scale
    for dtype in DTYPES:
        x = (torch.randn(2, 5, H, D) * torch.tensor([0.01, 0.3, 1.0, 10.0, 100.0])[:, None, None]).to(dtype)
        assert torch.equal(our_scaled(x), scaled(x)) and torch.equal(our_plain(x), plain(x))
        assert (our_plain(x) == x).any() and (our_plain(x) != x).any()


@pytest.mark.parametrize("family", ["swinv2", "swin2sr"])
def test_cosine_attention(family):
    """Swin v2 has no kernel to stop at: its attention probabilities are compared."""
    name = {"swinv2": "Swinv2", "swin2sr": "Swin2SR"}[family]
    module = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    config = getattr(pytest.importorskip(f"transformers.models.{family}"), f"{name}Config")(window_size=2)
    torch.manual_seed(0)
    attention = getattr(module, f"{name}SelfAttention")(config, H * D, H, 2).eval()
    nn.init.normal_(attention.logit_scale, 3.0, 1.5)  # some above the clamp
    for dtype in (torch.float32, torch.bfloat16):
        attention = attention.to(dtype)
        x = torch.randn(3, 4, H * D).to(dtype)
        with torch.no_grad():
            expected = attention(x, output_attentions=True)[1]
            qk = hf.qk_norm(attention, multiplier=None, layout="bhsd")
            scale = hf.qk_norm(attention).multiplier().to(dtype).view(H, 1, 1)
            heads = [proj(x).unflatten(-1, (H, D)).transpose(1, 2) for proj in (attention.query, attention.key)]
            q, k = qk(*heads)
            bias = attention.continuous_position_bias_mlp(attention.relative_coords_table).view(-1, H)
            bias = bias[attention.relative_position_index.view(-1)].view(4, 4, H).permute(2, 0, 1)
            scores = q @ k.transpose(-1, -2) * scale + 16 * torch.sigmoid(bias)
        assert torch.equal(scores.softmax(-1), expected)
        assert qk.softmax_scale == 1.0


def functional_peers():
    """What the attentions that call functions, and reach no kernel, do to k."""
    from transformers.models.qwen3_next.modeling_qwen3_next import l2norm
    from transformers.models.reformer.modeling_reformer import EfficientAttentionMixin, LSHSelfAttention
    from transformers.models.yoso.modeling_yoso import normalize

    reformer = LSHSelfAttention.__new__(LSHSelfAttention)
    assert isinstance(reformer, EfficientAttentionMixin)
    return {
        "reformer": lambda k: reformer._len_and_dim_norm(k, 4),
        "yoso": normalize,
        "swiftformer": lambda k: normalize(k.flatten(-2)).unflatten(-1, k.shape[-2:]),
        "gated_deltanet": lambda k: l2norm(k.float(), dim=-1, eps=1e-6),
        "idefics_perceiver": nn.LayerNorm(16),
    }


@pytest.mark.parametrize("family", ["reformer", "yoso", "swiftformer", "gated_deltanet", "idefics_perceiver"])
def test_functional_norms(family):
    peer = functional_peers()[family]
    for dtype, scale in COMBINATIONS:
        torch.manual_seed(0)
        k = (torch.randn(2, 5, H, 16) * scale).to(dtype)
        qk = families.qk_norm(family, head_dim=16, num_heads=H)
        with torch.no_grad():
            _, got = qk.to(dtype)(k, k)
            expected = (peer.to(dtype) if isinstance(peer, nn.Module) else peer)(k)
        if family == "reformer" and dtype != torch.float32:  # it sums squares below fp32
            torch.testing.assert_close(got, expected, rtol=2e-2, atol=1e-4)
        else:
            assert torch.equal(got, expected.to(dtype)), f"{dtype} {scale}"


def test_configs_give_the_family_with_fresh_weights():
    config = transformers.Qwen3Config(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32, rms_norm_eps=1e-4
    )
    qk = hf.qk_norm(config)
    assert (qk.head_dim, qk.num_heads, qk.num_kv_heads) == (32, 4, 2)
    assert qk.q_norm.spec == dataclasses.replace(families.get("qwen3").q, eps=1e-4)
    olmo = hf.qk_norm(transformers.Olmo2Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=2))
    assert olmo.q_norm.weight.shape == (64,) and olmo.k_norm.weight.shape == (32,)


def test_weights_are_shared_with_the_module():
    case = next(c for c in CASES if c.family == "qwen3")
    r = run(case, torch.float32, 1.0)
    qk = hf.qk_norm(r.module)
    assert qk.q_norm.weight is r.module.q_norm.weight and qk.k_norm.weight is r.module.k_norm.weight


def test_what_is_no_attention_is_refused():
    with pytest.raises(ValueError, match="no QK-norm can be read from Linear"):
        hf.qk_norm(nn.Linear(2, 2))
