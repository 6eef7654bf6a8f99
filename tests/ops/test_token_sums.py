"""Sums over tokens by groups: the same function and gradients, and used where it pays alone."""

import operator

import pytest
import torch
import torch.nn.functional as F

from nsphere.gpt import RMSNorm
from nsphere.ops.token_sums import share, sum_to


def compiled_and_graphs(function):
    """The function traced by the compiler and run as it was traced, and the graphs that it was given."""
    torch._dynamo.reset()  # a limit counts the variants of one piece of code
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    return torch.compile(function, backend=keep, fullgraph=True), graphs


def grouped(graph) -> bool:
    return "unflatten" in graph.code


@pytest.mark.parametrize("op", [operator.mul, operator.add])
@pytest.mark.parametrize("shape", [(), (1,), (6,), (4, 6), (4, 1), (1, 6)])
@pytest.mark.parametrize("heads_first", [False, True])
def test_value_and_gradients(op, shape, heads_first):
    x = torch.randn(2, 4, 192, 6, dtype=torch.float64).transpose(1, 2)
    x = (x if heads_first else x.contiguous()).requires_grad_()
    w = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 192, 4, 6, dtype=torch.float64)
    function, graphs = compiled_and_graphs(lambda x, w: share(op, x, w, 1))
    y, expected = function(x, w), op(x, w)
    assert grouped(graphs[0])
    assert y.stride() == expected.stride()
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    for mine, plain in zip(
        torch.autograd.grad((y * weight).sum(), (x, w)),
        torch.autograd.grad((expected * weight).sum(), (x, w)),
        strict=True,
    ):
        torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("num_tokens", "pays"), [(192, True), (64, False), (65, False), (100, False)])
def test_groups_where_they_divide_the_tokens(num_tokens, pays):
    x = torch.randn(3, num_tokens, 5, dtype=torch.float64)
    function, graphs = compiled_and_graphs(lambda x: sum_to(x, (5,), -2))
    torch.testing.assert_close(function(x), x.sum((0, 1)), rtol=1e-12, atol=1e-12)
    assert grouped(graphs[0]) == pays


def test_a_w_of_each_token_and_one_without_gradient_are_left_alone():
    x, w = torch.randn(2, 128, 4), torch.randn(128, 1, requires_grad=True)
    for factor in (w, w.detach()[0]):
        function, graphs = compiled_and_graphs(lambda x, w: share(operator.mul, x, w, 1))
        torch.testing.assert_close(function(x, factor), x * factor)
        assert not grouped(graphs[0])


def test_any_length_has_one_graph():
    function, graphs = compiled_and_graphs(lambda x, w: share(operator.mul, x, w, 0))
    w = torch.randn(5, requires_grad=True)
    for num_tokens in (128, 192, 77, 256):
        x = torch.randn(num_tokens, 5)
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(function(x, w), x * w)
    assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # torch's own of bf16 values under an fp32 weight
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rms_norm_is_torchs(dtype):
    norm, plain = RMSNorm(32, eps=1e-5), torch.nn.RMSNorm(32, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    plain.load_state_dict(norm.state_dict())
    x, grad = torch.randn(2, 128, 32, dtype=dtype), torch.randn(2, 128, 32, dtype=dtype)
    function, graphs = compiled_and_graphs(norm)
    results = []
    for module, of in ((function, norm), (plain, plain)):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.backward(grad)
        results.append((y, leaf.grad, of.weight.grad))
    assert grouped(graphs[0])
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    for mine, torchs in zip(*results, strict=True):
        assert mine.dtype == torchs.dtype
        torch.testing.assert_close(mine, torchs, **tolerance)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (32,), norm.weight, 1e-5), rtol=0, atol=0)
