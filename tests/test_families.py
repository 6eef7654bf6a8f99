import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nsphere.norms as norms
from nsphere import families
from nsphere.ngpt import NGPT, NGPTConfig
from nsphere.norms import StatisticNorm

B, T, H, HKV, D = 2, 4, 4, 2, 16
GUIDE = Path(__file__).parent.parent / "docs" / "qk-norm.md"


def call(qk, dtype=torch.float32):
    torch.manual_seed(1)
    q, k = torch.randn(B, T, H, D).to(dtype), torch.randn(B, T, HKV, D).to(dtype)
    rope = None if qk.rope is None else qk.rope.tables(T)
    return q, k, qk(q, k, rope=rope, positions=torch.arange(T))


def a_configs_numbers(name):
    """What families.qk_norm must be told because only a config knows it, and no more."""
    family, told = families.get(name), {}
    if family.rope is not None and family.partial is None:
        told["rope_dim"] = 8
    if family.factor == "config":
        told["multiplier"] = 1.5
    if family.softmax_scale in ("query_pre_attn_scalar", "1/√D · yarn's mscale²"):
        told["softmax_scale"] = 0.3
    return told


@pytest.mark.parametrize("name", sorted(families.FAMILIES))
def test_every_family_builds_and_fused_agrees_with_its_own_rounding(name):
    family = families.get(name)
    results = []
    for rounding in ("family", "fused"):
        torch.manual_seed(0)
        qk = families.qk_norm(
            name, head_dim=D, num_heads=H, num_kv_heads=HKV, rounding=rounding, **a_configs_numbers(name)
        )
        for p in qk.parameters():
            nn.init.normal_(p, 1.0, 0.3)
        _, k, out = call(qk)
        results.append(out)
        assert (qk.q_norm is None) == (family.q is None and not family.clip)
        if rounding == "fused" and isinstance(qk.q_norm, StatisticNorm):
            assert qk.q_norm.spec.weight_cast == "fused"
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
    if family.k is not None:
        assert not torch.equal(results[0][1], k)


def test_a_family_is_what_its_row_says():
    """A few rows, written out from the published modules rather than from the table."""
    q, _, (olmo, _) = call(families.qk_norm("olmo2", head_dim=D, num_heads=H, num_kv_heads=HKV, rope=False))
    torch.testing.assert_close(olmo, F.rms_norm(q.flatten(-2), (H * D,), eps=1e-5).unflatten(-1, (H, D)))
    qk = families.qk_norm("gemma3", head_dim=D, rope=False, softmax_scale="rsqrt")
    assert qk.q_norm.weight.abs().max() == 0  # zero-centred
    q, _, (gemma, _) = call(qk)
    torch.testing.assert_close(gemma, F.rms_norm(q, (D,), eps=1e-6))
    q, _, (zaya, _) = call(families.qk_norm("zaya", head_dim=D, num_heads=H, num_kv_heads=HKV, rope=False))
    torch.testing.assert_close(zaya, F.normalize(q, dim=-1) * D**0.5)
    assert families.qk_norm("ngpt", head_dim=D, num_heads=H).softmax_scale == D**0.5
    assert families.qk_norm("inkling", head_dim=D, multiplier=None).softmax_scale == 1 / D
    assert families.qk_norm("gemma4", head_dim=D).softmax_scale == 1.0
    assert families.qk_norm("phi", head_dim=D).rope.dim == D // 2
    assert families.qk_norm("te_l2normalization", head_dim=D).place == "after"


def test_arguments_override_the_table():
    qk = families.qk_norm("qwen3", head_dim=D, eps=0.1, rope_dim=8, rope_base=100.0, layout="bhsd", softmax_scale=2.0)
    assert (qk.q_norm.spec.eps, qk.rope.dim, qk.rope.base, qk.layout, qk.softmax_scale) == (0.1, 8, 100.0, "bhsd", 2.0)
    assert families.qk_norm("qwen3", head_dim=D, rope=False).rope is None


@pytest.mark.parametrize("name", sorted(n for n in families.FAMILIES if a_configs_numbers(n)))
def test_what_only_a_config_knows_must_be_given(name):
    told = a_configs_numbers(name)
    for missing in told:
        rest = {option: value for option, value in told.items() if option != missing}
        with pytest.raises(ValueError, match=f"{name}.*give {missing}="):
            families.qk_norm(name, head_dim=D, num_heads=H, **rest)
    qk = families.qk_norm(name, head_dim=D, num_heads=H, **told)
    assert qk.softmax_scale == told.get("softmax_scale", qk.softmax_scale)
    assert qk.multiplier == told.get("multiplier") and (qk.rope is None or qk.rope.dim == told.get("rope_dim", D))


