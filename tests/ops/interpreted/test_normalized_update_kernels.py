"""The kernels of h′ = Norm(h + α (Norm(o) − h)) in Triton's interpreter, against the formula in fp64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_close, error

from nsphere.ops.normalized_update import normalized_update, reference
from nsphere.ops.normalized_update import triton as kernels

FP32 = 1e-6


def draw(shape=(3, 5, 12), seed=0, length=1.0):
    generator = torch.Generator().manual_seed(seed)
    h, o, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    eigen_lr = torch.rand(shape[-1], generator=generator, dtype=torch.float64)
    return h / h.norm(dim=-1, keepdim=True), length * o, eigen_lr, grad


def written_out(h, o, lr):
    z = h + lr * (o / o.pow(2).sum(-1, keepdim=True).sqrt() - h)
    return z / z.pow(2).sum(-1, keepdim=True).sqrt()


def values_and_gradients(function, h, o, lr, grad):
    leaves = [t.detach().requires_grad_() for t in (h, o, lr)]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


def kernel(h, o, lr):
    return normalized_update(h, o, lr, backend="triton")


def check(h, o, lr, grad, dtype=torch.float32):
    low = [h.to(dtype), o.to(dtype), lr.float(), grad.to(dtype)]
    got = values_and_gradients(kernel, *low)
    plain = values_and_gradients(reference.normalized_update, *low)
    expected = values_and_gradients(written_out, *(t.double() for t in low))
    for name, a, b, p in zip(("h′", "dh", "do", "dα"), got, expected, plain, strict=True):
        assert a.dtype == p.dtype
        assert_close(a, b, p, name)


@pytest.mark.parametrize("length", [1e-4, 1.0, 1e3])
@pytest.mark.parametrize("shape", [(3, 5, 12), (7, 16), (33,), (2, 2, 3, 5)], ids=str)
def test_values_and_gradients(shape, length):
    check(*draw(shape, length=length))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.integers(8, 40), st.floats(1e-4, 1e4), st.integers(0, 2**16))
def test_ragged_rows(rows, width, length, seed):
    check(*draw((rows, width), seed, length))


def test_one_eigen_lr_for_all():
    h, o, lr, grad = draw()
    check(h, o, lr[:1], grad)
    check(h, o, lr[0], grad)


def test_an_eigen_lr_that_is_a_view():
    """One number for all dims, and every second of a longer vector."""
    h, o, lr, grad = (t.float() for t in draw((4, 16)))
    for view in (lr[:1].expand(16), lr.repeat_interleave(2)[::2]):
        leaves = [h.requires_grad_(), o.requires_grad_(), view.detach().requires_grad_()]
        assert not leaves[2].is_contiguous()
        y = kernel(*leaves)
        got = [y.detach(), *torch.autograd.grad(y, leaves, grad)]
        expected = values_and_gradients(written_out, *(t.double() for t in (h, o, view, grad)))
        for a, b in zip(got, expected, strict=True):
            assert error(a, b) <= FP32


def test_everything_keeps_its_own_dtype():
    h, o, lr, grad = draw((4, 16))
    for dtypes in itertools.permutations((torch.float32, torch.bfloat16, torch.float16)):
        low = [t.to(dtype) for t, dtype in zip((h, o, lr), dtypes, strict=True)]
        got = values_and_gradients(kernel, *low, grad)
        assert tuple(t.dtype for t in got) == (dtypes[0], *dtypes)
        for a, b in zip(got, values_and_gradients(written_out, *(t.double() for t in (*low, grad))), strict=True):
            # the gradient is rounded to the dtype of h′, and the interpreter cuts off
            assert error(a, b) <= 4 * max(torch.finfo(t.dtype).eps for t in (a, got[0]))


def test_bf16_is_off_by_less_than_a_unit_in_the_last_place():
    # the interpreter cuts off where a GPU rounds: one unit of error where that has half of one
    h, o, lr, grad = draw((20, 48))
    low = [h.bfloat16(), o.bfloat16(), lr.float(), grad.bfloat16()]
    got = values_and_gradients(kernel, *low)
    assert [t.dtype for t in got] == [torch.bfloat16] * 3 + [torch.float32]
    for a, b in zip(got, values_and_gradients(written_out, *(t.double() for t in low)), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=torch.finfo(a.dtype).eps, atol=1e-6 * b.abs().max().item())


def test_rows_at_any_strides_are_read_in_place(monkeypatch):
    h, o, lr, grad = draw((4, 6, 16))
    turned = [t.float().transpose(0, 1).contiguous().transpose(0, 1) for t in (h, o, grad)]
    wide = torch.zeros(4, 6, 40)
    wide[..., 8:24] = h.float()
    views = [wide[..., 8:24], *turned[1:]]
    addresses = []
    launch = kernels.forward_launch
    monkeypatch.setattr(kernels, "forward_launch", lambda *t: addresses.extend(x.data_ptr() for x in t) or launch(*t))
    got = values_and_gradients(kernel, views[0], views[1], lr.float(), views[2])
    assert addresses[:2] == [t.data_ptr() for t in views[:2]]
    expected = values_and_gradients(written_out, h, o, lr, grad)
    for a, b in zip(got, expected, strict=True):
        assert error(a, b) <= FP32


def test_zero_rows_as_the_reference_has_them():
    h, o, lr, grad = (t.float() for t in draw((4, 8)))
    o[1] = 0
    h[2] = 0
    o[3] = h[3] = 0
    got = values_and_gradients(kernel, h, o, lr, grad)
    expected = values_and_gradients(reference.normalized_update, h.double(), o.double(), lr.double(), grad)
    for a, b in zip(got, expected, strict=True):
        assert error(a, b) <= FP32
    assert got[2][1].abs().max() == 0


def test_an_expanded_gradient_and_an_empty_batch():
    h, o, lr, _ = (t.float() for t in draw((2, 3, 8)))
    leaves = [t.requires_grad_() for t in (h, o, lr)]
    kernel(*leaves).sum().backward()
    expected = values_and_gradients(
        written_out, h.detach().double(), o.detach().double(), lr.detach().double(), torch.ones(2, 3, 8)
    )
    for leaf, e in zip(leaves, expected[1:], strict=True):
        assert error(leaf.grad, e) <= FP32
    empty = values_and_gradients(kernel, h[:0], o[:0], lr, torch.ones(0, 3, 8))
    assert empty[0].shape == (0, 3, 8)
    assert torch.equal(empty[3], torch.zeros(8))


def test_the_sum_for_alpha_is_the_same_from_run_to_run():
    h, o, lr, grad = (t.float() for t in draw((40, 16)))
    runs = [values_and_gradients(kernel, h, o, lr, grad)[3] for _ in range(2)]
    assert torch.equal(*runs)


def test_offsets_beyond_2_to_the_31():
    h, o, lr, _ = (t.float() for t in draw((3, 8)))
    # rows 2^30 + 8 elements apart: a row's number and the stride fit 32 bits, their product does not.
    # Pages that nothing touches take no memory
    pages = torch.UntypedStorage(2 * (2**31 + 32))
    far = torch.tensor([], dtype=torch.bfloat16).set_(pages, 0, (3, 1, 8), (2**30 + 8, 8, 1))
    far.copy_(o.view(3, 1, 8))
    runs = [values_and_gradients(kernel, h.view(3, 1, 8), x, lr, torch.ones(3, 1, 8)) for x in (far, far.clone())]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_registered_with_torch_library(monkeypatch):
    monkeypatch.undo()  # opcheck makes tensors without values
    h, o, lr, _ = (t.float().requires_grad_() for t in draw((2, 3, 8)))
    torch.library.opcheck(torch.ops.nsphere.normalized_update.default, (h, o, lr))


def test_one_graph_under_torch_compile():
    h, o, lr, grad = (t.float() for t in draw((2, 3, 8)))
    compiled = torch.compile(lambda h, o, lr: kernel(2 * h, o, lr.abs()), fullgraph=True, backend="aot_eager")
    got = values_and_gradients(compiled, h, o, lr, grad)
    expected = values_and_gradients(lambda h, o, lr: kernel(2 * h, o, lr.abs()), h, o, lr, grad)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_what_the_kernels_do_not_take_is_told(caplog):
    h, o, lr, _ = draw((2, 8))
    with pytest.raises(
        RuntimeError, match="'triton' was asked for and cannot run: normalized_update: .* not torch.float64"
    ):
        kernel(h, o, lr)
    wide = torch.randn(1, 20_000)
    with pytest.raises(RuntimeError, match="a row of 20000 elements"):
        kernel(wide, wide, lr[:1].float())
    h, o, lr = (t.float() for t in draw((2, 8))[:3])
    for arguments, message in (
        ((h, o.double(), lr), "not torch.float64"),
        ((h, o, lr.double()), "not torch.float64"),
        ((h, o[:1], lr), r"h is \(2, 8\) and o is \(1, 8\)"),
        ((h, o, lr.expand(2, 8)), r"the eigen learning rate is \(2, 8\), not"),
    ):
        with pytest.raises(RuntimeError, match=f"'triton' was asked for and cannot run: .*{message}"):
            kernel(*arguments)
