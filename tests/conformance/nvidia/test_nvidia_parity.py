"""`convention="nvidia"` against what the authors' own code computed: golden.safetensors, made by make_golden.py.

Where their code and ours meet in fp64 the tolerance is rounding alone. Their rotary table is fp32, from angles
in fp32, in every dtype; ours is rounded once from fp64 angles. Tests of the rest take their table, and the table has a
test of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nsphere.ngpt import NGPTConfig
from nsphere.ngpt_nvidia import NvidiaNGPT, from_reference_state_dict, make_ngpt

safetensors = pytest.importorskip("safetensors.torch")

SHAPE = {"vocab_size": 97, "context": 24, "d_model": 32, "num_layers": 3, "num_heads": 4}


@pytest.fixture(scope="module")
def golden():
    return safetensors.load_file(Path(__file__).with_name("golden.safetensors"))


def under(golden, prefix):
    return {name.removeprefix(prefix): t for name, t in golden.items() if name.startswith(prefix)}


def load(golden, dtype=torch.float32, their_table=True):
    model = make_ngpt(NGPTConfig(**SHAPE, convention="nvidia"))
    model.load_state_dict(from_reference_state_dict(under(golden, "weights.")))
    model.to(dtype)
    if their_table:
        S, C = golden["table"].chunk(2, dim=-1)
        model.rope_cos, model.rope_sin = S.to(dtype), C.to(dtype)
    return model


def run(model, golden, autocast=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(golden["tokens"])
        loss = model.loss(golden["tokens"], golden["targets"])
    loss.backward()
    return logits.detach(), loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def relative(x, y):
    return ((x.double() - y.double()).norm() / y.double().norm()).item()


def test_every_parameter_of_theirs_is_one_of_ours(golden):
    reference = under(golden, "weights.")
    ours = from_reference_state_dict(reference)
    assert sum(w.numel() for w in ours.values()) == sum(w.numel() for w in reference.values())
    assert ours.keys() == make_ngpt(NGPTConfig(**SHAPE, convention="nvidia")).state_dict().keys()


def test_fp64_logits_loss_and_every_gradient(golden):
    logits, loss, grads = run(load(golden, torch.float64), golden)
    torch.testing.assert_close(logits, golden["float64.logits"], rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(loss, golden["float64.loss"], rtol=1e-12, atol=0)
    expected = from_reference_state_dict(under(golden, "float64.grad."))
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_fp64_at_the_start_of_training(golden):
    model = load(golden, torch.float64)
    for module in model.modules():
        if type(module).__name__ == "Scale":
            module.reset_parameters()
    # theirs starts from the fp32 1/√d, ours from the fp64 one; the effective value, and so the logits, agree
    logits, loss, _ = run(model, golden)
    torch.testing.assert_close(logits, golden["initial.logits"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(loss, golden["initial.loss"], rtol=1e-8, atol=0)
    assert relative(golden["float64.logits"], golden["initial.logits"]) > 0.1


def test_fp32(golden):
    logits, loss, grads = run(load(golden), golden)
    theirs = relative(golden["float32.logits"], golden["float64.logits"])
    assert relative(logits, golden["float64.logits"]) <= 2 * theirs + 1e-7
    torch.testing.assert_close(loss, golden["float64.loss"].float(), rtol=1e-6, atol=0)
    for name, expected in from_reference_state_dict(under(golden, "float64.grad.")).items():
        assert relative(grads[name], expected) < 3e-6, name


def test_rotary_table(golden):
    # fp32 angles up to 23 are off by up to 2⁻²⁰, half a unit in the last place of 16…32
    model = load(golden, their_table=False)
    S, C = golden["table"].chunk(2, dim=-1)
    torch.testing.assert_close(model.rope_cos, S, rtol=0, atol=2e-6)
    torch.testing.assert_close(model.rope_sin, C, rtol=0, atol=2e-6)


def test_fp32_with_our_table(golden):
    logits, loss, grads = run(load(golden, their_table=False), golden)
    assert relative(logits, golden["float64.logits"]) < 3e-6
    torch.testing.assert_close(loss, golden["float64.loss"].float(), rtol=1e-6, atol=0)
    for name, expected in from_reference_state_dict(under(golden, "float64.grad.")).items():
        assert relative(grads[name], expected) < 1e-5, name


def test_their_mix_of_dtypes(golden):
    """Under autocast ours is at most twice as far from fp64 as their bf16 run, in everything."""
    logits, loss, grads = run(load(golden, their_table=False), golden, autocast=True)
    theirs = relative(golden["bfloat16.logits"], golden["float64.logits"])
    assert 1e-4 < relative(logits, golden["float64.logits"]) <= 2 * theirs
    assert (
        abs(loss.double() - golden["float64.loss"]) <= 2 * abs(golden["bfloat16.loss"] - golden["float64.loss"]) + 2e-3
    )
    exact = from_reference_state_dict(under(golden, "float64.grad."))
    mixed = from_reference_state_dict(under(golden, "bfloat16.grad."))
    for name, grad in grads.items():
        assert relative(grad, exact[name]) <= 2 * relative(mixed[name], exact[name]), name


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "_orig_mod.module.", "module._orig_mod."])
def test_names_as_compile_and_ddp_leave_them(golden, prefix):
    weights = under(golden, "weights.")
    wrapped = from_reference_state_dict({prefix + name: w for name, w in weights.items()})
    for name, w in from_reference_state_dict(weights).items():
        assert torch.equal(wrapped[name], w)


@pytest.mark.parametrize("name", ["transformer.wpe.weight", "transformer.h.0.query.bias"])
def test_what_is_no_parameter_of_theirs_is_refused(golden, name):
    with pytest.raises(ValueError, match=f"'{name}' is no parameter of the authors' models"):
        from_reference_state_dict(under(golden, "weights.") | {name: torch.ones(32)})


@pytest.mark.skipif("NGPT_MODEL_PY" not in os.environ, reason="NGPT_MODEL_PY names no model.py of NVIDIA/ngpt")
def test_the_golden_numbers_are_what_the_authors_code_computes(golden, tmp_path):
    out = tmp_path / "again.safetensors"
    script = Path(__file__).with_name("make_golden.py")
    subprocess.run([sys.executable, script, os.environ["NGPT_MODEL_PY"], "--out", out], check=True)
    again = safetensors.load_file(out)
    assert again.keys() == golden.keys()
    for name, t in golden.items():
        # another torch may sum bf16 products in another order
        torch.testing.assert_close(again[name], t, rtol=2e-2 if name.startswith("bfloat16") else 1e-5, atol=2e-3)


def tiny(**fields):
    shape = {"vocab_size": 11, "context": 6, "d_model": 12, "num_layers": 1, "num_heads": 2} | fields
    return make_ngpt(NGPTConfig(**shape, convention="nvidia")).double()


class TestConventions:
    """Each detail of the specification's list, against its formula."""

    def test_rotary_table_is_two_halves_of_sine_and_cosine_rows(self):
        model = make_ngpt(
            NGPTConfig(vocab_size=11, context=6, d_model=12, num_layers=1, num_heads=2, convention="nvidia")
        )
        assert isinstance(model, NvidiaNGPT)
        for p in range(6):
            angles = [p * 10000 ** (-2 * i / 6) for i in range(3)]
            row = [f(torch.tensor(a, dtype=torch.float64)) for a in angles for f in (torch.sin, torch.cos)]
            row = torch.stack(row).float()
            assert torch.equal(model.rope_cos[p], row[:3])
            assert torch.equal(model.rope_sin[p], row[3:])

    def test_rotary_is_not_a_rotation(self):
        model = tiny()
        x = torch.randn(1, 6, 2, 6, dtype=torch.float64)
        q, k = model.blocks[0].attn.qk_norm(x, x, rope=(model.rope_cos, model.rope_sin))
        S, C = model.rope_cos, model.rope_sin
        expected = torch.empty_like(x)
        for i in range(3):
            expected[..., 2 * i] = -x[..., 2 * i + 1] * C[:, None, i]
            expected[..., 2 * i + 1] = x[..., 2 * i] * S[:, None, i]
        expected = expected / expected.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(q, expected, rtol=1e-7, atol=1e-7)  # times s_qk, one up to fp32's 1/√d
        torch.testing.assert_close(k, expected, rtol=1e-7, atol=1e-7)

    def test_s_qk_multiplies_q_and_k_each(self):
        model = tiny()
        qk_norm = model.blocks[0].attn.qk_norm
        x = torch.randn(1, 6, 2, 6, dtype=torch.float64)
        rope = (model.rope_cos, model.rope_sin)
        before = [t.detach() for t in qk_norm(x, x, rope=rope)]
        factor = torch.linspace(0.5, 2, 12, dtype=torch.float64)
        with torch.no_grad():
            qk_norm.multiplier.s_qk.stored.mul_(factor)
        for old, new in zip(before, qk_norm(x, x, rope=rope), strict=True):
            torch.testing.assert_close(new, old * factor.view(2, 6))

    def test_both_branches_of_the_mlp_carry_the_root_of_d(self):
        mlp = tiny().blocks[0].mlp
        x = torch.randn(3, 12, dtype=torch.float64)
        for W in (mlp.W_u, mlp.W_nu):
            expected = x @ W.weight.t() * W.scale.stored * 12**0.5
            torch.testing.assert_close(W(x), expected, rtol=1e-12, atol=0)

    def test_h_is_normalised_again_with_gradient(self):
        model = tiny()
        h = torch.nn.functional.normalize(torch.randn(2, 6, 12, dtype=torch.float64), dim=-1)
        rope = (model.rope_cos, model.rope_sin)
        block = model.blocks[0]
        # attention and MLP see h as it is; only the interpolation's own h is made unit. Null them, and length is lost
        with torch.no_grad():
            block.attn.W_o.weight.zero_()
            block.mlp.W_down.weight.zero_()
        torch.testing.assert_close(block(3 * h, rope), block(h, rope), rtol=1e-12, atol=1e-12)
        long = (3 * h).requires_grad_()
        (block(long, rope) * torch.randn_like(h)).sum().backward()
        # a norm's gradient is orthogonal to its input
        assert (long.grad * h).sum(-1).abs().max() < 1e-12
        assert long.grad.norm() > 0.1

    def test_paper_and_reference_conventions_differ(self):
        model = tiny()
        paper = make_ngpt(NGPTConfig(vocab_size=11, context=6, d_model=12, num_layers=1, num_heads=2)).double()
        paper.load_state_dict(dict(model.state_dict()))
        tokens = torch.arange(6)[None]
        assert relative(model(tokens), paper(tokens)) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_runs_in_one_low_dtype(dtype):
    model = tiny(num_layers=2)
    tokens = torch.arange(6)[None]
    exact = model(tokens)
    logits = model.to(dtype)(tokens)
    assert logits.dtype == dtype
    assert relative(logits, exact) < 8 * torch.finfo(dtype).eps


def test_q_k_v_share_a_dtype_under_autocast():
    model = tiny().float()
    with torch.autocast("cpu", torch.bfloat16):
        qkv = model.blocks[0].attn.qkv(torch.randn(1, 6, 12), (model.rope_cos, model.rope_sin))
    assert {t.dtype for t in qkv} == {torch.bfloat16}
