import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nsphere.norms as norms
from nsphere import families
from nsphere.gpt import GPT, GPTConfig
from nsphere.norms import StatisticNorm

B, T, H, HKV, D = 2, 4, 4, 2, 16
GUIDE = Path(__file__).parent.parent / "docs" / "qk-norm.md"


def call(qk, dtype=torch.float32):
    torch.manual_seed(1)
    q, k = torch.randn(B, T, H, D).to(dtype), torch.randn(B, T, HKV, D).to(dtype)
    rope = None if qk.rope is None else qk.rope.tables(T)
    return q, k, qk(q, k, rope=rope, positions=torch.arange(T))


@pytest.mark.parametrize("name", sorted(families.FAMILIES))
def test_every_family_builds_and_fused_agrees_with_its_own_rounding(name):
    family = families.get(name)
    results = []
    for rounding in ("family", "fused"):
        torch.manual_seed(0)
        qk = families.qk_norm(name, head_dim=D, num_heads=H, num_kv_heads=HKV, rounding=rounding)
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
    qk = families.qk_norm("gemma3", head_dim=D, rope=False)
    assert qk.q_norm.weight.abs().max() == 0  # zero-centred
    q, _, (gemma, _) = call(qk)
    torch.testing.assert_close(gemma, F.rms_norm(q, (D,), eps=1e-6))
    q, _, (zaya, _) = call(families.qk_norm("zaya", head_dim=D, num_heads=H, num_kv_heads=HKV, rope=False))
    torch.testing.assert_close(zaya, F.normalize(q, dim=-1) * D**0.5)
    assert families.qk_norm("ngpt", head_dim=D).softmax_scale == D**0.5
    assert families.qk_norm("inkling", head_dim=D).softmax_scale == 1 / D
    assert families.qk_norm("gemma4", head_dim=D).softmax_scale == 1.0
    assert families.qk_norm("phi", head_dim=D).rope.dim == D // 2
    assert families.qk_norm("te_l2normalization", head_dim=D).place == "after"


def test_arguments_override_the_table():
    qk = families.qk_norm("qwen3", head_dim=D, eps=0.1, rope_dim=8, rope_base=100.0, layout="bhsd", softmax_scale=2.0)
    assert (qk.q_norm.spec.eps, qk.rope.dim, qk.rope.base, qk.layout, qk.softmax_scale) == (0.1, 8, 100.0, "bhsd", 2.0)
    assert families.qk_norm("qwen3", head_dim=D, rope=False).rope is None


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
    assert len(found) >= 4
    namespace: dict = {}
    for example in found:
        exec(example, namespace)


def test_the_guides_own_norm_trains_a_model(registry):
    (example,) = (e for e in examples() if "register_norm" in e)
    lines = [line for line in example.splitlines() if line.strip()]
    assert len(lines) < 15
    namespace: dict = {}
    exec(example, namespace)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=16, context=12, d_model=32, num_layers=1, num_heads=2, qk_norm="p4"))
    gains = [m.weight for m in model.modules() if isinstance(m, namespace["P4Norm"])]
    assert len(gains) == 2
    tokens = torch.randint(16, (4, 12))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model.loss(tokens, tokens.roll(-1, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all((gain != 1).any() for gain in gains)  # the weights of the new norm learn too
    x = torch.randn(5, 16)
    expected = x / (x.double().pow(4).mean(-1, keepdim=True) + 1e-6).pow(0.25)
    torch.testing.assert_close(namespace["P4Norm"](16)(x).double(), expected, check_dtype=False, rtol=1e-5, atol=1e-5)
