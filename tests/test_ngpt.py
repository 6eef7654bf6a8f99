"""NGPT against the paper's formulas in fp64, and the identities of its specification."""

import copy
import math

import needs
import plain_models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsphere.hypersphere import Scale, assert_on_hypersphere, normalize_matrices_, on_sphere
from nsphere.layers import SwiGLU
from nsphere.ngpt import NGPT, NGPTConfig, QKScale
from nsphere.ngpt_nvidia import make_ngpt
from nsphere.optim import keep_on_hypersphere
from nsphere.qk_norm import QKNorm

SHAPE = {"vocab_size": 17, "context": 8, "d_model": 12, "num_layers": 2, "num_heads": 3}


def make(dtype=torch.float64, seed=0, perturbed=True, **fields):
    torch.manual_seed(seed)
    model = make_ngpt(NGPTConfig(**SHAPE | fields))
    return (plain_models.perturb(model) if perturbed else model).to(dtype)


def batch(vocab_size=17, batch_size=2, num_tokens=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (2, batch_size, num_tokens), generator=generator).unbind()


VARIANTS = {
    "paper": {},
    "gqa, odd MLP, wide heads": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "d_mlp": 13},
    "mqa, narrow heads": {"num_kv_heads": 1, "head_dim": 2},
    "eigen_lr scalar": {"eigen_lr": "scalar"},
    "eigen_lr fixed": {"eigen_lr": "fixed", "eigen_lr_init": 0.25},
    "s_qk scalar": {"s_qk": "scalar"},
    "s_qk fixed": {"s_qk": "fixed", "s_qk_init": 1.5},
    "s_qk fixed, gqa": {"s_qk": "fixed", "s_qk_init": 1.5, "num_kv_heads": 1},
    "s_uv scalar": {"s_uv": "scalar"},
    "s_uv fixed": {"s_uv": "fixed", "s_uv_init": 1.25},
    "s_z scalar": {"s_z": "scalar", "s_z_init": 10.0},
    "s_z fixed": {"s_z": "fixed", "s_z_init": 10.0},
    "no QK norm": {"qk_norm": False},
    "own softmax scale": {"softmax_scale": 0.7},
    "own base": {"rope_base": 50.0},
    "forward projection": {"projection": "forward"},
}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_loss_and_every_gradient(fields):
    model = make(**fields)
    if model.config.projection == "forward":
        with torch.no_grad():  # any length must do
            for p in model.parameters():
                p.mul_(1.7) if p.dim() == 2 else None
    # a single s_u is a positive factor on what Norm is taken of
    dead = "W_u.scale" if model.config.s_uv == "scalar" else None
    plain_models.compare(model, plain_models.ngpt_logits, *batch(), dead=dead)


@pytest.mark.parametrize("scale", ["eigen_lr", "s_qk", "s_uv", "s_z"])
@pytest.mark.parametrize("kind", ["vector", "scalar", "fixed"])
def test_a_learned_scale_changes_the_output(scale, kind):
    tokens, _ = batch()
    shift = {"eigen_lr": 0.4, "s_qk": 2.0, "s_uv": 2.0, "s_z": 2.0}[scale]
    logits, moved = (make(perturbed=False, **{scale: kind} | init)(tokens) for init in ({}, {f"{scale}_init": shift}))
    assert (logits - moved).abs().max() > 1e-3
    stored = sum(p.numel() for name, p in make(**{scale: kind}).named_parameters() if p.dim() == 1)
    per_block = {"eigen_lr": 2 * 12, "s_qk": 12, "s_uv": 2 * 48, "s_z": 0}
    own = 2 * per_block[scale] if scale != "s_z" else 17
    count = {"eigen_lr": 4, "s_qk": 2, "s_uv": 4, "s_z": 1}[scale]
    total = 2 * sum(per_block.values()) + 17
    assert stored == total - own + {"vector": own, "scalar": count, "fixed": 0}[kind]


