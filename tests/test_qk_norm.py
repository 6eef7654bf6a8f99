import copy
import math
import warnings

import pytest
import torch
from tolerances import assert_close
from torch import nn
from torch.nn import functional as F

from nsphere import norms
from nsphere.multiplier import LearnedMultiplier
from nsphere.norms import L2Clip, L2Norm, RMSNorm, register_norm
from nsphere.qk_norm import QKNorm
from nsphere.rope import RopeSpec

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")

B, T, H, HKV, D = 2, 5, 4, 2, 16
ROPE = RopeSpec(D)


def qk_pair(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(B, T, h, D, generator=generator).to(dtype) for h in (H, HKV))


def make(kind="rms", **options):
    torch.manual_seed(0)
    options = {"head_dim": D, "num_heads": H, "num_kv_heads": HKV, "rope": ROPE, **options}
    if kind == "l2" and options.get("over", "head") != "head":  # no scale of its own
        options.setdefault("softmax_scale", "rsqrt")
    qk = QKNorm(kind, **options)
    for p in qk.parameters():
        nn.init.normal_(p, 1.0, 0.3)
    return qk


@pytest.fixture
def tables():
    return ROPE.tables(T)


def reordered(x, layout):
    if layout == "sbhd":
        return x.transpose(0, 1)
    if layout == "bhsd":
        return x.transpose(1, 2)
    return x.flatten(0, 1) if layout == "thd" else x


@pytest.mark.parametrize("over", ["head", "full", 8, 32, (2, 10)])
@pytest.mark.parametrize("cast", ["fused", "after"])
@pytest.mark.parametrize("layout", ["sbhd", "bhsd", "thd"])
def test_layouts_agree(layout, cast, over, tables):
    q, k = qk_pair()
    expected = make(over=over, weight_cast=cast)(q, k, rope=tables)
    if layout == "thd":  # packed: every token has its own row of the tables
        tables = tuple(t.repeat(B, 1) for t in tables)
    got = make(over=over, weight_cast=cast, layout=layout)(reordered(q, layout), reordered(k, layout), rope=tables)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, reordered(b, layout), rtol=1e-6, atol=1e-6)


def test_layouts_are_views_of_the_input_not_copies():
    projected = torch.randn(B, H, T, D, requires_grad=True)
    qk = make(layout="bhsd", rope=None)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        qk(projected, projected[:, :HKV])
    inputs = [t for t in kept if t.dim() == 4 and t.shape[-1] == D]
    assert len(inputs) == 2
    assert all(t.untyped_storage().data_ptr() == projected.untyped_storage().data_ptr() for t in inputs)


def test_tables_per_sequence_and_offsets(tables):
    q, k = qk_pair()
    qk = make()
    positions = torch.stack((torch.arange(T), torch.arange(T) + 40))
    batched = qk(q, k, rope=ROPE.tables(positions))
    for i, start in enumerate((0, 40)):
        alone = qk(q[i : i + 1], k[i : i + 1], rope=ROPE.tables(T, offset=start))
        for a, b in zip(batched, alone, strict=True):
            assert torch.equal(a[i : i + 1], b)


def test_grouped_queries_and_one_key_head():
    q = torch.randn(B, T, H, D)
    for heads in (1, 2, 4):
        k = torch.randn(B, T, heads, D)
        _, got = make(num_kv_heads=heads, rope=None)(q, k)
        torch.testing.assert_close(got, F.rms_norm(k, (D,), make(num_kv_heads=heads).k_norm.weight, 1e-6))


def test_norms_for_q_and_k():
    qk = QKNorm(L2Norm, RMSNorm, head_dim=D, softmax_scale=1.0)
    assert isinstance(qk.q_norm, L2Norm) and isinstance(qk.k_norm, RMSNorm)
    own = RMSNorm(D)
    qk = QKNorm(own, head_dim=D)
    assert qk.q_norm is own and qk.k_norm is not own  # k's weight is its own
    shared = QKNorm(own, own, head_dim=D)
    assert shared.k_norm is own and len(list(shared.parameters())) == 1
    assert set(make().state_dict()) == {"q_norm.weight", "k_norm.weight"}
    q, k = qk_pair()
    for a, b in zip(QKNorm(None, head_dim=D)(q, k), (q, k), strict=True):
        assert torch.equal(a, b)
    only_k = QKNorm(None, RMSNorm(D), head_dim=D)(q, k)
    assert torch.equal(only_k[0], q)
    torch.testing.assert_close(only_k[1], F.rms_norm(k, (D,), eps=1e-6))


