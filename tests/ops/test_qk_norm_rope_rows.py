"""The C++ of the commonest sides: what it takes, its values and gradients against fp64, and what it leaves."""

import pytest
import torch

from nsphere import QKNorm, RopeSpec
from nsphere.ops import backend as backends
from nsphere.ops.qk_norm_rope import rows

D, H, HKV = 24, 3, 1
T = 70  # more than one block of positions, and no whole number of them


@pytest.fixture
def calls(monkeypatch):
    """Whether each call of the kernel was a backward."""
    if reason := backends.why_not("compiled", "cpu"):
        pytest.skip(reason)
    made, kernel = [], rows._kernel()
    monkeypatch.setattr(rows, "_kernel", lambda: lambda *args: (made.append(bool(args[2])), kernel(*args)))
    return made


def build(kind="rms", dim=D, **options):
    torch.manual_seed(0)
    qk_norm = QKNorm(kind, head_dim=D, num_heads=H, num_kv_heads=HKV, rope=RopeSpec(dim), **{"eps": 1e-3} | options)
    for p in qk_norm.parameters():
        torch.nn.init.normal_(p)
    return qk_norm


def run(qk_norm, packed, tables, grads, dtype, backend):
    """q, k and the gradients of the packed input and of every parameter."""
    qk_norm.to(dtype).backend = backend
    qk_norm.zero_grad()
    x = packed.detach().to(dtype, copy=True).requires_grad_()
    q, k = qk_norm(x[..., :H, :], x[..., H : H + HKV, :], rope=tuple(t.to(dtype) for t in tables))
    torch.autograd.backward((q, k), [g.to(dtype) for g in grads])
    return [q.detach(), k.detach(), x.grad, *[p.grad.clone() for p in qk_norm.parameters() if p.requires_grad]]


def inputs(dim=D, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    packed = scale * torch.randn(2, T, H + HKV + 1, D, generator=generator)  # strided views of q and k
    grads = [torch.randn(2, T, heads, D, generator=generator) for heads in (H, HKV)]
    return packed, tuple(1.25 * t for t in RopeSpec(dim).tables(T)), grads  # scaled, as YaRN scales them


def assert_near(got, expected, within=2e-6):
    for a, b in zip(got, expected, strict=True):
        assert (a.double() - b).abs().max() <= within * b.abs().max()


@pytest.mark.parametrize("dim", [D, 16])
@pytest.mark.parametrize("options", [{"weight": "none"}, {}, {"zero_centered": True}], ids=["bare", "weight", "zero"])
@pytest.mark.parametrize("kind", ["rms", "l2"])
def test_values_and_gradients(calls, kind, options, dim):
    qk_norm = build(kind, dim, **{"weight": "shared"} | options)
    packed, tables, grads = inputs(dim)
    got = run(qk_norm, packed, tables, grads, torch.float32, "compiled")
    assert calls == [False, True]
    assert_near(got, run(qk_norm, packed, tables, grads, torch.float64, "reference"))


def test_short_and_zero_rows(calls):
    qk_norm = build(eps=1e-6)
    packed, tables, grads = inputs(scale=1e-4)
    packed[0, 3:5] = 0
    got = run(qk_norm, packed, tables, grads, torch.float32, "compiled")
    assert calls == [False, True] and not got[0][0, 3:5].any()
    assert_near(got, run(qk_norm, packed, tables, grads, torch.float64, "reference"))


def test_a_frozen_weight_has_no_gradient_and_inference_keeps_nothing(calls):
    qk_norm = build()
    qk_norm.q_norm.weight.requires_grad_(False)
    packed, tables, grads = inputs()
    got = run(qk_norm, packed, tables, grads, torch.float32, "compiled")
    assert qk_norm.q_norm.weight.grad is None and len(got) == 4
    with torch.no_grad():
        q, k = qk_norm(packed[..., :H, :], packed[..., H : H + HKV, :], rope=tables)
    assert calls == [False, True, False] and torch.equal(q, got[0]) and torch.equal(k, got[1])


def test_the_same_bits_from_run_to_run(calls):
    qk_norm = build()
    runs = [run(qk_norm, *inputs(), torch.float32, "compiled") for _ in range(3)]
    assert calls == 3 * [False, True]
    assert all(torch.equal(a, b) for again in runs[1:] for a, b in zip(again, runs[0], strict=True))


def test_a_gradient_that_is_not_dense_takes_the_compilers_code(calls):
    qk_norm = build()
    packed, tables, _ = inputs()
    grads = [torch.ones(1).expand(2, T, heads, D) for heads in (H, HKV)]
    got = run(qk_norm, packed, tables, grads, torch.float32, "compiled")
    assert calls == [False]
    assert_near(got, run(qk_norm, packed, tables, grads, torch.float64, "reference"), within=5e-6)


@pytest.mark.parametrize(
    "build_it",
    [
        lambda: build("layer"),
        lambda: build(eps=0.0),
        lambda: build(bias=True),
        lambda: build(weight="per_head"),
        lambda: build(place="after"),
        lambda: build(over="full"),
        lambda: QKNorm("rms", head_dim=D, rope=RopeSpec(D, layout="interleaved")),
        lambda: QKNorm("rms", head_dim=D, rope=RopeSpec(16, where="trailing")),
        lambda: QKNorm("rms", head_dim=D, rope=RopeSpec(D, sign=-1)),
        lambda: QKNorm("rms", head_dim=D),
    ],
)
def test_other_kinds_are_not_its_own(build_it):
    qk_norm = build_it()
    spec = qk_norm._side_spec(qk_norm.q_norm.spec)
    assert not rows.suit([spec])