def test_initial_values():
    model = make(perturbed=False, dtype=torch.float32)
    block = model.blocks[0]
    s_qk = block.attn.qk_norm.multiplier.s_qk
    for scale, stored, value in [
        (block.eigen_lr_attn, 12**-0.5, 0.05),
        (block.eigen_lr_mlp, 12**-0.5, 0.05),
        (s_qk, 12**-0.5, 1.0),
        (block.mlp.W_u.scale, 1.0, 1.0),
        (block.mlp.W_nu.scale, 1.0, 1.0),
        (model.head.scale, 12**-0.5, 1.0),
    ]:
        torch.testing.assert_close(scale.stored, torch.full((scale.size,), stored))
        torch.testing.assert_close(scale(), torch.full((scale.size,), value))
    assert block.attn.qk_norm.softmax_scale == math.sqrt(4)
    assert_on_hypersphere(model)


class TestIdentities:
    """The specification's "Identities worth a test each", by its numbers."""

    @pytest.mark.parametrize("fields", [{}, {"num_kv_heads": 1, "head_dim": 6, "d_mlp": 13}])
    def test_1_every_matrix_is_on_the_sphere_after_init_steps_and_load(self, fields):
        model = make(torch.float32, **fields)
        assert_on_hypersphere(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
        keep_on_hypersphere(model, optimizer)
        for step in range(3):
            optimizer.zero_grad()
            model.loss(*batch(seed=step)).backward()
            optimizer.step()
            # not through the library's own check: rows of [out, in] where d comes in, columns where it goes out
            for name, p in model.named_parameters():
                if p.dim() == 2:
                    length = p.detach().double().norm(dim=0 if name.endswith(("W_o.weight", "W_down.weight")) else 1)
                    assert (length - 1).abs().max() <= 1e-6, name
        again = make(torch.float32, seed=5, **fields)
        again.load_state_dict(model.state_dict())
        resumed = torch.optim.AdamW(again.parameters())
        keep_on_hypersphere(again, resumed)
        for name, p in again.state_dict().items():
            assert torch.equal(p, model.state_dict()[name]), f"{name} was touched by resuming"

    @pytest.mark.parametrize("convention", ["paper", "nvidia"])
    def test_2_h_is_unit_after_every_sub_block_and_logits_are_bounded(self, convention, monkeypatch):
        model = make(convention=convention)
        lengths = []
        model.embed.register_forward_hook(lambda m, x, h: lengths.append(h.norm(dim=-1)))
        for block in model.blocks:
            # what the MLP is given is what attention's half left
            block.mlp.register_forward_pre_hook(lambda m, x: lengths.append(x[0].norm(dim=-1)))
            block.register_forward_hook(lambda m, x, h: lengths.append(h.norm(dim=-1)))
        tokens, _ = batch()
        logits = model(tokens)
        assert len(lengths) == 5
        # the embeddings were normalised in fp32
        assert all((length - 1).abs().max() < 1e-6 for length in lengths)
        assert all((length - 1).abs().max() < 1e-14 for length in lengths[1:])
        s_z = model.head.scale().abs()
        assert (logits.abs() <= s_z * (1 + 1e-6)).all()
        # and the bound is reached: a head whose rows are h itself
        with torch.no_grad():
            model.head.weight.copy_(model.hidden(tokens)[0, -1].expand(17, -1))
        torch.testing.assert_close(model(tokens)[0, -1].abs(), s_z, rtol=1e-12, atol=0)

    def test_3_s_scale_leaves_the_forward_alone_and_sets_the_adam_step(self):
        tokens, targets = batch()
        models = [
            make(perturbed=False, **fields)
            for fields in ({}, {"s_qk_scale": 0.01, "eigen_lr_scale": 3.0, "s_uv_scale": 0.5, "s_z_scale": 2.0})
        ]
        torch.testing.assert_close(models[0](tokens), models[1](tokens), rtol=1e-6, atol=1e-7)
        lr = 1e-3
        moved = []
        for model in models:
            scales = {name: m for name, m in model.named_modules() if isinstance(m, Scale)}
            before = {name: s().detach().clone() for name, s in scales.items()}
            optimizer = torch.optim.Adam(model.parameters(), lr=lr, eps=1e-30)
            model.loss(tokens, targets).backward()
            optimizer.step()
            for name, s in scales.items():
                # Adam's first step is lr·sign(gradient) on what is stored
                torch.testing.assert_close(
                    (s() - before[name]).abs(), torch.full_like(before[name], lr * s.init / s.scale), rtol=1e-6, atol=0
                )
            moved.append(torch.cat([(s() - before[name]).abs() for name, s in scales.items() if "s_qk" in name]))
        torch.testing.assert_close(moved[1] / moved[0], torch.full_like(moved[0], 12**-0.5 / 0.01), rtol=1e-6, atol=0)

    @settings(max_examples=15, deadline=None)
    @given(factor=st.floats(1e-3, 1e3), which=st.sampled_from(["W_o", "W_down", "s_u"]))
    def test_4_length_of_what_a_block_returns_is_lost(self, factor, which):
        model, (tokens, _) = make(), batch()
        expected = model(tokens)
        block = model.blocks[1]
        target = {"W_o": block.attn.W_o.weight, "W_down": block.mlp.W_down.weight, "s_u": block.mlp.W_u.scale.stored}
        with torch.no_grad():
            target[which].mul_(factor)
        torch.testing.assert_close(model(tokens), expected, rtol=1e-11, atol=1e-12)

    @settings(max_examples=15, deadline=None)
    @given(signs=st.lists(st.sampled_from([-1.0, 1.0]), min_size=24, max_size=24))
    def test_4_the_sign_of_eigen_lr_is_lost(self, signs):
        model, (tokens, _) = make(), batch()
        expected = model(tokens)
        flips = torch.tensor(signs, dtype=torch.float64).view(2, 12)
        with torch.no_grad():
            model.blocks[0].eigen_lr_attn.stored.mul_(flips[0])
            model.blocks[1].eigen_lr_mlp.stored.mul_(flips[1])
        assert torch.equal(model(tokens), expected)

    @pytest.mark.parametrize("kind", ["vector", "scalar"])
    def test_5_s_qk_squared_on_q_is_s_qk_on_both(self, kind):
        torch.manual_seed(0)
        q, k = (torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
        s = Scale(12, 1.0, 0.25, kind).double()
        with torch.no_grad():
            s.stored.uniform_(0.1, 0.5)
        weights = torch.randn(2, 3, 5, 5, dtype=torch.float64)
        qk_norm = QKNorm("l2", head_dim=4, num_heads=3, multiplier=QKScale(s, 3))

        def scores(q, k):
            return torch.einsum("bthd,bshd->bhts", q, k)

        ours = (scores(*qk_norm(q, k)) * weights).sum()
        spread = (s.stored * 4).expand(12).view(3, 4)
        both = (scores(plain_models.norm(q) * spread, plain_models.norm(k) * spread) * weights).sum()
        inputs = (q, k, s.stored)
        torch.testing.assert_close(ours, both, rtol=1e-12, atol=1e-12)
        for got, expected in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(both, inputs), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)

    def test_6_a_plain_attention_with_q_carrying_s_qk_squared_and_d(self):
        model = make(num_layers=1)
        attention = model.blocks[0].attn
        x = plain_models.norm(torch.randn(2, 8, 12, dtype=torch.float64))
        rope = model.rope_cos, model.rope_sin
        q, k, v = attention.qkv(x, rope)
        # 1/√D is what scaled_dot_product_attention takes when no scale is given
        y = torch.nn.functional.scaled_dot_product_attention(
            4 * q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
        torch.testing.assert_close(attention(x, rope), attention.W_o(y.transpose(1, 2).flatten(-2)))
        torch.testing.assert_close(k.norm(dim=-1), torch.ones(2, 8, 3, dtype=torch.float64))
        s = attention.qk_norm.multiplier.s_qk()
        unit_q = q / s.view(3, 4) ** 2
        torch.testing.assert_close(unit_q.norm(dim=-1), torch.ones(2, 8, 3, dtype=torch.float64))

    def test_7_scales_fold_into_rows_exactly(self):
        """u, ν and the logits as activations times scales, the formula unfolded."""
        torch.manual_seed(0)
        model = make()
        mlp = model.blocks[0].mlp
        x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
        u = x @ mlp.W_u.weight.t() * mlp.W_u.scale.stored
        nu = x @ mlp.W_nu.weight.t() * mlp.W_nu.scale.stored * math.sqrt(12)
        unfolded = (u * torch.nn.functional.silu(nu)) @ mlp.W_down.weight.t()
        logits = x @ model.head.weight.t() * (model.head.scale.stored * math.sqrt(12))
        for got, expected, module in ((mlp(x), unfolded, mlp), (model.head(x), logits, model.head)):
            inputs = (x, *module.parameters())
            weights = torch.randn_like(expected)
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
            got, expected = (torch.autograd.grad((y * weights).sum(), inputs) for y in (got, expected))
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)

    def test_7_the_fold_is_rounded_once(self):
        model = make(torch.float32)
        W = model.blocks[0].mlp.W_nu
        x = torch.randn(64, 12)
        with torch.autocast("cpu", torch.bfloat16):
            y = W(x)
        folded = (W.weight.double() * W.scale.stored.double().unsqueeze(-1) * math.sqrt(12)).float()
        # one rounding of x, of the folded weight and of the result, and an fp32 sum
        expected = x.bfloat16().double() @ folded.bfloat16().double().t()
        assert y.dtype == torch.bfloat16
        # fp32 products may fold to another last bit, and so now and then to the neighbouring bf16
        close = torch.isclose(y.double(), expected, rtol=2**-8, atol=1e-4)
        assert close.float().mean() > 0.995

    def test_8_the_norm_commutes_with_the_rotation(self):
        torch.manual_seed(0)
        q, k = torch.randn(2, 2, 8, 3, 4, dtype=torch.float64).unbind()
        model = make()
        spec, rope = model.rope_spec(), (model.rope_cos, model.rope_sin)
        after, before = (
            QKNorm("l2", head_dim=4, num_heads=3, rope=spec, place=place)(q, k, rope=rope)
            for place in ("after", "before")
        )
        for a, b in zip(after, before, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)  # fp32 tables: sin² + cos² = 1 to 1e-7

    def test_9_zero_rows_of_attention_and_mlp_give_zero_gradients(self):
        model = make()
        with torch.no_grad():
            model.blocks[0].attn.W_v.weight.zero_()  # attention returns exactly zero
            model.blocks[1].attn.W_q.weight.zero_()  # and every q is zero here
        tokens, targets = batch()
        model.loss(tokens, targets).backward()
        for name, p in model.named_parameters():
            assert p.grad.isfinite().all(), name
        assert model.blocks[0].attn.W_v.weight.grad.abs().max() == 0
        assert model.blocks[1].attn.W_q.weight.grad.abs().max() == 0
        assert model.embed.weight.grad.abs().max() > 0


def test_swiglu_is_the_same_module_for_both_architectures():
    assert isinstance(make().blocks[0].mlp, SwiGLU)


@pytest.mark.parametrize("fields", [{}, {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6}, {"convention": "nvidia"}])
def test_document_mask(fields):
    model = make(**fields)
    tokens, targets = batch(batch_size=1)
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2]])
    if model.config.convention == "paper":
        plain_models.compare(model, plain_models.ngpt_logits, tokens, targets, ids)
    alone = torch.cat([model(tokens[:, s]) for s in (slice(0, 3), slice(3, 7), slice(7, 8))], dim=1)
    torch.testing.assert_close(model(tokens, ids), alone, rtol=1e-11, atol=1e-12)
    assert (model(tokens) - alone).abs().max() > 1e-3