def test_any_module_serves_as_norm(tables):
    class Doubling(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.gain = nn.Parameter(torch.full((dim,), 2.0))

        def forward(self, x):
            return x * self.gain

    q, k = qk_pair()
    qk = QKNorm(Doubling, head_dim=D, rope=ROPE)
    got = qk(q, k, rope=tables)
    plain = QKNorm(None, head_dim=D, rope=ROPE)(q, k, rope=tables)
    for a, b in zip(got, plain, strict=True):
        torch.testing.assert_close(a, 2 * b)
    sum(y.square().sum() for y in got).backward()
    assert qk.q_norm.gain.grad.abs().sum() > 0 and qk.k_norm.gain.grad.abs().sum() > 0
    layer = QKNorm(nn.LayerNorm, head_dim=D)(q, k)
    torch.testing.assert_close(layer[0], F.layer_norm(q, (D,)))


def test_a_registered_norm_works_by_name(monkeypatch):
    monkeypatch.setattr(norms, "_NORMS", dict(norms._NORMS))
    register_norm("halved")(lambda x: x / 2)
    q, k = qk_pair()
    got = QKNorm("halved", head_dim=D)(q, k)
    assert torch.equal(got[0], q / 2) and torch.equal(got[1], k / 2)


def test_what_a_subclass_adds_is_not_lost():
    class Doubled(RMSNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    class Squared(RMSNorm):
        def factor(self, dtype=None):
            return super().factor(dtype) ** 2

    q, k = qk_pair()
    plain = make(rope=None)
    for kind, factor in ((Doubled, 2.0), (Squared, plain.q_norm.weight.detach())):
        qk = make(kind, rope=None)
        torch.testing.assert_close(qk(q, k)[0], plain(q, k)[0] * factor)
    assert QKNorm(Doubled, head_dim=D).logit_bound() is None
    assert QKNorm(RMSNorm, head_dim=D).logit_bound() is not None


def test_hooks_of_a_norm_are_called():
    q, k = qk_pair()
    qk = make(rope=None)
    expected, k_expected = qk(q, k)
    seen = []
    handle = qk.q_norm.register_forward_hook(lambda module, args, y: seen.append(args[0].shape) or 3 * y)
    got, k_got = qk(q, k)
    assert seen == [q.shape]
    torch.testing.assert_close(got, 3 * expected)
    torch.testing.assert_close(k_got, k_expected)
    assert qk.logit_bound() is None
    handle.remove()
    assert torch.equal(qk(q, k)[0], expected)


def test_norms_and_multipliers_may_be_replaced():
    q, k = qk_pair()
    qk = make(rope=None)
    before = qk(q, k)[0]
    qk.multiplier = 3.0
    torch.testing.assert_close(qk(q, k)[0], 3 * before)
    qk.q_norm = L2Norm(D)
    torch.testing.assert_close(qk(q, k)[0], 3 * F.normalize(q, dim=-1))


@pytest.fixture
def ops(monkeypatch):
    """The calls of the fused op: which specs of norms it got."""
    import nsphere.qk_norm as module

    calls = []
    both, one = module.qk_norm_rope, module.norm_rope
    monkeypatch.setattr(module, "qk_norm_rope", lambda *a, **b: calls.append([a[2].norm, a[3].norm]) or both(*a, **b))
    monkeypatch.setattr(module, "norm_rope", lambda *a, **b: calls.append([a[1].norm]) or one(*a, **b))
    return calls


class Thirds(nn.Module):
    def forward(self, x):
        return x / 3


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("multiplier", [None, 1.7, lambda p: 1 + p])
def test_what_stands_beside_a_norm_of_ones_own_is_fused(place, multiplier, ops, tables):
    q, k = qk_pair()
    options = {"head_dim": D, "rope": ROPE, "place": place, "multiplier": multiplier, "k_multiplier": 0.5}
    qk = QKNorm(Thirds(), RMSNorm(D), **options)
    got = qk(q, k, rope=tables, positions=torch.arange(T))
    assert ops == [[None, qk.k_norm.spec]]  # q is turned and scaled in the op that k passes whole
    third = QKNorm(None, RMSNorm(D), **options)(q / 3, k, rope=tables, positions=torch.arange(T))
    for a, b in zip(got, third, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_one_side_is_fused_beside_another_that_is_not(ops, tables):
    q, k = qk_pair(torch.bfloat16)
    rope = RopeSpec(D, compute_dtype=torch.float32, table_dtype="input")
    stepwise, fused = RMSNorm(D, weight_cast="after"), RMSNorm(D)
    for first in (False, True):
        norms_of_both = (stepwise, fused) if first else (fused, stepwise)
        got = QKNorm(*norms_of_both, head_dim=D, rope=rope)(q, k, rope=tables)
        assert ops.pop() == [fused.spec] and not ops
        own = [QKNorm(norm, head_dim=D, rope=rope)(q, k, rope=tables) for norm in norms_of_both]
        assert torch.equal(got[0], own[0][0]) and torch.equal(got[1], own[1][1])
        ops.clear()


def test_where_nothing_is_to_be_done_nothing_is(ops):
    q, k = qk_pair()
    got = QKNorm(RMSNorm, nn.Identity(), head_dim=D)(q, k)
    assert len(ops) == 1 and len(ops[0]) == 1 and got[1].data_ptr() == k.data_ptr()
    torch.testing.assert_close(got[0], F.rms_norm(q, (D,), eps=1e-6))


def test_tables_per_head():
    q, k = qk_pair()
    positions = torch.arange(T)
    per_head = [ROPE.tables(positions + 10 * h) for h in range(H)]  # every head at a place of its own
    tables = tuple(torch.stack(t, 1).unsqueeze(0) for t in zip(*per_head, strict=True))
    few = tuple(t[:, :, :HKV] for t in tables)
    for options in ({}, {"place": "after"}, {"over": "full"}, {"weight_cast": "after"}, {"over": (2, 10)}):
        for kind in ("l2", "layer"):
            qk = make(kind, **options)
            got = qk(q, k, rope=tables, k_rope=few)
            for h in range(H):
                alone = qk(q, k, rope=per_head[h])
                assert torch.equal(got[0][:, :, h], alone[0][:, :, h])
                assert h >= HKV or torch.equal(got[1][:, :, h], alone[1][:, :, h])
    with pytest.raises(ValueError, match="the RoPE tables have 4 heads and k has 2"):
        make()(q, k, rope=tables)


def test_cross_attention_turns_k_by_its_own_tables(tables):
    q, (_, k) = qk_pair()[0], qk_pair()
    longer = torch.cat((k, k, k), 1)
    other = RopeSpec(D, base=100.0).tables(3 * T)
    for cast in ("fused", "after"):
        qk = make(weight_cast=cast)
        got = qk(q, longer, rope=tables, k_rope=other)
        assert torch.equal(got[0], qk(q, k, rope=tables)[0])
        repeated = qk(q.repeat(1, 3, 1, 1), longer, rope=other)
        assert torch.equal(got[1], repeated[1])
    with pytest.raises(ValueError, match="the RoPE tables have 5 positions and k has 15; give k its own, k_rope="):
        make()(q, longer, rope=tables)


@pytest.mark.parametrize("rope", [None, ROPE])
def test_outputs_keep_the_dtype_whatever_a_norm_returns(rope, tables):
    class Wide(nn.Module):
        def forward(self, x):
            return x.float() / 3

    q, k = qk_pair(torch.bfloat16)
    for place in ("before", "after"):
        got = QKNorm(Wide(), head_dim=D, rope=rope, place=place)(q, k, tables if rope else None)
        for x, y in zip((q, k), got, strict=True):
            assert y.dtype == torch.bfloat16
            if rope is None:
                assert torch.equal(y, (x.float() / 3).bfloat16())


# multipliers


@pytest.mark.parametrize("cast", ["fused", "after"])
def test_parameters_and_tensors_are_multipliers(cast):
    q, k = qk_pair()
    plain, k_plain = make("layer", weight="none", rope=None, weight_cast=cast)(q, k)
    scale = torch.rand(H, D) + 0.5
    qk = make(
        "layer",
        weight="none",
        rope=None,
        weight_cast=cast,
        multiplier=nn.Parameter(scale.clone()),
        k_multiplier=torch.tensor(2.0),
    )
    qk.multiplier.data.copy_(scale)
    got, k_got = qk(q, k)
    torch.testing.assert_close(got, plain * scale)
    torch.testing.assert_close(k_got, 2 * k_plain)
    assert {"multiplier", "k_multiplier"} <= set(qk.state_dict())
    got.sum().backward()
    torch.testing.assert_close(qk.multiplier.grad, plain.sum((0, 1)).detach(), rtol=1e-5, atol=1e-5)
    bound = make("layer", weight="none", rope=None, weight_cast=cast).logit_bound()
    assert qk.logit_bound() == pytest.approx(2 * bound * scale.max().item())


def test_multipliers_that_do_not_fit():
    q, k = qk_pair()
    for wrong in ("3", [1.0, 2.0]):
        with pytest.raises(TypeError, match="give a number, a tensor, an nn.Module or a function"):
            QKNorm("rms", head_dim=D, multiplier=wrong)
    one_head = q[:, :, :1]
    qk = QKNorm("rms", head_dim=D)
    for cast in ("fused", "after"):
        qk = QKNorm("rms", head_dim=D, weight_cast=cast)
        with pytest.raises(ValueError, match=r"the multiplier of q is \(4, 1\) and q is \(2, 5, 1, 16\)"):
            qk(one_head, k, multiplier=torch.ones(H, 1))
        with pytest.raises(ValueError, match="the multiplier of k is"):
            qk(q, k, k_multiplier=torch.ones(1, B, T, HKV, D))
        with pytest.raises(ValueError, match="q is on cpu and its multiplier on meta"):
            qk(q, k, multiplier=torch.ones(H, 1, device="meta"))
        with pytest.raises(TypeError, match="the multiplier of q is of float; give a tensor"):
            qk(q, k, multiplier=2.0)


def test_multipliers_of_every_kind(tables):
    q, k = qk_pair()
    base, base_k = make()(q, k, rope=tables)
    positions = torch.arange(T)
    per_head = LearnedMultiplier((H, 1), 2.0)
    nn.init.normal_(per_head.weight)

    class OfPosition(nn.Module):
        takes_positions = True

        def forward(self, positions):
            return (positions.float() + 1).log().view(-1, 1, 1)

    def at_call(qk):
        return qk(q, k, rope=tables, multiplier=torch.full((H, D), 3.0))[0]

    def plain(qk):
        return qk(q, k, rope=tables, positions=positions)[0]

    for qk, call, expected in (
        (make(multiplier=1.7), plain, 1.7 * base),
        (make(multiplier=LearnedMultiplier((), 3.0)), None, None),
        (make(), at_call, 3 * base),
        (make(multiplier=lambda p: 1 + p), plain, base * (1 + positions).view(-1, 1, 1)),
        (make(multiplier=OfPosition()), plain, base * (positions + 1.0).log().view(-1, 1, 1)),
        (make(multiplier=1.7, multiplier_place="before_rope"), plain, 1.7 * base),
    ):
        if call is None:
            value = qk.multiplier().item()
            call, expected = plain, base * value
        torch.testing.assert_close(call(qk), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(make(multiplier=1.7)(q, k, rope=tables)[1], base_k)
    doubled = make(k_multiplier=2.0)(q, k, rope=tables)
    assert torch.equal(doubled[0], base) and torch.equal(doubled[1], 2 * base_k)


def test_positions_per_sequence_for_multipliers():
    q, k = qk_pair()
    positions = torch.stack((torch.arange(T), torch.arange(T) + 7))
    qk = QKNorm(None, head_dim=D, multiplier=lambda p: p)
    got, _ = qk(q, k, positions=positions)
    torch.testing.assert_close(got, q * positions[..., None, None])
    with pytest.raises(ValueError, match="depends on position; pass positions="):
        qk(q, k)


def test_learned_multipliers_start_where_asked():
    for transform in ("identity", "softplus", "exp"):
        multiplier = LearnedMultiplier((H, D), 1.5, transform=transform)
        torch.testing.assert_close(multiplier(), torch.full((H, D), 1.5))
    clamped = LearnedMultiplier((), 10.0, transform="exp", max=100.0)
    clamped.weight.data.fill_(9.0)
    torch.testing.assert_close(clamped(), torch.tensor(100.0))
    assert LearnedMultiplier((), 1.5, transform="exp").double()().dtype == torch.float64
    assert LearnedMultiplier((), 1.5).bfloat16()().dtype == torch.float32
    with pytest.raises(ValueError, match='got scale=2.0 with softplus; scale is for "identity"'):
        LearnedMultiplier((), 1.5, scale=2.0, transform="softplus")
    with pytest.raises(ValueError, match='got max=3.0 with identity; max is for "exp"'):
        LearnedMultiplier((), 1.5, max=3.0)
    with pytest.raises(ValueError, match="got init=10.0 above max=5.0"):
        LearnedMultiplier((), 10.0, transform="exp", max=5.0)
    scaled = LearnedMultiplier((D,), 1.0, scale=D**-0.5)
    torch.testing.assert_close(scaled.weight, torch.full((D,), D**-0.5))
    torch.testing.assert_close(scaled(), torch.ones(D))
    with pytest.raises(ValueError, match="got transform='cube'"):
        LearnedMultiplier((), transform="cube")
    with pytest.raises(ValueError, match="got init=-1"):
        LearnedMultiplier((), -1.0, transform="exp")


def test_one_multiplier_squared_equals_one_on_each_side(tables):
    """nGPT: s² on q alone is s on q and on k, in value of the logits and in gradient."""
    q, k = qk_pair()[0], torch.randn(B, T, H, D)
    s = (torch.rand(H, D) + 0.5).double()

    class Factor(nn.Module):
        def __init__(self, power):
            super().__init__()
            self.s, self.power = nn.Parameter(s.clone()), power

        def forward(self):
            return self.s**self.power

    results = []
    for q_factor, k_factor in ((Factor(2), None), (None, None)):
        if q_factor is None:
            q_factor = k_factor = Factor(1)
        qk = QKNorm("l2", head_dim=D, rope=ROPE, place="after", multiplier=q_factor, k_multiplier=k_factor)
        a, b = qk(q.double(), k.double(), rope=tables)
        logits = torch.einsum("bthd,bshd->bhts", a, b)
        (gradient,) = torch.autograd.grad(logits.square().sum(), q_factor.s)
        results.append((logits, gradient))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# scales and bounds


def test_softmax_scale_belongs_to_the_norm():
    assert QKNorm("rms", head_dim=64).softmax_scale == pytest.approx(1 / 8)
    assert QKNorm("l2", head_dim=64).softmax_scale == pytest.approx(8)
    assert QKNorm("l2", head_dim=64, softmax_scale=10.0).softmax_scale == 10.0
    assert QKNorm("l2", head_dim=64, softmax_scale="rsqrt").softmax_scale == pytest.approx(1 / 8)
    assert QKNorm(L2Norm(64, scale=8.0), head_dim=64).softmax_scale == pytest.approx(1 / 8)
    with pytest.warns(UserWarning, match="attention is nearly uniform"):
        QKNorm("l2", head_dim=64, softmax_scale=1 / 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        QKNorm("l2", head_dim=64, softmax_scale=1 / 8, multiplier=LearnedMultiplier((), 64.0))
        QKNorm("rms", head_dim=64, softmax_scale=1 / 8)
    for q, k, over in (("l2", "rms", "head"), ("rms", "l2", "head"), (None, "l2", "head"), ("l2", "l2", "full")):
        with pytest.warns(UserWarning, match="give softmax_scale="):
            qk = QKNorm(q, k, head_dim=64, over=over, num_heads=2)
        assert qk.softmax_scale == pytest.approx(1 / 8)
    with pytest.raises(ValueError, match='softmax_scale is a number, None or "rsqrt"'):
        QKNorm("l2", head_dim=64, softmax_scale="sqrt")
    for scale in (-1, 0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"QKNorm got softmax_scale={scale}; give a positive number"):
            QKNorm("rms", head_dim=64, softmax_scale=scale)
    with pytest.raises(TypeError, match="QKNorm got rope='half'; give a RopeSpec"):
        QKNorm("rms", head_dim=64, rope="half")


@pytest.mark.parametrize("kind", ["l2", "rms", "layer"])
@pytest.mark.parametrize("over", ["head", "full", 4, 32])
def test_logit_bound_holds(kind, over, tables):
    for multiplier in (None, 3.0, LearnedMultiplier((H, D), 2.0)):
        qk = make(kind, over=over, multiplier=multiplier, weight="shared")
        bound = qk.logit_bound()
        worst = 0.0
        for _ in range(20):
            q, k = (torch.randn(B, T, h, D) ** 5 for h in (H, HKV))  # a few dims dominate
            q, k = qk(q, k, rope=tables)
            logits = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(H // HKV, 2)) * qk.softmax_scale
            worst = max(worst, logits.abs().max().item())
        assert 0 < worst <= bound


def test_logit_bound_is_the_formula_for_a_unit_norm():
    qk = QKNorm("l2", head_dim=D)
    assert qk.logit_bound() == pytest.approx(D**0.5)
    aligned = torch.zeros(1, 1, 1, D)
    aligned[..., 0] = 3.0
    q, k = qk(aligned, aligned)
    assert (q * k).sum().item() * qk.softmax_scale == pytest.approx(qk.logit_bound())
    clip = QKNorm(L2Clip(D, max_norm=2.0), head_dim=D)
    assert clip.logit_bound() == pytest.approx(4 / D**0.5)
    assert QKNorm(nn.Identity, head_dim=D).logit_bound() is None
    assert QKNorm("l2", head_dim=D, multiplier=lambda p: p).logit_bound() is None


# dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_outputs_keep_the_dtype(dtype, tables):
    for options in ({}, {"weight_cast": "after"}, {"multiplier": LearnedMultiplier((H, D))}, {"place": "after"}):
        for out in make(**options)(*qk_pair(dtype), rope=tables):
            assert out.dtype == dtype


@pytest.mark.parametrize("kind", ["l2", "rms", "layer"])
def test_autocast(kind, tables):
    projection = nn.Linear(8, (H + 2 * HKV) * D, bias=False)
    x = torch.randn(B, T, 8)
    for place in ("before", "after"):
        qk = make(kind, place=place)
        with torch.autocast("cpu", torch.bfloat16):
            q, k, v = projection(x).split((H * D, HKV * D, HKV * D), -1)
            q, k = qk(q.unflatten(-1, (H, D)), k.unflatten(-1, (HKV, D)), rope=tables)
            assert q.dtype == k.dtype == v.dtype == torch.bfloat16  # attention takes them together
            expected = projection(x).split((H * D, HKV * D, HKV * D), -1)
        without = qk(expected[0].unflatten(-1, (H, D)), expected[1].unflatten(-1, (HKV, D)), rope=tables)
        assert torch.equal(q, without[0]) and torch.equal(k, without[1])
        (q.float().square().sum() + k.float().square().sum()).backward()
        assert projection.weight.grad.isfinite().all()


def test_fused_rounds_once(tables):
    q, k = qk_pair(torch.bfloat16)
    exact = make().double()(q.double(), k.double(), rope=tables)
    fused = make()(q, k, rope=tables)
    stepwise = make(weight_cast="after", rope=RopeSpec(D, compute_dtype="input", table_dtype="input"))(
        q, k, rope=tables
    )
    for a, b, truth in zip(fused, stepwise, exact, strict=True):
        assert torch.equal(a, truth.bfloat16())
        assert (a.double() - truth).square().mean() < 0.5 * (b.double() - truth).square().mean()
        assert_close(a, truth)


# what programs do to modules


OPTIONS = [
    {"kind": "rms"},
    {"kind": "l2", "place": "after", "multiplier": "learned"},
    {"kind": "layer", "over": "full"},
    {"kind": "rms", "over": (2, 10)},
    {"kind": "rms", "weight_cast": "after"},
]


def from_options(options):
    options = dict(options)
    if options.get("multiplier") == "learned":
        options["multiplier"] = LearnedMultiplier((H, D))
    return make(options.pop("kind"), **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_compiles_into_a_larger_graph(options, tables):
    qk = from_options(options)

    def block(q, k):
        q, k = qk(q * 2, k + 1, rope=tables)
        return (q @ q.transpose(-1, -2)).sum() + k.square().sum()

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    grads = []
    for function in (block, compiled):
        q, k = (t.requires_grad_() for t in qk_pair())
        loss = function(q, k)
        qk.zero_grad()
        loss.backward()
        grads.append([loss.detach(), q.grad, k.grad, *(p.grad.clone() for p in qk.parameters())])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_compiles_with_inductor(tables):
    qk = make("l2", place="after", multiplier=LearnedMultiplier((H, D)))
    q, k = qk_pair()
    for a, b in zip(torch.compile(qk, fullgraph=True)(q, k, rope=tables), qk(q, k, rope=tables), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_exports(options, tables):
    qk = from_options(options)
    q, k = qk_pair()
    program = torch.export.export(
        qk,
        (q, k),
        {"rope": tables},
        dynamic_shapes={
            "q": {0: torch.export.Dim("batch", min=2)},
            "k": {0: torch.export.Dim("batch", min=2)},
            "rope": (None, None),
        },
    )
    more = [torch.cat((t, t.flip(0))) for t in (q, k)]
    for a, b in zip(program.module()(*more, rope=tables), qk(*more, rope=tables), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_copies_state_dicts_and_meta(options, tables):
    qk = from_options(options)
    q, k = qk_pair()
    expected = qk(q, k, rope=tables)
    with torch.device("meta"):
        hollow = from_options(options)
        shapes = hollow(q.to("meta"), k.to("meta"), rope=tuple(t.to("meta") for t in tables))
    assert [y.shape for y in shapes] == [y.shape for y in expected]
    loaded = hollow.to_empty(device="cpu")
    loaded.load_state_dict(qk.state_dict())
    for twin in (copy.deepcopy(qk), loaded):
        for a, b in zip(twin(q, k, rope=tables), expected, strict=True):
            assert torch.equal(a, b)
    assert "QKNorm" in repr(qk)


# errors


def with_tables(cos, sin):
    return make()(*qk_pair(), rope=(cos, sin))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: QKNorm("rsm", head_dim=D), "unknown norm 'rsm'; known: l2, layer, rms"),
        (lambda: QKNorm("rms", head_dim=D, place="within"), "got place='within'; choose from 'before', 'after'"),
        (lambda: QKNorm("rms", head_dim=D, layout="hsbd"), "got layout='hsbd'"),
        (lambda: QKNorm("rms", head_dim=D, rope=RopeSpec(2 * D)), f"more than head_dim={D}"),
        (lambda: QKNorm("rms", head_dim=D, over="full"), "without num_heads; give num_heads"),
        (lambda: QKNorm("rms", head_dim=D, over="all", num_heads=H), "got over='all'; choose"),
        (lambda: QKNorm("rms", head_dim=D, over=0, num_heads=H), "got over=0; choose"),
        (lambda: QKNorm("rms", head_dim=D, over=-4, num_heads=H), "got over=-4; choose"),
        (lambda: QKNorm(None, head_dim=-4), "got head_dim=-4; give the width of a head, at least 1"),
        (lambda: QKNorm("rms", head_dim=D, over=7, num_heads=H), "over=7 does not divide 4 heads of 16 evenly"),
        (lambda: QKNorm("rms", head_dim=D, over=(4, 20)), "over=(4, 20) is no slice of a head of 16 dims"),
        (lambda: QKNorm(RMSNorm(8), head_dim=D), "the norm of q is 8 wide"),
        (
            lambda: QKNorm(RMSNorm(D, weight="per_head", num_heads=3), head_dim=D, num_heads=H),
            "the norm of q has weights for 3 heads and q has 4; build it with num_heads=4",
        ),
        (
            lambda: QKNorm("rms", head_dim=D, multiplier=LearnedMultiplier(), multiplier_place="before_rope"),
            "is for a number; other factors come last",
        ),
        (lambda: make()(torch.zeros(B, T, H, 8), torch.zeros(B, T, HKV, 8)), "head_dim=16 and got q with 8 dims"),
        (
            lambda: make(over="full")(torch.zeros(B, T, 3, D), torch.zeros(B, T, HKV, D)),
            "built for 4 heads of q and got 3",
        ),
        (lambda: make()(torch.zeros(B, T, H, D), torch.zeros(B, T, HKV, D)), "built with RoPE: pass rope=(cos, sin)"),
        (
            lambda: make(rope=None)(torch.zeros(B, T, H, D), torch.zeros(B, T, HKV, D), rope=ROPE.tables(T)),
            "built without RoPE: pass no tables",
        ),
        (
            lambda: make()(torch.zeros(B, T, H, D), torch.zeros(B, T, HKV, D), rope=ROPE.tables(T + 1)),
            "the RoPE tables have 6 positions and q has 5",
        ),
        (
            lambda: make(rope=None)(torch.zeros(T, H, D), torch.zeros(T, HKV, D)),
            "layout='bshd' got (5, 4, 16); give 4 dims",
        ),
        (
            lambda: make(rope=None)(*(torch.zeros(B, T, h, D, dtype=torch.int32) for h in (H, HKV))),
            "got q of torch.int32; give floating-point tensors",
        ),
        (
            lambda: make(rope=None)(*(torch.zeros(B, T, h, D, device="meta") for h in (H, HKV))),
            "q is on meta and the norm's weight on cpu; move one",
        ),
        (
            lambda: QKNorm(None, head_dim=D, rope=ROPE)(
                *(torch.zeros(B, T, h, D) for h in (H, HKV)), rope=ROPE.tables(T, device="meta")
            ),
            "q is on cpu and the RoPE tables on meta; move the tables",
        ),
        (lambda: RopeSpec(5), "dims turn in pairs"),
        (lambda: QKNorm(RMSNorm(D), head_dim=D, eps=1e-2, layuot="x"), "got eps, layuot for norms that are built"),
        (lambda: QKNorm("rms", RMSNorm(D), head_dim=D, eps=1e-2), "got eps for norms that are built already"),
        (lambda: QKNorm(None, head_dim=D, eps=1e-2), "got eps for norms that are built already or absent"),
        (
            lambda: QKNorm("rms", head_dim=D, multiplier=2.0, place="after", multiplier_place="before_rope"),
            "lets the norm undo the multiplier",
        ),
        (lambda: QKNorm("rms", head_dim=D, weight_cast="after", backend="fast"), "unknown backend 'fast'"),
        (lambda: make(rope=None)(torch.zeros(B, T, H, D), None), "got k of NoneType; give a tensor"),
        (
            lambda: make(rope=None)(torch.zeros(B, T, H, D), torch.zeros(B, T, HKV, D).double()),
            "got q of torch.float32 on cpu and k of torch.float64 on cpu; give both the same",
        ),
        (
            lambda: make(over=(2, 10), weight="per_head")(
                torch.zeros(B, T, 1, D), torch.zeros(B, T, HKV, D), rope=ROPE.tables(T)
            ),
            "built for 4 heads of q and got 1",
        ),
        *(
            (lambda shape=shape, sin=sin: with_tables(torch.zeros(shape), torch.zeros(sin or shape)), message)
            for shape, sin, message in (
                ((1, D // 2), None, "the RoPE tables have 1 positions and q has 5"),
                ((3, T, D // 2), None, "the RoPE tables have 3 sequences and q has 2"),
                ((B, T, 1, 1, D // 2), None, "give two of [T, R/2], [B, T, R/2] or [B, T, H, R/2]"),
                ((B, T, 3, D // 2), None, "the RoPE tables have 3 heads and q has 4"),
                ((D // 2,), None, "give two of [T, R/2], [B, T, R/2] or [B, T, H, R/2]"),
                ((T, D // 2), (B, T, D // 2), "the RoPE tables are (5, 8) and (2, 5, 8)"),
            )
        ),
    ],
)
def test_errors_say_what_to_do(build, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        build()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_backend_that_would_be_ignored_is_refused():
    q, k = qk_pair()
    with pytest.raises(RuntimeError, match="Triton kernels run on cuda, not on cpu"):
        QKNorm("rms", head_dim=D, backend="triton")(q, k)
    with pytest.raises(RuntimeError, match="a norm or RoPE of this QKNorm rounds between its steps"):
        QKNorm("rms", head_dim=D, weight_cast="after", backend="compiled")(q, k)
    with pytest.raises(RuntimeError, match="a factor of 0 takes the reference"):
        QKNorm("rms", head_dim=D, multiplier=0.0, backend="compiled")(q, k)
    for options in ({"weight_cast": "after"}, {"over": (2, 10)}):
        asked = QKNorm("rms", head_dim=D, backend="reference", **options)(q, k)
        for a, b in zip(asked, QKNorm("rms", head_dim=D, **options)(q, k), strict=True):
            assert torch.equal(a, b)


def test_one_compiled_function_meets_several_numbers_as_multiplier():
    """From the second on the compiler takes the number for a variable, which has no attributes."""
    torch._dynamo.reset()
    x = torch.randn(1, 3, 2, 8)
    compiled = torch.compile(lambda module, x: module(x, x), backend="eager", fullgraph=True)
    for number in (2.0, 3.0, 5.5):
        module = QKNorm("l2", head_dim=8, multiplier=number)
        for mine, eager in zip(compiled(module, x), module(x, x), strict=True):
            torch.testing.assert_close(mine, eager)
