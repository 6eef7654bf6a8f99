"""normalized_update's kernels against the formula in fp64: on a GPU at training's sizes, else interpreted."""

import pytest
import torch
from needs import kernels
from ops.on_device.device import COMPILER, DEVICE, check, size

from nsphere.ops.normalized_update import normalized_update

pytestmark = kernels

DTYPES = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)]


def draw(rows, width, h_dtype, o_dtype):
    generator = torch.Generator(DEVICE).manual_seed(0)
    h, o, grad = (torch.randn(2, rows, width, generator=generator, device=DEVICE) for _ in range(3))
    lr = torch.rand(width, generator=generator, device=DEVICE)
    return (h / h.norm(dim=-1, keepdim=True)).to(h_dtype), 3 * o.to(o_dtype), lr, grad.to(h_dtype)


def run(function, h, o, lr, grad):
    leaves = [t.detach().requires_grad_() for t in (h, o, lr)]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def kernel(h, o, lr):
    return normalized_update(h, o, lr, backend="triton")


def formula(h, o, lr):
    z = h + lr * (o / o.norm(dim=-1, keepdim=True) - h)
    return z / z.norm(dim=-1, keepdim=True)


def truth(*tensors):
    return run(formula, *(t.double() for t in tensors))


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("width", size((1024, 4096, 1000), (16, 12)))
def test_values_and_gradients(width, dtypes):
    tensors = draw(size(4096, 3), width, *dtypes)
    for name, a, b in zip(("h′", "dh", "do", "dα"), run(kernel, *tensors), truth(*tensors), strict=True):
        check(a, b, name)


def test_strided_rows():
    h, o, lr, grad = draw(size(512, 3), size(1024, 16), torch.float32, torch.bfloat16)
    h, grad = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (h, grad))
    o = torch.cat((o, o), -1)[..., : o.shape[-1]]
    for a, b in zip(run(kernel, h, o, lr, grad), truth(h, o, lr, grad), strict=True):
        check(a, b, "strided")


def test_the_same_bits_twice_and_in_one_compiled_graph():
    tensors = draw(size(4096, 5), size(1024, 16), torch.float32, torch.bfloat16)

    def function(h, o, lr):
        return kernel(2 * h, o, lr.abs())

    compiled = torch.compile(function, fullgraph=True, backend=COMPILER)
    runs = [run(f, *tensors) for f in (function, function, compiled)]
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


def test_the_backends_agree():
    tensors = draw(size(4096, 5), size(1024, 16), torch.float32, torch.bfloat16)
    exact = truth(*tensors)
    compiled = torch.compile(normalized_update, fullgraph=True, backend=COMPILER)
    for name, function in (("reference", normalized_update), ("compiled", compiled), ("triton", normalized_update)):
        got = run(lambda *t, f=function, b=name: f(*t, backend=b), *tensors)
        for what, a, b in zip(("h′", "dh", "do", "dα"), got, exact, strict=True):
            # compiled, the backward starts from h in bf16, which the products beside it keep anyway
            if name == "compiled" and what != "h′":
                assert (a.double() - b).abs().max() <= 2**-7 * b.abs().max(), (name, what)
            else:
                check(a, b, f"{name}, {what}")
