"""QK-clip: after it no logit is above the threshold, and nothing else has changed by a bit."""

import copy
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nsphere import GPT, NGPT, GPTConfig, NGPTConfig, QKClip, te
from nsphere.ops.attention import attention_with_max_logits
from nsphere.qk_clip import HeadRows, _rows, clip_factors, scale_heads_

ROUNDING = 1 + 1e-5


@settings(max_examples=50, deadline=None)
@given(
    logits=st.lists(st.floats(-50, 500), min_size=12, max_size=12),
    K=st.sampled_from([1, 2, 3, 6, 12]),
    alpha=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
)
def test_factors_take_each_head_to_the_threshold_and_leave_the_others(logits, K, alpha):
    S = torch.tensor(logits)
    factors = clip_factors(S, 100.0, K, alpha)
    after = S * factors["q"] * factors["k"].repeat_interleave(12 // K)
    above = S > 100.0
    torch.testing.assert_close(after, torch.where(above, 100.0, S), rtol=1e-5, atol=0)
    assert (factors["q"][~above] == 1).all()
    touched = ~above.view(K, -1).all(1)
    assert (factors["k"][touched] == 1).all()
    torch.testing.assert_close(factors["whole"], torch.where(above, 100 / S, 1.0))
    assert all((f > 0).all() and (f <= 1).all() for f in factors.values())


def test_shares_by_hand():
    factors = clip_factors(torch.tensor([400.0, 100.0]), 100.0)
    assert factors["q"].tolist() == [0.5, 1.0] == factors["k"].tolist()
    # two heads on one key: the key goes as far as both need, the query the rest
    factors = clip_factors(torch.tensor([1600.0, 400.0]), 100.0, 1)
    assert factors["k"].tolist() == [0.5] and factors["q"].tolist() == [0.125, 0.5]
    assert clip_factors(torch.tensor([1600.0, 99.0]), 100.0, 1)["k"].tolist() == [1.0]
    assert clip_factors(torch.tensor([math.inf, -math.inf, math.nan]), 1.0)["whole"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_factor_of_one_changes_no_bit(dtype):
    torch.manual_seed(0)
    w = (torch.randn(6, 5) * 10 ** torch.randint(-30, 30, (6, 5)).float()).to(dtype)
    before = w.clone()
    scale_heads_(HeadRows(w, torch.arange(6).view(3, 2), "q"), torch.tensor([1.0, 0.5, 1.0]))
    assert torch.equal(w[[0, 1, 4, 5]], before[[0, 1, 4, 5]]) and torch.equal(w[2:4], before[2:4] * 0.5)


def eager(q, k, v, mask, scale):
    group = q.shape[1] // k.shape[1]
    logits = torch.einsum("bhid,bhjd->bhij", q, k.repeat_interleave(group, 1)) * scale
    logits = logits.masked_fill(~mask, -math.inf)
    return logits.softmax(-1) @ v.repeat_interleave(group, 1), logits.amax((0, 2, 3))


@pytest.mark.parametrize("K", [4, 2, 1])
@pytest.mark.parametrize("kind", ["causal", "mask", "none"])
def test_attention_with_max_logits(kind, K):
    torch.manual_seed(0)
    q = torch.randn(2, 4, 5, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, K, 5, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = {
        "causal": torch.ones(5, 5).tril().bool(),
        "mask": torch.rand(2, 4, 5, 5) < 0.7,
        "none": torch.ones(5, 5).bool(),
    }[kind] | torch.eye(5).bool()
    y, largest = attention_with_max_logits(
        q, k, v, mask=mask if kind == "mask" else None, is_causal=kind == "causal", scale=0.3
    )
    expected, expected_largest = eager(q, k, v, mask, 0.3)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(largest, expected_largest.float())
    assert not largest.requires_grad
    probe = torch.randn_like(y)
    for a, e in zip(
        torch.autograd.grad((y * probe).sum(), (q, k, v)),
        torch.autograd.grad((expected * probe).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


def test_what_is_not_finite_is_not_hidden():
    q, k = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4)
    q[0, 0, 1] = math.nan
    blind = torch.ones(3, 3).tril().bool()
    blind[2] = False
    for kwargs in ({"is_causal": True}, {"mask": blind}):
        y, _ = attention_with_max_logits(q, k, k, **kwargs)
        assert y[0, 0, 1].isnan().all() and y[0, 0, [0, 2]].isfinite().all()
    assert (y[0, 0, 2] == 0).all()


def test_a_query_that_sees_nothing_has_no_gradient():
    q, k = (torch.randn(1, 1, 3, 4, requires_grad=True) for _ in range(2))
    added = torch.zeros(3, 3)
    added[1] = -math.inf
    y, largest = attention_with_max_logits(q, k, k, mask=added)
    gradients = torch.autograd.grad(y.sum(), (q, k))
    assert (y[0, 0, 1] == 0).all() and (gradients[0][0, 0, 1] == 0).all()
    assert largest.isfinite().all() and all(g.isfinite().all() for g in gradients)
    rows = q[:, :, [0, 2]]
    torch.testing.assert_close(y[:, :, [0, 2]], F.scaled_dot_product_attention(rows, k, k))


def test_attention_in_double_precision_is_not_rounded_to_single():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 8, dtype=torch.float64) for _ in range(3))
    y, largest = attention_with_max_logits(q, k, v)
    torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v), rtol=1e-13, atol=1e-13)
    assert largest.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention reports maxima on CUDA alone")
