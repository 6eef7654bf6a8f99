"""SphereLinear, SphereEmbedding, Scale: values, gradients and the checks of norms."""

import math
from types import MappingProxyType

import plain_models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nsphere.hypersphere import (
    Scale,
    SphereEmbedding,
    SphereLinear,
    assert_on_hypersphere,
    max_norm_deviation,
    normalize_matrices_,
    on_sphere,
    sphere_matrices,
)


class TestScale:
    @settings(max_examples=50, deadline=None)
    @given(
        init=st.floats(0.01, 100),
        scale=st.floats(0.01, 100),
        kind=st.sampled_from(["vector", "scalar", "fixed"]),
        size=st.integers(1, 5),
    )
    def test_starts_at_init_whatever_is_stored(self, init, scale, kind, size):
        s = Scale(size, init, scale, kind)
        expected = torch.full((size if kind == "vector" else 1,), init)
        torch.testing.assert_close(s().detach(), expected, rtol=1e-6, atol=0)
        if kind == "fixed":
            assert list(s.parameters()) == []
            assert s.state_dict() == {}
        else:
            torch.testing.assert_close(s.stored.detach(), torch.full_like(expected, scale), rtol=1e-6, atol=0)
            (grad,) = torch.autograd.grad(s().sum(), s.stored)
            torch.testing.assert_close(grad, torch.full_like(grad, init / scale), rtol=1e-6, atol=0)

    @pytest.mark.parametrize("kind", ["vector", "scalar", "fixed"])
    def test_reset(self, kind):
        s = Scale(3, 2.0, 0.5, kind)
        with torch.no_grad():
            (s.constant if kind == "fixed" else s.stored).fill_(9)
        s.reset_parameters()
        assert torch.equal(s(), torch.full((3 if kind == "vector" else 1,), 2.0))

    def test_bad_values_are_named(self):
        with pytest.raises(ValueError, match="scale kind 'row' is unknown; choose vector, scalar or fixed"):
            Scale(3, 1.0, 1.0, "row")
        for scale in (0.0, -1.0, math.nan):
            with pytest.raises(ValueError, match="must be positive"):
                Scale(3, 1.0, scale)


class TestSphereLinear:
    @pytest.mark.parametrize("projection", ["step", "forward"])
    @pytest.mark.parametrize("sphere_dim", [0, 1])
    @pytest.mark.parametrize("kind", ["vector", "scalar", "fixed", None])
    @pytest.mark.parametrize("gain", [1.0, 2.5])
    def test_the_fold_is_exact_in_value_and_gradient(self, projection, sphere_dim, kind, gain):
        torch.manual_seed(0)
        scale = None if kind is None else Scale(5, 1.25, 0.5, kind)
        W = SphereLinear(7, 5, sphere_dim, scale, gain, projection).double()
        with torch.no_grad():
            for p in W.parameters():
                p.mul_(torch.empty_like(p).uniform_(0.5, 2.0))
        x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
        weight = plain_models.norm(W.weight, sphere_dim) if projection == "forward" else W.weight
        y = x @ weight.t() * gain
        if kind == "fixed":
            y = y * 1.25
        elif kind is not None:
            y = y * (scale.stored * 2.5)
        downstream = torch.randn(3, 5, dtype=torch.float64)
        torch.testing.assert_close(W(x), y, rtol=1e-13, atol=1e-14)
        inputs = (x, *W.parameters())
        got, expected = (torch.autograd.grad((z * downstream).sum(), inputs) for z in (W(x), y))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)

    def test_forward_projection_has_no_gradient_along_the_row(self):
        torch.manual_seed(0)
        W = SphereLinear(7, 5, 1, projection="forward").double()
        W(torch.randn(3, 7, dtype=torch.float64)).pow(2).sum().backward()
        assert (W.weight.grad * W.weight).sum(1).abs().max() < 1e-14
        assert W.weight.grad.norm() > 0.1

    @pytest.mark.parametrize("sphere_dim", [0, 1])
    def test_a_fresh_matrix_is_on_the_sphere_in_random_directions(self, sphere_dim):
        torch.manual_seed(0)
        weight = SphereLinear(64, 48, sphere_dim).weight.detach()
        assert (weight.double().norm(dim=sphere_dim) - 1).abs().max() < 1e-6
        vectors = weight if sphere_dim == 1 else weight.t()
        cosines = vectors @ vectors.t() - torch.eye(len(vectors))
        # independent directions in n dims have cosines of size 1/√n
        assert abs(cosines.pow(2).mean().item() * vectors.shape[1] - 1) < 0.15
        assert cosines.mean().abs() < 0.01

    def test_a_linear_of_bf16_with_bf16_scale(self):
        torch.manual_seed(0)
        W = SphereLinear(64, 48, 1, Scale(48, 2.0, 1.0)).bfloat16()
        x = torch.randn(9, 64).bfloat16()
        expected = x.double() @ W.weight.double().t() * 2
        assert W(x).dtype == torch.bfloat16
        torch.testing.assert_close(W(x).double(), expected, rtol=2**-7, atol=2**-7)


