"""AdamW and projection in one op, against torch.optim.AdamW followed by the formula."""

import copy

import needs
import pytest
import torch

from nsphere.ops.sphere_adamw import sphere_adamw_
from nsphere.ops.sphere_adamw.reference import round_stochastically

SHAPES = [((12, 8), 1), ((8, 20), 0), ((7,), None), ((5, 6), None)]
OPTIONS = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def draw(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape, _ in SHAPES]


def state(weights):
    return {
        "exp_avgs": [torch.zeros_like(w) for w in weights],
        "exp_avg_sqs": [torch.zeros_like(w) for w in weights],
        "steps": [torch.zeros((), dtype=torch.float32) for _ in weights],
        "dims": [dim for _, dim in SHAPES],
    }


def torch_steps(weights, grads_of_steps):
    """torch.optim.AdamW, and each matrix divided by its norms after each step."""
    weights = [w.clone().requires_grad_() for w in weights]
    optimizer = torch.optim.AdamW(weights, **OPTIONS)
    for grads in grads_of_steps:
        for w, g in zip(weights, grads, strict=True):
            w.grad = g.to(w.dtype)
        optimizer.step()
        with torch.no_grad():
            for w, (_, dim) in zip(weights, SHAPES, strict=True):
                if dim is not None:
                    w /= w.norm(dim=dim, keepdim=True)
    return [w.detach() for w in weights], optimizer


class Subclass(torch.Tensor):
    def __deepcopy__(self, memo):
        return self.clone()


@needs.compiler
@pytest.mark.parametrize(
    "changed", [{"betas": (0.0, 0.95)}, {"betas": (0.9, 0.0)}, {"betas": (0.0, 0.0)}, {"eps": 0.5}]
)
def test_betas_of_0_and_a_large_eps_in_cpp(changed):
    weights, exact = draw(torch.float32), [w.double() for w in draw(torch.float32)]
    weights[0][1] = exact[0][1] = 0  # with gradients of 0 a row of no direction stays one
    kept, kept_exact = state(weights), state(exact)
    for seed in (1, 2):
        grads = draw(torch.float32, seed)
        grads[0][1] = 0
        sphere_adamw_(weights, grads, **kept, **OPTIONS | changed, backend="compiled")
        sphere_adamw_(exact, grads, **kept_exact, **OPTIONS | changed, backend="reference")
    for name in ("exp_avgs", "exp_avg_sqs"):
        for a, b in zip(kept[name], kept_exact[name], strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-7)
    for w, e in zip(weights, exact, strict=True):
        torch.testing.assert_close(w.double(), e, rtol=2e-6, atol=1e-6)
    assert not weights[0][1].any()


@needs.compiler
def test_gradients_at_any_strides_and_dims_of_more_axes_in_cpp():
    shapes = [((12, 8), 1), ((7,), None), ((7,), 0), ((4, 3, 5), 0), ((4, 3, 5), 2), ((2, 3, 5), None), ((4, 0), 1)]
    generator = torch.Generator().manual_seed(0)
    weights, grads = ([torch.randn(shape, generator=generator) for shape, _ in shapes] for _ in range(2))
    exact = [w.double() for w in weights]
    spread = [g.mT.contiguous().mT if g.dim() > 1 else g.repeat_interleave(2)[::2] for g in grads]
    assert not any(g.is_contiguous() for g in spread[:-1])
    for each, given, backend in ((weights, spread, "compiled"), (exact, grads, "reference")):
        kept = state(each) | {"dims": [dim for _, dim in shapes]}
        sphere_adamw_(each, given, **kept, **OPTIONS, backend=backend)
    for w, e in zip(weights, exact, strict=True):
        torch.testing.assert_close(w.double(), e, rtol=2e-6, atol=1e-6)


