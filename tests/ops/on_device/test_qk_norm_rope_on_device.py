"""qk_norm_rope's kernels against the reference in fp64: a GPU at training's sizes, or the interpreter at tiny ones."""

import itertools

import pytest
import torch
from needs import kernels
from ops.on_device.device import COMPILER, DEVICE, check, size

from nsphere.norms import NormSpec
from nsphere.ops.qk_norm_rope import SideSpec, SideTensors, qk_norm_rope
from nsphere.rope import RopeSpec

pytestmark = kernels

HEADS, KV_HEADS = size((32, 8), (4, 2))
BATCH, LENGTH = size((2, 1024), (2, 3))
HEAD_DIMS = size((64, 128, 80), (8, 12))
RMS, BARE, UNIT = NormSpec("rms", 1e-6, weight="shared"), NormSpec("rms", 1e-6), NormSpec("l2", 0.0)
LAYER, FULL = NormSpec("layer", 1e-5, weight="per_head", bias=True), NormSpec("rms", 1e-6, weight="full")
KINDS = {
    "rms": (RMS, True, "half", "head"),
    "rms, interleaved": (RMS, True, "interleaved", "head"),
    "bare after": (BARE, False, "half", "head"),
    "ngpt": (UNIT, False, "half", "head"),
    "layer": (LAYER, True, "half", "head"),
    "full": (FULL, True, "half", "full"),
    "rope alone": (None, True, "half", "head"),
}

WEIGHTLESS = ("bare after", "ngpt")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE)


def inputs(head_dim, layout="bshd", dtype=torch.float32, length=LENGTH):
    """q and k as views of one projection, [B, T, H, D] in the layout's strides."""
    order = {"bshd": (BATCH, length), "sbhd": (length, BATCH), "bhsd": (BATCH, length), "thd": (1, BATCH * length)}
    packed = random(*order[layout], (HEADS + 2 * KV_HEADS) * head_dim).to(dtype)
    q, k, _ = packed.unflatten(-1, (-1, head_dim)).split((HEADS, KV_HEADS, KV_HEADS), -2)
    if layout == "sbhd":
        return q.transpose(0, 1), k.transpose(0, 1)
    if layout == "bhsd":
        return tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    return q, k


def values(kind, head_dim, length, dtype):
    norm, _, _, _ = KINDS[kind]
    rope = RopeSpec(head_dim)
    cos, sin = rope.tables(length, device=DEVICE)
    sides = []
    for i, heads in enumerate((HEADS, KV_HEADS)):
        shape = {"shared": (head_dim,), "per_head": (heads, head_dim), "full": (heads * head_dim,)}.get(
            "none" if norm is None else norm.weight
        )
        weight = None if shape is None else (1 + 0.3 * random(*shape, seed=i + 1)).to(dtype).requires_grad_()
        bias = random(*shape, seed=i + 3).to(dtype).requires_grad_() if norm is not None and norm.bias else None
        scale = (1 + random(heads, head_dim, seed=5)).to(dtype).requires_grad_() if kind == "ngpt" and i == 0 else None
        sides.append(SideTensors(weight, bias, cos.to(dtype), sin.to(dtype), scale))
    return sides


def run(kind, q, k, backend, function=qk_norm_rope, wide=torch.float32):
    """Outputs, then gradients of q, k and everything learned."""
    norm, norm_first, layout, over = KINDS[kind]
    spec = SideSpec(norm, RopeSpec(q.shape[-1], layout=layout), norm_first, over)
    sides = values(kind, q.shape[-1], q.shape[1], wide)
    q, k = (x.detach().requires_grad_() for x in (q, k))
    outputs = function(q, k, spec, spec, *sides, backend=backend)
    grads = [random(*y.shape, seed=9).to(q.dtype) for y in outputs]
    learned = [w for t in sides for w in (t.weight, t.bias, t.multiplier) if w is not None]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, [q, k, *learned], grads)]


def truth(kind, q, k):
    """In fp64, from the same low-precision inputs and gradients."""
    norm, norm_first, layout, over = KINDS[kind]
    spec = SideSpec(norm, RopeSpec(q.shape[-1], layout=layout), norm_first, over)
    sides = [
        SideTensors(*(None if w is None else w.detach().double().requires_grad_() for w in (t.weight, t.bias)),
                    t.cos.double(), t.sin.double(),
                    None if t.multiplier is None else t.multiplier.detach().double().requires_grad_())
        for t in values(kind, q.shape[-1], q.shape[1], torch.float32)
    ]  # fmt: skip
    leaves = [x.detach().double().requires_grad_() for x in (q, k)]
    outputs = qk_norm_rope(*leaves, spec, spec, *sides, backend="reference")
    grads = [random(*y.shape, seed=9).to(q.dtype).double() for y in outputs]
    learned = [w for t in sides for w in (t.weight, t.bias, t.multiplier) if w is not None]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, [*leaves, *learned], grads)]


def compare(actual, truth, i, what, from_output):
    """A backward that starts from the rounded output has that rounding in its gradients, besides their own."""
    if i < 2 or not from_output or (actual.dtype == torch.float32 and i < 4):
        check(actual, truth, what)
    else:
        bf16 = torch.finfo(torch.bfloat16).eps
        assert (actual.double() - truth).abs().max() <= 1.5 * bf16 * truth.abs().max(), what


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", list(KINDS))
def test_values_and_gradients(kind, dtype):
    for head_dim in HEAD_DIMS:
        q, k = inputs(head_dim, dtype=dtype)
        for i, (a, b) in enumerate(zip(run(kind, q, k, "triton"), truth(kind, q, k), strict=True)):
            compare(a, b, i, f"{kind}, D {head_dim}, output {i}", kind in WEIGHTLESS)


@pytest.mark.parametrize("layout", ["sbhd", "bhsd", "thd"])
def test_layouts(layout):
    q, k = inputs(HEAD_DIMS[0], layout, torch.bfloat16)
    for a, b in zip(run("rms", q, k, "triton"), truth("rms", q, k), strict=True):
        check(a, b, layout)


def test_the_same_bits_twice_and_in_one_compiled_graph():
    def function(q, k, spec, k_spec, *sides, backend):
        return qk_norm_rope(2 * q, k, spec, k_spec, *sides, backend=backend)

    for kind in ("rms", "ngpt"):
        torch._dynamo.reset()  # else it takes eps, which differs, for a variable
        compiled = torch.compile(function, fullgraph=True, backend=COMPILER)
        q, k = inputs(HEAD_DIMS[0], dtype=torch.bfloat16)
        runs = [run(kind, q, k, "triton", f) for f in (function, function, compiled)]
        for again in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


def test_the_backends_agree():
    """Reference, the passes of the compiled backend, and the kernels, from the same bf16 inputs."""
    for kind, head_dim in itertools.product(("rms", "ngpt"), HEAD_DIMS[:1]):
        q, k = inputs(head_dim, dtype=torch.bfloat16)
        exact = truth(kind, q, k)
        torch._dynamo.reset()
        compiled = torch.compile(qk_norm_rope, fullgraph=True, backend=COMPILER)
        for name, function in (("reference", qk_norm_rope), ("compiled", compiled), ("triton", qk_norm_rope)):
            for i, (a, b) in enumerate(zip(run(kind, q, k, name, function), exact, strict=True)):
                # the reference in a compiled graph starts from the output as well
                compare(a, b, i, f"{name}, {kind}, output {i}", kind in WEIGHTLESS)