class TestSphereEmbedding:
    @pytest.mark.parametrize("projection", ["step", "forward"])
    def test_value_and_gradient(self, projection):
        torch.manual_seed(0)
        embed = SphereEmbedding(9, 4, projection).double()
        with torch.no_grad():
            embed.weight.mul_(1.5)
        tokens = torch.tensor([[0, 3, 3], [8, 3, 0]])
        rows = plain_models.norm(embed.weight) if projection == "forward" else embed.weight
        downstream = torch.randn(2, 3, 4, dtype=torch.float64)
        got, expected = embed(tokens), rows[tokens]
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-15)
        grads = [torch.autograd.grad((y * downstream).sum(), embed.weight)[0] for y in (got, expected)]
        torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)
        assert grads[0][1].abs().sum() == 0

    def test_a_fresh_table_is_on_the_sphere(self):
        assert_on_hypersphere(SphereEmbedding(100, 16))


class TestOnSphere:
    def test_marks_what_is_projected(self):
        torch.manual_seed(0)
        model = nn.Sequential(on_sphere(nn.Linear(6, 4), 1), nn.ReLU(), on_sphere(nn.Linear(4, 6), -2), nn.Linear(6, 2))
        plain, bias = model[3].weight.clone(), model[0].bias.clone()
        expected = model[0].weight / model[0].weight.norm(dim=1, keepdim=True)
        assert [(m.name, m.dim) for m in sphere_matrices(model)] == [("0.weight", 1), ("2.weight", 0)]
        normalize_matrices_(model)
        assert_on_hypersphere(model)
        torch.testing.assert_close(model[0].weight, expected)
        assert (model[2].weight.norm(dim=0) - 1).abs().max() < 1e-6
        assert torch.equal(model[3].weight, plain)
        assert torch.equal(model[0].bias, bias)

    def test_several_parameters_of_a_module(self):
        attention = nn.MultiheadAttention(8, 2)
        assert on_sphere(on_sphere(attention, 1, "in_proj_weight"), 0, "in_proj_bias") is attention
        assert [m.name for m in sphere_matrices(attention)] == ["in_proj_weight", "in_proj_bias"]
        other = nn.MultiheadAttention(8, 2)
        assert list(sphere_matrices(other)) == []

    def test_a_tied_matrix_is_there_once(self):
        model = nn.ModuleDict({"embed": on_sphere(nn.Embedding(5, 4), 1), "head": on_sphere(nn.Linear(4, 5), 1)})
        model["head"].weight = model["embed"].weight
        assert [m.name for m in sphere_matrices(model)] == ["embed.weight"]

    def test_errors(self):
        with pytest.raises(ValueError, match="ReLU has no parameter 'weight'"):
            on_sphere(nn.ReLU(), 1)
        with pytest.raises(ValueError, match="Linear has no parameter 'in_features'"):
            on_sphere(nn.Linear(2, 3), 1, "in_features")
        for dim in (2, -3):
            with pytest.raises(ValueError, match=rf"dim {dim} is outside 'weight' of shape \(3, 2\)"):
                on_sphere(nn.Linear(2, 3), dim)


class TestAssertOnHypersphere:
    def make(self):
        torch.manual_seed(0)
        return nn.ModuleDict({"a": SphereLinear(8, 5, 1), "b": SphereLinear(8, 5, 0), "c": SphereEmbedding(9, 8)})

    @pytest.mark.parametrize(("name", "dim", "row"), [("a", 1, 4), ("b", 0, 7), ("c", 1, 0)])
    def test_names_the_worst_vector(self, name, dim, row):
        model = self.make()
        assert_on_hypersphere(model)
        with torch.no_grad():
            model["a"].weight[2] *= 1 + 1e-4
            model[name].weight.select(1 - dim, row).mul_(0.9)
        worst = max_norm_deviation(model)
        assert worst[1:] == (f"{name}.weight", row)
        assert worst.value == pytest.approx(0.1, rel=1e-5)
        with pytest.raises(AssertionError, match=rf"{name}\.weight\[{row}\] has norm off by 0\.1, more than 1e-06"):
            assert_on_hypersphere(model)
        assert_on_hypersphere(model, atol=0.11)

    @pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
    def test_nan_infinity_and_zero_fail(self, value):
        model = self.make()
        with torch.no_grad():
            model["b"].weight[:, 3] = value
        with pytest.raises(AssertionError, match=r"b\.weight\[3\]"):
            assert_on_hypersphere(model)

    def test_a_model_with_nothing_to_check_is_an_error(self):
        assert max_norm_deviation(nn.Linear(3, 3)) is None
        with pytest.raises(ValueError, match="mark them with on_sphere"):
            assert_on_hypersphere(nn.Linear(3, 3))

    def test_just_above_and_just_below(self):
        model = self.make().double()
        normalize_matrices_(model)
        with torch.no_grad():
            model["a"].weight[1] *= 1 + 0.9e-6
        assert_on_hypersphere(model)
        with torch.no_grad():
            model["a"].weight[1] *= 1 + 0.2e-6
        with pytest.raises(AssertionError, match=r"a\.weight\[1\]"):
            assert_on_hypersphere(model)


def test_a_class_may_say_what_is_on_the_sphere_and_a_module_may_say_otherwise():
    class Rows(nn.Linear):
        sphere_dims = MappingProxyType({"weight": 1})

    class Columns(nn.Linear):
        @property
        def sphere_dims(self):
            return {"weight": 0}

    rows, off, columns = Rows(4, 3), Rows(4, 3), Columns(4, 3)
    off.sphere_dims = {}
    found = list(sphere_matrices(nn.Sequential(rows, off, columns, nn.Linear(3, 3))))
    assert [(m.name, m.dim) for m in found] == [("0.weight", 1), ("2.weight", 0)]
    assert found[0].weight is rows.weight and found[1].weight is columns.weight