@needs.compiler
@pytest.mark.parametrize(
    "changed, message",
    [
        (
            {name: [torch.ones(4, 6).double()] for name in ("weights", "exp_avgs", "exp_avg_sqs")},
            "Tensor of torch.float64",
        ),
        ({"exp_avgs": [torch.zeros(6, 4).t()]}, "contiguous"),
        ({"exp_avg_sqs": [torch.zeros(4, 12)[:, ::2]]}, "contiguous"),
        ({"weights": [torch.ones(6, 4).t()]}, "contiguous"),
        ({"weights": [torch.ones(4, 6).as_subclass(Subclass)]}, "not for Subclass"),
        ({name: [torch.ones(2, 3, 2)] for name in ("weights", "grads", "exp_avgs", "exp_avg_sqs")}, "not along 1 of 3"),
    ],
)
def test_what_the_pass_in_cpp_does_not_take_is_told_or_goes_another_way(changed, message):
    like = {"weights": [torch.ones(4, 6)], "grads": [torch.ones(4, 6)], "dims": [1]}
    like |= {name: [torch.zeros(4, 6)] for name in ("exp_avgs", "exp_avg_sqs")}
    lists = like | copy.deepcopy(changed)
    with pytest.raises(RuntimeError, match=f"'compiled' was asked for and cannot run: sphere_adamw_: .*{message}"):
        sphere_adamw_(**lists, **OPTIONS, steps=[torch.zeros(())], backend="compiled")
    exact = {k: [t.double() for t in v] if k != "dims" else v for k, v in lists.items()}
    for each in (lists, exact):
        sphere_adamw_(**each, **OPTIONS, steps=[torch.zeros(())])
    for name in ("weights", "exp_avgs", "exp_avg_sqs"):
        a, b = lists[name][0], exact[name][0]
        torch.testing.assert_close(a.double(), b, rtol=torch.finfo(a.dtype).eps * 8, atol=1e-6)


