"""AdamW's and the projection's kernels against fp64: a GPU at training's sizes, or the interpreter at tiny ones."""

import pytest
import torch
from needs import kernels
from ops.on_device.device import DEVICE, ON_GPU, size

from nsphere.ops.normalize_matrices import normalize_matrices_
from nsphere.ops.sphere_adamw import sphere_adamw_

pytestmark = kernels

SHAPES = size(
    [((3072, 1024), 1), ((1024, 4096), 0), ((32000, 1024), 1), ((1000, 999), 0), ((77, 1001), 1), ((1024,), None)],
    [((6, 16), 1), ((8, 20), 0), ((5, 7), 0), ((3, 5), 1), ((9,), None)],
)
OPTIONS = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def draw(seed):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return [torch.randn(shape, generator=generator, device=DEVICE) for shape, _ in SHAPES]


def steps(dtype, backend, num_steps=2, **options):
    """Weights and moments after so many steps, and the rounded copies of those that have one."""
    weights = [w.to(dtype) for w in draw(0)]
    kept = {name: [torch.zeros_like(w) for w in weights] for name in ("exp_avgs", "exp_avg_sqs")}
    counts = [torch.zeros((), device=DEVICE) for _ in weights]
    rounded = [torch.empty_like(w, dtype=torch.bfloat16) for w in weights]
    for seed in range(1, 1 + num_steps):
        grads = [g.bfloat16() for g in draw(seed)]
        lists = (kept["exp_avgs"], kept["exp_avg_sqs"], counts, [dim for _, dim in SHAPES])
        sphere_adamw_(weights, grads, *lists, **OPTIONS, **options, rounded=rounded, backend=backend)
    return weights, kept, rounded


@pytest.mark.parametrize("backend", ["triton", "compiled"])
def test_steps_equal_fp64(backend):
    exact, kept_exact, _ = steps(torch.float64, "reference")
    weights, kept, rounded = steps(torch.float32, backend)
    for name in ("exp_avgs", "exp_avg_sqs"):
        for a, b in zip(kept[name], kept_exact[name], strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)
    for w, e, low, (_, dim) in zip(weights, exact, rounded, SHAPES, strict=True):
        torch.testing.assert_close(w.double(), e, rtol=3e-6, atol=2e-6)
        if dim is not None:
            assert (w.double().norm(dim=dim) - 1).abs().max() <= 1e-6
        if ON_GPU or backend == "compiled":
            assert torch.equal(low, w.bfloat16())


def test_the_same_bits_twice():
    options = {"rounding_seed": 3}
    first, second = (steps(torch.float32, "triton", **options) for _ in range(2))
    for a, b in zip([*first[0], *first[2]], [*second[0], *second[2]], strict=True):
        assert torch.equal(a, b)


def test_skipped_steps_and_scaled_gradients():
    flags = {"grad_scale": torch.tensor(1.0, device=DEVICE), "found_inf": torch.tensor(1.0, device=DEVICE)}
    weights, _, _ = steps(torch.float32, "triton", **flags)
    assert all(torch.equal(w, before) for w, before in zip(weights, draw(0), strict=True))


def test_the_projection_alone():
    for dtype in (torch.float32, torch.bfloat16):
        matrices = [(w.to(dtype), dim) for w, (_, dim) in zip(draw(0), SHAPES, strict=True) if dim is not None]
        expected = [w.double() / w.double().norm(dim=dim, keepdim=True) for w, dim in matrices]
        normalize_matrices_(matrices, backend="triton")
        rtol = 4e-7 if dtype == torch.float32 else torch.finfo(dtype).eps * (0.51 if ON_GPU else 1.0)
        for (w, _), e in zip(matrices, expected, strict=True):
            torch.testing.assert_close(w.double(), e, rtol=rtol, atol=1e-7)