@pytest.mark.parametrize(
    "fields", [{}, {"num_kv_heads": 1}, {"convention": "nvidia"}, {"qk_norm": False, "projection": "forward"}]
)
def test_cache_gives_the_logits_of_the_full_forward(fields):
    model = make(**fields)
    tokens, _ = batch(num_tokens=11)  # longer than the context, so the tables grow on the way
    full = model(tokens)
    cache = model.make_cache(2, 11, torch.float64)
    parts = [model(tokens[:, a:b], cache=cache) for a, b in ((0, 4), (4, 5), (5, 8), (8, 11))]
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=1e-11, atol=1e-12)


def test_a_context_longer_than_the_tables():
    model = make()
    tokens, targets = batch(num_tokens=21)
    plain_models.compare(model, plain_models.ngpt_logits, tokens, targets)
    assert model.rope_cos.shape == (21, 2)
    plain_models.compare(model, plain_models.ngpt_logits, *batch())


def test_tables_grown_while_generating_serve_training_after():
    model, untouched = make(torch.float32), make(torch.float32)
    with torch.inference_mode():
        model(batch(num_tokens=12)[0])
    for m in (model, untouched):
        m.loss(*batch()).backward()
    for p, q in zip(model.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("fields", [{}, {"projection": "forward"}, {"num_kv_heads": 1}])
def test_autocast_keeps_the_residual_in_fp32_and_q_k_v_in_one_dtype(fields):
    model = make(torch.float32, **fields)
    seen = {}
    model.embed.register_forward_hook(lambda m, x, h: seen.update(embed=h.dtype))
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda m, x, h, i=i: seen.update({f"block {i}": h.dtype}))
        block.mlp.register_forward_pre_hook(lambda m, x, i=i: seen.update({f"mlp input {i}": x[0].dtype}))
        block.mlp.W_down.register_forward_pre_hook(lambda m, x, i=i: seen.update({f"mlp hidden {i}": x[0].dtype}))
    tokens, targets = batch()
    with torch.autocast("cpu", torch.bfloat16):
        rope = model.rope_cos, model.rope_sin
        qkv = model.blocks[0].attn.qkv(torch.randn(2, 8, 12), rope)
        loss = model.loss(tokens, targets)
    loss.backward()
    assert {t.dtype for t in qkv} == {torch.bfloat16}
    assert loss.dtype == torch.float32
    for name, dtype in seen.items():
        assert dtype == (torch.bfloat16 if "hidden" in name else torch.float32), name
    exact = make(**fields)
    plain = exact.loss(tokens, targets)
    plain.backward()
    torch.testing.assert_close(loss.double(), plain, rtol=2e-3, atol=0)
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert p.grad.dtype == torch.float32
        assert (p.grad - q.grad).norm() / q.grad.norm() < 0.05, name