def test_autograd_sees_that_moments_have_changed():
    weight, *moments = (torch.ones(4, 6, requires_grad=True).clone() for _ in range(3))
    sums = [t.square().sum() for t in (weight, *moments)]
    kept = {"exp_avgs": [moments[0].detach()], "exp_avg_sqs": [moments[1].detach()], "steps": [torch.zeros(())]}
    sphere_adamw_([weight.detach()], [torch.ones(4, 6)], **kept, dims=[None], **OPTIONS)
    for y in sums:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_torchs_adamw_followed_by_the_norm(dtype):
    weights, grads = draw(dtype), [draw(dtype, seed) for seed in (1, 2, 3)]
    expected, optimizer = torch_steps(weights, grads)
    kept = state(weights)
    for step in grads:
        sphere_adamw_(weights, step, **kept, **OPTIONS)
    for i, (w, e) in enumerate(zip(weights, expected, strict=True)):
        torch.testing.assert_close(w, e, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
        theirs = optimizer.state[optimizer.param_groups[0]["params"][i]]
        assert torch.equal(kept["exp_avgs"][i], theirs["exp_avg"])
        assert torch.equal(kept["exp_avg_sqs"][i], theirs["exp_avg_sq"])
        assert kept["steps"][i] == 3


def test_scaled_gradients_and_a_step_that_found_infinities():
    weights, grads = draw(torch.float32), draw(torch.float32, 1)
    scaled = [w.clone() for w in weights]
    kept, kept_scaled = state(weights), state(weights)
    sphere_adamw_(weights, grads, **kept, **OPTIONS)
    scale, found = torch.tensor(1024.0), torch.tensor(0.0)
    times = [g * 1024 for g in grads]
    sphere_adamw_(scaled, times, **kept_scaled, **OPTIONS, grad_scale=scale, found_inf=found)
    assert all(torch.equal(a, b) for a, b in zip(weights, scaled, strict=True))
    before = [t.clone() for t in (*scaled, *kept_scaled["exp_avgs"], *kept_scaled["steps"])]
    sphere_adamw_(scaled, times, **kept_scaled, **OPTIONS, grad_scale=scale, found_inf=found + 1)
    after = (*scaled, *kept_scaled["exp_avgs"], *kept_scaled["steps"])
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_rounded_copies_are_the_new_weights():
    weights, grads = draw(torch.float32), [g.bfloat16() for g in draw(seed=1)]
    rounded = [torch.full_like(w, torch.nan, dtype=torch.bfloat16) for w in weights[:3]] + [None]
    sphere_adamw_(weights, grads, **state(weights), **OPTIONS, rounded=rounded)
    for w, low in zip(weights[:3], rounded, strict=False):
        assert torch.equal(w.bfloat16(), low)


def test_stochastic_rounding_is_right_on_average_and_one_of_two_neighbours():
    w = torch.randn(64, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    draws = torch.stack([round_stochastically(w, generator) for _ in range(4000)]).double()
    gap = 2.0 ** (w.double().abs().log2().floor() - 7)
    assert ((draws - w.double()).abs() < gap).all()
    # the standard deviation of one draw is at most half a gap
    assert ((draws.mean(0) - w.double()).abs() <= 5 * gap / 2 / 4000**0.5).all()
    nan_of_a_gpu = torch.tensor([0x7FFFFFFF]).int().view(torch.float32)  # with noise its bits would be -0
    special = torch.cat((torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, 1.0]), nan_of_a_gpu))
    for _ in range(20):
        torch.testing.assert_close(round_stochastically(special), special.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_a_seed_gives_the_same_copies_again():
    copies = []
    for seed in (1, 1, 2):
        weights, grads = draw(torch.float32), draw(torch.float32, 1)
        rounded = [torch.empty_like(w, dtype=torch.bfloat16) for w in weights]
        sphere_adamw_(weights, grads, **state(weights), **OPTIONS, rounded=rounded, rounding_seed=seed)
        copies.append(torch.cat([r.flatten() for r in rounded]))
    assert torch.equal(copies[0], copies[1])
    assert not torch.equal(copies[0], copies[2])


def test_copies_of_equal_weights_are_rounded_each_by_itself_and_fp16_to_the_nearest():
    for dtype in (torch.bfloat16, torch.float16):
        weights = [torch.full((4, 6), 1.003) for _ in range(2)]
        copies = [torch.empty(4, 6, dtype=dtype) for _ in weights]
        kept = {name: [torch.zeros(4, 6) for _ in weights] for name in ("exp_avgs", "exp_avg_sqs", "grads")}
        kept |= {"steps": [torch.zeros(()) for _ in weights], "dims": [None, None], "rounded": copies}
        sphere_adamw_(weights, **kept, **OPTIONS | {"lr": 0.0}, rounding_seed=3)
        if dtype == torch.float16:
            assert torch.equal(copies[0], weights[0].half())
        assert torch.equal(*copies) == (dtype == torch.float16)


def test_bad_input_is_refused_before_anything_is_written():
    weights, grads = draw(torch.float32), draw(torch.float32, 1)
    before = [w.clone() for w in weights]
    for change, message in (
        ({"dims": [1, 0, 1, None]}, r"weight 2 of shape \(7,\) has dim=1; give one of its dims"),
        ({"dims": [1, 0]}, "give one entry per weight"),
        ({"exp_avgs": [*state(weights)["exp_avgs"][:3], torch.zeros(6, 5)]}, "weight 3 .* give equal shapes"),
        ({"exp_avgs": [m.bfloat16() for m in weights]}, "weight 0 is torch.float32, .* moments are torch.bfloat16 and"),
        ({"exp_avg_sqs": [*weights[:3], weights[3].double()]}, "weight 3 .* give moments in the weight's dtype"),
        ({"grads": [grads[0].flatten(), *grads[1:]]}, "weight 0 .* give equal shapes"),
        ({"dims": [1, -1, None, None]}, r"weight 1 of shape \(8, 20\) has dim=-1"),
        ({"rounded": [None] * 3}, "give one entry per weight"),
        ({"rounded": [None] * 3 + [torch.zeros(6, 5)]}, "weight 3 .* give equal shapes"),
    ):
        with pytest.raises(ValueError, match=message):
            sphere_adamw_(weights, **({"grads": grads} | state(weights) | change), **OPTIONS)
    with pytest.raises(ValueError, match="weight 3 is torch.float64; AdamW needs"):
        sphere_adamw_([*weights[:3], weights[3].double()], grads, **state(weights), **OPTIONS)
    with pytest.raises(ValueError, match="AdamW needs fp32 masters"):
        sphere_adamw_([w.bfloat16() for w in weights], grads, **state(weights), **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))
