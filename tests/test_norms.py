import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_close
from torch import nn
from torch.nn import functional as F

from nsphere import norms
from nsphere.norms import L2Clip, L2Norm, LayerNorm, Norm, RMSNorm, make_norm, norm_names, register_norm

H, D = 3, 16


@pytest.fixture
def registry(monkeypatch):
    """A copy of the registry that a test may add to."""
    monkeypatch.setattr(norms, "_NORMS", dict(norms._NORMS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_against_torch(dtype):
    x = torch.randn(5, H, D).to(dtype)
    pairs = [
        (L2Norm(D, eps=1e-12, eps_place="clamp"), lambda x: F.normalize(x, dim=-1)),
        (RMSNorm(D, eps=1e-6), lambda x: F.rms_norm(x, (D,), eps=1e-6)),
        (LayerNorm(D), lambda x: F.layer_norm(x, (D,))),
    ]
    for norm, plain in pairs:
        y = norm(x)
        assert y.dtype == dtype
        assert_close(y, plain(x.double()), plain(x), type(norm).__name__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_no_eps_is_that_of_the_dtype_or_torchs_own(dtype):
    x = (torch.randn(5, H, D) * 0.05).to(dtype)  # short rows, where eps matters
    plain = F.rms_norm(x, (D,))
    for weight in ("none", "shared", "per_head", "scalar_per_head"):
        assert torch.equal(RMSNorm(D, eps=None, weight=weight, num_heads=H, weight_cast="torch")(x), plain)
    mean = x.double().pow(2).mean(-1, keepdim=True)
    expected = x.double() * (mean + torch.finfo(dtype).eps).rsqrt()
    assert_close(RMSNorm(D, eps=None)(x), expected)
    if dtype in (torch.bfloat16, torch.float16):  # torch computes these in fp32, and takes the eps of that
        assert not torch.equal(RMSNorm(D, eps=None)(x), plain)


@pytest.mark.parametrize("cast", ["before", "after", "input", "torch", "fused"])
@pytest.mark.parametrize("kind", ["l2", "rms", "layer"])
def test_rounding_points(kind, cast):
    """Each cast against its definition, in bf16, bit for bit."""
    options = {"eps_place": "clamp", "eps": 1e-12} if kind == "l2" and cast == "torch" else {"eps": 1e-5}
    norm = make_norm(kind, D, weight="shared", weight_cast=cast, **options)
    for p in norm.parameters():
        nn.init.normal_(p, 1.0, 0.3)
    x = torch.randn(64, D).bfloat16()
    w, b = norm.weight, norm.bias
    x32 = x.float()
    if kind == "layer":
        x32 = x32 - x32.mean(-1, keepdim=True)
    s = x32.pow(2).sum(-1, keepdim=True) if kind == "l2" else x32.pow(2).mean(-1, keepdim=True)
    r = (s + 1e-5).rsqrt()
    if cast in ("fused", "before"):
        expected = (x32 * r * w + (0 if b is None else b)).bfloat16()
    elif cast == "after":
        plain = F.layer_norm(x, (D,), eps=1e-5) if kind == "layer" else (x32 * r).bfloat16()
        expected = plain * w.bfloat16() + (0 if b is None else b.bfloat16())
    elif cast == "input":
        centred = x - x.mean(-1, keepdim=True) if kind == "layer" else x
        expected = centred * r.bfloat16() * w.bfloat16() + (0 if b is None else b.bfloat16())
    elif kind == "l2":
        expected = F.normalize(x, dim=-1) * w.bfloat16()
    elif kind == "rms":
        expected = F.rms_norm(x, (D,), w.bfloat16(), 1e-5)
    else:
        expected = F.layer_norm(x, (D,), w.bfloat16(), b.bfloat16(), 1e-5)
    assert torch.equal(norm(x), expected)


def test_casts_differ_where_they_should():
    torch.manual_seed(0)
    x, w = torch.randn(256, D).bfloat16(), torch.randn(D).bfloat16()
    results = []
    for cast in ("before", "after", "input"):
        norm = RMSNorm(D, weight_cast=cast)
        norm.weight.data.copy_(w)
        results.append(norm(x))
    for i in range(3):
        for j in range(i):
            assert 0.05 < (results[i] != results[j]).float().mean() < 0.9


def test_promotion_only_when_asked_for():
    x = torch.randn(4, D).bfloat16()
    for cast in ("after", "input"):
        assert RMSNorm(D, weight_cast=cast)(x).dtype == torch.bfloat16
        promoted = RMSNorm(D, weight_cast=cast, promote=True)
        promoted.weight.data.normal_()
        assert promoted(x).dtype == torch.float32
    reference = promoted.weight * RMSNorm(D, weight="none", weight_cast="input")(x)
    assert torch.equal(promoted(x), reference)


@pytest.mark.parametrize(
    ("weight", "shape"),
    [("shared", (D,)), ("per_head", (H, D)), ("full", (H * D,)), ("scalar_per_head", (H,)), ("scalar", (1,))],
)
def test_weight_shapes(weight, shape):
    for zero_centered in (False, True):
        norm = RMSNorm(D, weight=weight, num_heads=H, zero_centered=zero_centered, bias=True)
        x = torch.randn(2, H, D)
        assert norm.weight.shape == norm.bias.shape == shape
        torch.testing.assert_close(norm(x), RMSNorm(D, weight="none")(x))  # it starts as the identity
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        w, b = norm.weight.detach(), norm.bias.detach()
        if weight == "full":
            w, b = w.view(H, D), b.view(H, D)
        if weight == "scalar_per_head":
            w, b = w.view(H, 1), b.view(H, 1)
        expected = RMSNorm(D, weight="none")(x) * (1 + w if zero_centered else w) + b
        torch.testing.assert_close(norm(x), expected)
        norm(x).sum().backward()
        assert norm.weight.grad.abs().sum() > 0 and norm.bias.grad.abs().sum() > 0


@given(
    st.floats(1e-6, 1e6),
    st.integers(1, 64),
    st.integers(0, 2**16),
)
@settings(max_examples=50, deadline=None)
def test_unit_norm_whatever_the_scale(scale, dim, seed):
    x = torch.randn(3, dim, generator=torch.Generator().manual_seed(seed)) * scale
    y = L2Norm(dim)(x)
    torch.testing.assert_close(y.norm(dim=-1), torch.ones(3), rtol=1e-5, atol=0)
    torch.testing.assert_close(L2Norm(dim)(x * 8), y)  # a power of two: to the bit but for the root's rounding


def test_eps_must_not_distort_short_rows():
    for length in (1e-2, 1e-4):
        row = F.normalize(torch.randn(5, D, dtype=torch.float64), dim=-1).float() * length
        torch.testing.assert_close(L2Norm(D)(row).norm(dim=-1), torch.ones(5), rtol=1e-6, atol=0)
        distorted = L2Norm(D, eps=1e-6)(row).norm(dim=-1)  # what an eps inside the root does
        assert (distorted < 0.996).all()


def test_zero_rows_are_safe():
    for norm in (
        L2Norm(D),
        L2Norm(D, eps=1e-12, eps_place="clamp"),
        L2Norm(D, eps=1e-6, eps_place="added"),
        RMSNorm(D, eps=0.0),
        LayerNorm(D, eps=0.0),
    ):
        x = torch.zeros(2, D, requires_grad=True)
        y = norm(x)
        y.sum().backward()
        assert y.abs().max() == 0 and x.grad.abs().max() == 0
    assert torch.isfinite(L2Norm(D, weight_cast="torch")(torch.zeros(2, D))).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_rows_are_safe_in_torchs_own_functions(dtype):
    for norm in (
        RMSNorm(D, eps=0.0, weight_cast="torch"),
        RMSNorm(D, eps=0.0, weight="scalar", weight_cast="torch"),
        LayerNorm(D, eps=0.0, weight_cast="torch"),
        LayerNorm(D, eps=0.0, weight_cast="after"),
    ):
        x = torch.randn(3, D).to(dtype)
        x[1] = 0.0 if isinstance(norm, RMSNorm) else 3.0  # LayerNorm: a row without variance
        x.requires_grad_()
        y = norm(x)
        y.sum().backward()
        assert y[1].abs().max() == 0 and x.grad[1].abs().max() == 0
        assert x.grad.isfinite().all() and norm.weight.grad.isfinite().all()
        plain = F.rms_norm(x, (D,), eps=0.0) if isinstance(norm, RMSNorm) else F.layer_norm(x, (D,), eps=0.0)
        assert torch.equal(y[0], plain[0]) and torch.equal(y[2], plain[2])


@pytest.mark.parametrize("weight", ["shared", "per_head", "scalar"])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_the_scale_leaves_the_bias_alone(kind, weight):
    options = {"weight": weight, "bias": True, "scale": 3.0, "eps": 1e-5, "num_heads": H}
    norm = make_norm(kind, D, weight_cast="torch", **options)
    fused = make_norm(kind, D, **options)
    for p, q in zip(norm.parameters(), fused.parameters(), strict=True):
        nn.init.normal_(p)
        q.data.copy_(p)
    x = torch.randn(2, H, D)
    torch.testing.assert_close(norm(x), fused(x))


def test_l2_clip():
    x = torch.randn(4, D) * torch.tensor([[0.01], [0.5], [2.0], [100.0]])
    y = L2Clip(D, max_norm=3.0)(x)
    assert torch.equal(y[:2], x[:2])
    torch.testing.assert_close(y[3].norm(), torch.tensor(3.0))
    with_weight = L2Clip(D, max_norm=3.0, num_heads=H)
    nn.init.normal_(with_weight.weight)
    x = torch.randn(4, H, D)
    torch.testing.assert_close(with_weight(x), L2Clip(D, max_norm=3.0)(x * with_weight.weight))


def test_registering(registry):
    @register_norm("max")
    def max_norm(x):
        return x / x.abs().amax(-1, keepdim=True)

    @register_norm("centred")
    class Centred(Norm):
        def __init__(self, dim, num_heads=None):
            super().__init__()
            self.dim, self.num_heads = dim, num_heads

        def forward(self, x):
            return x - x.mean(-1, keepdim=True)

    x = torch.randn(2, D)
    assert torch.equal(make_norm("max", D)(x), max_norm(x))
    assert make_norm("centred", D, num_heads=H).num_heads == H
    assert {"max", "centred", "l2", "rms", "layer"} <= set(norm_names())
    assert make_norm("max", D)(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="the norm name 'max' is taken"):
        register_norm("max")
    with pytest.raises(ValueError, match="the norm name 'rms' is taken"):
        register_norm("rms")
    with pytest.raises(TypeError, match="give an nn.Module class or a function"):
        register_norm("nothing")(3)
    with pytest.raises(ValueError, match="the norm name 'none' stands for no norm"):
        register_norm("none")


def test_registering_a_partial(registry):
    from functools import partial

    register_norm("loose")(partial(RMSNorm, eps=0.1))
    made = make_norm("loose", D)
    assert isinstance(made, RMSNorm) and made.spec.eps == 0.1
    x = torch.randn(2, D)
    assert torch.equal(made(x), RMSNorm(D, eps=0.1)(x))


def test_ways_to_ask_for_a_norm():
    from functools import partial

    assert isinstance(make_norm("rms", D), RMSNorm)
    assert make_norm(partial(RMSNorm, eps=0.1), D).spec.eps == 0.1
    assert isinstance(make_norm(nn.LayerNorm, D), nn.LayerNorm)
    instance = nn.RMSNorm(D)
    assert make_norm(instance, D) is instance
    assert make_norm(None, D) is None
    assert make_norm(partial(RMSNorm, num_heads=7), D, num_heads=H).num_heads == 7


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_norm("rsm", D), "unknown norm 'rsm'; known: l2, layer, rms"),
        (lambda: make_norm("rms", D, epss=1), "RMSNorm has no option epss; choose from eps, eps_place, weight, bias"),
        (lambda: make_norm("l2", D, statistic="rms"), "L2Norm has no option statistic; choose from eps"),
        (lambda: make_norm(3, D), "a norm is a name, a class, a partial, an instance or None; got 3"),
        (lambda: make_norm(nn.LayerNorm(D), D, eps=1.0), "cannot be applied to"),
        (lambda: RMSNorm(0), "got dim=0"),
        (lambda: RMSNorm(D, weight="per_head"), "without num_heads"),
        (lambda: RMSNorm(D, weight="each"), "got weight='each'; choose from 'none', 'shared'"),
        (lambda: norms.StatisticNorm(D, norms.NormSpec("l1", 0.0)), "got statistic='l1'; choose from 'l2', 'rms'"),
        (lambda: RMSNorm(D, weight_cast="late"), "got weight_cast='late'"),
        (lambda: RMSNorm(D, eps=-1.0), "got eps=-1.0"),
        (lambda: RMSNorm(D, eps=float("nan")), "got eps=nan"),
        (lambda: RMSNorm(D, eps="small"), "got eps='small'"),
        (lambda: RMSNorm(D, bias="yes"), "RMSNorm got bias='yes'; give True or False"),
        (lambda: LayerNorm(D, zero_centered=1), "LayerNorm got zero_centered=1; give True or False"),
        (lambda: L2Norm(D, scale="sqrt"), "L2Norm got scale='sqrt'; give a number"),
        (lambda: RMSNorm(D, weight="none", bias=True), 'got bias=True with weight="none"'),
        (lambda: L2Norm(D, eps=1.0, weight_cast="torch"), "choose that, or another weight_cast"),
        (lambda: RMSNorm(D)(torch.zeros(2, D + 1)), f"build it with dim={D + 1}"),
        (lambda: RMSNorm(D)(torch.zeros(2, D, dtype=torch.int64)), "give it a floating-point tensor"),
        (lambda: RMSNorm(D, weight="per_head", num_heads=H)(torch.zeros(2, 5, D)), f"has weights for {H} heads"),
    ],
)
def test_errors_say_what_to_do(make, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        make()
    assert message in str(caught.value)


def test_copies_meta_and_state_dicts():
    norm = RMSNorm(D, weight="per_head", num_heads=H)
    nn.init.normal_(norm.weight)
    twin = copy.deepcopy(norm)
    x = torch.randn(2, H, D)
    assert torch.equal(twin(x), norm(x)) and twin.weight is not norm.weight
    with torch.device("meta"):
        hollow = RMSNorm(D, weight="per_head", num_heads=H)
    assert hollow.weight.is_meta
    hollow = hollow.to_empty(device="cpu")
    hollow.load_state_dict(norm.state_dict())
    assert torch.equal(hollow(x), norm(x))
    assert "per_head" in repr(norm)
