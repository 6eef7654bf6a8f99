"""The kernels of AdamW and projection in Triton's interpreter, against torch's AdamW and the formula in fp64."""

import itertools

import pytest
import torch

from nsphere.ops.normalize_matrices import normalize_matrices_
from nsphere.ops.sphere_adamw import sphere_adamw_, triton

OPTIONS = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SHAPES = [((5, 16), 1), ((6, 12), 1), ((3, 16), 1), ((140, 48), 0), ((7, 5), 0), ((7,), None), ((5, 300), None)]


class Subclass(torch.Tensor):
    pass


def draw(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape, _ in SHAPES]


def state(weights):
    kept = {name: [torch.zeros_like(w) for w in weights] for name in ("exp_avgs", "exp_avg_sqs")}
    return kept | {"steps": [torch.zeros(()) for _ in weights], "dims": [dim for _, dim in SHAPES]}


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_steps_equal_torchs_adamw_followed_by_the_norm(grad_dtype):
    weights, steps = draw(0), [draw(seed, grad_dtype) for seed in (1, 2)]
    exact = [w.double() for w in weights]
    kept, kept_exact = state(weights), state(exact)
    copies = [torch.full_like(w, torch.nan, dtype=torch.bfloat16) for w in weights]
    rounded = [None if i in (1, 4) else low for i, low in enumerate(copies)]
    for grads in steps:
        sphere_adamw_(weights, grads, **kept, **OPTIONS, rounded=rounded, backend="triton")
        sphere_adamw_(exact, grads, **kept_exact, **OPTIONS, backend="reference")
    for name in ("exp_avgs", "exp_avg_sqs"):
        for a, b in zip(kept[name], kept_exact[name], strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-7)
    for w, e, (_, dim) in zip(weights, exact, SHAPES, strict=True):
        torch.testing.assert_close(w.double(), e, rtol=2e-6, atol=1e-6)
        if dim is not None:
            assert (w.double().norm(dim=dim) - 1).abs().max() <= 1e-6
    assert all(step == 2 for step in kept["steps"])
    for w, low in zip(weights, rounded, strict=True):
        if low is None:
            continue
        # the interpreter cuts off where a GPU rounds
        torch.testing.assert_close(low.double(), w.double(), rtol=torch.finfo(torch.bfloat16).eps, atol=0)


