"""The look-up and its gradient, the same bits from run to run."""

import needs
import pytest
import torch
import torch.nn.functional as F

from nsphere.ops.embedding import embedding, embedding_grad

# torch.compile calls what torch itself has deprecated
compiler_warns = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def draw(shape=(4, 50), V=7, d=6, dtype=torch.float64):
    torch.manual_seed(0)
    return torch.randint(V, shape), torch.randn(V, d, dtype=dtype).requires_grad_(), torch.randn(*shape, d, dtype=dtype)


@pytest.mark.parametrize("shape", [(4, 50), (9,), (), (0,), (2, 3, 4)])
def test_value_and_gradient(shape):
    tokens, weight, downstream = draw(shape)
    y = embedding(tokens, weight)
    assert torch.equal(y, weight[tokens])
    (got,) = torch.autograd.grad((y * downstream).sum(), weight)
    expected = torch.zeros_like(weight)
    for token, row in zip(tokens.flatten().tolist(), downstream.reshape(-1, 6), strict=True):
        expected[token] += row
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_torchs_own_bit_for_bit(dtype):
    tokens, weight, downstream = draw(dtype=dtype)
    (got,) = torch.autograd.grad((embedding(tokens, weight) * downstream).sum(), weight)
    (own,) = torch.autograd.grad((F.embedding(tokens, weight) * downstream).sum(), weight)
    assert got.dtype == dtype
    assert torch.equal(got, own)


def test_a_strided_gradient():
    tokens, weight, downstream = draw()
    y = embedding(tokens, weight)
    (got,) = torch.autograd.grad(y, weight, downstream.transpose(0, 1).contiguous().transpose(0, 1))
    (expected,) = torch.autograd.grad(F.embedding(tokens, weight), weight, downstream)
    torch.testing.assert_close(got, expected)


def test_int32_tokens():
    tokens, weight, downstream = draw()
    grads = [torch.autograd.grad((embedding(t, weight) * downstream).sum(), weight)[0] for t in (tokens, tokens.int())]
    assert torch.equal(*grads)


def test_the_operator_keeps_torchs_rules():
    tokens, _, downstream = draw((3, 5))
    torch.library.opcheck(embedding_grad, (downstream, tokens, 7), test_utils=("test_schema", "test_faketensor"))


@needs.compiler
@compiler_warns
def test_compiled_gradient_is_the_eager_one_every_time():
    """With two threads and many tokens a row, where the compiler's own atomic additions differ from run to run."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        tokens = torch.randint(11, (8, 512))
        weight = torch.randn(11, 64).requires_grad_()
        downstream = torch.randn(8, 512, 64)

        def loss(tokens, weight):
            return (embedding(tokens, weight) * downstream).sum()

        (eager,) = torch.autograd.grad(loss(tokens, weight), weight)
        compiled = torch.compile(loss, fullgraph=True)
        for _ in range(5):
            (grad,) = torch.autograd.grad(compiled(tokens, weight), weight)
            assert torch.equal(grad, eager)
    finally:
        torch.set_num_threads(threads)