@pytest.mark.parametrize("fields", [{}, {"projection": "forward"}])
def test_runs_in_one_low_dtype(fields):
    tokens, _ = batch()
    exact = make(**fields)(tokens)
    logits = make(torch.bfloat16, **fields)(tokens)
    assert (logits - exact).norm() / exact.norm() < 0.03


@needs.compiler
# torch.compile calls what torch itself has deprecated
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_block_is_the_eager_one():
    model = make(torch.float32, num_layers=1)
    block = model.blocks[0]
    compiled = torch.compile(block, fullgraph=True)
    rope = model.rope_cos, model.rope_sin
    x = plain_models.norm(torch.randn(2, 8, 12))
    results = []
    for f in (block, compiled):
        h = x.clone().requires_grad_()
        block.zero_grad()
        y = f(h, rope)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        results.append([y.detach(), h.grad, *(p.grad.clone() for p in block.parameters())])
    for eager, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, eager, rtol=1e-4, atol=1e-5 * eager.abs().max().item() + 1e-7)


@pytest.mark.parametrize("fields", [{}, {"eigen_lr": "fixed", "s_qk": "scalar"}, {"convention": "nvidia"}])
class TestLifeOfAModel:
    def test_state_dict_round_trip(self, fields):
        model, other = make(torch.float32, **fields), make(torch.float32, seed=3, perturbed=False, **fields)
        tokens, _ = batch()
        assert not torch.equal(model(tokens), other(tokens))
        other.load_state_dict(model.state_dict())
        assert torch.equal(model(tokens), other(tokens))
        assert len(model.state_dict()) == len(list(model.parameters()))

    def test_deepcopy(self, fields):
        model = make(torch.float32, **fields)
        twin = copy.deepcopy(model)
        tokens, _ = batch()
        assert torch.equal(model(tokens), twin(tokens))
        with torch.no_grad():
            for p in twin.parameters():
                p.add_(1)
        assert_on_hypersphere(model)

    def test_meta_device_then_reset_is_a_fresh_model(self, fields):
        with torch.device("meta"):
            model = make_ngpt(NGPTConfig(**SHAPE | fields))
        assert all(p.is_meta for p in model.parameters())
        model.to_empty(device="cpu")
        with torch.no_grad():
            for t in (*model.parameters(), *model.buffers()):
                t.fill_(torch.nan)
        torch.manual_seed(0)
        model.reset_parameters()
        assert_on_hypersphere(model)
        fresh = make(torch.float32, perturbed=False, **fields)
        for (name, a), b in zip(
            (*model.named_parameters(), *model.named_buffers()), (*fresh.parameters(), *fresh.buffers()), strict=True
        ):
            assert a.isfinite().all(), name
            if a.dim() == 1 or "rope" in name:
                assert torch.equal(a, b), name
        fresh.load_state_dict(model.state_dict())
        tokens, _ = batch()
        assert torch.equal(model(tokens), fresh(tokens))