def test_no_family_has_a_multiplier_in_words_alone():
    # beam's is a factor that its caller may pass
    assert [f.name for f in families.FAMILIES.values() if f.multiplier and f.factor is None] == ["beam"]


def test_multipliers_that_are_known_are_applied():
    q, k, (q_out, k_out) = call(families.qk_norm("nanochat_upstream", head_dim=D, rope=False))
    torch.testing.assert_close(q_out, 1.2 * F.rms_norm(q, (D,), eps=1e-6))
    torch.testing.assert_close(k_out, 1.2 * F.rms_norm(k, (D,), eps=1e-6))

    swin = families.qk_norm("swinv2", head_dim=D, num_heads=H, num_kv_heads=HKV)
    q, k, (q_out, k_out) = call(swin)
    torch.testing.assert_close(q_out, 10 * F.normalize(q, dim=-1))
    torch.testing.assert_close(k_out, F.normalize(k, dim=-1))
    with torch.no_grad():
        swin.multiplier.weight[1] = 50.0  # above the ceiling log(100)
    torch.testing.assert_close(call(swin)[2][0][..., 1, :], 100 * F.normalize(q, dim=-1)[..., 1, :])

    for name in ("swinv2", "ngpt"):
        with pytest.raises(ValueError, match=f"{name} learns a multiplier for each head; give num_heads"):
            families.qk_norm(name, head_dim=D)


