"""The backwards that compiled graphs use, which keep little, against autograd's of the references."""

import itertools

import pytest
import torch
from functorch.compile import make_boxed_func
from tolerances import assert_close
from torch._dynamo.backends.common import aot_autograd

from nsphere.norms import L2Norm, NormSpec, RMSNorm
from nsphere.ops.normalized_update import lean, reference
from nsphere.ops.qk_norm_rope import qk_norm_rope, traced
from nsphere.ops.qk_norm_rope import reference as qk_reference
from nsphere.ops.qk_norm_rope.reference import SideSpec, SideTensors
from nsphere.rope import RopeSpec


def gradients(function, inputs, seed=3):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*inputs)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad.to(y.dtype))]


def update_inputs(h_dtype, o_dtype, width=48, length=0.1):
    generator = torch.Generator().manual_seed(0)
    h, o = torch.randn(2, 3, 16, width, generator=generator, dtype=torch.float64)
    eigen_lr = torch.rand(width, generator=generator, dtype=torch.float64)
    h = h / h.norm(dim=-1, keepdim=True)
    wide = torch.promote_types(h_dtype, torch.float32)
    return h.to(h_dtype), (length * o).to(o_dtype), eigen_lr.to(wide)


@pytest.mark.parametrize("lr_shape", ["vector", "one", "zero-dim"])
def test_update_in_fp64_has_autograds_gradients(lr_shape):
    h, o, eigen_lr = update_inputs(torch.float64, torch.float64)
    o[0, 3] = 0  # a row without direction
    eigen_lr = {"vector": eigen_lr, "one": eigen_lr[:1], "zero-dim": eigen_lr[0]}[lr_shape]
    got = gradients(lean.normalized_update, (h, o, eigen_lr))
    for a, b in zip(got, gradients(reference.normalized_update, (h, o, eigen_lr)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "h_dtype, o_dtype", [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")]
)
def test_update_in_low_precision_is_within_its_dtypes_rounding(h_dtype, o_dtype):
    """What autocast makes of h for the product that follows is all that its backward sees of it: bf16."""
    inputs = update_inputs(getattr(torch, h_dtype), getattr(torch, o_dtype))
    got = gradients(lean.normalized_update, inputs)
    plain = gradients(reference.normalized_update, inputs)
    truth = gradients(reference.normalized_update, [x.double() for x in inputs])
    assert torch.equal(got[0], plain[0])
    lower = getattr(torch, o_dtype)
    for a, p, t, name in zip(got[1:], plain[1:], truth[1:], ("h", "o", "eigen_lr"), strict=True):
        assert_close(a.to(lower), t, p.to(lower), name)
        assert a.dtype == p.dtype


@pytest.mark.parametrize("norm", [L2Norm(8), RMSNorm(8, weight="none")], ids=["l2", "rms"])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("multiplied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_q_and_k_from_their_outputs(norm, norm_first, multiplied, dtype):
    rope = RopeSpec(8)
    cos, sin = rope.tables(5)
    spec = SideSpec(norm=norm.spec, rope=rope, norm_first=norm_first)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 8, generator=generator, dtype=torch.float64).to(dtype)
    multiplier = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    multiplier[1, 2:5] = torch.tensor([0.0, 1e-30, -1e-9])  # of what they leave little or nothing is left to divide
    multiplier = multiplier.to(torch.promote_types(dtype, torch.float32))

    def run(forward):
        def function(x, multiplier=None):
            t = SideTensors(cos=cos, sin=sin, multiplier=multiplier)
            return forward(x, spec, t)

        return function

    plain = run(lambda x, spec, t: qk_reference.forward(x, t, spec)[0])
    inputs = (x, multiplier) if multiplied else (x,)
    assert traced.suits(x.requires_grad_(), spec, SideTensors(cos=cos, sin=sin))
    got, expected = gradients(run(traced.norm_rope), inputs), gradients(plain, inputs)
    if dtype == torch.float64:
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
        return
    truth = gradients(plain, [i.double() for i in inputs])
    # a multiplier that is next to nothing leaves what no sum of products can show
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=2.0**-58)
    for a, p, t in zip(got[1:], expected[1:], truth[1:], strict=True):
        assert_close(a.to(dtype), t, p.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "multiplier_dtype, size, least",
    [(torch.float32, 1e-28, 1e-9), (torch.bfloat16, 1e-28, 1e-9), (torch.float16, 1.0, 1.0)],
)
def test_every_multiplier_has_its_own_gradient(multiplier_dtype, size, least, dtype):
    """Each to its own digits: tiny, negative and 0, in any dtype, of little gradients and components."""
    spec, generator = SideSpec(norm=L2Norm(8).spec, rope=None), torch.Generator().manual_seed(0)
    x, grad = torch.rand(2, 2, 64, 3, 8, generator=generator) + 0.5
    x[..., 2, 0] *= least
    grad = (size * grad).to(dtype)
    multiplier = torch.tensor([[1.0], [-1.5], [0.0]]).repeat(1, 8)
    multiplier[2, 1:] = torch.tensor([2.0**-59, -(2.0**-60), 2.0**-61, 1e-30, -1e-8, 0.1, -0.2])

    def run(forward, *inputs):
        x, multiplier = (t.detach().clone().requires_grad_() for t in inputs)
        return torch.autograd.grad(forward(x, spec, SideTensors(multiplier=multiplier)), (x, multiplier), grad.to(x))

    inputs = x.to(dtype), multiplier.to(multiplier_dtype)
    got = run(traced.norm_rope, *inputs)
    plain, truth = (
        run(lambda x, spec, t: qk_reference.forward(x, t, spec)[0], *each)
        for each in (inputs, [t.double() for t in inputs])
    )
    assert got[1].dtype == multiplier_dtype and truth[1].abs().min() > 0
    rtol = 2 * max(torch.finfo(dtype).eps, torch.finfo(multiplier_dtype).eps)
    torch.testing.assert_close(got[1].double(), truth[1], rtol=rtol, atol=0)
    for head in range(3):
        assert_close(*(dx[:, :, head] for dx, _ in (got, truth, plain)))


def attention(q, k, v):
    q, k, v = (t.to(q.dtype).transpose(1, 2) for t in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=8**0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_behind_a_multiplier_of_zero(dtype):
    """Of one dim, of a whole head, of everything; and attention's output has the bits that a true zero gives."""
    spec, generator = SideSpec(norm=L2Norm(8).spec, rope=None), torch.Generator().manual_seed(0)
    x, k, v = torch.randn(3, 2, 5, 3, 8, generator=generator, dtype=torch.float64).to(dtype)
    k = torch.nn.functional.normalize(k, dim=-1)
    for zeros in ((0, 3), (1,), ()):
        multiplier = 1 + torch.rand(3, 8, generator=generator)
        multiplier[zeros] = 0

        def ours(x, multiplier):
            return attention(traced.norm_rope(x, spec, SideTensors(multiplier=multiplier)), k, v)

        def plain(x, multiplier):
            return attention(qk_reference.forward(x, SideTensors(multiplier=multiplier), spec)[0], k, v)

        got, expected = gradients(ours, (x, multiplier)), gradients(plain, (x, multiplier))
        truth = gradients(plain, (x.double(), multiplier.double()))
        assert torch.equal(got[0], expected[0])
        for a, p, t in zip(got[1:], expected[1:], truth[1:], strict=True):
            assert_close(a.to(dtype), t, p.to(dtype))
        assert truth[2][zeros].abs().min() > 0  # what is compared is there


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("multiplied", [True, False])
def test_in_a_compiled_graph_they_are_the_same(multiplied, dtype):
    """torch 2.11 loses the gradient of an output that `to` has passed on as it was."""
    torch._dynamo.reset()
    rope, wide = RopeSpec(8), torch.promote_types(dtype, torch.float32)
    cos, sin = rope.tables(5)
    spec = SideSpec(norm=L2Norm(8).spec, rope=rope, norm_first=False)
    generator = torch.Generator().manual_seed(0)
    x, multiplier = (torch.randn(*shape, generator=generator) for shape in ((2, 5, 3, 8), (3, 8)))
    eigen_lr = torch.rand(24, generator=generator)

    def step(x, h, eigen_lr, multiplier=None):
        q = traced.norm_rope(2 * x, spec, SideTensors(cos=cos, sin=sin, multiplier=multiplier))
        return lean.normalized_update(2 * h, q.flatten(-2).sin(), eigen_lr.abs()).cos()

    inputs = [x.to(dtype), torch.ones(2, 5, 24, dtype=wide), eigen_lr.to(wide)]
    inputs += [multiplier.to(wide)] if multiplied else []
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for a, b in zip(gradients(compiled, inputs), gradients(step, inputs), strict=True):
        torch.testing.assert_close(a, b)
        assert b.abs().max() > 0


def test_one_compiled_function_meets_several_eps():
    """From the second on the compiler takes a spec's eps for a variable, which q's and k's autograd functions share."""
    torch._dynamo.reset()
    x = torch.randn(1, 2, 1, 4, generator=torch.Generator().manual_seed(0))

    def function(x, spec):
        q, k = qk_norm_rope(2 * x, x, spec, spec, SideTensors(), SideTensors())
        return q + k.sin()

    def plain(x, spec):
        q, k = (qk_reference.forward(y, SideTensors(), spec)[0] for y in (2 * x, x))
        return q + k.sin()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for eps in (1e-6, 0.5, 2.0):
        spec = SideSpec(NormSpec("rms", eps, eps_place="added"), None)
        got = gradients(lambda x, spec=spec: compiled(x, spec), [x])
        expected = gradients(lambda x, spec=spec: plain(x, spec), [x.double()])
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-6)


def test_weights_factors_of_zero_and_tables_with_gradients_are_left_to_autograd():
    x = torch.randn(1, 2, 1, 8, requires_grad=True)
    spec = SideSpec(norm=L2Norm(8).spec, rope=None)
    assert traced.suits(x, spec, SideTensors())
    assert not traced.suits(x.detach(), spec, SideTensors())
    assert not traced.suits(x, SideSpec(norm=None, rope=None), SideTensors())
    assert not traced.suits(x, spec, SideTensors(weight=torch.ones(8)))
    assert not traced.suits(x, spec, SideTensors(constant=0.0))
    assert traced.suits(x, spec, SideTensors(multiplier=torch.ones(8)))
    assert not traced.suits(x.half(), spec, SideTensors(multiplier=torch.ones(8)))
    assert not traced.suits(x, spec, SideTensors(cos=torch.ones(2, 4, requires_grad=True), sin=torch.ones(2, 4)))
    with torch.no_grad():
        assert not traced.suits(x, spec, SideTensors())


def recording(graphs):
    """A compiler's backend that runs graphs as they are and keeps those of backwards."""

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph)

    return aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(graph), bw_compiler=keep)