def test_late_steps_and_large_betas():
    """1 - β^t by its series where it cancels and by the power where it does not."""
    for late, beta2 in ((0.0, 0.9999), (3.0, 0.999), (5e4, 0.999)):
        weights, grads = draw(0), draw(1)
        exact = [w.double() for w in weights]
        options = OPTIONS | {"betas": (0.9, beta2)}
        kept, kept_exact = state(weights), state(exact)
        for k in (kept, kept_exact):
            k["steps"] = [torch.full((), late) for _ in weights]
        sphere_adamw_(weights, grads, **kept, **options, backend="triton")
        sphere_adamw_(exact, grads, **kept_exact, **options, backend="reference")
        for w, e in zip(weights, exact, strict=True):
            torch.testing.assert_close(w.double(), e, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(
    "changed, late",
    [
        ({"betas": (0.0, 0.95)}, 0.0),
        ({"betas": (0.9, 0.0)}, 0.0),
        ({"betas": (0.0, 0.0)}, 2.0),
        ({"betas": (0.03, 0.3)}, 0.0),
        ({"eps": 0.5}, 0.0),
    ],
)
def test_betas_of_0_small_ones_and_a_large_eps(changed, late):
    """1 - β^t is its power there; eps is added to the corrected root, after it."""
    weights, grads = draw(0), draw(1)
    exact = [w.double() for w in weights]
    kept, kept_exact = state(weights), state(exact)
    for k in (kept, kept_exact):
        k["steps"] = [torch.full((), late) for _ in weights]
    sphere_adamw_(weights, grads, **kept, **OPTIONS | changed, backend="triton")
    sphere_adamw_(exact, grads, **kept_exact, **OPTIONS | changed, backend="reference")
    for name in ("exp_avgs", "exp_avg_sqs"):
        for a, b in zip(kept[name], kept_exact[name], strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-7)
    for w, e in zip(weights, exact, strict=True):
        torch.testing.assert_close(w.double(), e, rtol=2e-6, atol=1e-6)


def test_the_bias_correction_to_its_last_digits():
    """From rest the first step is lr · sign(g), whatever β is: what is off is 1 - β^t."""
    for beta, late in itertools.product((0.99, 0.98, 0.9, 0.7), (0.0, 1.0, 4.0)):
        weight, steps = torch.zeros(16), [torch.full((), late)]
        gone = 1 - beta ** (late + 1)
        moments = {"exp_avgs": [torch.zeros(16)], "exp_avg_sqs": [torch.zeros(16)]}
        options = OPTIONS | {"lr": 1.0, "betas": (beta, beta), "weight_decay": 0.0, "eps": 1e-30}
        sphere_adamw_([weight], [torch.ones(16)], **moments, steps=steps, dims=[None], **options, backend="triton")
        expected = torch.full((16,), -(((1 - beta) / gone) ** 0.5), dtype=torch.float64)
        torch.testing.assert_close(weight.double(), expected, rtol=3e-7, atol=0)


def test_gradients_at_any_strides_an_lr_that_is_a_tensor_and_empty_weights():
    weights, grads = [*draw(0), torch.ones(0, 16), torch.ones(0)], [*draw(1), torch.ones(0, 16), torch.ones(0)]
    kept, kept_turned = (
        {k: [*v, *more] for (k, v), more in zip(state(draw(0)).items(), extra, strict=True)}
        for extra in [
            ([torch.ones(0, 16), torch.ones(0)], [torch.ones(0, 16), torch.ones(0)], torch.zeros(2), (1, None))
            for _ in range(2)
        ]
    )
    turned = [w.clone() for w in weights]
    sphere_adamw_(weights, grads, **kept, **OPTIONS, backend="triton")
    spread = [g.mT.contiguous().mT if g.dim() == 2 else g.repeat_interleave(2)[::2] for g in grads]
    assert not any(g.is_contiguous() for g in spread[:7])
    options = OPTIONS | {"lr": torch.tensor(OPTIONS["lr"], dtype=torch.float64)}
    sphere_adamw_(turned, spread, **kept_turned, **options, backend="triton")
    for a, b in zip([*weights, *kept["exp_avgs"]], [*turned, *kept_turned["exp_avgs"]], strict=True):
        assert torch.equal(a, b)


def test_scaled_gradients_and_a_step_that_found_infinities():
    weights, grads = draw(0), draw(1)
    scaled, times = [w.clone() for w in weights], [g * 1024 for g in grads]
    kept, kept_scaled = state(weights), state(weights)
    sphere_adamw_(weights, grads, **kept, **OPTIONS, backend="triton")
    flags = {"grad_scale": torch.tensor(1024.0), "found_inf": torch.tensor(0.0)}
    sphere_adamw_(scaled, times, **kept_scaled, **OPTIONS, **flags, backend="triton")
    for a, b in zip(weights, scaled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    everything = (*scaled, *kept_scaled["exp_avgs"], *kept_scaled["exp_avg_sqs"], *kept_scaled["steps"])
    before = [t.clone() for t in everything]
    flags["found_inf"] = torch.tensor(1.0)
    sphere_adamw_(scaled, times, **kept_scaled, **OPTIONS, **flags, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(before, everything, strict=True))


def test_stochastic_rounding_takes_either_neighbour_and_is_right_on_average():
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    draws = []
    for seed in range(60):
        w, low = weight.clone(), torch.empty(4, 16, dtype=torch.bfloat16)
        kept = {name: [torch.zeros_like(w)] for name in ("exp_avgs", "exp_avg_sqs")}
        options = OPTIONS | {"lr": 0.0, "rounded": [low], "rounding_seed": 1000 * seed, "backend": "triton"}
        sphere_adamw_([w], [torch.ones_like(w)], **kept, steps=[torch.zeros(())], dims=[None], **options)
        assert torch.equal(w, weight)
        draws.append(low.double())
    draws = torch.stack(draws)
    gap = 2.0 ** (weight.double().abs().log2().floor() - 7)
    assert ((draws - weight.double()).abs() < gap).all()
    assert (draws.std(0) > 0).double().mean() > 0.9
    assert (((draws.mean(0) - weight.double()) / gap).abs() <= 5 * 0.5 / 60**0.5).all()


def test_a_weight_in_several_parts(monkeypatch):
    """As above, with programs of 4 rows at most, the last of them short."""
    monkeypatch.setattr(triton, "TILE", 64)
    weights, grads = draw(0), draw(1)
    exact = [w.double() for w in weights]
    sphere_adamw_(weights, grads, **state(weights), **OPTIONS, backend="triton")
    sphere_adamw_(exact, grads, **state(exact), **OPTIONS, backend="reference")
    for w, e in zip(weights, exact, strict=True):
        torch.testing.assert_close(w.double(), e, rtol=2e-6, atol=1e-6)


def test_stochastic_rounding_is_its_own_in_every_row_weight_and_step():
    """And an infinity stays one, as does what is no number; a copy in fp16 is rounded to the nearest."""
    # a NaN as a GPU makes them: with noise its bits would be -0
    special = torch.cat((torch.tensor([1.003, torch.inf]), torch.tensor([0x7FFFFFFF]).int().view(torch.float32)))

    def copies(seed, dtype=torch.bfloat16):
        weights = [torch.full((2, 16), 1.003), torch.full((2, 16), 1.003), special.clone()]
        rounded = [torch.empty_like(w, dtype=dtype) for w in weights]
        kept = {name: [torch.zeros_like(w) for w in weights] for name in ("exp_avgs", "exp_avg_sqs")}
        grads = [torch.ones_like(w) for w in weights]
        kept |= {"steps": [torch.zeros(()) for _ in weights], "dims": [None] * 3, "rounded": rounded}
        sphere_adamw_(weights, grads, **kept, **OPTIONS | {"lr": 0.0}, rounding_seed=seed, backend="triton")
        assert rounded[2][1] == torch.inf and rounded[2][2].isnan()
        return rounded[:2]

    drawn = [row for seed in (5, 6) for w in copies(seed) for row in w]
    assert all(row.unique().numel() == 2 for row in drawn)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))
    for w in copies(5, torch.float16):  # the interpreter may cut off
        torch.testing.assert_close(w.float(), torch.full((2, 16), 1.003), rtol=2**-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_projection_alone(dtype):
    matrices = [(w.to(dtype), dim) for w, (_, dim) in zip(draw(0), SHAPES, strict=True) if dim is not None]
    matrices[0][0][1] = 0
    expected = [w.double() / w.double().norm(dim=dim, keepdim=True) for w, dim in matrices]
    expected[0][1] = 0
    addresses = [w.data_ptr() for w, _ in matrices]
    normalize_matrices_(matrices, backend="triton")
    allowed = 4e-7 if dtype == torch.float32 else torch.finfo(dtype).eps
    for (w, _), e, address in zip(matrices, expected, addresses, strict=True):
        torch.testing.assert_close(w.double(), e, rtol=allowed, atol=1e-7)
        assert w.data_ptr() == address
    normalize_matrices_([], backend="triton")


def test_changes_are_seen_by_autograd():
    w = torch.nn.Parameter(torch.randn(4, 16))
    y = w.square().sum()  # keeps w for its backward
    normalize_matrices_([(w, 1)], backend="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    written = [*(torch.ones(4, 16, requires_grad=True).clone() for _ in range(3)), torch.ones(4, 16).bfloat16()]
    written[3].requires_grad_()
    sums = [t.square().sum() for t in written]
    weight, m, v, low = (t.detach() for t in written)
    kept = {"exp_avgs": [m], "exp_avg_sqs": [v], "steps": [torch.zeros(())], "dims": [None], "rounded": [low]}
    sphere_adamw_([weight], [torch.ones(4, 16)], **kept, **OPTIONS, backend="triton")
    for y in sums:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


def test_what_the_launches_promise_the_compiler_of_pointers_and_rows():
    """A multiple of 16 is said to be one only if each pointer, and each row's length, is."""
    whole, off = torch.zeros(4 * 16 + 4), torch.zeros(4 * 16 + 4)[1:65].view(4, 16)
    like = whole[:64].view(4, 16)
    assert triton.kind_of(triton.Tensors(like, 1, like, like, like, like)).aligned
    for i in range(5):
        parts = [off if i == j else like for j in range(5)]
        assert not triton.kind_of(triton.Tensors(parts[0], 1, *parts[1:])).aligned
    for dim in (0, 1):
        assert triton.kind_of(triton.Tensors(like, dim)).aligned
        assert not triton.kind_of(triton.Tensors(torch.zeros(16, 12), dim)).aligned
    assert triton.kind_of(triton.Tensors(torch.zeros(12), None)).aligned  # rows of its own making


def test_what_the_kernels_do_not_take_is_told():
    for w, dim, message in (
        (torch.randn(6, 4).t(), 1, "is not contiguous"),
        (torch.randn(2, 3, 4), 1, "is no matrix"),
        (torch.randn(1, 20_000), 1, "a row of 20000 elements"),
        (torch.randn(2, 2).double(), 1, "do not take torch.float64"),
    ):
        before = w.clone()
        with pytest.raises(RuntimeError, match=message):
            normalize_matrices_([(w, dim)], backend="triton")
        assert torch.equal(before, w)
    w = torch.randn(4, 16)
    zeros = {"exp_avgs": [torch.zeros(4, 16)], "exp_avg_sqs": [torch.zeros(4, 16)]}
    for changed, message in (
        ({name: [w.double()] for name in ("weights", *zeros)}, "AdamW in anything but fp32"),
        ({"exp_avgs": [torch.zeros(16, 4).t()]}, "is not contiguous"),
        ({"exp_avg_sqs": [torch.zeros(4, 32)[:, ::2]]}, "is not contiguous"),
        ({"grads": [w.double()]}, "do not take torch.float64"),
        ({"rounded": [w.double()]}, "do not take torch.float64"),
        ({"weights": [w.as_subclass(Subclass)]}, "a Subclass; give its local tensor"),
    ):
        lists = {"weights": [w], "grads": [w], **zeros, "steps": [torch.zeros(())], "dims": [1]} | changed
        before = [t.clone() for ts in lists.values() for t in ts if isinstance(t, torch.Tensor)]
        with pytest.raises(RuntimeError, match=f"'triton' was asked for and cannot run: sphere_adamw_: .*{message}"):
            sphere_adamw_(**lists, **OPTIONS, backend="triton")
        after = [t for ts in lists.values() for t in ts if isinstance(t, torch.Tensor)]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
