"""AdamW and projection in one op, against torch.optim.AdamW followed by the formula."""

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
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, 1.0])
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


def test_bad_input_is_refused_before_anything_is_written():
    weights, grads = draw(torch.float32), draw(torch.float32, 1)
    before = [w.clone() for w in weights]
    for change, message in (
        ({"dims": [1, 0, 1, None]}, r"weight 2 of shape \(7,\) has dim=1; give one of its dims"),
        ({"dims": [1, 0]}, "give one entry per weight"),
        ({"exp_avgs": [*state(weights)["exp_avgs"][:3], torch.zeros(6, 5)]}, "weight 3 .* give equal shapes"),
    ):
        with pytest.raises(ValueError, match=message):
            sphere_adamw_(weights, grads, **(state(weights) | change), **OPTIONS)
    with pytest.raises(ValueError, match="AdamW needs fp32 masters"):
        sphere_adamw_([w.bfloat16() for w in weights], grads, **state(weights), **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))