@pytest.mark.parametrize(
    "num_tokens, lr_shape",
    [*itertools.product([128, 100, None], [(48,), (1,), ()]), (128, (128, 1)), (128, (2, 128, 1))],
)
def test_update_over_groups_of_tokens(num_tokens, lr_shape):
    """Compiled, the gradient of the eigen learning rate is summed by groups of 64 tokens where they divide them."""
    torch._dynamo.reset()
    backwards: list = []
    shape = (48,) if num_tokens is None else (2, num_tokens, 48)
    h, o = torch.randn(2, *shape, dtype=torch.float64)
    inputs = (h / h.norm(dim=-1, keepdim=True), o, torch.rand(lr_shape, dtype=torch.float64))
    compiled = torch.compile(lean.normalized_update, backend=recording(backwards), fullgraph=True)
    for a, b in zip(gradients(compiled, inputs), gradients(reference.normalized_update, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    assert ("[2, 2, 64, 48]" in backwards[0].code) == (num_tokens == 128 and 128 not in lr_shape)


@pytest.mark.parametrize(
    "shape", [(3, 8), (1, 1), (3, 1), (8,), (2, 1, 1, 1), (1, 128, 1, 1), (128, 1, 1), (2, 128, 3, 8)]
)
def test_multipliers_gradient_over_groups_of_tokens(shape):
    torch._dynamo.reset()
    spec = SideSpec(norm=L2Norm(8).spec, rope=None)
    inputs, backwards = (torch.randn(2, 128, 3, 8, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)), []
    compiled = torch.compile(
        lambda x, m: traced.norm_rope(x, spec, SideTensors(multiplier=m)), backend=recording(backwards), fullgraph=True
    )
    expected = gradients(lambda x, m: qk_reference.forward(x, SideTensors(multiplier=m), spec)[0], inputs)
    for a, b in zip(gradients(compiled, inputs), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    assert ("[2, 2, 64, 3, 8]" in backwards[0].code) == (128 not in shape)
