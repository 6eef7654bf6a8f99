import functools
import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_close, error, floor
from torch import nn

from nsphere.multiplier import LearnedMultiplier
from nsphere.norms import L2Norm, LayerNorm, NormSpec, RMSNorm
from nsphere.ops import backend as backends
from nsphere.ops.qk_norm_rope import SideSpec, SideTensors, lean, qk_norm_rope, reference
from nsphere.qk_norm import QKNorm
from nsphere.rope import RopeSpec

# torch's own compiler imports a deprecated part of torch
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")

B, T, H, HKV, D = 2, 3, 4, 2, 8
NORMS = {"l2": L2Norm, "rms": RMSNorm, "layer": LayerNorm}
ROPES = {
    "none": None,
    "half": RopeSpec(D),
    "interleaved": RopeSpec(D, layout="interleaved", sign=-1),
    "leading": RopeSpec(4),
    "trailing": RopeSpec(4, layout="interleaved", where="trailing", output="half"),
    "blocks": RopeSpec(D, blocks=2),
}


def written_out(x, norm, rope, tables, place, over, multiplier):
    """The op in fp64, one row at a time, from the formulas and sharing no code with the package."""

    def normalise(x):
        if norm is None:
            return x
        spec, shape = norm.spec, x.shape
        w = None if norm.weight is None else norm.weight.double()
        b = None if norm.bias is None else norm.bias.double()
        if over == "full":
            rows = x.reshape(*shape[:-2], 1, -1)
        elif isinstance(over, tuple):
            rows = x[..., over[0] : over[1]]
        elif isinstance(over, int):
            rows = x.reshape(*shape[:-2], -1, over)
        else:
            rows = x
        out = []
        for i, row in enumerate(rows.unbind(-2)):
            if spec.statistic == "layer":
                row = row - row.sum(-1, keepdim=True) / row.shape[-1]
            s = (row * row).sum(-1, keepdim=True)
            s = s if spec.statistic == "l2" else s / row.shape[-1]
            if spec.eps_place == "inside":
                root = (s + spec.eps).sqrt()
            elif spec.eps_place == "clamp":
                root = s.sqrt().clamp(min=spec.eps)
            else:
                root = s.sqrt() + spec.eps
            row = row / root * spec.scale
            width = row.shape[-1]

            def of_row(t, i=i, width=width):
                if spec.weight in ("per_head", "full"):
                    return t.reshape(-1, width)[i]
                return t[i] if spec.weight == "scalar_per_head" else t

            if w is not None:
                row = row * ((1 + of_row(w)) if spec.zero_centered else of_row(w))
            out.append(row if b is None else row + of_row(b))
        y = torch.stack(out, -2)
        if isinstance(over, tuple):
            return torch.cat((x[..., : over[0]], y, x[..., over[1] :]), -1)
        return y.reshape(shape)

    def turn(x):
        if rope is None:
            return x
        cos, sin = (t.double() for t in tables)
        start = x.shape[-1] - rope.dim if rope.where == "trailing" else 0
        part, out = x[..., start : start + rope.dim], list(x.unbind(-1))
        block = rope.dim // rope.blocks
        for pair in range(rope.dim // 2):
            in_block, i = divmod(pair, block // 2)
            first = in_block * block + (i if rope.layout == "half" else 2 * i)
            second = first + (block // 2 if rope.layout == "half" else 1)
            a, b = part[..., first], part[..., second]
            c, s = cos[..., pair, None], rope.sign * sin[..., pair, None]
            if rope.output == "half":
                first, second = in_block * block + i, in_block * block + i + block // 2
            out[start + first], out[start + second] = a * c - b * s, b * c + a * s
        return torch.stack(out, -1)

    y = turn(normalise(x)) if place == "before" else normalise(turn(x))
    return y if multiplier is None else y * multiplier.double()


def build(kind, over, place, rope, cast="fused", **options):
    """A QKNorm with everything that has a value set at random."""
    weight = options.pop("weight", "none" if kind == "l2" else "shared")
    torch.manual_seed(0)
    qk = QKNorm(
        kind,
        head_dim=D,
        num_heads=H,
        num_kv_heads=HKV,
        rope=rope,
        place=place,
        over=over,
        multiplier=options.pop("multiplier", None),
        weight=weight,
        weight_cast=cast,
        softmax_scale="rsqrt",
        **options,
    )
    for p in qk.parameters():
        nn.init.normal_(p, 1.0, 0.3)
    return qk


def gradients(qk, q, k, tables, grads, dtype, backend=None):
    """(q, k, dq, dk, then the gradients of the parameters) of the module in this dtype."""
    qk = qk.double() if dtype == torch.float64 else qk.float()
    qk.backend = backend
    qk.zero_grad()
    q, k = (t.detach().to(dtype, copy=True).requires_grad_() for t in (q, k))
    outputs = qk(q, k, rope=tables)
    torch.autograd.backward(outputs, [g.to(dtype) for g in grads])
    return [*(y.detach() for y in outputs), q.grad, k.grad, *(p.grad for p in qk.parameters())]


def truth(qk, q, k, tables, grads):
    qk = qk.double()
    qk.zero_grad()
    q, k = (t.detach().to(torch.float64, copy=True).requires_grad_() for t in (q, k))
    m = qk.multiplier() if isinstance(qk.multiplier, nn.Module) else None
    outputs = [
        written_out(q, qk.q_norm, qk.rope, tables, qk.place, qk.over, m),
        written_out(k, qk.k_norm, qk.rope, tables, qk.place, qk.over, None),
    ]
    torch.autograd.backward(outputs, [g.double() for g in grads])
    return [*(y.detach() for y in outputs), q.grad, k.grad, *(p.grad for p in qk.parameters())]


def inputs(scale=1.0, t=T):
    g = torch.Generator().manual_seed(1)
    made = [torch.randn(B, t, h, D, generator=g) * scale for h in (H, HKV)]
    return made, [torch.randn(B, t, h, D, generator=g) for h in (H, HKV)]


def tables_for(rope, t=T):
    return None if rope is None else rope.tables(torch.arange(3, 3 + t))


@pytest.mark.parametrize("over", ["head", "full", 4, 16, (2, 6)])
@pytest.mark.parametrize("kind", ["l2", "rms", "layer"])
def test_values_and_gradients_over_the_grid(kind, over):
    (q, k), grads = inputs()
    for place, (name, rope), cast in itertools.product(
        ("before", "after"), ROPES.items(), ("fused", "before", "after", "input", "torch")
    ):
        qk = build(kind, over, place, rope, cast, eps=1e-3 if kind != "l2" else 0.0)
        tables = tables_for(rope)
        expected = truth(qk, q, k, tables, grads)
        for dtype in (torch.float64, torch.float32):
            got = gradients(qk, q, k, tables, grads, dtype)
            for i, (a, b) in enumerate(zip(got, expected, strict=True)):
                # tables are fp32, and a few hundred products add up in a weight's gradient
                allowed = 1e-11 if dtype == torch.float64 else 3e-6
                assert error(a, b) <= allowed, f"{place} {name} {cast} output {i}: {error(a, b):.3g}"


@pytest.mark.parametrize("eps_place", ["inside", "clamp", "added"])
@pytest.mark.parametrize("kind", ["l2", "rms", "layer"])
def test_eps_places(kind, eps_place):
    (q, k), grads = inputs()
    q[0, 0] *= 1e-3  # below the eps, where the places differ most
    for over, place in itertools.product(("head", "full", 4), ("before", "after")):
        qk = build(kind, over, place, ROPES["half"], eps=0.05, eps_place=eps_place)
        expected = truth(qk, q, k, tables_for(qk.rope), grads)
        for a, b in zip(gradients(qk, q, k, tables_for(qk.rope), grads, torch.float64), expected, strict=True):
            assert error(a, b) <= 1e-11


WEIGHTS = ["none", "shared", "per_head", "full", "scalar_per_head", "scalar"]


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("over", ["head", 4, 16])
def test_weight_shapes(weight, over):
    (q, k), grads = inputs()
    for zero_centered, bias, place in itertools.product((False, True), (False, True), ("before", "after")):
        if weight == "none" and bias:
            continue
        qk = build(
            "rms", over, place, ROPES["leading"], weight=weight, zero_centered=zero_centered, bias=bias, scale=1.5
        )
        expected = truth(qk, q, k, tables_for(qk.rope), grads)
        for a, b in zip(gradients(qk, q, k, tables_for(qk.rope), grads, torch.float64), expected, strict=True):
            assert error(a, b) <= 1e-11


@pytest.mark.parametrize("shape", [(), (H, 1), (D,), (H, D)], ids=str)
@pytest.mark.parametrize("transform", ["identity", "softplus", "exp"])
def test_learned_multipliers(shape, transform):
    (q, k), grads = inputs()
    for kind, place in itertools.product(("l2", "rms"), ("before", "after")):
        multiplier = LearnedMultiplier(shape, 1.3, transform=transform)
        qk = build(kind, "head", place, ROPES["half"], multiplier=multiplier)
        expected = truth(qk, q, k, tables_for(qk.rope), grads)
        got = gradients(qk, q, k, tables_for(qk.rope), grads, torch.float32)
        assert qk.multiplier.weight.grad.abs().sum() > 0
        for a, b in zip(got, expected, strict=True):
            assert error(a, b) <= 3e-6


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["l2", "rms", "layer"]),
    over=st.sampled_from(["head", "full", 4, 8, 16, (0, 8), (1, 5)]),
    place=st.sampled_from(["before", "after"]),
    rope=st.sampled_from(sorted(ROPES)),
    cast=st.sampled_from(["fused", "before", "after", "input", "torch"]),
    eps=st.sampled_from([1e-6, 1e-2, 1.0]),
    eps_place=st.sampled_from(["inside", "clamp", "added"]),
    zero_centered=st.booleans(),
    scale=st.floats(0.1, 10.0),
    seed=st.integers(0, 2**16),
)
def test_values_and_gradients_beyond_the_grid(
    kind, over, place, rope, cast, eps, eps_place, zero_centered, scale, seed
):
    if cast == "torch":  # torch's functions have one place for eps each
        eps_place = "clamp" if kind == "l2" else "inside"
    torch.manual_seed(seed)
    q, k = torch.randn(B, T, H, D) * scale, torch.randn(B, T, HKV, D) * scale
    if kind == "l2" and eps_place == "clamp":
        eps = min(eps, 1e-2)  # at the clamp itself the slope is not defined
    grads = [torch.randn_like(q), torch.randn_like(k)]
    qk = build(kind, over, place, ROPES[rope], cast, eps=eps, eps_place=eps_place, zero_centered=zero_centered)
    tables = tables_for(ROPES[rope])
    expected = truth(qk, q, k, tables, grads)
    for a, b in zip(gradients(qk, q, k, tables, grads, torch.float64), expected, strict=True):
        assert error(a, b) <= 1e-9


@pytest.mark.parametrize("kind", ["l2", "rms", "layer"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_plain_autograd(kind, dtype):
    (q, k), grads = inputs()
    q, k, grads = q.to(dtype), k.to(dtype), [g.to(dtype) for g in grads]
    for place, name in itertools.product(("before", "after"), ("none", "half", "trailing")):
        qk = build(kind, "head", place, ROPES[name])
        tables = tables_for(ROPES[name])
        expected = truth(qk, q, k, tables, grads)
        plain = gradients(qk, q, k, tables, grads, dtype, backend="reference")
        lean_result = gradients(qk, q, k, tables, grads, dtype)
        for i, (a, b, p) in enumerate(zip(lean_result, expected, plain, strict=True)):
            assert a.dtype == p.dtype
            if i < 2:
                assert torch.equal(a, p)
            assert_close(a.to(dtype), b, p.to(dtype), f"{place} {name} output {i}")


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_tables_that_are_no_exact_rotation(layout):
    """YaRN scales its tables, and Hugging Face rounds them to bf16: the gradient must see the tables as they are."""
    (q, k), grads = inputs()
    rope = RopeSpec(D, layout=layout)
    for kind, place, dtype in itertools.product(("l2", "layer"), ("before", "after"), (None, torch.bfloat16)):
        qk = build(kind, "head", place, rope, weight="none", bias=False)
        tables = tuple(1.3 * t if dtype is None else t.to(dtype) for t in tables_for(rope))
        expected = truth(qk, q, k, tables, grads)
        for a, b in zip(gradients(qk, q, k, tables, grads, torch.float64), expected, strict=True):
            assert error(a, b) <= 1e-11


def test_tables_that_are_written_over_are_seen():
    (q, k), grads = inputs()
    qk = build("l2", "head", "before", ROPES["half"])
    cos, sin = tables_for(qk.rope)
    for factor in (1.0, 1.3, 1.3):
        cos, sin = cos.mul_(factor), sin * factor  # cos stays the same tensor
        expected = truth(qk, q, k, (cos, sin), grads)
        for a, b in zip(gradients(qk, q, k, (cos, sin), grads, torch.float64), expected, strict=True):
            assert error(a, b) <= 1e-11


def test_zero_rows_give_zero_and_get_zero():
    for kind in ("l2", "rms", "layer"):
        for backend in ("reference", None):
            (q, k), grads = inputs()
            q[0, 1] = 0
            qk = build(kind, "head", "after", ROPES["half"], bias=False, eps=0.0)
            got = gradients(qk, q, k, tables_for(qk.rope), grads, torch.float32, backend)
            assert got[0][0, 1].abs().max() == 0 and got[2][0, 1].abs().max() == 0
            assert all(torch.isfinite(g).all() for g in got)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_small_and_large_rows(scale):
    for kind in ("l2", "rms", "layer"):
        (q, k), grads = inputs(scale)
        qk = build(kind, "head", "before", ROPES["half"], eps=0.0, bias=False, weight="none")
        expected = truth(qk, q, k, tables_for(qk.rope), grads)
        got = gradients(qk, q, k, tables_for(qk.rope), grads, torch.float32)
        for a, b in zip(got, expected, strict=True):
            assert error(a, b) <= 3e-6
        length = {"l2": 1.0, "rms": D**0.5, "layer": D**0.5}[kind]
        torch.testing.assert_close(got[0].norm(dim=-1), torch.full((B, T, H), length), rtol=1e-5, atol=0)


@pytest.mark.parametrize("weight", ["none", "shared"])
@pytest.mark.parametrize("kind", ["l2", "rms", "layer"])
def test_an_added_eps_with_rows_far_shorter(kind, weight):
    for place, length in itertools.product(("before", "after"), (1e-10, 1e-5, 1.0)):
        (q, k), grads = inputs()
        q, k = q * length, k * length
        qk = build(kind, "head", place, ROPES["half"], weight=weight, bias=False, eps=1e-1, eps_place="added")
        expected = truth(qk, q, k, tables_for(qk.rope), grads)
        got = gradients(qk, q, k, tables_for(qk.rope), grads, torch.float32)
        for a, b in zip(got, expected, strict=True):
            assert error(a, b) <= 3e-6, f"{place} {length}"


@pytest.mark.parametrize("eps", [1e-3, 3e-3, 1e-5, 0.7])
@pytest.mark.parametrize("kind", ["l2", "rms"])
def test_clamped_rows_near_the_clamp(kind, eps):
    (q, k), grads = inputs()
    qk = build(kind, "head", "before", ROPES["half"], weight="none", bias=False, eps=eps, eps_place="clamp")
    for share in (0.9, 0.99, 1.01, 1.1):
        lengths = (x.norm(dim=-1, keepdim=True) / (1 if kind == "l2" else D**0.5) for x in (q, k))
        near = [x / n * share * eps for x, n in zip((q, k), lengths, strict=True)]
        expected = truth(qk, *near, tables_for(qk.rope), grads)
        for a, b in zip(gradients(qk, *near, tables_for(qk.rope), grads, torch.float32), expected, strict=True):
            assert error(a, b) <= 3e-6, f"{share}"


def test_padding_in_the_tables():
    for kind, place in itertools.product(("l2", "layer"), ("before", "after")):
        (q, k), grads = inputs()
        qk = build(kind, "head", place, ROPES["half"], weight="none", bias=False, eps=1e-6)
        cos, sin = tables_for(qk.rope)
        cos, sin = cos.clone(), sin.clone()
        cos[1] = sin[1] = 0.0
        expected = truth(qk, q, k, (cos, sin), grads)
        for a, b in zip(gradients(qk, q, k, (cos, sin), grads, torch.float64), expected, strict=True):
            assert error(a, b) <= 1e-11


def test_frozen_parameters_get_no_gradient_and_cost_none(monkeypatch):
    asked = []
    whole = reference.backward

    def watched(*args):
        results = whole(*args)
        asked.append([g is not None for g in results[1:]])
        return results

    monkeypatch.setattr(reference, "backward", watched)
    (q, k), grads = inputs()
    for frozen in ((), ("q_norm.weight", "k_norm.bias"), ("multiplier.weight", "q_norm.bias")):
        qk = build("layer", "head", "before", ROPES["half"], multiplier=LearnedMultiplier((H, D), 1.3))
        expected = gradients(qk, q, k, tables_for(qk.rope), grads, torch.float64, "reference")
        names = [name for name, _ in qk.named_parameters()]
        for name in frozen:
            qk.get_parameter(name).requires_grad_(False)
        asked.clear()
        got = gradients(qk, q, k, tables_for(qk.rope), grads, torch.float64)
        for name, a, b in zip(["q", "k", "dq", "dk", *names], got, expected, strict=True):
            assert a is None if name in frozen else error(a, b) <= 1e-11
        sides = [("q_norm.weight", "q_norm.bias", "multiplier.weight"), ("k_norm.weight", "k_norm.bias", "no")]
        assert asked == [[name in names and name not in frozen for name in side] for side in sides]


def test_one_position_and_an_empty_batch():
    qk = build("rms", "head", "before", ROPES["half"])
    (q, k), grads = inputs(t=1)
    expected = truth(qk, q, k, tables_for(qk.rope, 1), grads)
    for a, b in zip(gradients(qk, q, k, tables_for(qk.rope, 1), grads, torch.float32), expected, strict=True):
        assert error(a, b) <= 3e-6
    empty = [torch.zeros(0, T, h, D) for h in (H, HKV)]
    got = gradients(qk, *empty, tables_for(qk.rope), empty, torch.float32)
    assert got[0].shape == (0, T, H, D) and got[2].shape == (0, T, H, D)
    assert all(g.abs().sum() == 0 for g in got[4:])


def packed(dtype=torch.float32):
    """q and k as views of one projection [B, T, (H + 2 Hkv) · D], and the projection."""
    projected = torch.randn(B, T, (H + 2 * HKV) * D, generator=torch.Generator().manual_seed(2)).to(dtype)
    projected.requires_grad_()
    q, k, _ = projected.split((H * D, HKV * D, HKV * D), -1)
    return projected, q.unflatten(-1, (H, D)), k.unflatten(-1, (HKV, D))


@pytest.mark.parametrize("over", ["head", "full", 4])
def test_views_of_a_packed_projection_are_read_in_place(over):
    projected, q, k = packed()
    qk = build("rms", over, "before", ROPES["half"])
    tables = tables_for(qk.rope)
    saved = saved_by(lambda: qk(q, k, rope=tables))
    storage = projected.untyped_storage().data_ptr()
    inputs_kept = [t for t in saved if t.shape[-1] == D and t.dim() == 4]
    assert len(inputs_kept) == 2
    assert all(t.untyped_storage().data_ptr() == storage for t in inputs_kept)
    outputs = qk(q, k, rope=tables)
    copies = qk(q.detach().contiguous(), k.detach().contiguous(), rope=tables)
    for a, b in zip(outputs, copies, strict=True):
        assert torch.equal(a, b)
    sum(y.square().sum() for y in outputs).backward()
    assert projected.grad[..., (H + HKV) * D :].abs().max() == 0
    assert projected.grad[..., : (H + HKV) * D].abs().min() > 0


def saved_by(function):
    """The tensors the backward keeps."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        function.outputs = function()
    return kept


def bytes_kept(tensors, beside=()):
    """Bytes of distinct storage, beside that of tensors that are kept anyway."""
    known = {t.untyped_storage().data_ptr() for t in beside}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(n for p, n in storages.items() if p not in known)


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("compiled", [False, True])
def test_activations_kept(place, compiled):
    t = 33  # a length that nothing else has
    if compiled and backends.why_not("compiled", "cpu"):
        pytest.skip(backends.why_not("compiled", "cpu"))
    overs = {"head": H + HKV, "full": 2, 4: 2 * (H + HKV), (2, 6): H + HKV}  # and how many statistics a token has
    for kind, over in itertools.product(("l2", "rms", "layer"), overs):
        if compiled and (kind, over) not in (("l2", "head"), ("layer", (2, 6))):
            continue  # each is a compilation
        for weight in ("none", "shared"):
            qk = build(kind, over, place, ROPES["half"], weight=weight, bias=False)
            qk.backend = "compiled" if compiled else None
            q, k = (torch.randn(B, t, h, D).bfloat16().requires_grad_() for h in (H, HKV))
            tables = tables_for(qk.rope, t)
            call = lambda: qk(q, k, rope=tables)  # noqa: B023, E731
            saved = saved_by(call)
            factors = 4 * B * t * overs[over]  # one fp32 each
            kept = bytes_kept(saved, beside=[*call.outputs, *qk.parameters(), *tables])
            expected = factors if weight == "none" else factors + 2 * B * t * (H + HKV) * D
            assert kept == expected, f"{kind} {over} {weight} {place}: {kept} bytes, {expected} promised"


def test_a_checkpoint_keeps_the_inputs_alone():
    """What is composed of steps that round keeps more; a checkpoint around it keeps q and k, and nothing else."""
    (q, k), _ = inputs()
    q, k = (t.bfloat16().requires_grad_() for t in (q, k))
    qk = build("rms", "head", "before", RopeSpec(D, compute_dtype="input"), "after")
    tables = tables_for(qk.rope)
    plain = bytes_kept(saved_by(lambda: qk(q, k, rope=tables)), beside=[*qk.parameters(), *tables])
    kept = saved_by(lambda: torch.utils.checkpoint.checkpoint(qk, q, k, tables, use_reentrant=False))
    assert bytes_kept(kept, beside=[*qk.parameters(), *tables]) <= 2 * (q.numel() + k.numel()) < plain / 3


@pytest.mark.parametrize("place", ["before", "after"])
def test_constants_are_exact_and_share_their_code(place, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    (q, k), grads = inputs()
    torch._dynamo.utils.counters.clear()
    for kind, over in (("l2", "head"), ("rms", (2, 6))):
        counted = set()
        for constant in (1.7, -0.3, 25.0):
            qk = build(kind, over, place, ROPES["half"], weight="none", eps=5e-6 if kind == "rms" else 0.0)
            tables = tables_for(qk.rope)
            expected = truth(qk, q, k, tables, [grads[0].double() * constant, grads[1]])
            expected[0] = expected[0] * constant
            qk.multiplier = constant
            for backend, allowed in ((None, 1e-11), ("compiled", 3e-6)):
                if backend and backends.why_not("compiled", "cpu"):
                    continue
                dtype = torch.float32 if backend else torch.float64
                got = gradients(qk, q, k, tables, grads, dtype, backend)
                for a, b in zip(got, expected, strict=True):
                    assert error(a, b) <= allowed
            counted.add(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert len(counted) == 1  # all compiled with the first of them


def test_a_factor_of_zero():
    (q, k), grads = inputs()
    qk = build("l2", "head", "before", ROPES["half"])
    qk.multiplier = 0.0
    got = gradients(qk, q, k, tables_for(qk.rope), grads, torch.float32)
    assert got[0].abs().max() == got[2].abs().max() == 0 and got[3].abs().max() > 0


def test_all_lengths_share_two_compilations():
    if reason := backends.why_not("compiled", "cpu"):
        pytest.skip(reason)
    qk = build("layer", "head", "before", ROPES["half"], eps=2e-6)
    qk.backend = "compiled"
    torch._dynamo.utils.counters.clear()
    for t in (5, 7, 19, 64):
        (q, k), grads = inputs(t=t)
        expected = truth(qk, q, k, tables_for(qk.rope, t), grads)
        got = gradients(qk, q, k, tables_for(qk.rope, t), grads, torch.float32, "compiled")
        for a, b in zip(got, expected, strict=True):
            assert error(a, b) <= 3e-6
    # forward and backward, each for the first lengths and for all others
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4


def test_every_kind_of_call_is_compiled(caplog, monkeypatch):
    """Training and evaluation, dtypes, layouts and dims of one: no number of them exhausts the compiler."""
    if reason := backends.why_not("compiled", "cpu"):
        pytest.skip(reason)
    # the tracing and its limits are those of every backend; this one generates no code, which takes minutes
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch.manual_seed(0)
    qk = QKNorm("rms", head_dim=D, rope=ROPES["half"], eps=4e-6, backend="compiled")

    def call(b, t, dtype, layout, train):
        shape = (b, H + HKV, t, D) if layout == "bhsd" else (b, t, H + HKV, D)
        x = torch.randn(shape).to(dtype).requires_grad_(train)
        x_bshd = x.transpose(1, 2) if layout == "bhsd" else x
        q, k = x_bshd.split((H, HKV), 2)
        if layout == "dense":
            q, k = q.contiguous(), k.contiguous()
        got = []
        for backend in ("compiled", "reference"):
            qk.backend, x.grad = backend, None
            with torch.set_grad_enabled(train):
                outputs = qk(q, k, rope=tables_for(qk.rope, t))
            if train:
                sum(y.float().pow(3).sum() for y in outputs).backward(retain_graph=True)
            got.append([*outputs, *([x.grad] if train else [])])
        for a, b in zip(*got, strict=True):
            assert error(a, b) <= 2 * floor(dtype)
        assert not hasattr(q, "_dynamo_weak_dynamic_indices")  # the caller's tensors stay as they were

    kinds = itertools.product((torch.float32, torch.bfloat16), ("packed", "dense", "bhsd"), (True, False))
    for dtype, layout, train in kinds:
        call(3, 5, dtype, layout, train)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for dtype in (torch.float32, torch.bfloat16):  # evaluation runs the code of training
        call(3, 5, dtype, "packed", False)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    for b, t in ((1, 5), (3, 1), (2, 9)):
        call(b, t, torch.float32, "packed", True)
    assert not [r for r in caplog.records if r.name == "nsphere"]


def test_beyond_the_compilers_limit_the_plain_function_runs(monkeypatch, caplog):
    def refuse(function, options=None, **_):
        def call(*tensors):
            raise torch._dynamo.exc.FailOnRecompileLimitHit("too many")

        return function if options else call  # the first lengths have code of their own, without guards

    monkeypatch.setattr(torch, "compile", refuse)
    double = lean._compile(lambda x: 2 * x, (2,))
    for length in (3, 4, 5):
        x = torch.randn(2, length)
        assert torch.equal(double(x), 2 * x)
    assert [r.levelname for r in caplog.records if r.name == "nsphere"] == ["WARNING"]


def test_code_for_one_kind_of_tensor_is_not_used_for_another():
    """The code of the first lengths asks nothing of what it gets: what else comes must not reach it."""
    if reason := backends.why_not("compiled", "cpu"):
        pytest.skip(reason)
    double = lean._compile(lambda x: 2 * x, (2,))
    first = torch.randn(4, 6)
    others = [torch.randn(4, n)[:, 1:7] for n in (9, 11)] + [torch.randn(5, 6), torch.randn(1, 6).expand(4, 6)]
    for x in (first, *others, first):
        assert torch.equal(double(x), 2 * x)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert torch.equal(double(first), 2 * first)
    finally:
        torch.set_num_threads(threads)


def test_compiled_gradients_are_the_same_from_run_to_run():
    if reason := backends.why_not("compiled", "cpu"):
        pytest.skip(reason)
    qk = build("rms", "head", "before", ROPES["half"], eps=3e-6)
    (q, k), grads = inputs(t=300)
    runs = [gradients(qk, q, k, tables_for(qk.rope, 300), grads, torch.float32, "compiled") for _ in range(3)]
    runs = [[t.clone() for t in run] for run in runs]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_many_modules_do_not_exhaust_the_compiler(monkeypatch):
    # it gives up on a code object after eight variants, so every plan needs a code object of its own
    codes = set()
    monkeypatch.setattr(torch, "compile", lambda f, **_: codes.add(f.__code__))
    for _ in range(9):
        lean._own_compile(lambda x: x)
    assert len(codes) == 9


@pytest.mark.parametrize("kind", ["l2", "rms"])
def test_activation_checkpointing(kind):
    qk = build(kind, "head", "before", ROPES["half"])
    tables = tables_for(qk.rope)
    results = []
    for checkpointed in (False, True):
        q, k = (t.requires_grad_() for t in inputs()[0])
        if checkpointed:
            outputs = torch.utils.checkpoint.checkpoint(qk, q, k, tables, use_reentrant=False)
        else:
            outputs = qk(q, k, tables)
        torch.autograd.backward(outputs, inputs()[1])
        results.append((q.grad, k.grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_no_gradient_and_inference_mode():
    qk = build("rms", "head", "before", ROPES["half"])
    (q, k), _ = inputs()
    expected = qk(q, k, rope=tables_for(qk.rope))
    assert expected[0].requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got = qk(q, k, rope=tables_for(qk.rope))
        assert not got[0].requires_grad
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_second_derivatives_are_refused_and_the_reference_has_them():
    q, k = torch.randn(1, 2, H, D, requires_grad=True), torch.randn(1, 2, HKV, D)
    qk = build("rms", "head", "before", None)
    (g,) = torch.autograd.grad(qk(q, k)[0].square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()
    qk.backend = "reference"
    (g,) = torch.autograd.grad(qk(q, k)[0].square().sum(), q, create_graph=True)
    g.sum().backward()
    assert q.grad.abs().sum() > 0


def test_function_transforms_take_the_reference():
    qk = build("rms", "head", "before", None)
    q, k = torch.randn(1, 2, H, D), torch.randn(1, 2, HKV, D)
    got = torch.func.grad(lambda x: qk(x, k)[0].square().sum())(q)
    expected = torch.autograd.grad(qk(q.requires_grad_(), k)[0].square().sum(), q)[0]
    torch.testing.assert_close(got, expected)


def test_a_backend_that_cannot_run_says_why(monkeypatch):
    with pytest.raises(RuntimeError, match="Triton kernels run on cuda, not on cpu"):
        build("rms", "head", "before", None, backend="triton")(*inputs()[0])
    with pytest.raises(ValueError, match="unknown backend 'fast'; choose from reference, compiled, triton"):
        build("rms", "head", "before", None, backend="fast")(*inputs()[0])
    monkeypatch.setenv("NSPHERE_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="Triton kernels run on cuda, not on cpu"):
        build("rms", "head", "before", None)(*inputs()[0])


def test_without_a_compiler_it_still_works():
    code = (
        "import torch; from nsphere.qk_norm import QKNorm; from nsphere.ops import backend\n"
        "assert backend.choose(torch.device('cpu')) == 'reference'\n"
        "qk = QKNorm('rms', head_dim=64, num_heads=8)\n"
        "q = torch.randn(1, 1024, 8, 64, requires_grad=True)\n"
        "a, b = qk(q, torch.randn(1, 1024, 8, 64)); a.sum().backward(); assert q.grad.isfinite().all()\n"
        "try: backend.choose(torch.device('cpu'), 'compiled')\n"
        "except RuntimeError as e: assert 'no C++ compiler' in str(e) and 'CXX' in str(e), e\n"
        "else: raise AssertionError\n"
    )
    environment = {**os.environ, "CXX": "no-such-compiler", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_fp32_weights_beside_bf16_data_do_not_promote():
    (q, k), _ = inputs()
    qk = build("rms", "head", "before", ROPES["half"])
    low = qk(q.bfloat16(), k.bfloat16(), rope=tables_for(qk.rope))
    assert low[0].dtype == torch.bfloat16
    expected = truth(qk, q.bfloat16(), k.bfloat16(), tables_for(qk.rope), inputs()[1])
    assert error(low[0], expected[0]) <= floor(torch.bfloat16) / 4


@pytest.mark.parametrize("kind", ["l2", "rms"])
@pytest.mark.parametrize("over", ["head", "full", 4, (1, 7)])
def test_tables_per_head(kind, over):
    """Values and gradients as of each head turned alone, with tables that are no exact rotation."""
    (q, k), grads = inputs()
    for place, weight, name in itertools.product(("before", "after"), ("none", "shared"), ("half", "trailing")):
        rope = ROPES[name]
        qk = build(kind, over, place, rope, weight=weight).double()
        heads = [rope.tables(torch.arange(T) + 7 * h) for h in range(H)]
        tables = tuple(1.2 * torch.stack(t, 1).expand(B, T, H, -1) for t in zip(*heads, strict=True))
        k_tables = tuple(t[:1, :, :HKV] for t in tables)
        results = []
        for backend in (None, "reference"):
            qk.backend = backend
            qk.zero_grad()
            leaves = [x.double().requires_grad_() for x in (q, k)]
            outputs = qk(*leaves, rope=tables, k_rope=k_tables)
            torch.autograd.backward(outputs, [g.double() for g in grads])
            results.append([*outputs, *(x.grad for x in leaves), *(p.grad.clone() for p in qk.parameters())])
        for a, b in zip(*results, strict=True):
            assert error(a, b) <= 1e-11


def test_q_and_k_may_turn_by_different_tables():
    (q, k), grads = inputs()
    spec = SideSpec(NormSpec("rms", 1e-6), ROPES["half"])
    tables = [tables_for(spec.rope), tuple(2.0 * t for t in tables_for(spec.rope))]
    results = []
    for backend in (None, "reference"):
        leaves = [t.double().requires_grad_() for t in (q, k)]
        sides = [SideTensors(cos=cos, sin=sin) for cos, sin in tables]
        outputs = qk_norm_rope(*leaves, spec, spec, *sides, backend=backend)
        torch.autograd.backward(outputs, [g.double() for g in grads])
        results.append([t.grad for t in leaves])
    for a, b in zip(*results, strict=True):
        assert error(a, b) <= 1e-11
