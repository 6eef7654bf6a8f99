"""The kernels of norm + RoPE + multiplier in Triton's interpreter, against the formula written out in fp64."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import test_qk_norm_rope as plain
from ops.test_qk_norm_rope import HKV, ROPES, B, D, H, build, inputs, tables_for, truth
from tolerances import error

from nsphere.multiplier import LearnedMultiplier
from nsphere.norms import NormSpec
from nsphere.ops.qk_norm_rope import SideSpec, SideTensors, norm_rope, qk_norm_rope, triton
from nsphere.qk_norm import QKNorm
from nsphere.rope import RopeSpec

FP32 = 3e-6


def check(qk, q, k, grads, tables, allowed=FP32):
    expected = truth(qk, q, k, tables, grads)
    got = plain.gradients(qk, q, k, tables, grads, torch.float32, "triton")
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        size = b.abs().max().item()
        if b.numel() < k.numel():  # a sum over tokens, which may cancel: what counts is the size of such a sum
            size = max(size, (q.numel() / b.numel()) ** 0.5)
        off = (a.double() - b).abs().max().item() / max(size, 1e-300)
        assert off <= allowed, f"output {i}: {off:.3g}"


@pytest.mark.parametrize("rope", sorted(ROPES))
@pytest.mark.parametrize("place", ["before", "after"])
def test_values_and_gradients(rope, place):
    (q, k), grads = inputs()
    turn = sorted(ROPES).index(rope) + (place == "after")
    over, kind = ("head", "full", 16)[turn % 3], ("l2", "rms", "layer")[turn // 2 % 3]
    check(
        build(kind, over, place, ROPES[rope], eps=0.0 if kind == "l2" else 1e-3, scale=1.5),
        q,
        k,
        grads,
        tables_for(ROPES[rope]),
    )


@settings(max_examples=12, deadline=None)
@given(
    kind=st.sampled_from(["l2", "rms", "layer"]),
    over=st.sampled_from(["head", "full", 16]),
    place=st.sampled_from(["before", "after"]),
    rope=st.sampled_from(sorted(ROPES)),
    weight=st.sampled_from(plain.WEIGHTS),
    eps_place=st.sampled_from(["inside", "clamp", "added"]),
    zero_centered=st.booleans(),
    learned=st.sampled_from([None, (), (H, 1), (D,), (H, D)]),
    seed=st.integers(0, 2**16),
)
def test_values_and_gradients_beyond_the_grid(kind, over, place, rope, weight, eps_place, zero_centered, learned, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k, *grads = (torch.randn(B, 2, h, D, generator=generator) for h in (H, HKV, H, HKV))
    bias = weight != "none" and seed % 2 == 0
    multiplier = None if learned is None else LearnedMultiplier(learned, 1.3)
    options = {"weight": weight, "bias": bias, "zero_centered": zero_centered, "eps_place": eps_place, "scale": 1.5}
    if over == "full" and weight in ("per_head", "scalar_per_head", "full"):
        options["weight"] = "shared"  # one row has no heads to tell apart
    qk = build(kind, over, place, ROPES[rope], multiplier=multiplier, eps=1e-3, **options)
    check(qk, q, k, grads, tables_for(ROPES[rope], 2))


@pytest.mark.parametrize("eps_place", ["inside", "clamp", "added"])
@pytest.mark.parametrize("weight", ["none", "shared"])
def test_eps_places_where_they_differ_most(eps_place, weight):
    (q, k), grads = inputs()
    q[0, 0] *= 1e-3
    check(
        build("rms", "head", "before", ROPES["half"], eps=0.05, eps_place=eps_place, weight=weight),
        q,
        k,
        grads,
        tables_for(ROPES["half"]),
    )


@pytest.mark.parametrize("layout", ["bshd", "sbhd", "bhsd", "thd"])
@pytest.mark.parametrize("pairs", ["half", "interleaved"])
def test_layouts_and_views_of_a_packed_projection(layout, pairs):
    """GQA, three heads to one, twelve dims: nothing a power of two; q and k are views that are read in place."""
    head_dim, heads, kv_heads, length = 12, 3, 1, 3
    rope = RopeSpec(head_dim, layout=pairs)
    order = {"bshd": (2, length), "sbhd": (length, 2), "bhsd": (2, length), "thd": (length,)}[layout]
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(*order, (heads + 2 * kv_heads) * head_dim, generator=generator)

    def parts(projected):
        q, k, _ = projected.unflatten(-1, (-1, head_dim)).split((heads, kv_heads, kv_heads), -2)
        return (q.transpose(1, 2), k.transpose(1, 2)) if layout == "bhsd" else (q, k)

    qk = QKNorm("rms", head_dim=head_dim, num_heads=heads, num_kv_heads=kv_heads, rope=rope, layout=layout)
    results = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "reference")):
        qk, qk.backend = qk.to(dtype), backend
        leaf = packed.to(dtype, copy=True).requires_grad_()
        outputs = qk(*parts(leaf), rope=rope.tables(length))
        grads = [torch.linspace(-1, 1, y.numel(), dtype=dtype).view(y.shape) for y in outputs]
        torch.autograd.backward(outputs, grads)
        results.append([*(y.detach() for y in outputs), leaf.grad, *(p.grad.clone() for p in qk.parameters())])
        qk.zero_grad()
    for a, b in zip(*results, strict=True):
        assert error(a, b) <= FP32


def test_the_inputs_are_not_copied(monkeypatch):
    _, q, k = plain.packed()
    places, launch = [], triton.forward_launch
    monkeypatch.setattr(triton, "forward_launch", lambda xs, *rest: places.extend(xs) or launch(xs, *rest))
    qk_norm_rope(q, k, *[SideSpec(NormSpec("rms", 1e-6), None)] * 2, *[SideTensors()] * 2, backend="triton")
    assert [x.data_ptr() for x in places] == [q.data_ptr(), k.data_ptr()]


@pytest.mark.parametrize("place", ["before", "after"])
def test_bf16_is_off_by_less_than_a_unit_in_the_last_place(place):
    # the interpreter cuts off where a GPU rounds: one unit of error where that has half of one
    (q, k), grads = inputs()
    low = [t.bfloat16() for t in (q, k, *grads)]
    qk = build("rms", "head", place, ROPES["half"])
    expected = truth(qk, *low[:2], tables_for(qk.rope), low[2:])
    got = plain.gradients(qk, *low[:2], tables_for(qk.rope), low[2:], torch.bfloat16, "triton")
    assert [t.dtype for t in got[:4]] == [torch.bfloat16] * 4
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(
            a.double(), b.double(), rtol=torch.finfo(a.dtype).eps, atol=4e-6 * b.abs().max().item()
        )


def test_what_a_weightless_side_keeps_is_its_output():
    qk = build("l2", "head", "before", ROPES["half"])
    qk.backend = "triton"
    q, k = (torch.randn(B, 3, h, D).bfloat16().requires_grad_() for h in (H, HKV))
    tables = tables_for(qk.rope)
    saved = plain.saved_by(lambda: qk(q, k, rope=tables))
    kept = plain.bytes_kept(saved, beside=tables)
    assert kept == 4 * B * 3 * (H + HKV) + 2 * B * 3 * (H + HKV) * D  # 1/root in fp32, and the outputs
    assert not any(t.data_ptr() in (q.data_ptr(), k.data_ptr()) for t in saved)


def test_scaled_tables_are_undone_from_the_output():
    (q, k), grads = inputs()
    for place, layout in itertools.product(("before", "after"), ("half", "interleaved")):
        rope = RopeSpec(D, layout=layout)
        qk = build("l2", "head", place, rope)
        check(qk, q, k, grads, tuple(1.3 * t for t in tables_for(rope)))


def test_zero_rows_give_zero_and_get_zero():
    for kind in ("l2", "layer"):
        (q, k), grads = inputs()
        q[0, 1] = 0
        qk = build(kind, "head", "after", ROPES["half"], bias=False, eps=0.0)
        got = plain.gradients(qk, q, k, tables_for(qk.rope), grads, torch.float32, "triton")
        assert got[0][0, 1].abs().max() == 0 and got[2][0, 1].abs().max() == 0
        assert all(torch.isfinite(g).all() for g in got)


def test_ngpts_s_qk_may_be_zero():
    (q, k), grads = inputs()
    multiplier = LearnedMultiplier((H, D), 1.3)
    qk = build("l2", "head", "after", ROPES["half"], multiplier=multiplier)
    torch.nn.init.zeros_(qk.multiplier.weight[:2])
    check(qk, q, k, grads, tables_for(qk.rope))
    assert qk.multiplier.weight.grad[0].abs().min() > 0


def test_rope_and_multiplier_without_a_norm():
    (q, k), grads = inputs()
    spec, rope = SideSpec(None, ROPES["leading"]), tables_for(ROPES["leading"])
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (q, k, torch.full((H, 1), 0.7))]
        sides = (
            SideTensors(cos=rope[0], sin=rope[1], multiplier=leaves[2], constant=2.0),
            SideTensors(None, None, *rope),
        )
        outputs = qk_norm_rope(*leaves[:2], spec, spec, *sides, backend=backend)
        torch.autograd.backward(outputs, [g.to(dtype) for g in grads])
        results.append([*(y.detach() for y in outputs), *(t.grad for t in leaves)])
    for a, b in zip(*results, strict=True):
        assert error(a, b) <= FP32


def test_one_side_alone_tables_per_head_and_factors_per_token():
    (q, _), (grad, _) = inputs()
    spec = SideSpec(NormSpec("rms", 1e-6, weight="per_head"), ROPES["half"])
    tables = torch.rand(2, B, 3, H, D // 2)
    factor, weight = torch.rand(B, 3, 1, 1) + 0.5, torch.rand(H, D)
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        x, w = (t.to(dtype, copy=True).requires_grad_() for t in (q, weight))
        y = norm_rope(x, spec, SideTensors(w, None, *tables, factor, -0.7), backend=backend)
        y.backward(grad.to(dtype))
        results.append([y.detach(), x.grad, w.grad])
    for a, b in zip(*results, strict=True):
        assert error(a, b) <= FP32


def against_the_reference(q_spec, k_spec, sides, q, k, grads):
    """Outputs and gradients of q, k and all that is learned; `sides` makes the tensors of both, in a dtype."""
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        tensors = sides(dtype)
        learned = [w for t in tensors for w in (t.weight, t.bias, t.multiplier) if w is not None]
        leaves = [*(x.to(dtype, copy=True).requires_grad_() for x in (q, k)), *(w.requires_grad_() for w in learned)]
        outputs = qk_norm_rope(*leaves[:2], q_spec, k_spec, *tensors, backend=backend)
        results.append(
            [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, [g.to(dtype) for g in grads])]
        )
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        assert error(a, b) <= FP32, f"output {i}: {error(a, b):.3g}"


def some(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("compiled", [False, True])
def test_inputs_and_gradients_whose_last_dim_is_not_contiguous(compiled):
    """Heads as columns, one number for all dims of a head, and heads that overlap."""
    torch._dynamo.reset()
    spec = SideSpec(NormSpec("rms", 1e-3, weight="shared"), None)
    columns, one, windows = (
        some(B, 3, D, H, seed=0).mT,
        some(B, 3, H, 1, seed=1).expand(B, 3, H, D),
        some(B, 3, 11, seed=2),
    )
    function = torch.compile(qk_norm_rope, fullgraph=True, backend="aot_eager") if compiled else qk_norm_rope
    for q in (columns, one, windows.unfold(-1, D, 1)):
        results = []
        for call, backend, dtype in ((function, "triton", torch.float32), (qk_norm_rope, "reference", torch.float64)):
            leaves = [x.to(dtype).detach().requires_grad_() for x in (q, columns, some(D, seed=3), some(D, seed=4))]
            assert dtype == torch.float64 or leaves[0].stride() == q.stride()
            outputs = call(*leaves[:2], spec, spec, *(SideTensors(w) for w in leaves[2:]), backend=backend)
            grads = [q.to(dtype), columns.to(dtype)]
            results.append([*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, grads)])
        for a, b in zip(*results, strict=True):
            assert error(a, b) <= FP32


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_factors_of_every_kind_at_once(norm_first, bias):
    """q has weight, bias, scale, constant and a learned multiplier; k, without a weight, undoes scale and constant."""
    (q, k), grads = inputs()
    q_norm = NormSpec("rms", 1e-3, weight="shared", bias=bias, scale=1.5, zero_centered=bias)
    specs = [SideSpec(norm, ROPES["interleaved"], norm_first) for norm in (q_norm, NormSpec("l2", 0.0, scale=3.0))]

    def sides(dtype):
        tables = [t.to(dtype) for t in tables_for(ROPES["interleaved"])]
        shift = some(D, seed=2).to(dtype) if bias else None
        q_side = SideTensors(some(D, seed=1).to(dtype), shift, *tables, some(H, D, seed=3).to(dtype), -0.7)
        return q_side, SideTensors(None, None, *tables, None, 2.5)

    against_the_reference(*specs, sides, q, k, grads)


@pytest.mark.parametrize("weight", ["shared", "per_head"])
def test_heads_in_several_blocks(monkeypatch, weight):
    """Five heads by two, the last block short, and three by one, so that one is empty; a program has many tokens."""
    monkeypatch.setattr(triton, "TILE", 16)
    heads = (5, 3)
    q, k, *grads = (some(B, 2, n, D, seed=i) for i, n in enumerate(heads * 2))
    spec = SideSpec(NormSpec("layer", 1e-3, weight=weight, bias=True), ROPES["half"])

    def sides(dtype):
        tables, made = [t.to(dtype) for t in tables_for(ROPES["half"], 2)], []
        for n in heads:
            shape = (D,) if weight == "shared" else (n, D)
            made.append(SideTensors(*(some(*shape, seed=n + i).to(dtype) for i in (5, 6)), *tables))
        return dataclasses.replace(made[0], multiplier=some(5, 1, seed=8).to(dtype)), made[1]

    against_the_reference(spec, spec, sides, q, k, grads)


@pytest.mark.parametrize("head_dim", [6, 8])
def test_a_statistic_over_three_heads(head_dim):
    """A tile has heads that are not there, of six dims pairs as well, of eight none."""
    q, k, *grads = (some(B, 3, 3, head_dim, seed=i) for i in range(4))
    rope = RopeSpec(4)
    spec = SideSpec(NormSpec("layer", 1e-3, weight="full", bias=True), rope, over="full")

    def sides(dtype):
        tables = [t.to(dtype) for t in tables_for(rope)]
        return [SideTensors(*(some(3 * head_dim, seed=i + j).to(dtype) for j in (0, 1)), *tables) for i in (4, 6)]

    against_the_reference(spec, spec, sides, q, k, grads)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize(
    "rope",
    [
        RopeSpec(12, layout="interleaved", output="half", blocks=2, where="trailing"),
        RopeSpec(12, blocks=3, where="trailing"),
        RopeSpec(4, where="trailing", sign=-1),
        RopeSpec(8, layout="interleaved", where="trailing"),
        RopeSpec(8, layout="interleaved", output="half"),
    ],
    ids=str,
)
def test_rotations_of_a_part_in_every_order(rope, norm_first):
    """A weight, a bias and a multiplier for each dim, that differ: each is of the dim that it belongs to."""
    head_dim = 16
    q, k, *grads = (some(B, 3, n, head_dim, seed=i) for i, n in enumerate((2, 1) * 2))
    norm = NormSpec("layer", 1e-3, weight="per_head", bias=True)
    tables = rope.tables(torch.arange(2, 5))

    def sides(dtype):
        cos, sin = (t.to(dtype) for t in tables)
        learned = [[some(n, head_dim, seed=n + i).to(dtype) for i in (5, 7)] for n in (2, 1)]
        q_side = SideTensors(*learned[0], cos, sin, some(head_dim, seed=9).to(dtype))
        return q_side, SideTensors(None, None, cos, sin)

    k_spec = SideSpec(NormSpec("l2", 0.0), rope, norm_first)
    against_the_reference(SideSpec(norm, rope, norm_first), k_spec, sides, q, k, grads)


def test_tables_between_other_numbers_and_tables_of_zeros():
    """Cosines and sines side by side, as a complex tensor has them; a token of padding, whose tables are 0."""
    (q, k), grads = inputs()
    both = torch.stack(tables_for(ROPES["half"]), -1)
    both[1] = 0
    spec = SideSpec(NormSpec("rms", 1e-3), ROPES["half"])

    def sides(dtype):
        return [SideTensors(None, None, *both.to(dtype).unbind(-1))] * 2

    against_the_reference(spec, spec, sides, q, k, grads)


@pytest.mark.parametrize("eps_place", ["clamp", "added"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_a_zero_row_beside_an_eps(eps_place, norm_first):
    (q, k), grads = inputs()
    q[0, 1] = k[1, 0] = 0
    specs = [
        SideSpec(NormSpec("rms", 1e-3, eps_place=eps_place, weight=w), ROPES["half"], norm_first)
        for w in ("shared", "none")
    ]

    def sides(dtype):
        tables = [t.to(dtype) for t in tables_for(ROPES["half"])]
        return SideTensors(some(D, seed=1).to(dtype), None, *tables), SideTensors(None, None, *tables)

    against_the_reference(*specs, sides, q, k, grads)


def test_an_empty_batch_and_gradients_of_one_side():
    qk = build("rms", "head", "before", ROPES["half"])
    empty = [torch.zeros(0, 3, h, D) for h in (H, HKV)]
    got = plain.gradients(qk, *empty, tables_for(qk.rope), empty, torch.float32, "triton")
    assert got[0].shape == (0, 3, H, D) and got[2].shape == (0, 3, H, D)
    assert all(g.abs().sum() == 0 for g in got[4:])
    (q, k), _ = inputs()
    q, k = q.requires_grad_(), k.requires_grad_()
    qk.backend = "triton"
    qk(q, k, rope=tables_for(qk.rope))[1].sum().backward()
    assert k.grad.abs().sum() > 0 and q.grad.abs().sum() == 0


def test_heads_beyond_2_to_the_31_elements():
    # a head's number and the stride fit 32 bits, their product does not
    pages = torch.UntypedStorage(2 * (2**31 + 32))
    far = torch.tensor([], dtype=torch.bfloat16).set_(pages, 0, (1, 1, 3, 8), (0, 0, 2**30 + 8, 1))
    far.copy_(torch.randn(1, 1, 3, 8))
    spec = SideSpec(NormSpec("rms", 1e-6), None)
    got, expected = (norm_rope(x, spec, SideTensors(), backend="triton") for x in (far, far.contiguous()))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dim", [0, 1])
def test_tokens_and_batches_beyond_2_to_the_31_elements(dim):
    """Read, in the forward and in the backward, and written: a number and the stride fit 32 bits, their product not."""
    pages = torch.UntypedStorage(2 * (2**31 + 64))
    shape, strides = [1, 1, 2, 8], [32, 16, 8, 1]
    shape[dim], strides[dim] = 3, 2**30 + 16
    far = torch.tensor([], dtype=torch.bfloat16).set_(pages, 0, tuple(shape), tuple(strides))
    far.copy_(some(*shape, seed=0))
    spec, weight = SideSpec(NormSpec("rms", 1e-6, weight="shared"), None), some(8, seed=1)
    results = []
    for x in (far, far.contiguous()):
        leaf = x.detach().requires_grad_()
        y = norm_rope(leaf, spec, SideTensors(weight), backend="triton")
        y.backward(x.detach())
        results.append((y.detach(), leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_sums_are_the_same_from_run_to_run():
    (q, k), grads = inputs(t=9)
    qk = build("rms", "head", "before", ROPES["half"])
    runs = [plain.gradients(qk, q, k, tables_for(qk.rope, 9), grads, torch.float32, "triton") for _ in range(2)]
    runs[0] = [t.clone() for t in runs[0]]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_registered_with_torch_library(monkeypatch):
    monkeypatch.undo()  # opcheck makes tensors without values
    (q, k), _ = inputs()
    spec = SideSpec(NormSpec("rms", 1e-6, weight="shared"), ROPES["half"])
    cos, sin = (t.unsqueeze(-2) for t in tables_for(ROPES["half"]))
    weight = torch.rand(D, requires_grad=True)
    arguments = (weight, None, cos, sin, None, None, None, cos, sin, None, *(1.0, 1e-6, 1.0), *(1.0, 0.0, 1.0))
    k_spec = SideSpec(NormSpec("l2", 0.0), ROPES["half"])
    call = (q.requires_grad_(), k.requires_grad_(), *arguments, triton.encode((spec, k_spec)))
    torch.library.opcheck(torch.ops.nsphere.qk_norm_rope.default, call)


def test_one_graph_under_torch_compile():
    (q, k), grads = inputs()
    qk = build("rms", "head", "before", ROPES["half"], multiplier=LearnedMultiplier((H, D), 1.3))
    eager = plain.gradients(qk, q, k, tables_for(qk.rope), grads, torch.float32, "triton")
    eager = [t.clone() for t in eager]
    qk.compile(fullgraph=True, backend="aot_eager")
    traced = plain.gradients(qk, q, k, tables_for(qk.rope), grads, torch.float32, "triton")
    assert all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True))


def test_one_compiled_function_meets_several_numbers():
    """From the second on the compiler takes eps, scale and constant for variables, which no plan can hold."""
    torch._dynamo.reset()
    (q, k), grads = inputs()

    def function(q, k, spec, constant):
        q, k = qk_norm_rope(2 * q, k, spec, spec, SideTensors(), SideTensors(constant=constant), backend="triton")
        return q.sin(), k

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found = []
    for eps, scale, constant in ((1e-6, 1.5, 2.0), (0.5, 1.5, 0.5), (2.0, 0.7, 0.25), (None, 3.0, 1.0)):
        spec = SideSpec(NormSpec("rms", eps, eps_place="added", scale=scale), None)
        for call in (compiled, function):
            leaves = [x.detach().requires_grad_() for x in (q, k)]
            outputs = call(*leaves, spec, constant)
            found.append([*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, grads)])
        for a, b in zip(*found[-2:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert not any(torch.allclose(a[0], b[0]) for a, b in itertools.combinations(found[::2], 2))


def test_what_the_kernels_do_not_take_is_told():
    (q, k), _ = inputs()
    for over, message in ((4, "over=4: a statistic of the kernels spans whole heads"), ((2, 6), r"over=\(2, 6\)")):
        qk = build("rms", over, "before", None)
        qk.backend = "triton"
        with pytest.raises(RuntimeError, match=f"'triton' was asked for and cannot run: qk_norm_rope: {message}"):
            qk(q, k)
    qk = build("rms", "head", "before", None).double()
    qk.backend = "triton"
    with pytest.raises(RuntimeError, match="take bf16, fp16 and fp32, not torch.float64"):
        qk(q.double(), k.double())


TURNS = RopeSpec(8)


def meets(norm="rms", rope=None, heads=1, head_dim=8, over="head", **tensors):
    x = some(1, 2, heads, head_dim, seed=0)
    norm = None if norm is None else NormSpec(norm, 1e-3, weight="shared" if "weight" in tensors else "none")
    return lambda: norm_rope(x, SideSpec(norm, rope, over=over), SideTensors(**tensors), backend="triton")


@pytest.mark.parametrize(
    "call, message",
    [
        (meets(head_dim=7), "a head of 7 dims has no pairs"),
        (meets(heads=5, head_dim=4098, over="full"), "over=full: more than the 32768"),
        (meets(rope=RopeSpec(8, compute_dtype=torch.float64), cos=some(2, 4, seed=1), sin=some(2, 4, seed=2)), "fp64"),
        (meets(rope=TURNS, cos=some(2, 4, seed=1).double(), sin=some(2, 4, seed=2)), "not torch.float64"),
        (meets(rope=TURNS, cos=some(2, 4, seed=1).requires_grad_(), sin=some(2, 4, seed=2)), "tables that need"),
        (meets(rope=TURNS, cos=some(2, 4, seed=1), sin=some(2, 4, seed=2).requires_grad_()), "tables that need"),
        (meets(multiplier=some(1, 2, 1, 1, seed=1).requires_grad_()), "a multiplier that differs"),
        (meets(multiplier=some(3, 1, 1, 1, seed=1).requires_grad_()), "a multiplier that differs"),
        (meets(constant=torch.tensor(2.0)), "a constant that is a tensor"),
        (meets(constant=0.0), "a factor of 0"),
        (meets(weight=some(8, seed=1).double()), "not torch.float64"),
        (meets(multiplier=some(8, seed=1).double()), "not torch.float64"),
        (lambda: torch.func.grad(lambda m: meets(multiplier=m)().sum())(some(8, seed=1)), "a transform of torch.func"),
    ],
)  # fmt: skip
def test_each_thing_that_is_not_taken_is_told(call, message):
    with pytest.raises(RuntimeError, match=f"'triton' was asked for and cannot run: qk_norm_rope: .*{message}"):
        call()


@pytest.mark.parametrize(
    "rope, head_dim, together",
    [
        (RopeSpec(16), 32, True),
        (RopeSpec(32, blocks=2, where="trailing"), 48, True),
        (RopeSpec(32, where="trailing"), 44, False),  # the turning dims start at the twelfth
        (RopeSpec(24), 40, False),  # twelve pairs
        (RopeSpec(32), 40, False),  # four pairs do not turn
        (RopeSpec(32, blocks=4), 48, False),  # blocks of four pairs
    ],
)
def test_what_is_promised_the_compiler_of_runs_of_8_pairs(rope, head_dim, together):
    """It holds for the dims that a tile's pairs have."""
    x = some(1, 1, 1, head_dim, seed=0)
    spec = SideSpec(None, rope)
    shape = triton._side(x.shape, spec, SideTensors(), 0.0, 1.0, (False,) * 3).shape
    assert shape.runs_of_8 == together
    start = head_dim - rope.dim if rope.where == "trailing" else 0
    turning = torch.arange(start, start + rope.dim).view(rope.blocks, 2, -1)[:, 0].flatten()
    still = torch.tensor([i for i in range(head_dim) if not start <= i < start + rope.dim])
    first = torch.cat((turning, still[: len(still) // 2])).view(-1)
    runs = len(first) % 8 == 0 and all(
        run[0] % 8 == 0 and torch.equal(run, run[0] + torch.arange(8)) for run in first.split(8)
    )
    assert runs or not together
