"""x (s ⊙ W)ᵀ with the backward that keeps W and s alone, against autograd's of the formula."""

import pytest
import torch
from tolerances import assert_close

from nsphere.hypersphere import Scale, SphereLinear
from nsphere.ops.row_scaled_linear import row_scaled_linear


def formula(x, weight, scale):
    return torch.nn.functional.linear(x, weight * scale.unsqueeze(-1))


def gradients(function, inputs):
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    y = function(*inputs)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad.to(y.dtype))]


def make_inputs(dtype, shape=(2, 5), scale_shape=(24,)):
    generator = torch.Generator().manual_seed(0)
    x, weight, scale = (
        torch.randn(s, generator=generator, dtype=torch.float64) for s in ((*shape, 16), (24, 16), scale_shape)
    )
    return x.to(dtype), torch.nn.functional.normalize(weight, dim=-1).to(dtype), scale.to(dtype)


@pytest.mark.parametrize("shape", [(2, 5), (7,), ()], ids=["batch", "tokens", "vector"])
@pytest.mark.parametrize("scale_shape", [(24,), (1,)])
def test_in_fp64_it_is_the_formula(shape, scale_shape):
    inputs = make_inputs(torch.float64, shape, scale_shape)
    for a, b in zip(gradients(row_scaled_linear, inputs), gradients(formula, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_in_fp32_it_is_as_near_to_the_truth_as_the_formula():
    inputs = make_inputs(torch.float32, (4, 64))
    truth = gradients(formula, [t.double() for t in inputs])
    for got, plain, true in zip(gradients(row_scaled_linear, inputs), gradients(formula, inputs), truth, strict=True):
        assert_close(got, true, plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scales_of_nothing_learn_as_others_do(dtype):
    """0, and what is next to it: the same value; gradients of 0 as far as a sum shows, the scale's with its digits."""
    x, weight, scale = make_inputs(dtype)
    scale[:4] = torch.tensor([0.0, -0.0, 1e-30, -1e-10])
    got, expected = gradients(row_scaled_linear, (x, weight, scale)), gradients(formula, (x, weight, scale))
    assert torch.equal(got[0], expected[0])
    for a, b in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2.0**-56)
    assert expected[3][:4].abs().min() > 0.01  # what is compared is there


@pytest.mark.parametrize("kind", ["vector", "scalar", "fixed"])
@pytest.mark.parametrize("projection", ["step", "forward"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_compiled_sphere_linear(kind, projection, autocast):
    """It takes the op where all is one dtype, and computes what the eager module does in either case."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = SphereLinear(16, 24, 1, Scale(24, 1.5, 0.25, kind), gain=4.0, projection=projection)
    x = torch.randn(2, 5, 16)
    if not autocast:
        module, x = module.double(), x.double()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.print_readable(print_output=False))
        return graph

    def run(function):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = function(x)
        y.double().square().sum().backward()
        found = [y.detach(), *(p.grad for p in module.parameters())]
        module.zero_grad()
        return found

    compiled = torch.compile(module, backend=keep, fullgraph=True)
    for a, b in zip(run(compiled), run(module), strict=True):
        torch.testing.assert_close(a, b)
    assert ("autograd_function_apply" in graphs[0]) != autocast
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x), rtol=0, atol=0)
    assert "autograd_function_apply" not in graphs[1]


@pytest.mark.parametrize(
    "dtype, backend, taken", [("float32", "", True), ("float32", "reference", False), ("bfloat16", "", False)]
)
def test_the_reference_and_bf16_weights_are_left_to_autograd(dtype, backend, taken, monkeypatch):
    monkeypatch.setenv("NSPHERE_BACKEND", backend)
    torch._dynamo.reset()
    module = SphereLinear(16, 24, 1, Scale(24, 1.0, 1.0)).to(getattr(torch, dtype))
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.print_readable(print_output=False))
        return graph

    torch.compile(module, backend=keep, fullgraph=True)(torch.ones(2, 16, dtype=getattr(torch, dtype)))
    assert ("autograd_function_apply" in graphs[0]) == taken
