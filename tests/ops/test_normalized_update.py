"""h′ = Norm(h + α (Norm(o) − h)) against its formula in fp64, and at the edges where formulas break."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsphere.ops.normalized_update import normalized_update, unit


def norm(x):
    return x / x.pow(2).sum(-1, keepdim=True).sqrt()


def formula(h, o, eigen_lr):
    return norm(h + eigen_lr * (norm(o) - h))


def draw(shape=(3, 5, 16), seed=0, length=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    h, o = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    eigen_lr = torch.rand(shape[-1], generator=generator, dtype=torch.float64)
    return norm(h).to(dtype), (norm(o) * length).to(dtype), eigen_lr


def values_and_gradients(function, inputs, seed=7):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*inputs)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), inputs)]


@pytest.mark.parametrize("length", [1e-4, 1e-2, 1.0, 1e3])
@pytest.mark.parametrize("width", ["vector", "one", "zero-dim"])
def test_value_and_gradients_in_fp64(length, width):
    h, o, eigen_lr = draw(length=length)
    eigen_lr = {"vector": eigen_lr, "one": eigen_lr[:1], "zero-dim": eigen_lr[0]}[width]
    got = values_and_gradients(normalized_update, (h, o, eigen_lr))
    expected = values_and_gradients(formula, (h, o, eigen_lr))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12 * b.abs().max().item())


def test_gradcheck():
    h, o, eigen_lr = draw(shape=(2, 6))
    torch.autograd.gradcheck(normalized_update, tuple(x.requires_grad_() for x in (h, o, eigen_lr)))


@pytest.mark.parametrize("o_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("h_dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_rounded_once(h_dtype, o_dtype):
    h, o, eigen_lr = draw(shape=(64, 48))
    h, o, eigen_lr = h.to(h_dtype), o.to(o_dtype), eigen_lr.float()
    got = values_and_gradients(normalized_update, (h, o, eigen_lr))
    exact = values_and_gradients(formula, (h.double(), o.double(), eigen_lr.double()))
    assert [t.dtype for t in got] == [h_dtype, h_dtype, o_dtype, torch.float32]
    half_ulp = torch.finfo(h_dtype).eps / 2
    torch.testing.assert_close(got[0].double(), exact[0], rtol=1.01 * half_ulp + 1e-6, atol=1e-7)
    for a, b in zip(got[1:], exact[1:], strict=True):
        # what comes back is rounded to the dtype of h′ on its way in, to that of the gradient on its way out
        assert (a.double() - b).norm() / b.norm() <= half_ulp + torch.finfo(a.dtype).eps / 2 + 1e-6


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    length=st.floats(1e-6, 1e6),
    scale=st.floats(1e-3, 1e3),
    d=st.integers(2, 65),
    step=st.floats(0, 0.99),
)
def test_identities(seed, length, scale, d, step):
    h, o, eigen_lr = draw((4, d), seed, length)
    eigen_lr = step * eigen_lr
    y = normalized_update(h, o, eigen_lr)
    torch.testing.assert_close(y.norm(dim=-1), torch.ones(4, dtype=torch.float64), rtol=1e-13, atol=0)
    torch.testing.assert_close(normalized_update(h, scale * o, eigen_lr), y, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(normalized_update(h, o, 0 * eigen_lr), h, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(normalized_update(h, o, torch.ones_like(eigen_lr)), norm(o), rtol=1e-9, atol=1e-11)
    # a scalar step turns h towards o: its cosine with o grows, and it stays in their plane
    turned = normalized_update(h, o, eigen_lr.mean())
    assert ((turned * norm(o)).sum(-1) >= (h * norm(o)).sum(-1) - 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1e-2, 1e-4, 1e-10])
def test_small_vectors_get_norm_one(length, dtype):
    x = draw(length=length, dtype=dtype)[1]
    torch.testing.assert_close(
        unit(x).double().norm(dim=-1), torch.ones(3, 5, dtype=torch.float64), rtol=4 * torch.finfo(dtype).eps, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_unit_computes_in_at_least_fp32(dtype):
    x = draw(shape=(50, 32), dtype=dtype)[1] * 3
    y = unit(x)
    assert y.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(y.double(), norm(x.double()), rtol=4 * torch.finfo(y.dtype).eps, atol=0)


@pytest.mark.parametrize("dim", [0, 1, -1, -2])
def test_unit_along_any_dim(dim):
    x = draw(shape=(4, 6))[0]
    torch.testing.assert_close(unit(x, dim), x / x.norm(dim=dim, keepdim=True))


def test_zero_vectors_give_zero_and_a_zero_gradient():
    x = torch.randn(3, 8, dtype=torch.float64)
    x[1] = 0
    x.requires_grad_()
    y = unit(x)
    assert (y[1] == 0).all()
    y.sum().backward()
    assert (x.grad[1] == 0).all()
    assert x.grad.isfinite().all()
    assert (x.grad[[0, 2]] != 0).any()


def test_a_zero_output_leaves_h_where_it_is():
    h, o, eigen_lr = draw(shape=(3, 8))
    o[1] = 0
    h, o = h.requires_grad_(), o.requires_grad_()
    y = normalized_update(h, o, eigen_lr[0])
    torch.testing.assert_close(y[1], h[1], rtol=1e-14, atol=1e-15)
    grad_h, grad_o = torch.autograd.grad(y.pow(3).sum(), (h, o))
    assert (grad_o[1] == 0).all()
    assert grad_o.isfinite().all()
    assert grad_h.isfinite().all()
    assert (grad_h[1] != 0).any()


def test_strided_input():
    h, o, eigen_lr = draw(shape=(4, 6, 16))
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (h, o)]
    assert not turned[0].is_contiguous()
    assert torch.equal(normalized_update(*turned, eigen_lr), normalized_update(h, o, eigen_lr))
