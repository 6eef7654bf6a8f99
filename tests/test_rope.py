import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsphere.rope import RopeSpec, apply_rope, rotate

B, T, H, D = 2, 7, 3, 16
VARIANTS = [
    RopeSpec(dim, layout=layout, where=where, sign=sign, output=output, blocks=blocks)
    for dim, layout, where, sign, output, blocks in itertools.product(
        (8, 16), ("half", "interleaved"), ("leading", "trailing"), (1, -1), ("same", "half"), (1, 2)
    )
]


def test_tables_are_the_angles():
    cos, sin = RopeSpec(8, base=100.0).tables(5, offset=2)
    assert cos.shape == sin.shape == (5, 4) and cos.dtype == torch.float32
    for p, i in itertools.product(range(5), range(4)):
        angle = torch.tensor((p + 2) * 100.0 ** (-2 * i / 8), dtype=torch.float64)
        assert cos[p, i] == angle.cos().float() and sin[p, i] == angle.sin().float()


def test_tables_for_any_positions():
    spec = RopeSpec(8)
    positions = torch.tensor([[3, 0, 9], [1, 1, 4]])
    cos, sin = spec.tables(positions)
    all_cos, all_sin = spec.tables(10)
    assert torch.equal(cos, all_cos[positions]) and torch.equal(sin, all_sin[positions])


def test_angles_do_not_drift_at_long_context():
    cos, _ = RopeSpec(64).tables(torch.tensor([131071]))
    exact = torch.cos(131071 * 10000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64))
    single = torch.cos(131071.0 * 10000.0 ** (-torch.arange(0, 64, 2).float() / 64))
    assert (cos[0] - exact).abs().max() < 1e-7
    assert (single - exact).abs().max() > 1e-3  # what fp32 angles would give


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_it_is_multiplication_by_a_complex_number(layout):
    spec = RopeSpec(D, layout=layout)
    x = torch.randn(B, T, H, D, dtype=torch.float64)
    cos, sin = spec.tables(T)
    z = (
        torch.complex(x[..., : D // 2], x[..., D // 2 :])
        if layout == "half"
        else torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    )
    z = z * torch.complex(cos.double(), sin.double()).unsqueeze(-2)
    expected = torch.cat((z.real, z.imag), -1) if layout == "half" else torch.view_as_real(z).flatten(-2)
    torch.testing.assert_close(apply_rope(x, cos, sin, spec), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("spec", VARIANTS, ids=str)
def test_rotations_keep_norms_and_undo(spec):
    x = torch.randn(B, T, H, D, dtype=torch.float64)
    cos, sin = (t.double() for t in RopeSpec(spec.dim, blocks=spec.blocks).tables(T))
    unit = (cos.square() + sin.square()).sqrt()  # fp32 tables are no exact rotation
    cos, sin = cos / unit, sin / unit
    y = rotate(x, cos, sin, spec)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotate(y, cos, sin, spec, inverse=True), x)
    still = slice(spec.dim, None) if spec.where == "leading" else slice(0, D - spec.dim)
    assert torch.equal(y[..., still], x[..., still]) if spec.dim < D else True
    assert (y[:, 1:] != x[:, 1:]).any(-1).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 5000), st.integers(0, 500), st.sampled_from(VARIANTS))
def test_dot_products_depend_on_distance_alone(position, shift, spec):
    q, k = torch.randn(2, 1, 1, 1, D, dtype=torch.float64)
    score = []
    for start in (0, shift):
        turned = []
        for x, p in ((q, start + position), (k, start)):
            cos, sin = spec.tables(torch.tensor([p]))
            turned.append(apply_rope(x, cos, sin, spec))
        score.append((turned[0] * turned[1]).sum())
    torch.testing.assert_close(score[0], score[1], rtol=1e-5, atol=1e-5)


def test_sign_turns_the_other_way():
    x = torch.randn(B, T, H, D)
    cos, sin = RopeSpec(D).tables(T)
    assert torch.equal(apply_rope(x, cos, sin, RopeSpec(D, sign=-1)), apply_rope(x, cos, -sin, RopeSpec(D)))


def test_half_output_reorders_pairs():
    x = torch.randn(B, T, H, D)
    cos, sin = RopeSpec(D).tables(T)
    same = apply_rope(x, cos, sin, RopeSpec(D, layout="interleaved"))
    half = apply_rope(x, cos, sin, RopeSpec(D, layout="interleaved", output="half"))
    assert torch.equal(half, torch.cat((same[..., ::2], same[..., 1::2]), -1))


def test_tables_of_full_width_say_every_angle_twice():
    x = torch.randn(B, T, H, D)
    cos, sin = RopeSpec(D).tables(T)
    for layout, double in (
        ("half", lambda t: torch.cat((t, t), -1)),
        ("interleaved", lambda t: t.repeat_interleave(2, -1)),
    ):
        spec = RopeSpec(D, layout=layout)
        assert torch.equal(apply_rope(x, double(cos), double(sin), spec), apply_rope(x, cos, sin, spec))
    in_halves = RopeSpec(D, layout="interleaved", twice="halves")
    doubled = [torch.cat((t, t), -1) for t in (cos, sin)]
    assert torch.equal(apply_rope(x, *doubled, in_halves), apply_rope(x, cos, sin, in_halves))


def test_rounding_of_tables_and_compute():
    x = torch.randn(B, T, H, D).bfloat16()
    cos, sin = RopeSpec(D).tables(T)
    a, b = x.float().chunk(2, -1)
    c, s = cos.unsqueeze(-2), sin.unsqueeze(-2)
    once = torch.cat((a * c - b * s, b * c + a * s), -1).bfloat16()
    assert torch.equal(apply_rope(x, cos, sin, RopeSpec(D)), once)
    a, b, c, s = a.bfloat16(), b.bfloat16(), c.bfloat16(), s.bfloat16()
    thrice = torch.cat((a * c - b * s, b * c + a * s), -1)
    in_input = RopeSpec(D, compute_dtype="input", table_dtype="input")
    assert torch.equal(apply_rope(x, cos, sin, in_input), thrice)
    assert 0.1 < (once != thrice).float().mean() < 0.9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RopeSpec(7), "dims turn in pairs, so give a positive multiple of 2"),
        (lambda: RopeSpec(0), "got dim=0"),
        (lambda: RopeSpec(6, blocks=2), "positive multiple of 4"),
        (lambda: RopeSpec(8, layout="neox"), "got layout='neox'; choose from ('half', 'interleaved')"),
        (lambda: RopeSpec(8, blocks=0), "got blocks=0; give at least 1"),
        (lambda: RopeSpec(8, table_dtype="bf16"), "got table_dtype='bf16'; give a torch.dtype or one of"),
        (lambda: RopeSpec(8, compute_dtype="float32"), "got compute_dtype='float32'; give a torch.dtype or one of"),
        (lambda: RopeSpec(8, compute_dtype=None), "got compute_dtype=None"),
        (lambda: RopeSpec(8, sign=0), "got sign=0"),
        (lambda: apply_rope(torch.zeros(1, 1, 1, 4), *RopeSpec(8).tables(1), RopeSpec(8)), "rotate at most those"),
        (lambda: apply_rope(torch.zeros(1, 1, 1, 8), *RopeSpec(4).tables(1), RopeSpec(8)), "give 4 (or 8,"),
    ],
)
def test_errors_say_what_to_do(make, message):
    with pytest.raises(ValueError) as caught:
        make()
    assert message in str(caught.value)
