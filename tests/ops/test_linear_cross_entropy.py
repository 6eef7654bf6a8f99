"""Output projection and cross-entropy in chunks, against torch's own in fp64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nsphere.ops import linear_cross_entropy as module
from nsphere.ops.linear_cross_entropy import linear_cross_entropy


def draw(N=13, d=6, V=11, ignored=(), seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(N, d, generator=generator, dtype=torch.float64).to(dtype)
    weight = (2 * torch.randn(V, d, generator=generator, dtype=torch.float64)).to(dtype)
    targets = torch.randint(V, (N,), generator=generator)
    targets[list(ignored)] = -100
    return h.requires_grad_(), weight.requires_grad_(), targets


@settings(max_examples=40, deadline=None)
@given(
    N=st.integers(1, 20),
    V=st.integers(1, 30),
    rows=st.integers(0, 25),
    ignored=st.sets(st.integers(0, 19)),
    factor=st.floats(0.1, 100),
)
def test_loss_and_gradients_whatever_the_chunks(N, V, rows, ignored, factor):
    ignored = [i for i in ignored if i < N]
    h, weight, targets = draw(N, 6, V, ignored)
    loss = linear_cross_entropy(h, weight, targets, max_logits=rows * V + V // 2)
    grads = torch.autograd.grad(factor * loss, (h, weight))
    if len(ignored) == N:
        assert loss == 0
        assert all((g == 0).all() for g in grads)
        return
    expected = F.cross_entropy(h @ weight.t(), targets)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    for got, want in zip(grads, torch.autograd.grad(factor * expected, (h, weight)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_without_gradients():
    h, weight, targets = draw(ignored=[2])
    with torch.no_grad():
        loss = linear_cross_entropy(h, weight, targets, max_logits=30)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, F.cross_entropy(h @ weight.t(), targets).detach())


@pytest.mark.parametrize("frozen", ["h", "weight"])
def test_gradient_of_one_side(frozen):
    h, weight, targets = draw()
    (h if frozen == "h" else weight).requires_grad_(False)
    free = weight if frozen == "h" else h
    (got,) = torch.autograd.grad(linear_cross_entropy(h, weight, targets, max_logits=30), free)
    (want,) = torch.autograd.grad(F.cross_entropy(h @ weight.t(), targets), free)
    torch.testing.assert_close(got, want)


def test_a_second_derivative_is_refused_rather_than_wrong():
    h, weight, targets = draw()
    (grad,) = torch.autograd.grad(linear_cross_entropy(h, weight, targets), h, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(grad.pow(2).sum(), h)


def test_logits_of_hundreds_do_not_overflow():
    h, weight, targets = draw(dtype=torch.float32)
    with torch.no_grad():
        h.mul_(300)
    loss = linear_cross_entropy(h, weight, targets)
    expected = F.cross_entropy(h.double() @ weight.double().t(), targets)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (h, weight)))


def test_never_more_logits_than_asked_for(monkeypatch):
    h, weight, targets = draw(N=40, V=16)
    sizes = []
    product = torch.Tensor.__matmul__

    def counted(a, b):
        y = product(a, b)
        sizes.append(y.numel() if y.shape[-1] == 16 else 0)
        return y

    monkeypatch.setattr(torch.Tensor, "__matmul__", counted)
    linear_cross_entropy(h, weight, targets, max_logits=100)
    assert max(sizes) == 96  # six rows of 16
    assert sum(sizes) == 40 * 16
    assert module.MAX_LOGITS * 4 == 256 * 2**20


def relative(x, y):
    return ((x.double() - y).norm() / y.norm()).item()


@pytest.mark.parametrize("autocast", [True, False])
def test_bf16_is_as_good_as_torchs_own(autocast):
    """At most twice the error of plain PyTorch in the same dtypes."""
    exact_h, exact_weight, targets = draw(N=64, d=32, V=50, dtype=torch.float32)
    if not autocast:
        exact_h, exact_weight = (x.detach().bfloat16() for x in (exact_h, exact_weight))
    results = []
    for dtype in (torch.float64, exact_h.dtype, exact_h.dtype):
        h, weight = (x.detach().to(dtype).requires_grad_() for x in (exact_h, exact_weight))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype != torch.float64):
            if len(results) == 2:
                loss = linear_cross_entropy(h, weight, targets, max_logits=1000)
            else:
                loss = F.cross_entropy((h @ weight.t()).to(torch.promote_types(dtype, torch.float32)), targets)
        results.append((loss, *torch.autograd.grad(loss, (h, weight))))
    exact, plain, ours = results
    assert ours[0].dtype == torch.float32
    assert (ours[1].dtype, ours[2].dtype) == (exact_h.dtype, exact_weight.dtype)
    for got, torchs, want in zip(ours, plain, exact, strict=True):
        assert relative(got, want) <= 2 * relative(torchs, want) + 1e-4


def test_weight_gradient_is_summed_in_fp32_over_chunks():
    h, weight, targets = draw(N=512, d=4, V=3, dtype=torch.bfloat16)
    (got,) = torch.autograd.grad(linear_cross_entropy(h, weight, targets, max_logits=6), weight)
    (want,) = torch.autograd.grad(F.cross_entropy(h.double() @ weight.double().t(), targets), weight)
    # 256 partial sums, each of products of bf16: a bf16 sum over them would be off by several per cent
    assert relative(got, want) < 0.01