@pytest.mark.parametrize("K", [4, 2])
@pytest.mark.parametrize("is_causal", [True, False])
def test_flex_reports_what_eager_does(is_causal, K):
    torch.manual_seed(0)
    q = torch.randn(2, 4, 256, 64, device="cuda")
    k, v = (torch.randn(2, K, 256, 64, device="cuda") for _ in range(2))
    y, largest = attention_with_max_logits(q, k, v, is_causal=is_causal)
    mask = torch.ones(256, 256, device="cuda", dtype=torch.bool)
    expected, expected_largest = eager(q, k, v, mask.tril() if is_causal else mask, 64**-0.5)
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(largest, expected_largest, rtol=1e-2, atol=1e-2)


def grown(model, *names, factor=6.0, seed=0):
    """The model with some of its weights grown, as a high learning rate grows them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(names):
                p.copy_(torch.randn(p.shape, generator=generator) * factor / p.shape[-1] ** 0.5)
    return model


def tiny_gpt(**kwargs):
    shape = {"vocab_size": 13, "context": 8, "d_model": 16, "num_layers": 2, "num_heads": 4}
    return GPT(GPTConfig(**shape | kwargs))


TOKENS = torch.arange(24).view(3, 8) % 13


def observe(model, clip, run):
    """The largest logits that a forward pass reports, without clipping."""
    run(model)
    seen = {name: module.max_logits.clone() for name, module in clip.attentions.items()}
    for module in clip.attentions.values():
        module.max_logits.fill_(-math.inf)
    return seen


def check_clips(model, run, threshold, query_and_key, *, factor_of_rows=None):
    """Runs, clips, runs again; everything but the named weights is as it was."""
    clip = QKClip(model, threshold)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    seen = observe(model, clip, run)
    assert any((s > threshold).any() for s in seen.values()), seen
    assert any((s <= threshold).any() for s in seen.values()), "choose a threshold that spares a head"
    # one attention after the other: what the first does changes what comes to the second
    for name, module in clip.attentions.items():
        now = observe(model, clip, run)[name]
        for other in clip.attentions.values():
            other.max_logits.fill_(-math.inf)
        module.max_logits.copy_(now)
        gammas = clip()
        assert ((gammas[name] < 1) == (now > threshold)).all()
        after = observe(model, clip, run)[name]
        assert (after <= threshold * ROUNDING).all()
        untouched = now <= threshold
        torch.testing.assert_close(after[untouched], now[untouched], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(after[~untouched], torch.full_like(after[~untouched], threshold), rtol=1e-4, atol=0)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all(n.endswith(query_and_key) for n in changed), changed
    return clip, before


@pytest.mark.parametrize("K", [4, 2, 1])
def test_gpt(K):
    model = grown(tiny_gpt(num_kv_heads=K), "W_q.weight", "W_k.weight")
    check_clips(model, lambda m: m.loss(TOKENS, TOKENS), 70.0, ("W_q.weight", "W_k.weight"))


def test_untouched_heads_keep_every_bit():
    model = grown(tiny_gpt(num_kv_heads=2), "W_q.weight", "W_k.weight")
    clip = QKClip(model, 10.0)
    before = copy.deepcopy(model.state_dict())
    for name, module in clip.attentions.items():
        module.max_logits.copy_(
            torch.tensor([11.0, 3.0, 20.0, 40.0]) if name == "blocks.0.attn" else torch.full((4,), 9.0)
        )
    gammas = clip()
    torch.testing.assert_close(gammas["blocks.0.attn"], torch.tensor([10 / 11, 1.0, 0.5, 0.25]))
    q, old_q = (s["blocks.0.attn.W_q.weight"].view(4, 4, 16) for s in (model.state_dict(), before))
    k, old_k = (s["blocks.0.attn.W_k.weight"].view(2, 4, 16) for s in (model.state_dict(), before))
    assert torch.equal(q[1], old_q[1]) and torch.equal(k[0], old_k[0])
    torch.testing.assert_close(q[0], old_q[0] * 10 / 11)
    torch.testing.assert_close(k[1], old_k[1] * 0.5**0.5)
    torch.testing.assert_close(q[2:], old_q[2:] * torch.tensor([0.5**0.5, 0.25 / 0.5**0.5])[:, None, None])
    for name, p in model.state_dict().items():
        if name not in ("blocks.0.attn.W_q.weight", "blocks.0.attn.W_k.weight"):
            assert torch.equal(p, before[name]), name
    assert all((m.max_logits == -math.inf).all() for m in clip.attentions.values())


def test_reporting_changes_no_result_and_sees_all_micro_batches_of_training_alone():
    plain = grown(tiny_gpt(num_kv_heads=2), "W_q.weight", "W_k.weight", factor=1.0)
    model = copy.deepcopy(plain)
    clip = QKClip(model, 1.0)
    losses = [m.loss(TOKENS, TOKENS) for m in (model, plain)]
    torch.testing.assert_close(*losses)
    grads = [torch.autograd.grad(loss, m.parameters()) for loss, m in zip(losses, (model, plain), strict=True)]
    for a, e in zip(*grads, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
    both = {n: m.max_logits.clone() for n, m in clip.attentions.items()}
    for module in clip.attentions.values():
        module.max_logits.fill_(-math.inf)
    for half in (TOKENS[:1], TOKENS[1:]):
        model.loss(half, half)
    for name, module in clip.attentions.items():
        torch.testing.assert_close(module.max_logits, both[name])
        module.max_logits.fill_(-math.inf)
    with torch.no_grad():
        model.loss(TOKENS, TOKENS)
    assert all((m.max_logits == -math.inf).all() for m in clip.attentions.values())
    assert set(model.state_dict()) == set(plain.state_dict())


def test_it_keeps_a_training_run_below_the_threshold_and_the_moments_alone():
    torch.manual_seed(0)
    model = tiny_gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    clip = QKClip(model, 2.0)
    clipped = 0
    for _ in range(30):
        optimizer.zero_grad()
        model.loss(TOKENS, TOKENS).backward()
        optimizer.step()
        moments = [s["exp_avg"].clone() for s in optimizer.state.values()]
        clipped += sum((g < 1).sum().item() for g in clip().values())
        assert all(torch.equal(a, s["exp_avg"]) for a, s in zip(moments, optimizer.state.values(), strict=True))
    assert clipped > 0
    free = tiny_gpt()
    free.load_state_dict(model.state_dict())
    seen = observe(model, clip, lambda m: m.loss(TOKENS, TOKENS))
    assert max(s.max().item() for s in seen.values()) < 6.0  # one step beyond the threshold at most


TE_KINDS = {
    "apart": {},
    "interleaved": {"fuse_qkv_params": True},
    "one after the other": {"fuse_qkv_params": True, "qkv_weight_interleaved": False},
    "input norm": {"input_layernorm": True},
    "cross": {"attention_type": "cross", "attn_mask_type": "no_mask"},
    "cross fused": {"attention_type": "cross", "attn_mask_type": "no_mask", "fuse_qkv_params": True},
    "cross with norm": {"attention_type": "cross", "attn_mask_type": "no_mask", "input_layernorm": True},
}


@pytest.mark.parametrize("K", [4, 2])
@pytest.mark.parametrize("kind", list(TE_KINDS))
def test_transformer_engine(kind, K):
    torch.manual_seed(0)
    options = TE_KINDS[kind]
    model = te.MultiheadAttention(16, 4, num_gqa_groups=K, attention_dropout=0.0, device="cpu", **options)
    names = ("weight",)
    model = grown(model, *names)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_()
    x, encoder = torch.randn(6, 2, 16), torch.randn(5, 2, 16)
    kwargs = {"encoder_output": encoder} if "cross" in kind else {}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    seen = observe(model, QKClip(model, 1e9), lambda m: m(x, **kwargs))[""]
    threshold = seen.sort().values[1:3].mean().item()
    check_clips(model, lambda m: m(x, **kwargs), threshold, ("weight", "bias"))
    # told apart by another piece of code, the values are what they were
    options = {name: value for name, value in options.items() if "qkv" not in name}
    apart = te.MultiheadAttention(16, 4, num_gqa_groups=K, device="cpu", **options)
    new, old = (
        te.convert_state_dict(state, apart, qkv_weight_interleaved=model.qkv_weight_interleaved)
        for state in (dict(model.named_parameters()), before)
    )
    changed = {name for name in new if not torch.equal(new[name], old[name])}
    assert changed and all("query" in name or "key_" in name.removeprefix("key_value.") for name in changed), changed


def test_transformer_layer():
    model = te.TransformerLayer(
        16, 16, 2, attention_dropout=0.0, hidden_dropout=0.0, layer_type="decoder", device="cpu"
    )
    clip = QKClip(model, 1.0)
    assert set(clip.attentions) == {"self_attention", "inter_attention"}
    x = torch.randn(3, 2, 16)
    model(x, encoder_output=x).sum().backward()
    assert all(torch.isfinite(g).all() for g in clip().values())


def hf_model(family, **kwargs):
    transformers = pytest.importorskip("transformers")
    common = {
        "vocab_size": 13, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 4, "pad_token_id": 0,
    }  # fmt: skip
    config = {
        "llama": lambda: transformers.LlamaConfig(num_key_value_heads=2, attention_bias=True, **common | kwargs),
        "qwen2": lambda: transformers.Qwen2Config(num_key_value_heads=4, **common | kwargs),
        "qwen3": lambda: transformers.Qwen3Config(num_key_value_heads=4, head_dim=4, **common | kwargs),
        "deepseek_v3": lambda: transformers.DeepseekV3Config(
            num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=6,
            first_k_dense_replace=2, **common | kwargs,
        ),
    }[family]()  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)


HF_QK = {
    "llama": ("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias"),
    "qwen2": ("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias"),
    "deepseek_v3": ("q_b_proj.weight", "kv_b_proj.weight"),
}


@pytest.mark.parametrize("family", list(HF_QK))
def test_transformers(family):
    from nsphere import hf

    model = grown(hf_model(family), *HF_QK[family], factor=4.0)
    expected = model(TOKENS).logits
    hf.report_max_logits(model)
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
    seen = observe(model, QKClip(model, 1e9), lambda m: m(TOKENS))
    threshold = torch.cat(list(seen.values())).median().item()
    _, before = check_clips(model, lambda m: m(TOKENS), threshold, HF_QK[family])
    if family == "deepseek_v3":  # the values' rows of kv_b_proj, and all of the shared rotated key
        for name, p in model.named_parameters():
            if name.endswith("kv_b_proj.weight"):
                assert torch.equal(p.view(4, 10, -1)[:, 4:], before[name].view(4, 10, -1)[:, 4:])


def test_latent_attention_shares_the_clip_as_kimi_k2_does():
    from nsphere import hf

    model = grown(hf_model("deepseek_v3"), *HF_QK["deepseek_v3"])
    hf.report_max_logits(model)
    clip = QKClip(model, 100.0)
    attention = next(iter(clip.attentions.values()))
    q, kv = attention.q_b_proj.weight.detach().clone(), attention.kv_b_proj.weight.detach().clone()
    attention.max_logits.copy_(torch.tensor([400.0, 50.0, 100.0, 1600.0]))
    clip()
    root, whole = torch.tensor([0.5, 1, 1, 0.25]), torch.tensor([0.25, 1, 1, 0.0625])
    new_q, new_kv = attention.q_b_proj.weight.view(4, 6, -1), attention.kv_b_proj.weight.view(4, 10, -1)
    torch.testing.assert_close(new_q[:, :4], q.view(4, 6, -1)[:, :4] * root[:, None, None])
    torch.testing.assert_close(new_q[:, 4:], q.view(4, 6, -1)[:, 4:] * whole[:, None, None])
    torch.testing.assert_close(new_kv[:, :4], kv.view(4, 10, -1)[:, :4] * root[:, None, None])
    assert torch.equal(new_kv[:, 4:], kv.view(4, 10, -1)[:, 4:])


def test_padding_in_transformers():
    from nsphere import hf

    model = grown(hf_model("llama"), *HF_QK["llama"], factor=4.0)
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    expected = model(TOKENS, attention_mask=mask).logits
    hf.report_max_logits(model)
    torch.testing.assert_close(model(TOKENS, attention_mask=mask).logits[mask.bool()], expected[mask.bool()])


def test_it_says_so_when_no_logits_were_seen():
    for run in (lambda model: None, lambda model: torch.no_grad()(model.loss)(TOKENS, TOKENS)):
        model = tiny_gpt()
        clip = QKClip(model)
        run(model)
        with pytest.raises(RuntimeError, match="has seen no logits"):
            clip()
    model.loss(TOKENS, TOKENS)
    seen = {name: module.max_logits.clone() for name, module in clip.attentions.items()}
    clip()
    assert clip.max_logits.keys() == seen.keys()
    assert all(torch.equal(s, seen[name]) and torch.isfinite(s).all() for name, s in clip.max_logits.items())


def test_forgetting():
    model = tiny_gpt()
    clip = QKClip(model, 1e-3)
    model.loss(TOKENS, TOKENS)
    clip()
    model.loss(TOKENS, TOKENS)
    clip.forget()
    assert all((g == 1).all() for g in clip().values())


def test_a_model_that_is_cast_after_the_construction():
    model = grown(tiny_gpt(), "W_q.weight", "W_k.weight")
    clip = QKClip(model, 10.0)
    model.to(torch.bfloat16).loss(TOKENS, TOKENS)
    gammas = clip()
    assert all(g.dtype == torch.float32 and (g < 1).any() for g in gammas.values())
    seen = observe(model, clip, lambda m: m.loss(TOKENS, TOKENS))
    assert seen["blocks.0.attn"].max() <= 10.0 * 1.02


@pytest.mark.parametrize("model", ["gpt", "te", "llama", "deepseek_v3"])
def test_rows_are_numbered_where_the_parameter_is(model):
    made = {
        "gpt": tiny_gpt,
        "te": lambda: te.MultiheadAttention(16, 4, fuse_qkv_params=True, device="cpu"),
        "llama": lambda: hf_model("llama"),
        "deepseek_v3": lambda: hf_model("deepseek_v3"),
    }[model]().to("meta")
    rows = [r for module in made.modules() for r in _rows(module)]
    assert rows and all(r.rows.is_meta and r.parameter.is_meta for r in rows)


def test_what_it_refuses():
    from nsphere import hf

    for model in (
        tiny_gpt(qk_norm="rms"),
        NGPT(NGPTConfig(vocab_size=13, context=8, d_model=16, num_layers=1, num_heads=2)),
    ):
        with pytest.raises(ValueError, match="has QK-norm"):
            QKClip(model)
    qwen3 = hf_model("qwen3")
    hf.report_max_logits(qwen3)
    with pytest.raises(ValueError, match="has QK-norm"):
        QKClip(qwen3)
    with pytest.raises(ValueError, match="has QK-norm"):
        QKClip(te.MultiheadAttention(16, 2, qk_norm_type="RMSNorm", device="cpu"))
    with pytest.raises(ValueError, match="report_max_logits"):
        QKClip(hf_model("llama"))
    with pytest.raises(ValueError, match="no attention that QK-clip knows"):
        QKClip(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="on the hypersphere"):
        QKClip(NGPT(NGPTConfig(vocab_size=13, context=8, d_model=16, num_layers=1, num_heads=2, qk_norm=False)))
    with pytest.raises(ValueError, match="a transformers model, got Linear"):
        hf.report_max_logits(nn.Linear(2, 2))
    for threshold in (0.0, -1.0, math.inf, math.nan, "100", True, None):
        with pytest.raises(ValueError, match="positive number"):
            QKClip(tiny_gpt(), threshold)
        with pytest.raises(ValueError, match="positive number"):
            clip_factors(torch.ones(4), threshold)
    for alpha in (2.0, -0.1, math.nan, "half", None):
        with pytest.raises(ValueError, match="alpha must be from 0 to 1"):
            QKClip(tiny_gpt(), alpha=alpha)
        with pytest.raises(ValueError, match="alpha must be from 0 to 1"):
            clip_factors(torch.ones(4), 1.0, alpha=alpha)
    with pytest.raises(ValueError, match="QKClip takes a model, got NoneType"):
        QKClip(None)
    for logits, heads in (([4.0, 5.0], None), (torch.ones(4), 3), (torch.ones(2, 2), None)):
        with pytest.raises(ValueError, match=r"give a tensor \[H\] and a divisor of H"):
            clip_factors(logits, 1.0, heads)


def test_an_attention_of_ones_own():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            q, k = self.q(x).unflatten(-1, (2, 4)).transpose(1, 2), self.k(x)[:, None]
            return attention_with_max_logits(q, k, k)[1]

    torch.manual_seed(0)
    own, x = Own(), torch.randn(2, 5, 8)
    seen = own(x)
    factors = clip_factors(seen, 0.5 * seen.min().item(), num_kv_heads=1)
    for linear, share in ((own.q, "q"), (own.k, "k")):
        for parameter in (linear.weight, linear.bias):
            scale_heads_(HeadRows(parameter, torch.arange(len(parameter)).view(-1, 4), share), factors[share])
    torch.testing.assert_close(own(x), torch.full((2,), 0.5 * seen.min().item()))
    assert F.relu(own(x)).sum() > 0


DISTRIBUTED = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from nsphere import GPT, GPTConfig, QKClip

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
for sharded in (False, True):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=13, context=8, d_model=16, num_layers=1, num_heads=4))
    whole = {n: p.detach().clone() for n, p in model.named_parameters()}
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    clip = QKClip(model, 100.0)
    attention = next(iter(clip.attentions.values()))
    attention.max_logits.copy_(torch.tensor([400.0, 1.0, 50.0, 1.0] if rank == 0 else [1.0, 1.0, 1.0, 1600.0]))
    gammas = clip()["blocks.0.attn"]
    assert gammas.tolist() == [0.25, 1.0, 1.0, 0.0625], gammas
    root = torch.tensor([0.5, 1.0, 1.0, 0.25]).repeat_interleave(4)[:, None]
    for name, p in model.named_parameters():
        assert hasattr(p, "full_tensor") == sharded
        p = p.full_tensor() if sharded else p
        expected = whole[name] * root if name.endswith(("W_q.weight", "W_k.weight")) else whole[name]
        assert torch.equal(p, expected), name
dist.destroy_process_group()
"""


def test_ranks_clip_alike_and_shards_stay_sharded(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", DISTRIBUTED, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(outputs)