def test_ngpt_is_the_attention_of_our_own():
    model = NGPT(NGPTConfig(vocab_size=8, context=T, d_model=H * D, num_layers=1, num_heads=H, num_kv_heads=HKV))
    theirs = model.blocks[0].attn.qk_norm
    ours = families.qk_norm("ngpt", head_dim=D, num_heads=H, num_kv_heads=HKV)
    torch.testing.assert_close(ours.multiplier.weight.flatten(), theirs.multiplier.s_qk.stored)  # the stored start
    start = call(ours)[2]
    with torch.no_grad():
        theirs.multiplier.s_qk.stored.mul_(torch.rand(H * D) + 0.5)
        ours.multiplier.weight.copy_(theirs.multiplier.s_qk.stored.view(H, D))
    assert ours.softmax_scale == theirs.softmax_scale
    for a, b in zip(call(ours)[2], call(theirs)[2], strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.allclose(call(ours)[2][0], start[0])


def test_families_of_diffusers():
    """Rows written out from the blocks of diffusers 0.42.1."""
    sizes = {"head_dim": D, "num_heads": H, "num_kv_heads": HKV, "rope": False}
    for name, expected in {
        "cogvideox": lambda x: F.layer_norm(x, (D,), eps=1e-6),
        "hunyuan_dit": lambda x: F.layer_norm(x, (D,), eps=1e-6),
        "cogview4": lambda x: F.layer_norm(x, (D,), eps=1e-5),
        "cosmos": lambda x: F.rms_norm(x, (D,), eps=1e-5),
        "sd3_5": lambda x: F.rms_norm(x, (D,), eps=1e-6),
        "lumina2": lambda x: F.rms_norm(x, (D,), eps=1e-5),
        "z_image": lambda x: F.rms_norm(x, (D,), eps=1e-5),
        "wan": lambda x: F.rms_norm(x.flatten(-2), (H * D,), eps=1e-6).unflatten(-1, (H, D)),
        "ltx": lambda x: F.rms_norm(x.flatten(-2), (H * D,), eps=1e-5).unflatten(-1, (H, D)),
    }.items():
        qk = families.qk_norm(name, **sizes)
        q = torch.randn(B, T, H, D) * 1e-3  # small rows, so that eps shows
        out, _ = qk(q, torch.randn(B, T, HKV, D))
        torch.testing.assert_close(out, expected(q), rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
        assert (qk.q_norm.weight is None) == (name == "cogview4")
    layouts = {
        n: getattr(families.qk_norm(n, **sizes | {"rope": True}).rope, "layout", None)
        for n in ("cogvideox", "hunyuan_dit", "cogview4", "cosmos", "sd3_5", "lumina2", "z_image", "wan", "ltx")
    }
    assert [n for n, layout in layouts.items() if layout == "half"] == ["cogview4", "cosmos"]
    assert [n for n, layout in layouts.items() if layout is None] == ["sd3_5"]


def test_ltx_turns_every_head_by_angles_of_its_own():
    """As diffusers' LTX does: one table over all heads together, pairs side by side."""
    qk = families.qk_norm("ltx", head_dim=D, num_heads=H)
    q, k = torch.randn(B, T, H, D), torch.randn(B, T, H, D)
    angles = torch.rand(B, T, H * D // 2) * 6
    cos, sin = (t.repeat_interleave(2, -1) for t in (angles.cos(), angles.sin()))
    got = qk(q, k, rope=(cos.unflatten(-1, (H, D)), sin.unflatten(-1, (H, D))))
    for x, y in zip((q, k), got, strict=True):
        x = F.rms_norm(x.flatten(-2), (H * D,), eps=1e-5)
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        expected = x * cos + torch.stack((-b, a), -1).flatten(-2) * sin
        torch.testing.assert_close(y, expected.unflatten(-1, (H, D)))


def test_a_family_over_groups():
    sizes = {"head_dim": D, "num_heads": H, "num_kv_heads": HKV, "rope": False}
    q, _, (out, _) = call(families.qk_norm("x_transformers", over=4, **sizes))
    torch.testing.assert_close(out, F.normalize(q.unflatten(-1, (-1, 4)), dim=-1).flatten(-2))
    q, _, (out, _) = call(families.qk_norm("qwen3", over=2 * D, **sizes))
    torch.testing.assert_close(out, F.rms_norm(q.unflatten(-2, (-1, 2)).flatten(-2), (2 * D,)).view_as(q))
    with pytest.raises(ValueError, match="over=5 does not divide 4 heads of 16 evenly"):
        families.qk_norm("qwen3", over=5, **sizes)


def test_each_name_that_is_not_covered_says_why():
    assert all(name.isidentifier() for name in families.NOT_COVERED)
    for name, reason in {
        "levit": "BatchNorm inside the projections",
        "aria": "precede the projections",
        "clip": "acts on the logits",
        "diffllama": "of the attention's output",
    }.items():
        with pytest.raises(ValueError, match=f"'{name}' is no QK-norm of this kind: .*{reason}"):
            families.get(name)


def test_norms_of_v_and_of_latents():
    x = torch.randn(2, 3, D)
    torch.testing.assert_close(families.v_norm("gemma3n", D)(x), F.rms_norm(x, (D,), eps=1e-6))
    torch.testing.assert_close(families.latent_norm("deepseek_v3", D)(x), F.rms_norm(x, (D,), eps=1e-6))
    assert families.latent_norm("glm5_next", D).spec.eps == 1e-5
    assert families.v_norm("qwen3", D) is None and families.latent_norm("qwen3", D) is None


def test_unknown_families():
    with pytest.raises(ValueError, match=r"unknown family 'qwen9'; known: qwen3, "):
        families.get("qwen9")
    with pytest.raises(ValueError, match="'blt' is no QK-norm of this kind: .*norm of hidden states"):
        families.get("blt")
    with pytest.raises(ValueError, match='rounding is "family" or "fused"'):
        families.qk_norm("qwen3", head_dim=D, rounding="exact")
    with pytest.raises(ValueError, match="normalises all heads together; give num_heads"):
        families.qk_norm("olmo2", head_dim=D)


def test_the_table_has_a_row_for_each():
    text = families.table()
    for name in families.FAMILIES:
        assert f"\n| {name} |" in text
    for name, reason in families.NOT_COVERED.items():
        assert f"- {name}: {reason}" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {11}


def test_families_are_data():
    for family in families.FAMILIES.values():
        assert dataclasses.replace(family) == family
        assert family.q is None or isinstance(family.q, norms.NormSpec)


def examples():
    return re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(norms, "_NORMS", dict(norms._NORMS))


def test_the_guides_examples_run(registry):
    pytest.importorskip("transformers")
    found = examples()
    assert len(found) >= 3
    namespace: dict = {}
    for example in found:
        exec(example, namespace)


def test_the_guides_own_norm_is_short_and_right(registry):
    page = (GUIDE.parent / "own-norm.md").read_text()  # whose other examples train a model with it
    (example,) = re.findall(r"```python\n(# my_norms.py\n.*?)```", page, re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) < 15
    namespace: dict = {}
    exec(example, namespace)
    torch.manual_seed(0)
    x = torch.randn(5, 16)
    for p in (3.0, 4.0):
        expected = x / (x.double().abs().pow(p).mean(-1, keepdim=True) + 1e-6).pow(1 / p)
        y = norms.make_norm("p_norm", 16, p=p)(x)
        torch.testing.assert_close(y.double(), expected, check_dtype=False, rtol=1e-5, atol=1e-5)