class TestConfig:
    def test_derived_fields(self):
        config = NGPTConfig(**SHAPE)
        assert (config.head_dim, config.num_kv_heads, config.d_mlp) == (4, 3, 48)
        assert config.eigen_lr_scale == config.s_qk_scale == config.s_z_scale == 1 / math.sqrt(12)
        assert config.softmax_scale == 2.0

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"eigen_lr": "matrix"}, "eigen_lr is 'matrix'; choose vector, scalar or fixed"),
            ({"s_qk": ""}, "s_qk is ''"),
            ({"s_uv": "none"}, "s_uv is 'none'"),
            ({"s_z": "off"}, "s_z is 'off'"),
            ({"s_z_scale": 0.0}, "s_z_scale must be a positive number"),
            ({"eigen_lr_scale": -1.0}, "eigen_lr_scale must be a positive number"),
            ({"projection": "never"}, "projection is 'never'; choose step or forward"),
            ({"convention": "openai"}, "convention is 'openai'; choose paper or nvidia"),
            ({"convention": "nvidia", "num_kv_heads": 1}, "num_kv_heads 1"),
            ({"convention": "nvidia", "qk_norm": False}, "qk_norm False"),
        ],
    )
    def test_bad_values_are_named(self, fields, message):
        with pytest.raises(ValueError, match=message):
            NGPTConfig(**SHAPE | fields)


def test_projection_after_a_zeroed_row_leaves_it_zero():
    model = make(torch.float32)
    with torch.no_grad():
        model.head.weight[3] = 0
    normalize_matrices_(model)
    assert model.head.weight[3].abs().max() == 0
    assert torch.isfinite(model.loss(*batch()))
    assert isinstance(on_sphere(model.head, 1), torch.nn.Module)
    assert isinstance(model, NGPT)
