"""SphereAdamW against torch's AdamW followed by the projection: weights, state, and everything a step may meet."""

import copy

import pytest
import torch
from torch import nn

from nsphere.hypersphere import assert_on_hypersphere, on_sphere, sphere_matrices
from nsphere.ngpt import NGPT, NGPTConfig
from nsphere.ops.backend import cpp_compiler
from nsphere.optim import SphereAdamW, keep_on_hypersphere

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
BACKENDS = [
    "reference",
    pytest.param("compiled", marks=pytest.mark.skipif(not cpp_compiler().available, reason=cpp_compiler().reason)),
]


def make(seed=0):
    torch.manual_seed(seed)
    return NGPT(NGPTConfig(vocab_size=17, context=8, d_model=12, num_layers=2, num_heads=3))


def loss(model, step=0):
    generator = torch.Generator().manual_seed(step)
    return model.loss(*torch.randint(17, (2, 2, 8), generator=generator).unbind())


def train(model, optimizer, steps=3, start=0):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()


def assert_same(model, twin):
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta1", [0.9, 0.3])
def test_equals_torchs_fused_adamw_followed_by_the_projection(backend, beta1):
    model, twin = make(), make()
    options = OPTIONS | {"betas": (beta1, 0.95)}
    ours = SphereAdamW(model, **options, backend=backend)
    plain = torch.optim.AdamW(twin.parameters(), **options, fused=True)
    keep_on_hypersphere(twin, plain)
    train(model, ours, 5)
    train(twin, plain, 5)
    for (name, p), q in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(p, q[1], rtol=2e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        for key, value in plain.state[q[1]].items():
            torch.testing.assert_close(ours.state[p][key], value, rtol=1e-4, atol=1e-7)
    assert_on_hypersphere(model)


@pytest.mark.skipif(not cpp_compiler().available, reason=cpp_compiler().reason)
@pytest.mark.parametrize("shape", [(7,), (1, 3), (5, 1), (), (64, 130), (3, 40000), (0, 4)])
@pytest.mark.parametrize("dim", [None, 0, 1])
def test_the_pass_in_cpp_has_the_bits_of_torchs_step_whatever_the_number_of_threads(shape, dim):
    """Off the sphere: those of the fused kernel but for its tail of a few elements; on it: the step's, normalised."""
    if dim is not None and dim >= len(shape):
        pytest.skip("no such dim")
    generator = torch.Generator().manual_seed(0)
    start, grads = (torch.randn(shape, generator=generator) for _ in range(2))
    results = []
    threads = torch.get_num_threads()
    for count in (1, 3):
        layer = nn.Module()
        layer.weight, layer.anchor = nn.Parameter(start.clone()), nn.Parameter(torch.ones(2, 2))
        on_sphere(layer, 0, "anchor")
        optimizer = SphereAdamW(layer, **OPTIONS, backend="compiled")
        if dim is not None:
            on_sphere(layer, dim)
        torch.set_num_threads(count)
        try:
            for scale in (1.0, -0.5):
                layer.weight.grad = grads * scale
                optimizer.step()
        finally:
            torch.set_num_threads(threads)
        results.append((layer.weight.detach(), *optimizer.state[layer.weight].values()))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    w = nn.Parameter(start.double())
    truth = torch.optim.AdamW([w], **OPTIONS)
    for scale in (1.0, -0.5):
        w.grad = grads.double() * scale
        truth.step()
        if dim is not None:
            with torch.no_grad():
                w /= w.norm(dim=dim, keepdim=True)
    torch.testing.assert_close(results[0][0].double(), w.detach(), rtol=1e-5, atol=1e-6)


def test_state_moves_to_torchs_adamw_and_back():
    model, twin = make(), make()
    ours = SphereAdamW(model, **OPTIONS)
    train(model, ours, 2)
    twin.load_state_dict(model.state_dict())
    plain = torch.optim.AdamW(twin.parameters(), **OPTIONS, fused=True)
    keep_on_hypersphere(twin, plain)
    plain.load_state_dict(copy.deepcopy(ours.state_dict()))
    train(twin, plain, 1, start=2)
    back = make()
    back.load_state_dict(twin.state_dict())
    again = SphereAdamW(back, **OPTIONS)
    again.load_state_dict(copy.deepcopy(plain.state_dict()))
    train(model, ours, 3, start=2)
    train(back, again, 2, start=3)
    for p, q in zip(model.parameters(), back.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=1e-6)
        assert ours.state[p]["step"] == again.state[q]["step"] == 5


def test_it_goes_on_bit_for_bit_from_its_state_dict_and_from_a_copy():
    model = make()
    ours = SphereAdamW(model, **OPTIONS)
    train(model, ours, 2)
    twin = make()
    twin.load_state_dict(model.state_dict())
    resumed = SphereAdamW(twin, **OPTIONS)
    resumed.load_state_dict(copy.deepcopy(ours.state_dict()))
    copied = copy.deepcopy(ours)
    train(model, ours, 2, start=2)
    train(twin, resumed, 2, start=2)
    train(copied.model, copied, 2, start=2)
    assert_same(model, twin)
    assert_same(model, copied.model)


def test_a_skipped_step_changes_no_bit_and_a_scaled_one_is_unscaled():
    model, twin = make(), make()
    ours, other = SphereAdamW(model, **OPTIONS), SphereAdamW(twin, **OPTIONS)
    before = copy.deepcopy(model)
    loss(model).backward()
    ours.grad_scale, ours.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    ours.step()
    assert_same(model, before)
    (loss(twin) * 1024).backward()
    other.grad_scale, other.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    other.step()
    ours.found_inf = torch.tensor(0.0)
    ours.step()
    assert_same(model, twin)


def test_a_weight_without_gradient_keeps_every_bit_and_a_closure_is_called():
    model = make()
    model.embed.weight.requires_grad_(False)
    before = model.embed.weight.clone()
    optimizer = SphereAdamW(model, lr=1e-2)

    def closure():
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        return value

    assert optimizer.step(closure) > 0
    assert torch.equal(model.embed.weight, before)
    assert_on_hypersphere(model)


def test_autograd_notices_the_step():
    model = make()
    optimizer = SphereAdamW(model, lr=1e-2)
    stale = (model.head.weight * model.head.weight).sum()
    loss(model).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


def test_bf16_weights_are_stepped_through_fp32_masters_that_resume():
    model = make().to(torch.bfloat16)
    optimizer = SphereAdamW(model, lr=1e-3)
    train(model, optimizer, 3)
    for m in sphere_matrices(model):
        master = optimizer.state[m.weight]["master"]
        assert master.dtype == torch.float32
        assert (master.norm(dim=m.dim) - 1).abs().max() <= 1e-6
        assert torch.equal(master.bfloat16(), m.weight)
    twin = make().to(torch.bfloat16)
    twin.load_state_dict(model.state_dict())
    resumed = SphereAdamW(twin, lr=1e-3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 2, start=3)
    train(twin, resumed, 2, start=3)
    assert_same(model, twin)


def test_stochastic_rounding_goes_on_where_the_nearest_bf16_stands_still():
    """Steps far below half a gap of bf16: rounded to the nearest they are lost, at random they add up."""

    def moved(**options):
        torch.manual_seed(0)
        layer = on_sphere(nn.Linear(64, 64, bias=False), dim=1).to(torch.bfloat16)
        layer.bias = nn.Parameter(torch.full((4096,), 1.0, dtype=torch.bfloat16))
        optimizer = SphereAdamW(layer, lr=1e-4, eps=1e-8, **options)
        for _ in range(8):
            layer.bias.grad = torch.ones_like(layer.bias)
            layer.weight.grad = torch.ones_like(layer.weight)
            optimizer.step()
        return layer, optimizer

    layer, optimizer = moved(stochastic_rounding=True, seed=3)
    assert "master" not in optimizer.state[layer.bias]
    # eight steps of 1e-4 down from 1, where bf16 has gaps of 0.0039: the mean is right within five standard errors
    assert abs((1 - layer.bias.float()).mean().item() - 8e-4) < 5 * 0.0039 / 2 * 8**0.5 / 4096**0.5
    assert torch.equal(layer.bias, moved(stochastic_rounding=True, seed=3)[0].bias)
    assert not torch.equal(layer.bias, moved(stochastic_rounding=True, seed=4)[0].bias)
    assert optimizer.param_groups[0]["rounding_seed"] == 11
    kept, masters = moved()
    torch.testing.assert_close(masters.state[kept.bias]["master"], torch.full((4096,), 1 - 8e-4), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("option", ["amsgrad", "maximize", "capturable", "differentiable", "foreach"])
def test_options_it_does_not_have_are_refused(option):
    with pytest.raises(ValueError, match=f"SphereAdamW has no {option}"):
        SphereAdamW(make(), **{option: True})


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match="mark them with on_sphere"):
        SphereAdamW(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="this SphereAdamW holds none of the model's"):
        SphereAdamW(make(), nn.Linear(3, 3).parameters())
    optimizer = SphereAdamW(make())
    state = torch.optim.AdamW(make().parameters(), amsgrad=True).state_dict()
    optimizer.load_state_dict(state)
    loss(optimizer.model).backward()
    with pytest.raises(ValueError, match="SphereAdamW has no amsgrad"):
        optimizer.step()
