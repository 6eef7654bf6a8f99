"""W ← w / ‖w‖ in place, over rows or columns."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsphere.ops.normalize_matrices import normalize_matrices_


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    dim=st.sampled_from([0, 1]),
    exponent=st.floats(-6, 6),
    seed=st.integers(0, 2**31),
)
def test_rows_or_columns_are_unit_in_their_old_direction(rows, columns, dim, exponent, seed):
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10**exponent
    expected = w.double() / w.double().norm(dim=dim, keepdim=True)
    normalize_matrices_([(w, dim)])
    assert (w.double().norm(dim=dim) - 1).abs().max() <= 1e-6
    torch.testing.assert_close(w.double(), expected, rtol=5e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_rounded_once(dtype):
    torch.manual_seed(0)
    w = (3 * torch.randn(64, 48)).to(dtype)
    exact = w.double() / w.double().norm(dim=1, keepdim=True)
    normalize_matrices_([(w, 1)])
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(w.double(), exact, rtol=0.501 * eps if eps > 1e-6 else 4 * eps, atol=1e-7 * (eps > 1e-6))


def test_several_matrices_of_several_shapes_in_place():
    torch.manual_seed(0)
    matrices = [(torch.randn(5, 7), 0), (torch.randn(5, 7), 1), (torch.randn(3, 5), 0), (torch.randn(2, 3, 4), 1)]
    expected = [w / w.norm(dim=dim, keepdim=True) for w, dim in matrices]
    addresses = [w.data_ptr() for w, _ in matrices]
    normalize_matrices_(matrices)
    for (w, _), e, address in zip(matrices, expected, addresses, strict=True):
        torch.testing.assert_close(w, e)
        assert w.data_ptr() == address
    normalize_matrices_([])


def test_zero_rows_stay_zero():
    w = torch.randn(4, 6)
    w[2] = 0
    normalize_matrices_([(w, 1)])
    assert (w[2] == 0).all()
    assert (w[[0, 1, 3]].norm(dim=1) - 1).abs().max() < 1e-6
    normalize_matrices_([(w, 0)])
    assert w.isfinite().all()


def test_is_not_differentiated_through():
    w = torch.nn.Parameter(torch.randn(4, 6))
    loss = (w * 2).sum()
    normalize_matrices_([(w, 1)])
    assert w.is_leaf
    assert w.grad_fn is None
    loss.backward()  # the product with a constant needs no value of w
    assert torch.equal(w.grad, torch.full_like(w, 2))


def test_strided_matrices():
    base = torch.randn(8, 10)
    before = base.clone()
    view = base.t()[::2]
    expected = view / view.norm(dim=1, keepdim=True)
    normalize_matrices_([(view, 1)])
    torch.testing.assert_close(base.t()[::2], expected)
    assert torch.equal(base.t()[1::2], before.t()[1::2])


def test_once_more_moves_only_last_bits():
    torch.manual_seed(0)
    w = torch.randn(200, 96)
    normalize_matrices_([(w, 1)])
    once = w.clone()
    normalize_matrices_([(w, 1)])
    torch.testing.assert_close(w, once, rtol=2.4e-7, atol=0)
